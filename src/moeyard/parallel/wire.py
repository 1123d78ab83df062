"""What crosses between ranks, by the collectives of torch.distributed, and rows that are quantised on their way."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from moeyard.dispatch.op import Gradient, Op, ops
from moeyard.quant import LEAST_MAGNITUDE

_LARGEST_CODE = 448.0
_LEAST_HALF = 2.0**-24
"""The distance of float16's small numbers."""
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13


def exchange(
    rows: Tensor,
    given: Sequence[int],
    taken: Sequence[int],
    group: dist.ProcessGroup,
    *,
    training: bool = False,
    works: list[dist.Work] | None = None,
) -> Tensor:
    """Sends the first `given[0]` rows to rank 0, the next ones to rank 1, and so on.

    Args:
        rows: [at least sum(given), ...], contiguous.
        given, taken: rows for and from each rank.
        group: of as many ranks.
        training: whether the backward is an exchange, too. All ranks take part in it if one does. So rows that need no
            gradient get one here, which is dropped.
        works: where to put what is to be waited for; without it, and with a gradient, it is waited for here.

    Returns [sum(taken), ...]: what rank 0 sent, then what rank 1 sent, and so on.
    """
    sent = rows[: sum(given)]
    if training and torch.is_grad_enabled():
        sent = sent if sent.requires_grad else sent.detach().requires_grad_()
        result: Tensor = _EXCHANGE((sent, list(given), list(taken), group.group_name), "auto")
        return result
    return _exchange(sent.detach(), given, taken, group, works)


def _exchange(
    sent: Tensor,
    given: Sequence[int],
    taken: Sequence[int],
    group: dist.ProcessGroup,
    works: list[dist.Work] | None = None,
) -> Tensor:
    got, later = sent.new_empty((sum(taken), *sent.shape[1:])), works is not None
    work = dist.all_to_all_single(_plain(got), _plain(sent), list(taken), list(given), group, async_op=later)
    if works is not None and work is not None:
        works.append(work)
    return got


def _allocate(sent: Tensor, _given: Sequence[int], taken: Sequence[int], _group: str) -> Tensor:
    return sent.new_empty((sum(taken), *sent.shape[1:]))


def _launch(_: str, out: Tensor, sent: Tensor, given: Sequence[int], taken: Sequence[int], group: Any) -> None:
    dist.all_to_all_single(out, sent.contiguous(), list(taken), list(given), _resolve_process_group(group))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, ctx.given, ctx.taken, ctx.group, _ = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """What was sent is returned."""
    return ops.exchange_rows(grad, ctx.taken, ctx.given, ctx.group, "auto"), None, None, None, None


_EXCHANGE = Op(
    "exchange_rows(Tensor sent, SymInt[] given, SymInt[] taken, str group, str impl) -> Tensor",
    allocate=_allocate,
    launch=_launch,
    gradient=Gradient(("sent",), _setup, _backward),
    composed=True,
)


def exchange_evenly(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sends `rows[r]` of rows [ranks, ...] to rank r; returns what each rank sent, of the same shape."""
    got = torch.empty_like(rows)
    dist.all_to_all_single(_plain(got), _plain(rows), group=group)
    return got


def gather(rows: Tensor, ranks: int, group: dist.ProcessGroup, works: list[dist.Work] | None = None) -> Tensor:
    """The rows [n, ...] of all ranks, [ranks * n, ...]; `works` as in `exchange`."""
    got = rows.new_empty((ranks * rows.shape[0], *rows.shape[1:]))
    work = _all_gather(_plain(got), _plain(rows), group=group, async_op=works is not None)
    if works is not None and work is not None:
        works.append(work)
    return got


def gather_with_gradient(rows: Tensor, ranks: int, group: dist.ProcessGroup) -> Tensor:
    """`gather` whose backward sends each rank's gradients home, where they are added."""
    even = [rows.shape[0]] * ranks
    return exchange(rows.expand(ranks, *rows.shape).flatten(0, 1), even, even, group, training=True)


def _plain(tensor: Tensor) -> Tensor:
    """The same memory as bytes where collectives do not know the dtype."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def host_counts(counts: Tensor, group: dist.ProcessGroup) -> tuple[list[list[int]], list[list[int]]]:
    """Counts [ranks, n] int64 for each rank, and those of each rank for this one, on the host, which waits for both."""
    given, taken = on_host(torch.stack((counts, exchange_evenly(counts, group))))
    return given, taken


def on_host(tensor: Tensor) -> Any:
    """The numbers of a tensor, which the host waits for: here alone does it read what a device computed."""
    return tensor.tolist()


def pack(slots: Tensor, factors: Tensor) -> Tensor:
    """[num_tokens, 2 * top_k] int32: slots, then the bits of router weights."""
    return torch.cat((slots, factors.detach().view(torch.int32)), 1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The slots and router weights that `pack` packed."""
    slots, factors = packed.chunk(2, 1)
    return slots.contiguous(), factors.contiguous().view(torch.float32)


def restore(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows that are quantised to just these codes and scales again.

    Args:
        codes: [n, hidden_size] float8_e4m3fn.
        scales: [n, groups] float32: max(largest magnitude, 1e-10) / 448 of each group, in float32.
        dtype: of the rows that were quantised, and of the result.

    A value is code times scale, rounded to the dtype, which is still nearest to the same code. Only the code 448 is the
    group's largest magnitude, which gives the scale again: it becomes a number of the dtype that does. For dtypes of 16
    bits that is the magnitude itself.
    """
    num_rows, groups = scales.shape
    if not codes.numel():
        return codes.new_empty(codes.shape, dtype=dtype)
    factors = scales.unsqueeze(2)
    if dtype == torch.bfloat16:  # which holds every code: fewer passes over the rows
        limits = _largest(scales, dtype).unsqueeze(2)
        values = codes.view(num_rows, groups, -1).to(dtype)
        return torch.mul(values, factors, out=torch.empty_like(values)).clamp_(-limits, limits).view(num_rows, -1)
    wide = codes.view(num_rows, groups, -1).float()
    values = (wide * factors).to(dtype)
    if dtype == torch.float16:  # whose small numbers lie evenly: their neighbour towards code times scale may be meant
        quotients = (values.float() / factors).clamp(-_LARGEST_CODE, _LARGEST_CODE)
        other = (values.float() + _LEAST_HALF * torch.sign(wide * factors - values.float())).to(dtype)
        kept = (quotients.to(codes.dtype).float() == wide) | (values.abs() >= 1024 * _LEAST_HALF)
        values = torch.where(kept, values, other)
    largest = torch.copysign(_largest(scales, dtype).unsqueeze(2), values)
    return torch.where(wide.abs() == _LARGEST_CODE, largest, values).view(num_rows, -1)


def _largest(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A magnitude of the dtype that has this scale; where the scale is the least one, a magnitude of at most 1e-10."""
    magnitudes = (scales * _LARGEST_CODE).to(dtype)
    if dtype == torch.float32:
        for direction in (0.0, torch.inf):
            near = torch.nextafter(scales * _LARGEST_CODE, torch.full_like(scales, direction))
            magnitudes = torch.where(near / _LARGEST_CODE == scales, near, magnitudes)
        exact = scales * _LARGEST_CODE
        magnitudes = torch.where(exact / _LARGEST_CODE == scales, exact, magnitudes)
    least = torch.tensor(LEAST_MAGNITUDE, dtype=torch.float32, device=scales.device)
    below = least.to(dtype)
    below = torch.where(below.float() > least, torch.nextafter(below, torch.zeros_like(below)), below)
    return torch.where(scales == least / _LARGEST_CODE, torch.minimum(magnitudes, below), magnitudes)
