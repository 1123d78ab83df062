"""What stands between the two products of an expert."""

from torch import Tensor

from moeyard.dispatch.checks import FLOATS, check_activation, check_out, check_tensor
from moeyard.dispatch.op import Op
from moeyard.values import Activation

ACTIVATION = "bool gated, str name, float alpha, float beta, float? limit"
"""An activation in the schema of a registered operator."""


def flatten_activation(activation: Activation) -> tuple[str, float, float, float | None]:
    """An activation as registered operators take it."""
    return activation.name, activation.alpha, activation.beta, activation.limit


ACTIVATE = Op(
    f"activate(Tensor rows, {ACTIVATION}, str impl) -> Tensor",
    flatten=lambda rows, gated, activation: (rows, gated, *flatten_activation(activation)),
    gather=lambda rows, gated, *activation: (rows, gated, Activation(*activation)),
    allocate=lambda rows, gated, _: rows.new_empty((rows.shape[0], rows.shape[1] // (1 + gated))),
    launch=lambda launch, out, rows, gated, activation: launch(rows, activation, gated=gated, out=out),
)


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
    if out is not None:
        check_out("out", out, (rows.shape[0], rows.shape[1] // (1 + gated)), rows.dtype, rows.device)
    result: Tensor = ACTIVATE((rows, bool(gated), activation), impl, out)
    return result
