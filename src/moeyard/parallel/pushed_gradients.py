"""Gradients through pushed rows: the backward of a dispatch is a combine of gradients, and the reverse.

Sums of gradients have the order of forward sums: ranks in rank order, in float32, rounded once. Layers that share a
connection take turns in the backward, too. One that would bring back what another sent is refused.
"""

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moeyard.dispatch.op import Gradient, Op, ops
from moeyard.parallel.pushed import Arrived, Pushes
from moeyard.values import Routing

_OPEN: WeakValueDictionary[int, Pushes] = WeakValueDictionary()
"""The memory that registered operators know by a number."""


def spread_with_gradient(pushes: Pushes, rows: Tensor, given: Routing) -> Arrived:
    """`Pushes.spread` of rows whose gradient comes back; router weights that arrive carry none.

    All ranks take part in the backward. So rows that need no gradient get one here, which is dropped. What is returned
    is copied out of the memory; rows without an expert here are zeros.
    """
    rows = rows if rows.requires_grad else rows.detach().requires_grad_()
    arrived = _SPREAD((rows, given.topk_ids, given.topk_weights.detach(), _number_of(pushes)), "auto")
    return pushes.arrived()._replace(rows=arrived).copied()


def bring_with_gradient(pushes: Pushes, rows: Tensor, given: Routing) -> Tensor:
    """`Pushes.bring` of grouped sums [ranks * max_tokens, hidden_size], whose gradient is sent to the ranks again."""
    rows = rows if rows.requires_grad else rows.detach().requires_grad_()
    result: Tensor = _BRING((rows, given.topk_ids, given.topk_weights.detach(), _number_of(pushes)), "auto")
    return result


def _number_of(pushes: Pushes) -> int:
    _OPEN[id(pushes)] = pushes
    return id(pushes)


def _allocate_spread(rows: Tensor, _ids: Tensor, _weights: Tensor, number: int) -> Tensor:
    sizes = _OPEN[number].sizes
    return rows.new_empty((sizes.ranks * sizes.max_tokens, rows.shape[1]))


def _spread(_: str, out: Tensor, rows: Tensor, ids: Tensor, weights: Tensor, number: int) -> None:
    pushes = _OPEN[number]
    got = pushes.spread(rows, None, ids, weights)
    pushes.sent = ids.data_ptr()
    there = (got.slots >= 0) & (pushes.here[got.slots.clamp(min=0).long()] >= 0)
    torch.where(there.any(1, keepdim=True), got.rows, got.rows.new_zeros(()), out=out)


def _allocate_bring(rows: Tensor, ids: Tensor, _weights: Tensor, _number: int) -> Tensor:
    return rows.new_empty((ids.shape[0], rows.shape[1]))


def _bring(_: str, out: Tensor, rows: Tensor, ids: Tensor, _weights: Tensor, number: int) -> None:
    pushes = _OPEN[number]
    if not pushes.waiting or pushes.sent != ids.data_ptr():
        raise ValueError(
            "connection: expected the combine, or the gradient, of what was dispatched last, as all share memory, got "
            "that of an earlier dispatch"
        )
    pushes.bring(rows, None, weighted=False, out=out)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, ids, weights, ctx.number, _ = inputs
    ctx.save_for_backward(ids, weights)


def _backward_of_spread(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return ops.bring_rows(grad.contiguous(), *ctx.saved_tensors, ctx.number, "auto"), None, None, None, None


def _backward_of_bring(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return ops.spread_rows(grad.contiguous(), *ctx.saved_tensors, ctx.number, "auto"), None, None, None, None


_SPREAD = Op(
    "spread_rows(Tensor rows, Tensor topk_ids, Tensor topk_weights, int number, str impl) -> Tensor",
    allocate=_allocate_spread,
    launch=_spread,
    gradient=Gradient(("rows",), _setup, _backward_of_spread),
    composed=True,
)
_BRING = Op(
    "bring_rows(Tensor rows, Tensor topk_ids, Tensor topk_weights, int number, str impl) -> Tensor",
    allocate=_allocate_bring,
    launch=_bring,
    gradient=Gradient(("rows",), _setup, _backward_of_bring),
    composed=True,
)
