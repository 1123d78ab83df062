"""Threads, devices and streams that nobody prepared; graphs that come and go; tensors that lie anywhere."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard import ExpertWeights, Routing
from moeyard.combine import combine_routes
from moeyard.cuda.runtime import barriers
from moeyard.dispatch.table import explain
from moeyard.testing import plain_experts, same_bits, wide_weights

EXPERTS, TOP_K, HIDDEN, SIZE = 32, 4, 256, 128
MANY = 400_000
"""Routes of an alignment whose blocks meet at a barrier."""
Operators = dict[str, Callable[[], tuple[Tensor, ...]]]


def operators(device: torch.device, tokens: int = 40) -> Operators:
    """Every operator of the cuda implementation on inputs of a device, the same on all devices."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    logits, hidden = draw(tokens, EXPERTS), draw(tokens, HIDDEN).bfloat16()
    weights = ExpertWeights(
        draw(EXPERTS, 2 * SIZE, HIDDEN, scale=HIDDEN**-0.5).bfloat16(),
        draw(EXPERTS, HIDDEN, SIZE, scale=SIZE**-0.5).bfloat16(),
    )
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)]).int().to(device)
    many = torch.randint(0, EXPERTS, (MANY,), generator=generator).int().to(device)
    counts = torch.randint(0, 9, (EXPERTS,), generator=generator).int().to(device)
    factors = torch.rand(tokens, TOP_K, generator=generator).to(device)
    layout = moeyard.moe_align_block_size(ids, num_experts=EXPERTS, block_size=1, impl="torch")
    rows = moeyard.permute(hidden, layout, impl="torch").rows
    one = Routing(factors[:1], ids[:1])

    def of_layout(made: moeyard.Layout) -> tuple[Tensor, ...]:
        return made.tensors

    made: Operators = {
        "align": lambda: of_layout(moeyard.moe_align_block_size(ids, num_experts=EXPERTS, block_size=16, impl="cuda")),
        "align, a grid": lambda: of_layout(
            moeyard.moe_align_block_size(many, num_experts=EXPERTS, block_size=16, impl="cuda")
        ),
        "batched align": lambda: of_layout(
            moeyard.batched_moe_align_block_size(counts, max_num_tokens=9, block_size=4, impl="cuda")
        ),
        "route": lambda: values(moeyard.route(logits, top_k=TOP_K, impl="cuda")),
        "route and align": lambda: of_layout(moeyard.route_and_align(logits, block_size=16, top_k=TOP_K)[1]),
        "permute": lambda: (moeyard.permute(hidden, layout, impl="cuda").rows,),
        "permute_to_fp8": lambda: (
            moeyard.permute_to_fp8(hidden, layout, group_size=128, impl="cuda").rows.view(torch.uint8),
        ),
        "shuffle_rows": lambda: (moeyard.shuffle_rows(hidden, layout.sorted_token_ids // TOP_K, impl="cuda"),),
        "combine": lambda: (moeyard.combine(rows, layout, factors, impl="cuda"),),
        "moe_sum": lambda: (moeyard.moe_sum(rows.view(tokens, TOP_K, HIDDEN), impl="cuda"),),
        "triton activate": lambda: (moeyard.activate(rows, impl="triton"),),
        "triton grouped_gemm": lambda: (
            moeyard.grouped_gemm(rows, weights.w13, expert_offsets=layout.expert_offsets, impl="triton"),
        ),
        "triton fused_experts": lambda: (moeyard.fused_experts(hidden, Routing(factors, ids), weights, impl="triton"),),
        "torch fused_experts": lambda: (moeyard.fused_experts(hidden, Routing(factors, ids), weights, impl="torch"),),
    }
    if torch.cuda.get_device_capability(device) == (9, 0):
        made |= {
            "grouped_gemm": lambda: (
                moeyard.grouped_gemm(rows, weights.w13, expert_offsets=layout.expert_offsets, impl="cuda"),
            ),
            "fused_experts": lambda: (moeyard.fused_experts(hidden, Routing(factors, ids), weights, impl="cuda"),),
            "fused_experts, 1 token": lambda: (moeyard.fused_experts(hidden[:1], one, weights, impl="cuda"),),
        }
    return made


def values(routing: Routing) -> tuple[Tensor, ...]:
    return routing.topk_weights, routing.topk_ids


def operator(name: str, device: torch.device, tokens: int = 40) -> Callable[[], tuple[Tensor, ...]]:
    made = operators(device, tokens)
    if name not in made:
        pytest.skip("needs compute capability 9.0")
    return made[name]


WITH_BARRIERS = ("align, a grid", "grouped_gemm", "fused_experts")
NAMES = (
    *WITH_BARRIERS,
    *("align", "batched align", "route", "route and align", "permute", "permute_to_fp8", "shuffle_rows", "combine"),
    *("moe_sum", "fused_experts, 1 token"),
    *("triton activate", "triton grouped_gemm", "triton fused_experts", "torch fused_experts"),
)


def in_a_fresh_thread(call: Callable[[], object]) -> object:
    """What a call gives in a thread that has done nothing with CUDA before."""
    found: list[object] = []

    def work() -> None:
        from cuda.bindings import driver

        assert not int(driver.cuCtxGetCurrent()[1]), "the thread begins without a context"
        found.append(call())

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
    return found[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_a_thread_may_begin_with_any_operator(name: str, side: bool) -> None:
    """Prepared launches, and allocations that the caching allocator answers, make no context current by themselves."""
    call = operator(name, torch.device("cuda", 0))
    stream = torch.cuda.Stream() if side else torch.cuda.default_stream()
    with torch.cuda.stream(stream):
        wanted = call(), call()
    torch.cuda.synchronize()

    def work() -> object:
        with torch.cuda.stream(stream):
            return call()

    got = in_a_fresh_thread(work)
    torch.cuda.synchronize()
    assert isinstance(got, tuple)
    assert all(same_bits(a, b) for a, b in zip(got, wanted[0], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_thread_may_begin_with_an_operator_that_nobody_has_called(name: str) -> None:
    """Compiling, loading, words for barriers and tensor maps need a context as well."""
    call = operator(name, torch.device("cuda", 0), tokens=41)
    got = in_a_fresh_thread(call)
    torch.cuda.synchronize()
    assert isinstance(got, tuple)
    assert all(same_bits(a, b) for a, b in zip(got, call(), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("current", "used"), [(0, 1), (1, 0)])
def test_operators_work_on_a_device_that_is_not_current(name: str, current: int, used: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(used):
        wanted = operator(name, torch.device("cuda", used))()
    with torch.cuda.device(current):
        call = operator(name, torch.device("cuda", used))
        for _ in range(2):
            got = call()
            torch.cuda.synchronize(used)
            assert all(tensor.device.index == used for tensor in got)
            assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))
            assert torch.cuda.current_device() == current
        with torch.cuda.stream(torch.cuda.Stream(used)):
            got = call()
        torch.cuda.synchronize(used)
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))
    in_a_thread = in_a_fresh_thread(call)
    torch.cuda.synchronize(used)
    assert isinstance(in_a_thread, tuple)
    assert all(same_bits(a, b) for a, b in zip(in_a_thread, wanted, strict=True))


def test_layouts_and_rows_of_two_devices_do_not_meet() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ids = torch.zeros(4, 2, dtype=torch.int32, device="cuda:1")
    layout = moeyard.moe_align_block_size(ids, num_experts=4, block_size=1)
    with pytest.raises(ValueError, match="rows: expected a tensor on cuda:1, got one on cuda:0"):
        moeyard.combine(torch.ones(8, 16, device="cuda:0"), layout)


# Graphs


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def lent() -> int:
    """Barriers that graphs hold, after those that were given back have been fetched."""
    for device in range(torch.cuda.device_count()):
        barriers._SPARE.setdefault(device, []).extend(barriers._LENT.returned(device))
    return len(barriers._LENT)


@pytest.mark.parametrize("name", WITH_BARRIERS)
def test_barriers_of_graphs_that_are_gone_are_used_again(name: str) -> None:
    call = operator(name, torch.device("cuda", 0))
    call()
    torch.cuda.synchronize()
    before = lent()
    for round_ in range(8):
        graph = captured(call)
        assert lent() > before, "a captured launch has a barrier of its own"
        graph.replay()
        graph.replay()
        del graph  # while it may still run
        torch.cuda.synchronize()
        deadline = threading.Event()
        for _ in range(100):  # the driver tells on a thread of its own
            if lent() == before:
                break
            deadline.wait(0.05)
        assert lent() == before, f"round {round_}"


def test_a_barrier_stays_with_a_graph_that_is_only_instantiated() -> None:
    """torch keeps what was instantiated and destroys what was captured: the barrier is still in use."""
    call = operator("align, a grid", torch.device("cuda", 0))
    wanted, before = call(), lent()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    others = [captured(call) for _ in range(3)]
    assert lent() >= before + 4
    for _ in range(3):
        graph.replay()
        for other in others:
            other.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


# Tensors that lie anywhere


def off_by(tensor: Tensor, elements: int) -> Tensor:
    """The same values, beginning so many elements into a storage."""
    room = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device=tensor.device)
    return room[elements:].view(tensor.shape).copy_(tensor)


@pytest.fixture
def experts() -> Iterator[ExpertWeights]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    torch.manual_seed(0)
    w13 = torch.randn(EXPERTS, 2 * SIZE, HIDDEN, device="cuda") * HIDDEN**-0.5
    w2 = torch.randn(EXPERTS, HIDDEN, SIZE, device="cuda") * SIZE**-0.5
    yield ExpertWeights(w13.bfloat16(), w2.bfloat16())


@pytest.mark.parametrize("tokens", [1, 3, 64, 2000])
def test_rows_may_lie_anywhere(tokens: int, experts: ExpertWeights) -> None:
    hidden, factors = torch.randn(tokens, HIDDEN, device="cuda").bfloat16(), torch.rand(tokens, TOP_K, device="cuda")
    ids = torch.rand(tokens, EXPERTS, device="cuda").argsort(1)[:, :TOP_K].int()
    wanted = moeyard.fused_experts(hidden, Routing(factors, ids), experts, impl="cuda")
    wide = torch.randn(tokens, 3 * HIDDEN, device="cuda").bfloat16()
    wide[:, HIDDEN : 2 * HIDDEN] = hidden
    both = torch.stack([ids, ids], 2)[:, :, 1], torch.stack([factors, factors], 2)[:, :, 1]
    for rows in (hidden, off_by(hidden, 1), off_by(hidden, 4), wide[:, HIDDEN : 2 * HIDDEN], hidden.T.contiguous().T):
        for routing in (Routing(factors, ids), Routing(both[1], both[0])):
            for out in (torch.empty_like(hidden), off_by(hidden, 1), off_by(hidden, 8)):
                got = moeyard.fused_experts(rows, routing, experts, out=out, impl="cuda")
                assert same_bits(got, wanted)
    layout = moeyard.moe_align_block_size(ids, num_experts=EXPERTS, block_size=16)
    product = moeyard.grouped_gemm(hidden, experts.w13, layout=layout, topk_weights=factors, impl="cuda")
    for rows in (off_by(hidden, 1), wide[:, HIDDEN : 2 * HIDDEN]):
        for out in (torch.empty_like(product), off_by(product, 1)):
            got = moeyard.grouped_gemm(rows, experts.w13, layout=layout, topk_weights=factors, out=out, impl="cuda")
            assert same_bits(got, product)


def test_weights_that_lie_badly_are_refused_in_words(experts: ExpertWeights) -> None:
    hidden = torch.randn(64, HIDDEN, device="cuda").bfloat16()
    ids = torch.randint(0, EXPERTS, (64, TOP_K), dtype=torch.int32, device="cuda")
    routing = Routing(torch.rand(64, TOP_K, device="cuda"), ids)
    with pytest.raises(ValueError, match="w13: expected an address that is a multiple of 16 bytes"):
        moeyard.fused_experts(hidden, routing, ExpertWeights(off_by(experts.w13, 1), experts.w2), impl="cuda")
    with pytest.raises(ValueError, match="w2: expected a contiguous tensor, got strides"):
        moeyard.fused_experts(hidden, routing, ExpertWeights(experts.w13, experts.w2.mT.contiguous().mT), impl="cuda")


@pytest.mark.parametrize("impl", ["cuda", "torch"])
def test_launchers_read_inverse_maps_of_any_strides(impl: str) -> None:
    """Layouts are dense, but vLLM's maps need not be."""
    tokens = 100
    hidden = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    ids = torch.randint(-1, EXPERTS, (tokens, TOP_K), dtype=torch.int32, device="cuda")
    layout = moeyard.moe_align_block_size(ids, num_experts=EXPERTS, block_size=1)
    strided = torch.stack([layout.route_rows, torch.full_like(layout.route_rows, -7)], -1)[..., 0]
    rows, factors = moeyard.permute(hidden, layout, impl=impl).rows, torch.rand(tokens, TOP_K, device="cuda")
    wanted = moeyard.combine(rows, layout, factors, impl=impl)
    assert same_bits(combine_routes(rows, strided, factors, TOP_K, out=None, impl=impl), wanted)
    given = moeyard.Layout.of((*layout.tensors[:-1], strided), (EXPERTS, EXPERTS, 1, TOP_K))
    with pytest.raises(ValueError, match=r"layout\.route_rows: expected a contiguous tensor"):
        moeyard.permute(hidden, given, impl=impl)


# Ranges


@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_float16_rows_that_only_their_weights_make_small_enough(tokens: int, experts: ExpertWeights) -> None:
    """A route's row may pass 65504 where the router's weight times it does not: no infinity, whatever the batch."""
    hidden = torch.randn(tokens, HIDDEN, device="cuda").half()
    large = ExpertWeights(experts.w13.half(), (experts.w2 * 60_000).half())
    ids = torch.rand(tokens, EXPERTS, device="cuda").argsort(1)[:, :TOP_K].int()
    factors = torch.full((tokens, TOP_K), 0.05, device="cuda")
    routing = Routing(factors, ids)
    wide = plain_experts(hidden.double(), routing, wide_weights(large))
    single = plain_experts(hidden.double(), Routing(factors[:, :1] * 20, ids[:, :1]), wide_weights(large))
    assert tokens == 1 or float(single.abs().max()) > 65504 > float(wide.abs().max()), "unweighted rows pass the range"
    got = moeyard.fused_experts(hidden, routing, large, impl="cuda")
    assert bool(got.isfinite().all())
    assert float((got.double() - wide).abs().max()) < 4e-3 * float(wide.abs().max())


def test_cards_that_run_these_kernels_are_not_refused() -> None:
    from moeyard.cuda.runtime.cards import refusal

    assert refusal(torch.cuda.current_device()) is None
    assert explain("route", "cuda").chosen == "cuda"
