"""Ways in which a tensor may lie in memory: each function gives the values of a dense tensor from another place."""

from collections.abc import Callable

import torch
from torch import Tensor

Lie = Callable[[Tensor], Tensor]


def _room(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory of a shape that holds values which nobody may read."""
    return torch.full(shape, 99, dtype=torch.float32, device=t.device).to(t.dtype)


def dense(t: Tensor) -> Tensor:
    """One element after the other."""
    return t.clone(memory_format=torch.contiguous_format)


def every_other(t: Tensor) -> Tensor:
    """Two elements apart."""
    room = _room(t, (*t.shape, 2))
    room[..., 1] = t
    return room[..., 1]


def columns(t: Tensor) -> Tensor:
    """Columns of a wider tensor."""
    width = t.shape[-1]
    room = _room(t, (*t.shape[:-1], 3 * width))
    room[..., width : 2 * width] = t
    return room[..., width : 2 * width]


def off_by_one(t: Tensor) -> Tensor:
    """Dense, from the second element of its storage on."""
    return _room(t, (t.numel() + 1,))[1:].view(t.shape).copy_(t)


def transposed(t: Tensor) -> Tensor:
    """The first axis is the fastest."""
    axes = tuple(reversed(range(t.dim())))
    return t.permute(axes).contiguous().permute(axes)


def chunked(t: Tensor) -> Tensor:
    """The second of two chunks along the last axis."""
    whole = _room(t, (*t.shape[:-1], 2 * t.shape[-1]))
    whole[..., t.shape[-1] :] = t
    return whole.chunk(2, -1)[1] if t.shape[-1] else whole


def unbound(t: Tensor) -> Tensor:
    """One of three tensors that were stacked along a last axis."""
    room = _room(t, (*t.shape, 3))
    room[..., 2] = t
    return room.unbind(-1)[2]


def expanded(t: Tensor) -> Tensor:
    """One row for all (of 1-D tensors, one element): other values than those of `t`, and no memory of their own."""
    return t[:1].expand(t.shape)


def overlapping(t: Tensor) -> Tensor:
    """Rows that begin one element apart: other values than those of `t`, and elements share memory."""
    strides = [1] * t.dim()
    return t.reshape(-1).as_strided(t.shape, strides) if t.numel() else t


def negated(t: Tensor) -> Tensor:
    """Memory holds the negative values, and a bit says so: what `x.conj().imag` gives."""
    return torch._neg_view(-t)


def conjugated(t: Tensor) -> Tensor:
    """Memory holds the conjugated values, and a bit says so."""
    return t.conj().clone().conj()


def made_in_inference_mode(t: Tensor) -> Tensor:
    """A tensor without a version, which autograd may not save."""
    with torch.inference_mode():
        return t.clone()


def parameter(t: Tensor) -> Tensor:
    """A parameter that needs no gradient."""
    return torch.nn.Parameter(t.clone(), requires_grad=False)


LIES: dict[str, Lie] = {
    lie.__name__: lie
    for lie in (
        dense, every_other, columns, off_by_one, transposed, chunked, unbound, expanded, overlapping, negated,
        conjugated, made_in_inference_mode, parameter,
    )
}  # fmt: skip
"""By name. `negated` takes floats, `conjugated` complex tensors; see `lies_of`."""
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lies_of(t: Tensor) -> list[str]:
    """The names of the ways in which such a tensor may lie."""
    return [
        name
        for name in LIES
        if (name != "negated" or t.dtype in _COMPUTED) and (name != "conjugated" or t.dtype.is_complex)
    ]
