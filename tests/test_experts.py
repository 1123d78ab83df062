"""Products, activations, experts and the layer: against float64, with the errors of plain torch as the budget."""

import contextlib
from typing import Any

import pytest
import torch
from torch.nn import functional

import moeyard
from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Layout, Routing, reference
from moeyard.dispatch import op
from moeyard.testing import (
    CPU,
    draw_routing,
    draw_weights,
    guard_broken,
    impls_on,
    largest_and_rms,
    no_worse,
    plain_experts,
    poisoned,
    same_bits,
    wide_weights,
)
from moeyard.vectorised.experts import grouped_product

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [
    Activation(),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu2"),
    GPT_OSS_ACTIVATION,
    Activation("silu", limit=0.5),
    Activation("relu2", limit=1.5),
]


@pytest.mark.parametrize("impl", impls_on("activate", CPU, torch.float32))
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(impl: str, dtype: torch.dtype, activation: Activation) -> None:
    if impl not in impls_on("activate", CPU, dtype):
        pytest.skip(f"{impl} does not take {dtype}")
    for rows, size in ((0, 4), (1, 1), (5, 37), (300, 256)):
        for gated in (True, False):
            whole = (torch.randn(rows, (1 + gated) * size + 2) * 4).to(dtype)
            given = whole[:, 1 : 1 + (1 + gated) * size]
            wide = reference.activate(given.double(), activation, gated=gated)
            out = poisoned((rows, size), dtype)
            got = moeyard.activate(given, activation, gated=gated, out=out, impl=impl)
            assert got is out and not guard_broken(out)
            # gelu's error function cancels: what is left of large negative values is small against them
            bound = wide.abs() * torch.finfo(dtype).eps * (0.51 if dtype.itemsize == 2 else 8) + 4e-6
            assert bool(((got.double() - wide).abs() <= bound).all())
            assert same_bits(moeyard.activate(given, activation, gated=gated, impl=impl), got)


def test_activations_of_extreme_values() -> None:
    rows = torch.tensor([[-1e30, -200.0, -90, -87.4, -0.0, 0, 87.4, 89, 1e30, float("inf"), float("nan")]])
    for impl in impls_on("activate", CPU, torch.float32):
        got = moeyard.activate(rows, gated=False, impl=impl)[0]
        assert torch.allclose(got[:9], functional.silu(rows)[0, :9], rtol=1e-6, atol=1e-35), impl
        assert got[9] == float("inf") and got[10].isnan(), impl


def as_ways(layout: Layout, rows: torch.Tensor) -> dict[str, tuple[torch.Tensor, dict[str, Any]]]:
    """The same rows addressed by a layout (by token, by route) and by compact offsets."""
    by_route = rows.repeat_interleave(layout.top_k, 0)
    ways = {"token": (rows, {"layout": layout}), "route": (by_route, {"layout": layout})}
    if layout.block_size == 1:
        compact = moeyard.permute(rows, layout).rows
        ways["compact"] = (compact, {"expert_offsets": layout.expert_offsets})
    return ways


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "size", [(0, 3, 2, 8, 8, 1), (1, 3, 2, 16, 24, 4), (70, 4, 3, 100, 37, 1), (9, 5, 2, 1030, 7, 16)], ids=str
)
@pytest.mark.parametrize("extras", [False, True])
def test_grouped_gemm_in_every_way(dtype: torch.dtype, size: tuple[int, ...], extras: bool) -> None:
    tokens, experts, top_k, hidden, columns, block = size
    routing = draw_routing(tokens, experts, top_k)
    layout = moeyard.moe_align_block_size(routing.topk_ids, num_experts=experts, block_size=block)
    rows = torch.randn(tokens, hidden).to(dtype)
    weight = (torch.randn(experts, columns, hidden) / hidden**0.5).to(dtype)
    bias = torch.randn(experts, columns).to(dtype) if extras else None
    for way, (given, where) in as_ways(layout, rows).items():
        factors = routing.topk_weights if extras and "layout" in where else None
        options = {"bias": bias, "topk_weights": factors, **where}
        wide_options = {**options, "bias": None if bias is None else bias.double()}
        wide = reference.grouped_gemm(given.double(), weight.double(), **wide_options)
        valid = layout.route_rows >= 0
        if way == "compact":
            valid = torch.arange(len(given)) < layout.expert_offsets[-1]
            given[~valid] = float("nan")  # nobody reads rows past the last offset
        for impl in impls_on("grouped_gemm", CPU, dtype):
            out = poisoned(tuple(wide.shape), dtype)
            got = moeyard.grouped_gemm(given, weight, out=out, impl=impl, **options)
            assert got is out and not guard_broken(out)
            honest = wide.float().to(dtype) if dtype != torch.float64 else wide  # one rounding
            largest = float(wide.abs().max()) if wide.numel() else 0.0
            slack = 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * largest
            if impl == "torch" and dtype.itemsize == 2:  # torch's grouped product rounds before bias and weight
                slack = 1.5 * torch.finfo(dtype).eps * largest
            error, budget = largest_and_rms(got[valid], wide[valid]), largest_and_rms(honest[valid], wide[valid])
            assert all(a <= 1.1 * b + slack for a, b in zip(error, budget, strict=True)), (impl, way)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_gemm_of_batches(dtype: torch.dtype) -> None:
    rows, weight = torch.randn(4, 50, 72).to(dtype), torch.randn(4, 33, 72).to(dtype)
    counts = torch.tensor([50, 0, -3, 99], dtype=torch.int32)
    wide = reference.grouped_gemm(rows.double(), weight.double(), expert_num_tokens=counts)
    for impl in impls_on("grouped_gemm", CPU, dtype):
        got = moeyard.grouped_gemm(rows, weight, expert_num_tokens=counts, impl=impl)
        assert got.shape == (4, 50, 33)
        for expert in (0, 3):
            assert torch.allclose(got[expert].double(), wide[expert], rtol=2 * torch.finfo(dtype).eps, atol=2e-5), impl
    flat, odd = rows.view(200, 72), torch.tensor([-5, 60, 40, 9999, 100])  # out of order and of range
    wide = reference.grouped_gemm(flat.double(), weight.double(), expert_offsets=torch.tensor([0, 60, 60, 200, 200]))
    for impl in impls_on("grouped_gemm", CPU, dtype):
        got = moeyard.grouped_gemm(flat, weight, expert_offsets=odd, impl=impl)
        assert torch.allclose(got.double(), wide, rtol=2 * torch.finfo(dtype).eps, atol=2e-5), impl


CASES = {
    "nobody": (0, 3, 2, 8, 8),
    "one token": (1, 8, 2, 128, 96),
    "odd": (7, 5, 3, 100, 37),
    "ones": (3, 1, 1, 1, 1),
    "many": (130, 4, 2, 272, 80),
    "wide": (5, 16, 4, 1100, 60),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["plain", "biased gpt-oss", "not gated", "on input"])
def test_fused_experts_are_as_exact_as_plain_torch(dtype: torch.dtype, case: str, kind: str) -> None:
    tokens, experts, top_k, hidden, size = CASES[case]
    activation = GPT_OSS_ACTIVATION if kind == "biased gpt-oss" else Activation()
    if kind == "not gated":
        activation = Activation("relu2")
    weights = draw_weights(experts, hidden, size, dtype, gated=kind != "not gated", bias=kind == "biased gpt-oss")
    rows, routing = torch.randn(tokens, hidden).to(dtype), draw_routing(tokens, experts, top_k)
    options: dict[str, Any] = {"activation": activation, "apply_router_weight_on_input": kind == "on input"}
    wide = reference.fused_experts(rows.double(), routing, wide_weights(weights), **options)
    plain = plain_experts(rows, routing, weights, activation)
    if kind == "on input":
        plain = torch.zeros_like(rows)
        for k in range(top_k):
            once = Routing(torch.ones(tokens, 1), routing.topk_ids[:, k : k + 1])
            plain += plain_experts((rows * routing.topk_weights[:, k : k + 1]).to(dtype), once, weights, activation)
    rows_before = rows.clone()
    for impl in impls_on("fused_experts", CPU, dtype):
        out = poisoned((tokens, hidden), dtype)
        got = moeyard.fused_experts(rows, routing, weights, out=out, impl=impl, **options)
        assert got is out and not guard_broken(out) and torch.equal(rows, rows_before)
        errors, budget = largest_and_rms(got, wide), largest_and_rms(plain, wide)
        if tokens * hidden > 30000 and impl != "torch":  # enough for largest errors to be comparable
            assert no_worse(got, plain, wide), (impl, errors, budget)
        assert all(a <= 3 * b + 1e-6 for a, b in zip(errors, budget, strict=True)), (impl, errors, budget)
        dropped = (routing.topk_ids < 0).all(1)
        assert not got[dropped].any()
        assert same_bits(moeyard.fused_experts(rows, routing, weights, impl=impl, **options), got)


@pytest.mark.parametrize("impl", impls_on("fused_experts", CPU, torch.float32))
def test_routings_at_the_edges(impl: str) -> None:
    weights, rows = draw_weights(6, 48, 40, torch.float32), torch.randn(60, 48)
    factors = torch.rand(60, 2)
    every = torch.full((60, 2), 3, dtype=torch.int32)
    mapping = torch.tensor([-1, 2, 0, 7, -5, 1, 3, 3], dtype=torch.int32)
    for ids, options in (
        (every, {}),
        (torch.full_like(every, -1), {}),
        (every.long() + 2**32, {}),
        (torch.randint(-2, 9, (60, 2)), {}),
        (torch.randint(-2, 9, (60, 2)).int().view(torch.uint32), {}),
        (torch.randint(-1, 9, (60, 2), dtype=torch.int32), {"expert_map": mapping}),
    ):
        routing = Routing(factors, ids)
        signed = Routing(factors, ids.view(torch.int32) if ids.dtype == torch.uint32 else ids)
        wide = reference.fused_experts(rows.double(), signed, wide_weights(weights), **options)
        got = moeyard.fused_experts(rows, routing, weights, impl=impl, **options)
        assert torch.allclose(got.double(), wide, atol=3e-6)
        if bool((signed.topk_ids == -1).all()):
            assert not got.any()


def test_a_token_does_not_depend_on_the_others() -> None:
    """The cpu implementation sums every dot product the same way, whatever tile it falls into."""
    if "cpu" not in impls_on("fused_experts", CPU, torch.float32):
        pytest.skip("numba is not installed")
    for dtype in DTYPES:
        weights, routing = draw_weights(3, 2100, 133, dtype), draw_routing(64, 3, 2)
        rows = torch.randn(64, 2100).to(dtype)
        together = moeyard.fused_experts(rows, routing, weights, impl="cpu")
        for some in ([0], [5, 6], [9, 3, 7], list(range(11, 41))):
            part = Routing(routing.topk_weights[some], routing.topk_ids[some])
            assert same_bits(moeyard.fused_experts(rows[some], part, weights, impl="cpu"), together[some])


def test_the_layer_is_its_parts() -> None:
    hidden, rows = 64, torch.randn(40, 64).bfloat16()
    weights, shared = draw_weights(8, hidden, 48, torch.bfloat16), draw_weights(1, hidden, 80, torch.bfloat16)
    router, gate = torch.randn(8, hidden), torch.randn(1, hidden).bfloat16()
    options: dict[str, Any] = {"top_k": 3, "scoring": "sigmoid", "renormalize": True}
    options["selection_bias"] = torch.randn(8) * 0.1
    got = moeyard.moe_layer(rows, router, weights, shared=shared, shared_gate=gate, **options)
    routing = reference.route(rows.float() @ router.t(), **options)
    wide = reference.fused_experts(rows.double(), routing, wide_weights(weights))
    factor = torch.sigmoid(rows.double() @ gate.double().t())
    everyone = Routing(factor.float(), torch.zeros(40, 1, dtype=torch.int32))
    both = wide + reference.fused_experts(rows.double(), everyone, wide_weights(shared))
    plain = plain_experts(rows, routing, weights) + plain_experts(rows, everyone, shared)
    assert no_worse(got, plain, both)
    padding = torch.arange(40) % 3 == 0
    whole = moeyard.moe_layer(rows, router, weights, **options)
    alone = moeyard.moe_layer(rows, router, weights, is_padding=padding, **options)
    assert not alone[padding].any() and torch.equal(alone[~padding], whole[~padding])
    with_shared = moeyard.moe_layer(rows, router, weights, is_padding=padding, shared=shared, **options)
    everyone = Routing(torch.ones(40, 1), torch.zeros(40, 1, dtype=torch.int32))
    assert torch.equal(with_shared[padding], moeyard.fused_experts(rows, everyone, shared)[padding])
    biased = moeyard.moe_layer(rows, router, weights, router_bias=torch.tensor([1e4] + [0.0] * 7), top_k=1)
    assert same_bits(biased, moeyard.fused_experts(rows, everyone, weights))


def test_route_and_align() -> None:
    logits, padding = torch.randn(50, 16), torch.rand(50) < 0.2
    mapping = torch.arange(16, dtype=torch.int32) - 4
    for impl in impls_on("route", CPU, torch.float32):
        routing, layout = moeyard.route_and_align(
            logits, block_size=8, expert_map=mapping, num_local_experts=12, top_k=3, is_padding=padding, impl=impl
        )
        wanted = reference.route(logits, top_k=3, is_padding=padding)
        aligned = reference.moe_align_block_size(
            wanted.topk_ids, num_experts=16, block_size=8, expert_map=mapping, num_local_experts=12
        )
        assert torch.equal(routing.topk_ids, wanted.topk_ids)
        assert all(same_bits(a, b) for a, b in zip(layout.tensors, aligned.tensors, strict=True))


@pytest.mark.parametrize("way", ["straight", "registered"])
def test_launchers_of_products_learn_of_the_experts_elsewhere(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout counts the routes of all ranks, so plans have to know how many experts those are spread over."""
    chosen, seen = op.launcher, []

    def recorded(*call: Any) -> Any:
        launch = chosen(*call)
        return lambda *given, out: (seen.append(given[-1].num_experts), launch(*given, out=out))

    monkeypatch.setattr(op, "launcher", recorded)
    weights, rows = draw_weights(4, 16, 8, torch.float32), torch.randn(6, 16)
    ids, mapping = draw_routing(6, 32, 2).topk_ids, torch.full((32,), -1, dtype=torch.int32)
    mapping[8:12] = torch.arange(4, dtype=torch.int32)
    layout = reference.moe_align_block_size(ids, num_experts=32, block_size=1, expert_map=mapping, num_local_experts=4)
    mode = contextlib.nullcontext() if way == "straight" else torch.device("cpu")  # under a mode nothing goes straight
    with mode:
        assert op.goes_straight(rows) is (way == "straight")
        moeyard.grouped_gemm(rows, weights.w13, layout=layout)
        moeyard.grouped_gemm(rows, weights.w13, expert_offsets=torch.tensor([0, 1, 2, 4, 6]))
        moeyard.grouped_gemm(rows[:4, None], weights.w13, expert_num_tokens=torch.ones(4, dtype=torch.int32))
    assert seen == [32, 0, 0]


def test_registered_ops_and_compile() -> None:
    weights, routing = draw_weights(4, 32, 24, torch.float32, bias=True), draw_routing(6, 4, 2)
    rows = torch.randn(6, 32)
    layout = moeyard.moe_align_block_size(routing.topk_ids, num_experts=4, block_size=4)
    torch.library.opcheck(torch.ops.moeyard.activate.default, (rows, True, "silu", 1.702, 1.0, 7.0, "auto"))
    biases, silu = (weights.w13_bias, None, *(None,) * 8, 0, "", True), ("silu", 1.0, 0.0, None)
    torch.library.opcheck(
        torch.ops.moeyard.fused_experts.default,
        (rows, routing.topk_weights, routing.topk_ids, None, weights.w13, weights.w2, *biases, *silu, 4, False, "auto"),
    )
    everything, factors = torch.tensor([12, 0, 0, 0], dtype=torch.int32), routing.topk_weights
    torch.library.opcheck(
        torch.ops.moeyard.grouped_gemm.default,
        (torch.randn(12, 32), weights.w13, None, factors, None, 1, torch.zeros(4).long(), everything, 4, 12, "auto"),
    )  # fmt: skip

    def layer(rows: torch.Tensor) -> torch.Tensor:
        return moeyard.moe_layer(rows, rows.new_ones(4, 32).cumsum(0), weights, top_k=2, renormalize=True)

    def steps(rows: torch.Tensor) -> torch.Tensor:
        product = moeyard.grouped_gemm(rows, weights.w13, bias=weights.w13_bias, layout=layout)
        product = moeyard.activate(product)
        product = moeyard.grouped_gemm(product, weights.w2, layout=layout, topk_weights=routing.topk_weights)
        return moeyard.moe_sum(product.view(6, 2, 32), topk_ids=routing.topk_ids)

    with torch.no_grad():
        for function in (layer, steps):
            assert torch.allclose(torch.compile(function, fullgraph=True)(rows), function(rows), atol=1e-6)


def test_bad_input_names_the_argument() -> None:
    weights, rows, routing = draw_weights(4, 16, 8, torch.float32), torch.zeros(3, 16), draw_routing(3, 4, 2)
    layout = moeyard.moe_align_block_size(routing.topk_ids, num_experts=4, block_size=1)
    offsets, w13, w2 = layout.expert_offsets, weights.w13, weights.w2
    experts, product, layer = moeyard.fused_experts, moeyard.grouped_gemm, moeyard.moe_layer
    router = torch.zeros(4, 16)
    short_bias = ExpertWeights(w13, w2, torch.zeros(4, 15))
    bad: list[tuple[Any, type[Exception], str]] = [
        (lambda: experts(rows, routing, w13), TypeError, "weights: expected ExpertWeights, got Tensor"),
        (lambda: experts(rows.half(), routing, weights), TypeError, "weights.w13: expected dtype float16, got float32"),
        (lambda: experts(rows[:, :8], routing, weights), ValueError, r"hidden_states: expected 16 columns .* got 8"),
        (lambda: experts(rows[:2], routing, weights), ValueError, r"routing.topk_ids: expected shape \(2, 2\)"),
        (lambda: experts(rows, routing.topk_ids, weights), TypeError, "routing: expected a Routing, got Tensor"),
        (lambda: experts(rows, routing, ExpertWeights(w13, w13)), ValueError, "weights.w2: expected shape"),
        (lambda: experts(rows, routing, short_bias), ValueError, r"weights.w13_bias: expected shape \(4, 16\)"),
        (lambda: experts(rows, routing, weights, activation="silu"), TypeError, "activation: expected an Activation"),
        (lambda: experts(rows, routing, weights, num_experts=0), ValueError, "num_experts: expected an integer in"),
        (
            lambda: experts(rows, routing, weights, out=rows),
            ValueError,
            "out: expected memory apart from hidden_states",
        ),
        (lambda: experts(rows, routing, weights, out=rows.t()), ValueError, r"out: expected shape \(3, 16\)"),
        (
            lambda: experts(rows.double(), routing, wide_weights(weights), impl="cpu"),
            ValueError,
            "impl: 'cpu' refuses fused_experts: computes in float32",
        ),
        (lambda: Activation("swish"), ValueError, "name: expected one of"),
        (lambda: Activation("gelu", alpha=2.0), ValueError, "alpha: expected 1.0 for gelu"),
        (lambda: Activation(limit=-1.0), ValueError, "limit: expected a positive number or None, got -1.0"),
        (lambda: moeyard.activate(torch.zeros(2, 3)), ValueError, "rows: expected an even number of columns"),
        (lambda: product(rows, w13), ValueError, "layout: expected exactly one of"),
        (lambda: product(rows, w13, layout=layout, expert_offsets=offsets), ValueError, "layout: expected exactly"),
        (lambda: product(rows[:2], w13, layout=layout), ValueError, "rows: expected 3 or 6 rows"),
        (lambda: product(rows, w2, layout=layout), ValueError, "rows: expected 8 columns"),
        (lambda: product(rows, w13[:3], layout=layout), ValueError, "weight: expected 4 experts"),
        (
            lambda: product(rows, w13, expert_offsets=offsets, topk_weights=routing.topk_weights),
            ValueError,
            "topk_weights: expected a layout beside them",
        ),
        (lambda: product(rows, w13, expert_offsets=offsets[:3]), ValueError, r"expert_offsets: expected shape \(5,\)"),
        (
            lambda: product(rows[None], w13, expert_num_tokens=layout.expert_counts),
            ValueError,
            "rows: expected 4 batches",
        ),
        (lambda: layer(rows, torch.zeros(3, 16), weights, top_k=1), ValueError, "router_weight: expected shape"),
        (
            lambda: layer(rows, router, weights, top_k=1, shared_gate=rows[:1]),
            ValueError,
            "shared: expected the shared experts beside shared_gate",
        ),
        (lambda: layer(rows, router, weights, top_k=1, shared=weights), ValueError, "shared: expected one expert"),
    ]
    for call, kind, message in bad:
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize("impl", impls_on("fused_experts", CPU))
def test_a_shared_expert_may_be_one_more_expert_and_one_more_slot(impl: str) -> None:
    rows, routing, weights = torch.randn(21, 32), draw_routing(21, 6, 2), draw_weights(7, 32, 48, torch.float32)
    routed, shared = (
        ExpertWeights(weights.w13[part].contiguous(), weights.w2[part].contiguous())
        for part in (slice(0, 6), slice(6, 7))
    )
    ones = Routing(torch.ones(21, 1), torch.full((21, 1), 6, dtype=torch.int32))
    kept = torch.where(routing.topk_ids == 6, -1, routing.topk_ids)  # drawn as out of range, which now is in it
    both = Routing(torch.cat((routing.topk_weights, ones.topk_weights), 1), torch.cat((kept, ones.topk_ids), 1))
    got = moeyard.fused_experts(rows, both, weights, impl=impl)
    everyone = Routing(ones.topk_weights, torch.zeros_like(ones.topk_ids))
    apart = moeyard.fused_experts(rows, Routing(routing.topk_weights, kept), routed, impl=impl)
    torch.testing.assert_close(got, apart + moeyard.fused_experts(rows, everyone, shared, impl=impl))
    assert not torch.allclose(got, apart)


def test_grouped_products_are_float32_though_torch_rounds_them() -> None:
    """What the torch implementation does on a GPU, on a CPU: the errors are those of float32 sums, not of bfloat16."""
    rows, weight = torch.randn(40, 64).bfloat16(), torch.randn(5, 272, 64).bfloat16()
    ends = torch.tensor([3, 3, 20, 33, 40], dtype=torch.int32)
    expert = torch.bucketize(torch.arange(40), ends, right=True)
    wanted = (weight[expert].double() @ rows.double().unsqueeze(2)).squeeze(2)
    got = grouped_product(rows, weight, ends)
    assert got.dtype == torch.float32
    assert float((got.double() - wanted).abs().max()) < 2e-4 * float(wanted.abs().max())
