"""What stands between the two products of an expert."""

import torch
from torch import Tensor

from moeyard.checks import FLOATS, check_out, check_tensor, refuse_gradients
from moeyard.impls import launcher
from moeyard.library import goes_straight
from moeyard.library_layer import ops
from moeyard.values import Activation


def activate(
    rows: Tensor,
    activation: Activation | None = None,
    *,
    gated: bool = True,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Applies an activation to rows, and multiplies by the up half if there is a gate.

    Args:
        rows: [num_rows, 2 * intermediate_size], gate half first, or [num_rows, intermediate_size] without a gate;
            float32, bfloat16, float16 or float64.
        activation: which one (`Activation`); silu unless given.
        gated: whether rows hold gate and up.
        out: [num_rows, intermediate_size] of the dtype of `rows`, to overwrite.

    Returns [num_rows, intermediate_size], computed in float32 (float64 rows: in float64) and rounded once. Raises
    TypeError or ValueError naming the argument. Follows vLLM's `silu_and_mul`, `gelu_and_mul` and `swigluoai_and_mul`
    (whose rows interleave gate and up).
    """
    check_tensor("rows", rows, dtypes=FLOATS, ndim=(2,))
    activation = check_activation(activation)
    if gated and rows.shape[1] % 2:
        raise ValueError(f"rows: expected an even number of columns (gate and up), got {rows.shape[1]}")
    refuse_gradients(rows=rows)
    shape = (rows.shape[0], rows.shape[1] // 2 if gated else rows.shape[1])
    if out is not None:
        check_out("out", out, shape, rows.dtype, rows.device)
    if not goes_straight(rows):
        a = activation
        result: Tensor = ops.activate(rows, gated, a.name, a.alpha, a.beta, a.limit, impl)
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty(shape, dtype=rows.dtype, device=rows.device)
    launcher("activate", impl, rows.device, rows.dtype)(rows, activation, gated=gated, out=out)
    return out


def check_activation(activation: Activation | None) -> Activation:
    """The activation, silu for None; TypeError for anything else."""
    if activation is None:
        return Activation()
    if not isinstance(activation, Activation):
        raise TypeError(f"activation: expected an Activation, got {type(activation).__name__}")
    return activation
