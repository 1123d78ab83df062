"""Layouts of CUDA tensors: one launch of align.cu, straight from Python."""

from collections.abc import Iterator
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from moeyard.cuda.compile import kernel
from moeyard.cuda.plan import Card, Plan, division, plan
from moeyard.values import Layout

_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from builds without CUDA


def align_launch(topk_ids: Tensor, expert_map: Tensor | None, out: Layout, chosen: Plan | None = None) -> None:
    """Fills the layout of int32 or int64 ids of any shape and strides, by a plan of its own or a given one."""
    device = topk_ids.get_device()
    if device != _current_device():
        with torch.cuda.device(device):
            align_launch(topk_ids, expert_map, out, chosen)
        return
    if not topk_ids.is_contiguous():
        topk_ids = topk_ids.contiguous()
    if expert_map is not None and not expert_map.is_contiguous():
        expert_map = expert_map.contiguous()
    num_routes, capacity = topk_ids.numel(), out.sorted_token_ids.shape[0]
    experts, block_size = out.num_local_experts, out.block_size
    ids = topk_ids.data_ptr()
    key = (num_routes, experts, capacity, block_size, topk_ids.dtype, expert_map is None, ids % 16 == 0, device, chosen)
    ready = _READY.get(key)
    if ready is None:
        ready = _READY.setdefault(key, _make_ready(*key))
    launch, config, loaded, chosen, streams, sizes = ready
    handle = _current_stream(device)
    stream = streams.get(handle)
    if stream is None:
        stream = streams.setdefault(handle, _wrap_stream(handle))
    exchange = barrier = 0
    if chosen.cooperative:
        words = topk_ids.new_empty(chosen.grid // chosen.cluster * experts, dtype=torch.int32)
        exchange, barrier = words.data_ptr(), _barrier(device, handle)
    launch(
        stream,
        config,
        loaded,
        ids,
        0 if expert_map is None else expert_map.data_ptr(),
        out.sorted_token_ids.data_ptr(),
        out.expert_ids.data_ptr(),
        out.num_tokens_post_padded.data_ptr(),
        out.expert_offsets.data_ptr(),
        out.expert_counts.data_ptr(),
        out.route_rows.data_ptr(),
        exchange,
        barrier,
        num_routes,
        out.num_experts,
        *sizes,
    )


_READY: dict[tuple[Any, ...], tuple[Any, ...]] = {}
"""What a launch needs besides pointers, by all that it depends on: hashing plain values, not plans, on every call."""
_STREAMS: dict[int, dict[int, Any]] = {}


def _make_ready(
    num_routes: int,
    experts: int,
    capacity: int,
    block_size: int,
    dtype: torch.dtype,
    unmapped: bool,
    aligned: bool,
    device: int,
    chosen: Plan | None,
) -> tuple[Any, ...]:
    from cuda.core import Device, LaunchConfig, launch

    Device(device).set_current()
    if chosen is None:
        chosen = plan(num_routes, experts, capacity, card_of(device))
    defines = (
        ("EXCHANGE", chosen.exchange),
        ("BLOCK", str(chosen.threads)),
        ("BLOCKS_A_CLUSTER", str(chosen.cluster)),
        ("PLACING_WARPS", str(chosen.warps)),
        ("ROUTES_A_LANE", str(chosen.rounds)),
        ("EXPERTS_A_THREAD", str(-(-experts // chosen.threads))),
        ("ID", "i64" if dtype == torch.int64 else "int"),
        ("MAP", "false" if unmapped else "true"),
        ("ALIGN", "true" if aligned else "false"),
    )
    options: dict[str, Any] = {"grid": chosen.grid, "block": chosen.threads}
    if chosen.cluster > 1:
        options |= {"grid": chosen.grid // chosen.cluster, "cluster": chosen.cluster}
    shared = chosen.shared_bytes(experts)
    config = LaunchConfig(**options, shmem_size=shared, is_cooperative=chosen.cooperative)
    magic, shift = division(block_size)
    sizes = (experts, block_size, capacity, magic, shift, chosen.tiles)
    if len(_READY) >= _MOST_READY:
        _READY.clear()
    streams = _STREAMS.setdefault(device, {})
    return launch, config, kernel("align.cu", "align_kernel", defines, device), chosen, streams, sizes


@cache
def card_of(device: int) -> Card:
    """What plans need to know of a device."""
    facts: Any = torch.cuda.get_device_properties(device)
    return Card(facts.multi_processor_count, facts.shared_memory_per_block_optin, facts.major >= 9)


def _wrap_stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


def _barrier(device: int, stream: int) -> int:
    """Two zeroed words that no other launch uses at the same time; every launch leaves them ready for the next.

    Launches on one stream follow each other and share theirs. A captured launch gets its own, for good: its graph may
    be replayed on any stream, but never beside itself.
    """
    if torch.cuda.is_current_stream_capturing():
        return _new_barrier(device)
    key = (device, stream)
    found = _BARRIERS.get(key)
    return _BARRIERS.setdefault(key, _new_barrier(device)) if found is None else found


def _new_barrier(device: int) -> int:
    with _LOCK:
        spare = _SPARE.setdefault(device, [])
        if not spare:
            spare.extend(_zeroed())
        return spare.pop()


def _zeroed() -> Iterator[int]:
    """Addresses of zeroed words of the current device, a cache line apart; also while this thread captures a graph."""
    from cuda.bindings import driver

    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    _, mode = _check(driver.cuThreadExchangeStreamCaptureMode(mode))
    try:
        size = _LINE * _LINES
        _, address = _check(driver.cuMemAlloc(size))
        _, stream = _check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        _check(driver.cuMemsetD8Async(address, 0, size, stream))
        _check(driver.cuStreamSynchronize(stream))
        _check(driver.cuStreamDestroy(stream))
    finally:
        _check(driver.cuThreadExchangeStreamCaptureMode(mode))
    return (int(address) + _LINE * i for i in range(_LINES))


def _check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]):
        raise RuntimeError(f"CUDA driver: {result[0]}")
    return result


_MOST_READY = 4096
_LINE = 256
_LINES = 4096
_LOCK = Lock()
_BARRIERS: dict[tuple[int, int], int] = {}
_SPARE: dict[int, list[int]] = {}
