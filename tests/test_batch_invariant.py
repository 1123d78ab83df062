"""A token's experts give the same bits in any batch: what promises it, what refuses it, what depends on the count."""

import itertools
import json
from random import Random
from typing import Any

import pytest
import torch

import moeyard
from moeyard import GPT_OSS_ACTIVATION, Activation, Routing
from moeyard.bench.served import models, options_of, served
from moeyard.dispatch import invariance
from moeyard.dispatch.call import LayerFacts
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, INT8_CHANNEL, MXFP4, QuantScheme
from moeyard.testing import CPU, differing, draw_quantised, draw_routing, draw_weights, impls_on, python, sub_batches
from moeyard.warmup import facts_of

HOPPER = (9, 0)
needs_cpu = pytest.mark.skipif("cpu" not in impls_on("fused_experts", CPU), reason="numba is not installed")
LAYERS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16, "bias": True, "activation": GPT_OSS_ACTIVATION},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32, "gated": False, "activation": Activation("gelu")},
    **{str(scheme): {"dtype": torch.bfloat16, "scheme": scheme} for scheme in (FP8_BLOCK, INT8_CHANNEL, MXFP4)},
}


def layer(
    tokens: int, dtype: torch.dtype, scheme: QuantScheme | None = None, *, bias: bool = False, gated: bool = True,
    activation: Activation | None = None, **options: Any,
) -> tuple[tuple[torch.Tensor, ...], Any]:  # fmt: skip
    """Hidden states, router weights and ids; and their experts as a function of these."""
    experts, hidden, size = 6, 96, 80
    if scheme is None:
        weights = draw_weights(experts, hidden, size, dtype, bias=bias, gated=gated)
    else:
        weights = draw_quantised(experts, hidden, size, scheme, dtype, bias=bias, gated=gated)
    routing = draw_routing(tokens, experts, 3)

    def call(rows: torch.Tensor, factors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        options.setdefault("batch_invariant", True)
        return moeyard.fused_experts(rows, Routing(factors, ids), weights, activation=activation, **options)

    return (torch.randn(tokens, hidden).to(dtype), routing.topk_weights, routing.topk_ids), call


@needs_cpu
@pytest.mark.parametrize("name", LAYERS)
def test_no_token_depends_on_its_batch(name: str) -> None:
    tensors, call = layer(150, **LAYERS[name])
    count, wrong, first = differing(call, tensors, sub_batches(150, 200, Random(1)))
    assert (count, wrong) == (200, 0), first


@needs_cpu
def test_router_and_shared_expert_depend_on_no_batch_either() -> None:
    """With a gate of the shared expert: torch's sigmoid has another result in the last elements of a tensor."""
    weights, shared = draw_weights(16, 64, 48, torch.bfloat16), draw_weights(1, 64, 32, torch.bfloat16)
    router, bias, gate = (torch.randn(shape).bfloat16() for shape in ((16, 64), (16,), (1, 64)))

    def call(rows: torch.Tensor) -> torch.Tensor:
        return moeyard.moe_layer(
            rows, router, weights, router_bias=bias, shared=shared, shared_gate=gate, top_k=3, renormalize=True,
            batch_invariant=True,
        )  # fmt: skip

    rows = torch.randn(200, 64).bfloat16()
    count, wrong, first = differing(call, (rows,), sub_batches(200, 60, Random(2)))
    assert (count, wrong) == (60, 0), first
    usual = moeyard.moe_layer(
        rows, router, weights, router_bias=bias, shared=shared, shared_gate=gate, top_k=3, renormalize=True
    )
    assert torch.allclose(call(rows).float(), usual.float(), atol=0.05)


@needs_cpu
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_routers_depend_on_no_batch(scoring: str) -> None:
    for experts in (1, 5, 130):
        logits = torch.randn(3000, experts)

        def call(rows: torch.Tensor) -> torch.Tensor:
            routing = moeyard.route(rows, top_k=1, scoring=scoring, batch_invariant=True)
            return torch.cat((routing.topk_weights, routing.topk_ids.float()), 1)

        assert differing(call, (logits,), sub_batches(3000, 20, Random(3)))[1:] == (0, "")


def test_a_token_that_differs_is_seen() -> None:
    """What depends on the number of tokens, on their order, or on those before."""
    rows = torch.randn(50, 4)
    changes = (
        lambda x: x + len(x) * 1e-6,
        lambda x: x + torch.arange(len(x)).unsqueeze(1) * 1e-6,
        lambda x: x.cumsum(0),
        lambda x: torch.where(torch.rand(()) < 0.3, -x, x),
    )
    for change in changes:
        count, wrong, first = differing(change, (rows,), sub_batches(50, 40, Random(4)))
        assert count == 40 and wrong > 5 and "token" in first
    assert differing(lambda x: x * 2, (rows,), sub_batches(50, 40, Random(4))) == (40, 0, "")
    assert differing(lambda x: x * 2, (rows,), sub_batches(50, 40, Random(4)), lambda: False)[0] == 0


def test_batches_are_of_all_sizes_and_kinds() -> None:
    drawn = list(sub_batches(4096, 500, Random(5)))
    slices = [batch for batch in drawn if isinstance(batch, slice)]
    sizes = {len(range(4096)[b]) if isinstance(b, slice) else len(b) for b in drawn}
    assert len(slices) == 167 and min(sizes) == 1 and max(sizes) == 4096
    assert sum(size < 64 for size in sizes) > 20 and sum(size > 1024 for size in sizes) > 20
    assert any(not isinstance(b, slice) and len(b.unique()) < len(b) for b in drawn)


# Who refuses


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_sums_of_torch_are_refused(impl: str) -> None:
    (rows, factors, ids), call = layer(4, torch.float32, impl=impl)
    wanted = f"impl: '{impl}' refuses fused_experts: promises no batch-invariant result: torch chooses the order"
    with pytest.raises(ValueError, match=wanted):
        call(rows, factors, ids)
    with pytest.raises(ValueError, match=f"'{impl}' refuses route"):
        moeyard.route(rows, top_k=2, impl=impl, batch_invariant=True)
    with pytest.raises(ValueError, match="'auto' refuses fused_experts"):  # float64 is torch's alone
        layer(4, torch.float64)[1](rows.double(), factors, ids)


def test_what_is_no_choice_is_an_error() -> None:
    (rows, factors, ids), _ = layer(4, torch.float32)
    weights = draw_weights(6, 96, 80, torch.float32)
    for wrong in (1, "yes"):
        with pytest.raises(TypeError, match=f"batch_invariant: expected a bool or None, got {type(wrong).__name__}"):
            moeyard.fused_experts(rows, Routing(factors, ids), weights, batch_invariant=wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="batch_invariant: expected a bool or None"):
            moeyard.route(rows, top_k=2, batch_invariant=wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="batch_invariant: expected a bool or None"):
            moeyard.route_and_align(rows, top_k=2, block_size=1, batch_invariant=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_invariant: expected None or False for permute"):
        moeyard.explain("permute", batch_invariant=True)


def test_explain_says_who_promises_it() -> None:
    weights = draw_weights(8, 64, 48, torch.bfloat16)
    said = moeyard.explain("fused_experts", "cuda", weights=weights, num_tokens=1, top_k=2, batch_invariant=True)
    assert said.reasons["cuda (few tokens)"].startswith(("promises no batch-invariant", "cuda-core"))
    for name in ("torch", "reference"):
        assert said.reasons[name].startswith("promises no batch-invariant result")
    for name in ("cuda (products)", "triton"):
        assert not said.reasons[name].startswith("promises")
    usual = moeyard.explain("fused_experts", "cuda", weights=weights, num_tokens=1, top_k=2)
    assert not any("invariant" in reason for reason in usual.reasons.values())


# Gradients and compilers


@needs_cpu
def test_gradients_want_inputs_saved() -> None:
    weights = draw_weights(6, 32, 48, torch.float32)
    weights.w13.requires_grad_()
    routing, rows = draw_routing(9, 6, 2), torch.randn(9, 32)
    with pytest.raises(ValueError, match="save: expected 'inputs' for batch-invariant results with gradients"):
        moeyard.fused_experts(rows, routing, weights, batch_invariant=True)
    got = moeyard.fused_experts(rows, routing, weights, batch_invariant=True, save="inputs")
    got.sum().backward()
    with torch.no_grad():
        assert torch.equal(got, moeyard.fused_experts(rows, routing, weights, batch_invariant=True))
    found, weights.w13.grad = weights.w13.grad, None
    moeyard.fused_experts(rows, routing, weights, save="inputs").sum().backward()
    assert found is not None and torch.equal(found, weights.w13.grad)
    router = torch.randn(6, 32, requires_grad=True)
    moeyard.moe_layer(rows, router, weights, top_k=2, batch_invariant=True, save="inputs").sum().backward()
    assert router.grad is not None and bool(router.grad.any())


@needs_cpu
def test_compiled_calls_keep_it() -> None:
    tensors, call = layer(40, torch.bfloat16)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    count, wrong, first = differing(compiled, tensors, sub_batches(40, 6, Random(6)))
    assert (count, wrong) == (6, 0), first
    assert torch.equal(compiled(*tensors), call(*tensors))
    refused = torch.compile(layer(40, torch.bfloat16, impl="torch")[1], backend="eager")
    with pytest.raises(Exception, match="'torch' refuses fused_experts"):
        refused(*tensors)


def test_older_calls_of_registered_operators_stay_valid() -> None:
    """Without the option, which is listed last; opcheck calls them with it, too."""
    rows = torch.randn(5, 8)
    route = torch.ops.moeyard.route
    arguments = (rows, None, None, 2, "softmax", False, 1, 1, 1.0, "auto")
    assert torch.equal(route(*arguments)[0], route(*arguments, False)[0])
    for given in (arguments, (*arguments, "cpu" in impls_on("route", CPU))):
        torch.library.opcheck(route.default, given)
    weight = torch.randn(2, 4, 8)
    given = (rows, weight, None, None, None, 1, torch.tensor([0, 3]), torch.tensor([3, 2]).int(), 0, 5, "auto")
    product = torch.ops.moeyard.grouped_gemm
    assert torch.equal(product(*given), product(*given, False))


# The environment

ASK = """
import json, torch, moeyard
from moeyard import ExpertWeights, Routing
weights = ExpertWeights(torch.randn(3, 32, 16), torch.randn(3, 16, 16))
rows, routing = torch.randn(4, 16), Routing(torch.rand(4, 2), torch.zeros(4, 2, dtype=torch.int32))
def said(**options):
    try:
        moeyard.fused_experts(rows, routing, weights, **options)
    except ValueError as problem:
        return str(problem)
    return "answered"
chosen, asked = (moeyard.explain(op) for op in ("permute", "fused_experts"))
answers = said(impl="torch"), said(impl="torch", batch_invariant=False), said()
print(json.dumps([*answers, chosen.chosen, asked.call.batch_invariant]))
"""


def test_the_environment_has_the_default() -> None:
    done = python("-c", ASK, environment={"MOEYARD_BATCH_INVARIANT": "1"})
    assert done.returncode == 0, done.stderr
    named, asked, auto, other, explained = json.loads(done.stdout)
    assert named.startswith("impl: 'torch' refuses") and asked == "answered" and explained
    assert auto == "answered" or "cpu" not in impls_on("fused_experts", CPU)
    assert other == moeyard.explain("permute").chosen
    assert not invariance._read("0") and not invariance._read("")
    with pytest.raises(ValueError, match="MOEYARD_BATCH_INVARIANT: expected 0 or 1, got 'on'"):
        invariance._read("on")


# Plans

MOST = 16384
FREE = {"ROWS_A_TILE", "CONSUMER_GROUPS", "PRODUCTS_A_GROUP", "STAGES", "BLOCKS_A_PROCESSOR", "STREAMING", "GATHER",
        "TABLE_READY", "FINE_FROM_128"}  # fmt: skip
"""What a product may be compiled for by the number of tokens: which sums a block holds, and how operands come to it."""


def facts(model: str) -> LayerFacts:
    given = served(model)
    return facts_of(given.weights, **options_of(given), batch_invariant=True)


@pytest.mark.parametrize("model", ["mixtral-8x7b", "gpt-oss-120b", pytest.param("deepseek-v3", marks=pytest.mark.full)])
def test_on_hopper_no_count_changes_how_a_product_sums(model: str) -> None:
    """Each product has one kernel, but for what is free."""
    pytest.importorskip("cuda.bindings")
    from moeyard.cuda.ahead import CARDS
    from moeyard.cuda.walk import all_recipes

    given = facts(model)
    recipes = all_recipes(given, CARDS[HOPPER], MOST)
    assert "few_tokens.cu" not in {recipe.source for recipe in recipes}
    fixed = {
        tuple(sorted((name, value) for name, value in recipe.defines if name not in FREE))
        for recipe in recipes
        if recipe.source == "experts.cu"
    }
    assert len(fixed) == 2, fixed  # the router's product is a second one
    usual = all_recipes(given._replace(batch_invariant=False), CARDS[HOPPER], 8)
    assert "few_tokens.cu" in {recipe.source for recipe in usual}


QUICK = (("mixtral-8x7b", HOPPER), ("qwen3-30b-a3b", HOPPER), ("gpt-oss-120b", (8, 0)))


@pytest.mark.parametrize(
    ("model", "capability"),
    [
        pytest.param(*cell, marks=[] if cell in QUICK else pytest.mark.full)
        for cell in itertools.product(models(), ((8, 0), (8, 9), HOPPER))
    ],
)
def test_in_triton_all_counts_share_one_kernel(model: str, capability: tuple[int, int]) -> None:
    """Per product and for the sum; only layouts, which are integers, take others."""
    pytest.importorskip("triton")
    from moeyard.triton.ahead import CARDS, all_asked

    given = facts(model)._replace(shared=None)
    asked = all_asked(given, CARDS[capability], MOST)
    names = [one.kernel for one in asked if one.kernel in ("product_kernel", "combine_kernel")]
    assert sorted(names) == ["combine_kernel", *["product_kernel"] * 3], "the third is the router's"
    usual = all_asked(given._replace(batch_invariant=False), CARDS[capability], MOST)
    assert sum(one.kernel == "product_kernel" for one in usual) > 2


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), HOPPER], ids=str)
def test_the_tile_of_triton_is_that_of_a_middling_batch(capability: tuple[int, int]) -> None:
    """Which tests of compiled kernels cover."""
    pytest.importorskip("triton")
    from moeyard.triton.ahead import CARDS
    from moeyard.triton.plan import coded_tile, product_tile

    card, counts = CARDS[capability], (1, 16, 100, 1000, 10**5)
    for gated, size in itertools.product((False, True), (512, 4096)):
        for itemsize in (2, 4):
            how: dict[str, Any] = {"gated": gated, "itemsize": itemsize, "card": card}
            found = {product_tile(rows, 8, 768, size, **how, pinned=True) for rows in counts}
            assert found == {product_tile(8 * 40, 8, 768, size, **how)}
        for stepwise, native, wide in itertools.product((False, True), repeat=3):
            how = {"gated": gated, "stepwise": stepwise, "native": native, "wide": wide, "card": card}
            found = {coded_tile(rows, 8, 768, size, **how, pinned=True) for rows in counts}
            assert found == {coded_tile(8 * 40, 8, 768, size, **how)}


def test_rows_of_a_batch_lie_alike_for_triton() -> None:
    """One compiled kernel serves rows that begin anywhere and are any distance apart."""
    pytest.importorskip("triton")
    from moeyard.triton.steps import placed_alike

    rows = torch.randn(9, 20).half()
    assert placed_alike(rows) is rows
    for other in (rows[:, 1:], rows[1:, :8], rows[1:2], rows.t(), rows[::2], rows[:1].as_strided((1, 20), (1, 1))):
        placed = placed_alike(other)
        assert torch.equal(placed, other) and not placed.data_ptr() % 16
        assert placed.stride() == (placed.shape[1], 1)


def test_weights_of_4_bits_in_tiles_are_refused() -> None:
    weights = moeyard.pack_experts(draw_quantised(4, 128, 128, MXFP4, torch.bfloat16))
    said = moeyard.explain("fused_experts", "cuda", weights=weights, num_tokens=8, top_k=2, batch_invariant=True)
    of_tiles = [words for label, words in said.reasons.items() if label.startswith(("triton", "cuda"))]
    assert said.chosen == "none" and all("batch-invariant" in words or "takes no" in words for words in of_tiles), (
        of_tiles
    )
    usual = moeyard.explain("fused_experts", "cuda", weights=weights, num_tokens=8, top_k=2)
    assert usual.able


def test_weights_of_a_scheme_are_taken_where_they_are_otherwise() -> None:
    weights = draw_quantised(8, 128, 128, FP8_CHANNEL)
    said = moeyard.explain("fused_experts", "cuda", weights=weights, batch_invariant=True)
    assert not any(said.reasons[name].startswith("promises") for name in ("cuda (products)", "triton"))
