"""Calls that repeat earlier ones on a GPU: the bits of calls that are checked, on any stream, thread and device."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard import ExpertWeights, Layout, Routing, experts, layer, layout, router
from moeyard.dispatch.op import Op
from moeyard.testing import draw_weights, same_bits

EXPERTS, TOP_K, HIDDEN, SIZE = 64, 4, 256, 128
MEMORIES = (experts._REPEATS, layer._REPEATS, layout._REPEATS, router._ROUTES, router._BOTH)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    for one in MEMORIES:
        one.clear()
    yield
    for one in MEMORIES:
        one.clear()


class Inputs:
    def __init__(self, tokens: int, seed: int, device: str = "cuda:0", dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(tokens, HIDDEN, generator=generator).to(device, dtype)
        self.logits = torch.randn(tokens, EXPERTS, generator=generator).to(device, dtype)
        self.router = torch.randn(EXPERTS, HIDDEN, generator=generator).to(device, dtype)
        self.ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K, 1).indices.int().to(device)
        self.factors = torch.rand(tokens, TOP_K, generator=generator).to(device)
        torch.manual_seed(seed)
        weights = draw_weights(EXPERTS, HIDDEN, SIZE, dtype)
        self.weights = ExpertWeights(weights.w13.to(device), weights.w2.to(device))


CALLS: dict[str, Callable[[Inputs], Any]] = {
    "route": lambda x: moeyard.route(x.logits, top_k=TOP_K, renormalize=True),
    "align": lambda x: moeyard.moe_align_block_size(x.ids, num_experts=EXPERTS, block_size=16),
    "route_and_align": lambda x: moeyard.route_and_align(x.logits, top_k=TOP_K, block_size=16),
    "fused_experts": lambda x: moeyard.fused_experts(x.hidden, Routing(x.factors, x.ids), x.weights),
    "moe_layer": lambda x: moeyard.moe_layer(x.hidden, x.router, x.weights, top_k=TOP_K),
}


def values(result: Any) -> list[Tensor]:
    """What a result says; slots past the last one are unspecified in no field."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Routing):
        return [result.topk_weights, result.topk_ids]
    if isinstance(result, Layout):
        return list(result.tensors)
    return [tensor for part in result for tensor in values(part)]


def equal(one: Any, other: Any) -> bool:
    return all(same_bits(a, b) for a, b in zip(values(one), values(other), strict=True))


def repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a call that is checked is an error."""

    def checked(op: Op, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"{op.name} is checked again")

    monkeypatch.setattr(Op, "__call__", checked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 40, 64, 700, 5000])
@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_has_the_bits_of_a_checked_one(
    name: str, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, inputs = CALLS[name], [Inputs(tokens, seed, dtype=dtype) for seed in range(3)]
    wanted = []
    for x in inputs:
        for one in MEMORIES:
            one.clear()
        wanted.append(call(x))
    repeated(monkeypatch)
    kept = [call(x) for x in inputs for _ in range(3)]
    assert all(equal(got, wanted[i // 3]) for i, got in enumerate(kept))


@pytest.mark.parametrize("name", CALLS)
def test_streams_threads_and_graphs_may_repeat_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, x = CALLS[name], Inputs(40, 0)
    wanted = call(x)
    torch.cuda.synchronize()
    repeated(monkeypatch)
    side, found = torch.cuda.Stream(), []
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found += [call(x) for _ in range(3)]
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(x)
    for tensor in values(captured):
        tensor.zero_()
    graph.replay()
    found.append(captured)

    def work() -> None:
        torch.cuda.synchronize(0)
        found.append(call(x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(found) == 8 and all(equal(one, wanted) for one in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
@pytest.mark.parametrize("name", CALLS)
def test_any_device_may_be_current(name: str) -> None:
    call, here, there = CALLS[name], Inputs(40, 0), Inputs(40, 0, "cuda:1")
    found = []
    for current in (0, 1, 0):
        with torch.cuda.device(current):
            found += [call(x) for x in (here, there) for _ in range(2)]
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    on_host = [[tensor.cpu() for tensor in values(one)] for one in found]
    assert all(same_bits(a, b) for one in on_host for a, b in zip(one, on_host[0], strict=True))
