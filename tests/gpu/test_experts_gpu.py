"""Products, activations and experts of every GPU implementation: errors of plain torch, repeatable, in graphs."""

import faulthandler
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import moeyard
from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Routing
from moeyard.testing import (
    guard_broken,
    impls_on,
    largest_and_rms,
    no_worse,
    plain_activation,
    plain_experts,
    poisoned,
    same_bits,
)

CUDA = torch.device("cuda")
IMPLS = [name for name in impls_on("fused_experts", CUDA) if name not in ("torch", "reference")]
GEMMS = [name for name in impls_on("grouped_gemm", CUDA) if name not in ("torch", "reference")]
ACTIVATES = [name for name in impls_on("activate", CUDA) if name not in ("torch", "reference")]
CASES = {  # tokens, experts, top_k, hidden, size, kind
    "one token": (1, 128, 8, 2048, 768, "plain"),
    "one token of gpt-oss": (1, 32, 4, 2880, 2880, "biased gpt-oss"),
    "few": (5, 8, 2, 256, 96, "not gated"),
    "few on input": (24, 16, 1, 1024, 512, "on input"),
    "decode": (64, 128, 8, 2048, 704, "plain"),
    "32 rows": (200, 32, 4, 512, 1408, "biased gpt-oss"),
    "64 rows": (300, 16, 2, 1024, 256, "plain"),
    "not gated": (1000, 8, 2, 512, 176, "not gated"),
    "prefill": (4096, 32, 8, 1024, 512, "plain"),
    "prefill of gpt-oss": (2000, 8, 4, 720, 720, "biased gpt-oss"),
    "odd": (130, 5, 3, 100, 37, "on input"),
}


@pytest.fixture(autouse=True)
def _ends_a_hang() -> Iterator[None]:
    """A kernel that never ends takes the process with it, not the machine."""
    faulthandler.dump_traceback_later(40, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def poison_free_memory() -> None:
    """Fills what the allocator hands out next with NaN: what nobody wrote is seen if somebody reads it."""
    blocks = [torch.full((size,), 0x7F, dtype=torch.uint8, device=CUDA) for size in (1 << 28, *(1 << 15,) * 40)]
    del blocks


def draw(case: str, dtype: torch.dtype) -> tuple[torch.Tensor, Routing, ExpertWeights, Activation, bool]:
    tokens, experts, top_k, hidden, size, kind = CASES[case]
    wide = size * (1 if kind == "not gated" else 2)
    bias = kind == "biased gpt-oss"
    weights = ExpertWeights(
        (torch.randn(experts, wide, hidden, device=CUDA) / hidden**0.5).to(dtype),
        (torch.randn(experts, hidden, size, device=CUDA) / size**0.5).to(dtype),
        torch.randn(experts, wide, device=CUDA).to(dtype) if bias else None,
        torch.randn(experts, hidden, device=CUDA).to(dtype) if bias else None,
        kind != "not gated",
    )
    activation = {"biased gpt-oss": GPT_OSS_ACTIVATION, "not gated": Activation("relu2")}.get(kind, Activation())
    routing = draw_routing(tokens, experts, top_k)
    return torch.randn(tokens, hidden, device=CUDA).to(dtype), routing, weights, activation, kind == "on input"


def draw_routing(tokens: int, experts: int, top_k: int) -> Routing:
    """Distinct experts a token, some routes dropped."""
    ids = torch.rand(tokens, experts, device=CUDA).topk(top_k).indices.int()
    ids[torch.rand(ids.shape, device=CUDA) < 0.05] = -1
    return Routing(torch.rand(tokens, top_k, device=CUDA), ids)


def loop(
    rows: torch.Tensor, routing: Routing, weights: ExpertWeights, activation: Activation, on_input: bool
) -> torch.Tensor:
    """`plain_experts`, with weights on either side; at the dtype of its arguments."""
    if not on_input:
        return plain_experts(rows, routing, weights, activation)
    result = torch.zeros_like(rows)
    for k in range(routing.topk_ids.shape[1]):
        once = Routing(torch.ones_like(routing.topk_weights[:, :1]), routing.topk_ids[:, k : k + 1])
        weighed = (rows * routing.topk_weights[:, k : k + 1]).to(rows.dtype)
        result += plain_experts(weighed, once, weights, activation)
    return result


def widened(weights: ExpertWeights) -> ExpertWeights:
    def wide(tensor: Any) -> Any:
        return None if tensor is None else tensor.double()

    return ExpertWeights(
        wide(weights.w13), wide(weights.w2), wide(weights.w13_bias), wide(weights.w2_bias), weights.gated
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_plain_torch(impl: str, case: str) -> None:
    dtype = torch.float16 if case in ("few", "64 rows") else torch.bfloat16
    rows, routing, weights, activation, on_input = draw(case, dtype)
    exact = Routing(routing.topk_weights.double(), routing.topk_ids)
    wide = loop(rows.double(), exact, widened(weights), activation, on_input)
    plain = loop(rows, routing, weights, activation, on_input)
    options: dict[str, Any] = {"activation": activation, "apply_router_weight_on_input": on_input, "impl": impl}
    before, out = rows.clone(), poisoned(tuple(rows.shape), dtype, CUDA)
    poison_free_memory()
    try:
        got = moeyard.fused_experts(rows, routing, weights, out=out, **options)
    except ValueError as error:
        if f"{impl!r} refuses" not in str(error):
            raise
        pytest.skip(str(error))
    assert got is out and not guard_broken(out) and torch.equal(rows, before)
    assert not got[(routing.topk_ids < 0).all(1)].any()
    errors, budget = largest_and_rms(got, wide), largest_and_rms(plain, wide)
    if rows.numel() > 30000:  # enough for largest errors to be comparable
        assert no_worse(got, plain, wide), (errors, budget)
    assert all(a <= 2 * b + 1e-6 for a, b in zip(errors, budget, strict=True)), (errors, budget)
    for _ in range(5):
        poison_free_memory()
        assert same_bits(moeyard.fused_experts(rows, routing, weights, **options), got)


def test_worse_errors_are_seen() -> None:
    """A product that is rounded once more than plain torch's, or one wrong row, does not pass `no_worse`."""
    rows, routing, weights, activation, _ = draw("decode", torch.bfloat16)
    wide = loop(
        rows.double(), Routing(routing.topk_weights.double(), routing.topk_ids), widened(weights), activation, False
    )
    plain = loop(rows, routing, weights, activation, False)
    wrong = plain.clone()
    wrong[5] = plain[6]
    assert no_worse(plain, plain, wide) and not no_worse(wrong, plain, wide)
    assert not no_worse((plain.float() * 1.02).bfloat16(), plain, wide)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["one token", "decode", "prefill"])
def test_the_same_bits_in_a_hundred_runs_and_in_graphs(impl: str, case: str) -> None:
    rows, routing, weights, activation, _ = draw(case, torch.bfloat16)
    out = torch.empty_like(rows)

    def call(out: torch.Tensor | None = None) -> torch.Tensor:
        return moeyard.fused_experts(rows, routing, weights, activation=activation, out=out, impl=impl)

    first = call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [call() for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(same_bits(other, first) for other in again)
    differ = torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(95):
        differ += (call(out).view(torch.int16) != first.view(torch.int16)).any()
    assert int(differ) == 0
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):  # back to back: what one call leaves unfinished, the next would spoil
            call(out)
    tokens, top_k = routing.topk_ids.shape
    for _ in range(4):
        routing.copy_(draw_routing(tokens, weights.num_local_experts, top_k))
        rows.copy_(torch.randn_like(rows))
        out.fill_(float("nan"))
        graph.replay()
        assert same_bits(out, call())
    routing.topk_ids.fill_(-1)
    graph.replay()
    assert not out.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_first_call_may_be_captured(impl: str) -> None:
    """At sizes that nothing else here has, so that kernels are compiled and loaded during the capture."""
    weights = ExpertWeights(
        torch.randn(6, 2 * 144, 336, device=CUDA).half() / 18, torch.randn(6, 336, 144, device=CUDA).half() / 12
    )
    rows, routing = torch.randn(11, 336, device=CUDA).half(), draw_routing(11, 6, 3)
    out, graph = torch.empty_like(rows), torch.cuda.CUDAGraph()
    options: dict[str, Any] = {"activation": Activation("gelu_tanh"), "impl": impl}
    with torch.cuda.graph(graph):
        moeyard.fused_experts(rows, routing, weights, out=out, **options)
    graph.replay()
    assert same_bits(out, moeyard.fused_experts(rows, routing, weights, **options))


@pytest.mark.parametrize("impl", IMPLS)
def test_routings_at_the_edges(impl: str) -> None:
    rows, _, weights, activation, _ = draw("64 rows", torch.bfloat16)
    experts, factors = weights.num_local_experts, torch.rand(300, 2, device=CUDA)
    every = torch.full((300, 2), 3, dtype=torch.int32, device=CUDA)
    mapping = torch.randint(-2, experts + 2, (40,), dtype=torch.int32, device=CUDA)
    for ids, options in (
        (every, {}),
        (torch.full_like(every, -1), {}),
        (every.long() + 2**32, {}),
        (torch.randint(-2, experts + 3, (300, 2), device=CUDA), {}),
        (torch.randint(-2, 50, (300, 2), device=CUDA).int(), {"expert_map": mapping}),
    ):
        routing = Routing(factors, ids)
        got = moeyard.fused_experts(rows, routing, weights, activation=activation, impl=impl, **options)
        local = ids.long()
        held = (local >= 0) & (local < (len(mapping) if options else experts))
        if options:
            local = mapping.long()[torch.where(held, local, 0)]
        local = torch.where(held & (local >= 0) & (local < experts), local, -1)
        exact = Routing(factors.double(), local)
        wide = loop(rows.double(), exact, widened(weights), activation, False)
        assert no_worse(got, loop(rows, Routing(factors, local), weights, activation, False), wide)
        assert not got[(local < 0).all(1)].any()
    none = Routing(factors[:0], every[:0])
    assert moeyard.fused_experts(rows[:0], none, weights, impl=impl).shape == (0, rows.shape[1])


@pytest.mark.parametrize("impl", GEMMS)
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((3, 8, 2, 1024, 256, 1), torch.bfloat16),
        ((40, 64, 4, 704, 96, 16), torch.float16),
        ((1000, 8, 2, 512, 1408, 1), torch.bfloat16),
        ((700, 4, 2, 176, 720, 128), torch.bfloat16),
    ],
    ids=str,
)
def test_grouped_gemm_in_every_way(impl: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, experts, top_k, hidden, columns, block = size
    routing = draw_routing(tokens, experts, top_k)
    layout = moeyard.moe_align_block_size(routing.topk_ids, num_experts=experts, block_size=block)
    weight = (torch.randn(experts, columns, hidden, device=CUDA) / hidden**0.5).to(dtype)
    bias = torch.randn(experts, columns, device=CUDA).to(dtype)
    by_token = torch.randn(tokens, hidden, device=CUDA).to(dtype)
    by_route = torch.randn(tokens * top_k, hidden, device=CUDA).to(dtype)
    compact = torch.randn(tokens * top_k, hidden, device=CUDA).to(dtype)
    batches = torch.randn(experts, tokens, hidden, device=CUDA).to(dtype)
    offsets = torch.cat([layout.expert_counts.new_zeros(1), layout.expert_counts.cumsum(0)])
    of_route = torch.where(layout.route_rows >= 0, routing.topk_ids.view(-1), -1).long()
    route = torch.arange(tokens * top_k, device=CUDA)
    packed = torch.searchsorted(offsets[1:], route, right=True)
    in_batch = torch.arange(tokens, device=CUDA) < layout.expert_counts[:, None]
    batch = torch.where(in_batch, torch.arange(experts, device=CUDA)[:, None], -1).view(-1)
    factors, ones = routing.topk_weights, torch.ones_like(routing.topk_weights)
    for given, flat, expert, scale, where in (
        (by_token, by_token[route // top_k], of_route, factors, {"layout": layout, "topk_weights": factors}),
        (by_route, by_route, of_route, ones, {"layout": layout}),
        (compact, compact, torch.where(packed < experts, packed, -1), ones, {"expert_offsets": offsets}),
        (batches, batches.view(-1, hidden), batch, None, {"expert_num_tokens": layout.expert_counts}),
    ):
        wide = torch.zeros(len(flat), columns, dtype=torch.float64, device=CUDA)
        for e in range(experts):
            wide[expert == e] = flat[expert == e].double() @ weight[e].double().t() + bias[e].double()
        if scale is not None:
            wide *= scale.reshape(-1, 1).double()
        held = expert >= 0
        if given is compact or given is batches:
            flat[~held] = float("nan")  # nobody reads these
        out = poisoned((*given.shape[:-1], columns) if given is batches else (len(flat), columns), dtype, CUDA)
        poison_free_memory()
        got = moeyard.grouped_gemm(given, weight, bias=bias, out=out, impl=impl, **where)  # type: ignore[arg-type]
        assert got is out and not guard_broken(out)
        got = got.view(-1, columns)
        rounded = wide.float().to(dtype)  # one rounding, and room for sums in float32
        room = 32 * torch.finfo(torch.float32).eps * float(wide.abs().max())
        errors, budget = largest_and_rms(got[held], wide[held]), largest_and_rms(rounded[held], wide[held])
        assert all(a <= 1.1 * b + room for a, b in zip(errors, budget, strict=True)), (where.keys(), errors, budget)


@pytest.mark.parametrize("impl", ACTIVATES)
@pytest.mark.parametrize(
    "activation",
    [Activation(), Activation("gelu"), Activation("gelu_tanh"), Activation("relu2", limit=1.5), GPT_OSS_ACTIVATION],
    ids=str,
)
def test_activations(impl: str, activation: Activation) -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if activation.name == "silu" else (torch.bfloat16,)
    for dtype in dtypes:
        for rows, size in ((0, 4), (5, 37), (300, 704)):
            for gated in (True, False):
                whole = (torch.randn(rows, (1 + gated) * size + 2, device=CUDA) * 4).to(dtype)
                given = whole[:, 1 : 1 + (1 + gated) * size]
                wide = plain_activation(given.double(), activation, gated)
                out = poisoned((rows, size), dtype, CUDA)
                got = moeyard.activate(given, activation, gated=gated, out=out, impl=impl)
                assert got is out and not guard_broken(out)
                bound = wide.abs() * torch.finfo(dtype).eps * (0.51 if dtype.itemsize == 2 else 8) + 4e-6
                assert bool(((got.double() - wide).abs() <= bound).all())
