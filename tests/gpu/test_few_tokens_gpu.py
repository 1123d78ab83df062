"""The experts of a few tokens on the GPU: against float64 at the sizes of models, repeatable, overlapping."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional

from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, reference
from moeyard.cuda.experts.few_tokens import fused_experts_launch, unfit
from moeyard.cuda.experts.few_tokens_plan import ExpertSizes, few_tokens_are_quicker, few_tokens_plan
from moeyard.cuda.runtime.cards import card_of
from moeyard.dispatch import table
from moeyard.dispatch.call import Call, facts_of_experts
from moeyard.testing import SOURCE, guard_broken, no_worse, poisoned, same_bits
from moeyard.values import ExpertCall

REFUSAL = table.explain("route", "cuda").reasons["cuda"]
pytestmark = [pytest.mark.skipif(REFUSAL != "chosen", reason=f"cuda: {REFUSAL}")]
CUDA = torch.device("cuda")
MODELS = {  # top_k, hidden size, intermediate size; experts are as few as the memory of a small card wants
    "Mixtral": (2, 4096, 14336),
    "Qwen3-30B": (8, 2048, 768),
    "DeepSeek-V3": (8, 7168, 2048),
    "gpt-oss-120b": (4, 2880, 2880),
    "Qwen3-Next": (10, 2048, 512),
    "Qwen3-Next / 4": (10, 2048, 128),
    "Qwen3-235B / 8": (8, 4096, 192),
    "Gemma4": (8, 2816, 704),
    "odd": (3, 8 * 37, 8 * 131),
    "one word": (1, 8, 8),
}
VARIANTS: list[dict[str, Any]] = [
    {"warps": 16, "segment": 64},
    {"warps": 4, "segment": 256},
    {"ring_bytes": 48 << 10},
    {"trigger": 1 << 20},
    {"trigger": 4, "evict_first": False},
]
PROBE = """
import torch
from moeyard import Activation, ExpertWeights
from moeyard.cuda.experts.few_tokens import fused_experts_launch
from moeyard.cuda.experts.few_tokens_plan import ExpertSizes, few_tokens_plan
from moeyard.cuda.runtime.cards import card_of
from moeyard.values import ExpertCall
for tokens, top_k, hidden, size in ((1, 8, 2048, 768), (2, 3, 296, 1048)):
    for variant in ({}, {"trigger": 1 << 20}):
        rows = torch.randn(tokens, hidden, device="cuda").bfloat16()
        weights = ExpertWeights(torch.randn(9, 2 * size, hidden, device="cuda").bfloat16(),
                                torch.randn(9, hidden, size, device="cuda").bfloat16())
        ids = torch.randint(-1, 10, (tokens, top_k), device="cuda", dtype=torch.int32)
        plan = few_tokens_plan(ExpertSizes(tokens, top_k, hidden, size, True), card_of(0), **variant)
        for _ in range(20):
            fused_experts_launch(rows, torch.rand(tokens, top_k, device="cuda"), ids,
                                 ExpertCall(weights, Activation(), 9), out=torch.empty_like(rows), chosen=plan)
        torch.cuda.synchronize()
print("finished")
"""


@pytest.fixture(scope="module", autouse=True)
def _returns() -> None:
    """Nothing else runs here before kernels that wait for copies are seen to end, in a process that may be killed."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("bulk copies came with compute capability 9.0")
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        check=False,
        timeout=40,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr[-2000:]


def draw(
    experts: int, hidden: int, size: int, dtype: torch.dtype, *, gated: bool = True, bias: bool = False
) -> ExpertWeights:
    wide = size * (1 + gated)
    return ExpertWeights(
        torch.randn(experts, wide, hidden, device=CUDA, dtype=dtype).div_(hidden**0.5),
        torch.randn(experts, hidden, size, device=CUDA, dtype=dtype).div_(size**0.5),
        torch.randn(experts, wide, device=CUDA, dtype=dtype) if bias else None,
        torch.randn(experts, hidden, device=CUDA, dtype=dtype) if bias else None,
        gated,
    )


def launch(
    rows: torch.Tensor,
    factors: torch.Tensor,
    ids: torch.Tensor,
    weights: ExpertWeights,
    *,
    out: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    chosen = {name: options.pop(name) for name in ("chosen",) if name in options}
    call = ExpertCall(weights, **{"activation": Activation(), "num_experts": weights.num_local_experts, **options})
    if out is None:
        out = poisoned(tuple(rows.shape), rows.dtype, CUDA)
        fused_experts_launch(rows, factors, ids, call, out=out, **chosen)
        assert not guard_broken(out)
    else:
        fused_experts_launch(rows, factors, ids, call, out=out, **chosen)
    return out


def by_hand(
    rows: torch.Tensor,
    factors: torch.Tensor,
    local: torch.Tensor,
    weights: ExpertWeights,
    dtype: torch.dtype,
    activation: Activation,
    on_input: bool,
) -> torch.Tensor:
    """Route by route at a dtype, local experts below 0 dropped: float64 for the answer, the rows' for a plain one."""
    result = torch.zeros(rows.shape, dtype=dtype, device=CUDA)
    for token in range(len(rows)):
        for k, expert in enumerate(local[token].tolist()):
            if not 0 <= expert < weights.num_local_experts:
                continue
            factor = factors[token, k].to(torch.promote_types(dtype, torch.float32))
            row = rows[token : token + 1].to(dtype)
            row = (row * factor).to(dtype) if on_input else row
            b13, b2 = (None if b is None else b[expert].to(dtype) for b in (weights.w13_bias, weights.w2_bias))
            row = functional.linear(row, weights.w13[expert].to(dtype), b13)
            if dtype == torch.float64:
                row = reference.activate(row, activation, gated=weights.gated)
            else:
                row = plain(row, activation, weights.gated)
            row = functional.linear(row, weights.w2[expert].to(dtype), b2)[0]
            result[token] += row if on_input else (row * factor).to(dtype)
    return result


def plain(row: torch.Tensor, activation: Activation, gated: bool) -> torch.Tensor:
    gate, up = row.chunk(2, 1) if gated else (row, None)
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = None if up is None else up.clamp(-activation.limit, activation.limit)
    if activation.name == "silu":
        gate = gate * torch.sigmoid(gate * activation.alpha)
    elif activation.name == "relu2":
        gate = functional.relu(gate).square()
    else:
        gate = functional.gelu(gate, approximate="tanh" if activation.name == "gelu_tanh" else "none")
    return gate if up is None else gate * (up + activation.beta)


def is_right(
    got: torch.Tensor,
    rows: torch.Tensor,
    factors: torch.Tensor,
    local: torch.Tensor,
    weights: ExpertWeights,
    activation: Activation | None = None,
    on_input: bool = False,
) -> bool:
    what = (weights, torch.float64, activation or Activation(), on_input)
    wide = by_hand(rows, factors, local, *what)
    if got.numel() < 200:  # too few for one largest error to be like another
        bound = 2 * torch.finfo(rows.dtype).eps * wide.abs().max()
        return bool(((got.double() - wide).abs() <= bound).all())
    honest = by_hand(rows, factors, local, weights, rows.dtype, activation or Activation(), on_input)
    return no_worse(got, honest, wide)


@pytest.mark.parametrize("model", MODELS)
def test_models(model: str) -> None:
    top_k, hidden, size = MODELS[model]
    weights = draw(top_k + 2, hidden, size, torch.bfloat16)
    for tokens in (1, 2) if model in ("Qwen3-30B", "DeepSeek-V3", "Qwen3-Next / 4", "odd") else (1,):
        rows, factors = torch.randn(tokens, hidden, device=CUDA).bfloat16(), torch.rand(tokens, top_k, device=CUDA)
        ids = torch.stack([torch.randperm(top_k + 2, device=CUDA)[:top_k] for _ in range(tokens)]).int()
        got = launch(rows, factors, ids, weights)
        assert is_right(got, rows, factors, ids, weights)
        assert not is_right(got, rows, factors.roll(1, 1) if top_k > 1 else factors + 1, ids, weights)
        assert all(same_bits(launch(rows, factors, ids, weights), got) for _ in range(30))


@pytest.mark.parametrize("kind", ["gpt-oss", "gelu", "gelu_tanh", "relu2", "limited", "on input"])
def test_every_activation(kind: str) -> None:
    activation = GPT_OSS_ACTIVATION if kind == "gpt-oss" else Activation("silu", limit=0.5)
    if kind not in ("gpt-oss", "limited"):
        activation = Activation("silu" if kind == "on input" else kind)
    for tokens, top_k, hidden, size, gated, dtype in (
        (3, 5, 264, 200, True, torch.float16 if kind in ("gelu", "limited") else torch.bfloat16),
        (1, 6, 1024, 136, False, torch.bfloat16 if kind in ("gelu", "limited") else torch.float16),
    ):
        weights = draw(6, hidden, size, dtype, gated=gated, bias=kind in ("gpt-oss", "on input"))
        rows, factors = torch.randn(tokens, hidden, device=CUDA).to(dtype), torch.rand(tokens, top_k, device=CUDA)
        ids = torch.randint(0, 6, (tokens, top_k), device=CUDA, dtype=torch.int32)
        options = {"activation": activation, "weight_on_input": kind == "on input"}
        got = launch(rows, factors, ids, weights, **options)
        assert is_right(got, rows, factors, ids, weights, activation, kind == "on input")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants(variant: dict[str, Any]) -> None:
    tokens, top_k, hidden, size = 2, 4, 2880, 704
    weights = draw(top_k + 1, hidden, size, torch.bfloat16)
    plan = few_tokens_plan(ExpertSizes(tokens, top_k, hidden, size, True), card_of(0), **variant)
    rows, factors = torch.randn(tokens, hidden, device=CUDA).bfloat16(), torch.rand(tokens, top_k, device=CUDA)
    ids = torch.stack([torch.randperm(top_k + 1, device=CUDA)[:top_k] for _ in range(tokens)]).int()
    got = launch(rows, factors, ids, weights, chosen=plan)
    assert is_right(got, rows, factors, ids, weights)
    assert all(same_bits(launch(rows, factors, ids, weights, chosen=plan), got) for _ in range(30))


def test_dropped_routes_maps_and_wide_ids() -> None:
    weights, experts = draw(5, 512, 192, torch.bfloat16, bias=True), 11
    mapping = torch.tensor([-1, 3, 5, 0, 2**31 - 1, -7, 1, 2, 4, 9, -1], dtype=torch.int32, device=CUDA)
    for tokens, top_k in ((1, 8), (4, 8), (32, 1)):
        rows, factors = torch.randn(tokens, 512, device=CUDA).bfloat16(), torch.rand(tokens, top_k, device=CUDA)
        ids = torch.randint(-2, experts + 2, (tokens, top_k), device=CUDA)
        local = torch.where((ids >= 0) & (ids < experts), mapping[ids.clamp(0, experts - 1)], -1)
        for given in (ids, ids.int()):
            got = launch(rows, factors, given, weights, expert_map=mapping, num_experts=experts)
            assert is_right(got, rows, factors, local, weights)
        far = torch.where(ids < 0, ids + 2**32, ids)  # not the expert that 32 bits of it would be
        assert is_right(launch(rows, factors, far, weights), rows, factors, torch.where(far < 5, far, -1), weights)
        nobody = launch(rows, factors, torch.full_like(ids, -1), weights)
        assert same_bits(nobody, torch.zeros_like(rows))
    launch(rows[:0], factors[:0], ids[:0], weights)


def test_strides_and_refusals() -> None:
    whole = draw(6, 256, 64, torch.bfloat16)
    weights = ExpertWeights(whole.w13[::2], whole.w2[1::2])
    rows = torch.randn(2, 3 * 256, device=CUDA).bfloat16()
    factors, ids = torch.rand(2, 2, device=CUDA), torch.tensor([[0, 2], [1, 0]], device=CUDA, dtype=torch.int32)
    for given in (rows[:, 256:512], rows[:, 1:257], rows[:, ::3]):
        assert is_right(launch(given, factors, ids, weights), given, factors, ids, weights)
    turned = ExpertWeights(whole.w13.transpose(1, 2).contiguous().transpose(1, 2), whole.w2)
    refusal = unfit(Call(rows.device, torch.bfloat16, facts_of_experts(turned), 2, 2, 3))
    assert refusal is not None and refusal.startswith("weights.w13: expected a contiguous tensor")
    with pytest.raises(ValueError, match="expected at most 32 routes"):
        launch(rows[:1, :256].repeat(40, 1), torch.rand(40, 1, device=CUDA), ids[:1, :1].repeat(40, 1), weights)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(("tokens", "top_k", "hidden", "size"), [(1, 8, 2048, 768), (2, 4, 1024, 256)])
def test_layers_that_overlap_see_each_other(tokens: int, top_k: int, hidden: int, size: int) -> None:
    """Each layer's tokens and ids come from the one before it, by kernels that end just before it may start."""
    layers = [draw(16, hidden, size, torch.bfloat16) for _ in range(6)]
    state, factors = torch.randn(tokens, hidden, device=CUDA).bfloat16(), torch.rand(tokens, top_k, device=CUDA)
    ids = torch.zeros(tokens, top_k, dtype=torch.int32, device=CUDA)

    def step(rows: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
        ids.copy_(rows[:, :16].float().topk(top_k).indices)
        out = launch(rows, factors, ids, weights, out=torch.empty_like(rows))
        return out / out.float().square().mean().sqrt().to(out.dtype)

    def whole() -> torch.Tensor:
        rows = state
        for weights in layers:
            rows = step(rows, weights)
        once = launch(rows, factors, ids, layers[0], out=torch.empty_like(rows))  # nothing in between these two
        return launch(once, factors, ids, layers[1], out=torch.empty_like(rows))

    whole()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = whole()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(30):
        state.copy_(torch.randn_like(state))
        rows = state
        for weights in layers:
            rows = step(rows, weights)
            torch.cuda.synchronize()
        once = launch(rows, factors, ids, layers[0])
        torch.cuda.synchronize()
        alone = launch(once, factors, ids, layers[1])
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(result, alone) and bool(alone.isfinite().all())


def test_a_graph_where_copies_and_fills_come_first() -> None:
    """What is no kernel cannot let the next launch in early, and must still be waited for."""
    weights, factors = draw(6, 512, 128, torch.bfloat16), torch.rand(1, 4, device=CUDA)
    given, rows = torch.randn(1, 512, device=CUDA).bfloat16(), torch.zeros(1, 512, device=CUDA).bfloat16()
    ids = torch.tensor([[5, 0, 3, 2]], dtype=torch.int32, device=CUDA)
    out = torch.empty_like(rows)
    launch(rows, factors, ids, weights, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows.copy_(given)
        launch(rows, factors, ids, weights, out=out)
        kept = out.clone()
        ids.zero_()
        launch(rows, factors, ids, weights, out=out)
    for _ in range(5):
        given.copy_(torch.randn_like(given))
        ids.copy_(torch.tensor([[1, 2, 4, 5]]))
        wanted = launch(given, factors, ids, weights)
        wanted_after = launch(given, factors, torch.zeros_like(ids), weights)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(kept, wanted) and same_bits(out, wanted_after)


def test_it_is_chosen_where_it_should_be() -> None:
    assert few_tokens_are_quicker(ExpertSizes(1, 8, 2048, 768, True), 128, card_of(0))
