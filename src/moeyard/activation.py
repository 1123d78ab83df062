"""What stands between the two products of an expert."""

from typing import Any

import torch
from torch import Tensor

from moeyard.dispatch.call import Call
from moeyard.dispatch.checks import FLOATS, check_activation, check_out, check_tensor
from moeyard.dispatch.curves import activated
from moeyard.dispatch.op import Gradient, Op
from moeyard.dispatch.table import for_gradients
from moeyard.values import Activation, WeightedGradients

ACTIVATION = "bool gated, str name, float alpha, float beta, float? limit"
"""An activation in the schema of a registered operator."""


def flatten_activation(activation: Activation) -> tuple[str, float, float, float | None]:
    """An activation as registered operators take it."""
    return activation.name, activation.alpha, activation.beta, activation.limit


def activation_gradient(
    rows: Tensor, grad: Tensor, gated: bool, activation: Activation, impl: str, invariant: bool = False
) -> Tensor:
    """The gradient of `rows` where that of what the activation leaves is `grad`, in the dtype of `rows`."""
    if torch.is_grad_enabled():  # it has a gradient itself, and autograd finds it
        needy = rows if rows.requires_grad else rows.detach().requires_grad_()
        result = activated(needy, gated, activation)
        return torch.autograd.grad(result, needy, grad.to(result.dtype), create_graph=True)[0]
    result = ACTIVATE_BACKWARD((rows, grad, gated, activation, invariant), for_gradients(impl))
    assert isinstance(result, Tensor)
    return result


def weighted_gradients(
    rows: Tensor, grad: Tensor, factors: Tensor | None, gated: bool, activation: Activation, impl: str,
    invariant: bool = False,
) -> WeightedGradients:  # fmt: skip
    """Of `factors * activate(rows)`, factors [num_rows] or None for ones: its gradients where its own is `grad`, and
    itself. `invariant` asks for rows that do not depend on each other, which gradients with gradients do not promise.
    """
    if not torch.is_grad_enabled():
        arguments = (rows, grad, factors, gated, activation, invariant)
        result: WeightedGradients = WEIGHTED_ACTIVATE_BACKWARD(arguments, for_gradients(impl))
        return result
    wide = torch.promote_types(rows.dtype, torch.float32)
    level = activated(rows, gated, activation)
    column = None if factors is None else factors.reshape(-1, 1)
    upstream, weighted = (grad, level) if column is None else (grad * column, level * column)
    of_rows = activation_gradient(rows, upstream, gated, activation, impl)
    return WeightedGradients(of_rows, weighted.to(rows.dtype), (level * grad.to(wide)).sum(1))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    rows, ctx.gated, *curve, ctx.impl = inputs
    ctx.activation = Activation(*curve)
    ctx.save_for_backward(rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (rows,) = ctx.saved_tensors
    return activation_gradient(rows, grad, ctx.gated, ctx.activation, ctx.impl), *(None,) * 6


def _call_backward(rows: Tensor, *rest: Any) -> Call | None:
    return Call(rows.device, rows.dtype, batch_invariant=True) if rest[-1] else None


ACTIVATE_BACKWARD = Op(
    f"activate_backward(Tensor rows, Tensor grad, {ACTIVATION}, str impl, bool batch_invariant=False) -> Tensor",
    flatten=lambda rows, grad, gated, curve, invariant: (rows, grad, gated, *flatten_activation(curve), invariant),
    gather=lambda rows, grad, gated, *rest: (rows, grad, gated, Activation(*rest[:-1]), rest[-1]),
    seen=lambda rows, grad, *_: (rows, grad),
    allocate=lambda rows, *_: rows.new_empty(rows.shape),
    call=_call_backward,
    launch=lambda launch, out, rows, grad, gated, activation, _: launch(rows, grad, activation, gated=gated, out=out),
)


def _allocate_weighted(rows: Tensor, grad: Tensor, *_: Any) -> WeightedGradients:
    wide = torch.promote_types(rows.dtype, torch.float32)
    dots = rows.new_empty(rows.shape[0], dtype=wide)
    return WeightedGradients(rows.new_empty(rows.shape), rows.new_empty(grad.shape), dots)


WEIGHTED_ACTIVATE_BACKWARD = Op(
    f"weighted_activate_backward(Tensor rows, Tensor grad, Tensor? factors, {ACTIVATION}, str impl, "
    "bool batch_invariant=False) -> (Tensor, Tensor, Tensor)",
    flatten=lambda *given: (*given[:4], *flatten_activation(given[4]), given[5]),
    gather=lambda *flat: (*flat[:4], Activation(*flat[4:-1]), flat[-1]),
    seen=lambda rows, grad, factors, *_: (rows, grad, factors),
    allocate=_allocate_weighted,
    call=_call_backward,
    launch=lambda launch, out, rows, grad, factors, gated, activation, _: launch(
        rows, grad, factors, activation, gated=gated, out=out
    ),
    assemble=lambda fields, *_: WeightedGradients(*fields),
)
ACTIVATE = Op(
    f"activate(Tensor rows, {ACTIVATION}, str impl) -> Tensor",
    flatten=lambda rows, gated, activation: (rows, gated, *flatten_activation(activation)),
    gather=lambda rows, gated, *activation: (rows, gated, Activation(*activation)),
    allocate=lambda rows, gated, _: rows.new_empty((rows.shape[0], rows.shape[1] // (1 + gated))),
    launch=lambda launch, out, rows, gated, activation: launch(rows, activation, gated=gated, out=out),
    gradient=Gradient(("rows",), _setup, _backward),
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

    Returns [num_rows, intermediate_size], computed in float32 (float64 rows: in float64) and rounded once. Gradients
    flow to rows; where a limit clamps, they are zero. Raises TypeError or ValueError naming the argument. Follows
    vLLM's `silu_and_mul`, `gelu_and_mul` and `swigluoai_and_mul` (whose rows interleave gate and up).
    """
    check_tensor("rows", rows, dtypes=FLOATS, ndim=(2,))
    activation = check_activation(activation)
    if gated and rows.shape[1] % 2:
        raise ValueError(f"rows: expected an even number of columns (gate and up), got {rows.shape[1]}")
    if out is not None:
        check_out("out", out, (rows.shape[0], rows.shape[1] // (1 + gated)), rows.dtype, rows.device)
    result: Tensor = ACTIVATE((rows, bool(gated), activation), impl, out)
    return result
