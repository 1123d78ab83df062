"""On a GPU a token's experts give the same bits in any batch, on both sides of every size at which plans change."""

import faulthandler
import sys
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch

import moeyard
from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Routing
from moeyard.dispatch.schemes import TAKES
from moeyard.dispatch.sizes import changes
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR_STATIC, FP8_WEIGHTS, INT8_CHANNEL, QuantScheme
from moeyard.testing import differing, draw_quantised, draw_routing, draw_weights, impls_on, same_bits, sub_batches
from moeyard.testing.quantised import moved_to
from moeyard.values import ExpertCall
from moeyard.warmup import facts_of

CUDA = torch.device("cuda")
IMPLS = [name for name in impls_on("fused_experts", CUDA) if name in ("cuda", "triton")]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
CASES: dict[str, dict[str, Any]] = {  # experts, top_k, hidden, size
    "narrow": {"sizes": (64, 8, 1024, 384)},
    "gpt-oss": {"sizes": (16, 4, 720, 720), "bias": True, "activation": GPT_OSS_ACTIVATION},
    "few experts": {"sizes": (4, 2, 2048, 1024), "activation": Activation("gelu_tanh")},
    "not gated": {"sizes": (8, 1, 512, 176), "gated": False, "activation": Activation("relu2")},
}
WHOLE = 3000
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def _ends_a_hang() -> Iterator[None]:
    """A kernel that never ends takes the process with it, not the machine. First calls compile."""
    faulthandler.dump_traceback_later(180, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def draw(
    name: str, dtype: torch.dtype, scheme: QuantScheme | None = None
) -> tuple[tuple[torch.Tensor, ...], ExpertWeights, Activation | None]:
    """Tokens, their router weights and ids; the experts and their activation."""
    case = CASES[name]
    experts, top_k, hidden, size = case["sizes"]
    shape = {"gated": case.get("gated", True), "bias": case.get("bias", False)}
    if scheme is None:
        weights = draw_weights(experts, hidden, size, dtype, device=CUDA, **shape)
    else:
        weights = moved_to(draw_quantised(experts, hidden, size, scheme, dtype, **shape), CUDA)
    routing = draw_routing(WHOLE, experts, top_k, device=CUDA)
    rows = torch.randn(WHOLE, hidden, device=CUDA).to(dtype)
    return (rows, routing.topk_weights, routing.topk_ids), weights, case.get("activation")


def called(weights: ExpertWeights, activation: Activation | None, impl: str, invariant: bool = True) -> Call:
    return lambda rows, factors, ids: moeyard.fused_experts(
        rows, Routing(factors, ids), weights, activation=activation, batch_invariant=invariant, impl=impl
    )


def warmed(
    name: str, dtype: torch.dtype, impl: str, scheme: QuantScheme | None = None
) -> tuple[tuple[torch.Tensor, ...], ExpertWeights, Call]:
    """Tokens, experts, and batch-invariant calls of them, whose kernels are compiled beside each other."""
    tensors, weights, activation = draw(name, dtype, scheme)
    moeyard.warmup(
        weights, impl=impl, top_k=tensors[2].shape[1], max_tokens=WHOLE, activation=activation, dtype=dtype,
        batch_invariant=True,
    )  # fmt: skip
    return tensors, weights, called(weights, activation, impl)


def around_changes(weights: ExpertWeights, top_k: int, impl: str) -> Iterator[slice]:
    """Batches of as many tokens as change what is launched by default, and of one fewer, from either end."""
    facts = facts_of(weights, top_k=top_k)
    if impl == "cuda":
        from moeyard.cuda.runtime.cards import card_of
        from moeyard.cuda.walk import all_recipes

        counts = set(all_recipes(facts, card_of(torch.cuda.current_device()), WHOLE).values())
    else:
        from moeyard.triton import ahead
        from moeyard.triton.launch import card, planning

        here = card(torch.device("cuda", torch.cuda.current_device()))

        def asked(tokens: int) -> Any:
            with planning(here) as plan:
                ahead._experts(facts, facts.weights, top_k, facts.num_experts, tokens)
            return plan.asked.keys()

        counts = set(changes(asked, WHOLE))
    for count in sorted({max(1, at - off) for at in counts for off in (0, 1)}):
        yield slice(0, count)
        yield slice(WHOLE - count, WHOLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", IMPLS)
def test_no_token_depends_on_its_batch(impl: str, name: str, dtype: torch.dtype) -> None:
    tensors, weights, call = warmed(name, dtype, impl)
    count, wrong, first = differing(call, tensors, sub_batches(WHOLE, 100, Random(1)))
    assert (count, wrong) == (100, 0), first
    count, wrong, first = differing(call, tensors, around_changes(weights, tensors[2].shape[1], impl))
    assert count >= 8 and wrong == 0, first


@pytest.mark.skipif(not HOPPER, reason="cuda has products of a few tokens and of many on Hopper")
def test_without_the_option_tokens_depend_on_it() -> None:
    """What the tests here would see."""
    tensors, weights, activation = draw("narrow", torch.bfloat16)
    _, wrong, _ = differing(called(weights, activation, "cuda", False), tensors, sub_batches(WHOLE, 60, Random(1)))
    assert wrong > 0


@pytest.mark.skipif("triton" not in IMPLS, reason="triton is not installed")
def test_float32_depends_on_no_batch() -> None:
    tensors, weights, activation = draw("not gated", torch.float32)
    assert differing(called(weights, activation, "triton"), tensors, sub_batches(WHOLE, 40, Random(2)))[1:] == (0, "")


@pytest.mark.parametrize("scheme", [FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL, FP8_TENSOR_STATIC, FP8_WEIGHTS], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_codes_depend_on_no_batch(impl: str, scheme: QuantScheme) -> None:
    if impl == "cuda" and not TAKES["cuda (products)"](scheme):
        pytest.skip("products of cuda do not take the scheme")
    if impl == "cuda" and scheme.static:
        pytest.skip("products of cuda take no static scales")
    tensors, _, call = warmed("narrow", torch.bfloat16, impl, scheme)
    count, wrong, first = differing(call, tensors, sub_batches(WHOLE, 60, Random(3)))
    assert (count, wrong) == (60, 0), first


@pytest.mark.skipif(not HOPPER, reason="the products of cuda are for Hopper")
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [(None, torch.bfloat16), (None, torch.float16), (FP8_BLOCK, torch.float16), (INT8_CHANNEL, torch.bfloat16)],
    ids=str,
)
def test_all_heights_of_tiles_give_the_same_bits(scheme: QuantScheme | None, dtype: torch.dtype) -> None:
    """Also rows that are copied first, and steps of 32: what plans choose by the number of tokens."""
    from moeyard.cuda.experts.launchers import fused_experts_launch
    from moeyard.cuda.experts.plan import Way

    (rows, factors, ids), weights, activation = draw("narrow", dtype, scheme)
    call = ExpertCall(weights, activation or Activation(), weights.num_local_experts)

    def answer(way: Way, tokens: int) -> torch.Tensor:
        out = torch.empty_like(rows[:tokens])
        fused_experts_launch(rows[:tokens], factors[:tokens], ids[:tokens], call, out=out, way=way)
        return out

    heights = (8, 16, 32, 64, 128, 192) if scheme is None else (8, 32, 128)
    ways = [Way(copied, height) for height in heights for copied in (False, True) if not copied or height in (16, 128)]
    for tokens in (5, 1100):
        wanted = answer(ways[0], tokens)
        for way in (*ways[1:], Way(rows=128, fine=32)):
            assert same_bits(answer(way, tokens), wanted), (way, tokens)


@pytest.mark.parametrize("experts", [8, 128, 300, 1500])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_routers_depend_on_no_batch(scoring: str, experts: int) -> None:
    """One kernel for router and layout included."""
    logits = torch.randn(WHOLE, experts, device=CUDA).bfloat16()
    router: dict[str, Any] = {"top_k": 6, "scoring": scoring, "renormalize": True, "batch_invariant": True}

    def both(routing: Routing) -> torch.Tensor:
        return torch.cat((routing.topk_weights, routing.topk_ids.float()), 1)

    whole = both(moeyard.route(logits, **router))
    for batch in (*sub_batches(WHOLE, 40, Random(4)), *(slice(7, 7 + n) for n in (1, 2, 3, 16, 17, 64, 65, 133, 265))):
        where = batch if isinstance(batch, slice) else batch.to(CUDA)
        assert same_bits(both(moeyard.route(logits[where], **router)), whole[where])
        routing, _ = moeyard.route_and_align(logits[where], block_size=16, **router)
        assert same_bits(both(routing), whole[where])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("router_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layers_depend_on_no_batch(impl: str, router_dtype: torch.dtype) -> None:
    (rows, _, _), weights, _ = warmed("narrow", torch.bfloat16, impl)
    shared = draw_weights(1, rows.shape[1], 256, torch.bfloat16, device=CUDA)
    router, gate = (torch.randn(n, rows.shape[1], device=CUDA).to(router_dtype) / 32 for n in (64, 1))
    options: dict[str, Any] = {
        "shared": shared, "shared_gate": gate, "top_k": 8, "renormalize": True, "impl": impl,
    }  # fmt: skip

    def call(some: torch.Tensor) -> torch.Tensor:
        return moeyard.moe_layer(some, router, weights, batch_invariant=True, **options)

    count, wrong, first = differing(call, (rows,), sub_batches(WHOLE, 60, Random(5)))
    assert (count, wrong) == (60, 0), first
    usual = moeyard.moe_layer(rows, router, weights, **options)
    error = (call(rows).float() - usual.float()).square().mean().sqrt()
    assert float(error) < 0.1, "logits that are rounded differently may choose other experts for a few tokens"


@pytest.mark.parametrize("impl", IMPLS)
def test_graphs_keep_it(impl: str) -> None:
    """A graph of 32 tokens, 20 of which a batch of 20 has, too."""
    (rows, factors, ids), _, call = warmed("narrow", torch.bfloat16, impl)
    wanted = call(rows[:20], factors[:20], ids[:20])
    call(rows[:32], factors[:32], ids[:32])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(rows[:32], factors[:32], ids[:32])
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(got[:20], wanted)


def gradients_called(weights: ExpertWeights, activation: Activation | None, impl: str, **options: Any) -> Any:
    """(rows, factors, ids, upstream) -> gradients of rows and of router weights, side by side."""

    def call(rows: torch.Tensor, factors: torch.Tensor, ids: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
        given = [t.clone().requires_grad_() for t in (rows, factors)]
        answer = moeyard.fused_experts(
            given[0], Routing(given[1], ids), weights, activation=activation, save="inputs", impl=impl, **options
        )
        return torch.cat([one.float() for one in torch.autograd.grad(answer, given, upstream)], 1)

    return call


@pytest.mark.parametrize("on_input", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["narrow", "gpt-oss", "not gated"])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_of_a_token_depends_on_its_batch(impl: str, name: str, dtype: torch.dtype, on_input: bool) -> None:
    tensors, weights, activation = draw(name, dtype)
    given = (*tensors, torch.randn_like(tensors[0]))
    options = {"batch_invariant": True, "apply_router_weight_on_input": on_input}
    call = gradients_called(weights, activation, impl, **options)
    count, wrong, first = differing(call, given, sub_batches(WHOLE, 40, Random(6)))
    assert (count, wrong) == (40, 0), first
    count, wrong, first = differing(call, given, around_changes(weights, tensors[2].shape[1], impl))
    assert count >= 8 and wrong == 0, first


def test_parts_of_columns_depend_on_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large batch has its gradient of hidden states made in parts of columns, a small one at once."""
    tensors, weights, activation = draw("narrow", torch.bfloat16)
    monkeypatch.setattr(sys.modules["moeyard.grouped_gemm"], "_MOST_SPREAD_BYTES", 1 << 22)
    call = gradients_called(weights, activation, "auto", batch_invariant=True)
    given = (*tensors, torch.randn_like(tensors[0]))
    assert differing(call, given, sub_batches(WHOLE, 20, Random(7)))[1:] == (0, "")


@pytest.mark.parametrize("outer", ["cuda", "triton"])
def test_gradients_of_weights_depend_on_their_own_tokens_alone(outer: str) -> None:
    """Whatever goes to other experts beside them: a sum goes over an expert's rows in the order of tokens."""
    experts, top_k, columns, size, mine = 8, 2, 512, 256, 3
    ids = draw_routing(WHOLE, experts, top_k, device=CUDA).topk_ids
    grads, rows = (torch.randn(n, width, device=CUDA).bfloat16() for n, width in ((WHOLE, columns), (WHOLE, size)))

    def gradient(where: torch.Tensor) -> torch.Tensor:
        layout = moeyard.moe_align_block_size(ids[where], num_experts=experts, block_size=1)
        segments = (layout.sorted_token_ids, top_k, top_k, layout.expert_offsets[:-1], layout.expert_counts, True)
        result: torch.Tensor = sys.modules["moeyard.grouped_gemm"].GROUPED_OUTER(
            (grads[where], rows[where], *segments), outer
        )
        return result[mine]

    has = (ids == mine).any(1)
    own, others = torch.where(has)[0], torch.where(~has)[0]
    try:
        wanted = gradient(own)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    for some in (others, others[:100]):
        assert same_bits(gradient(torch.cat((own, some)).sort().values), wanted)
