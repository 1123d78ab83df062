"""Many tokens with weights of 4 bits by experts.cu on Hopper: against float64, in all tiles, repeatable, in graphs."""

from typing import Any

import pytest
import torch

from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Routing, fused_experts, pack_experts
from moeyard.cuda.experts.four_bits_many import fused_experts_launch, interleave
from moeyard.cuda.experts.four_bits_many_plan import PLANNED, Tile
from moeyard.dispatch import table
from moeyard.quant import MXFP4, NVFP4, QuantScheme, int4_scheme
from moeyard.testing import draw_routing, guard_broken, poisoned, same_bits
from moeyard.testing.budgets import judged_experts
from moeyard.testing.quantised import draw_quantised, moved_to
from moeyard.values import ExpertCall

REFUSAL = table.explain("grouped_gemm", "cuda").reasons["cuda"]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not HOPPER, reason=f"needs a GPU of compute capability 9.0: {REFUSAL}")
CUDA = torch.device("cuda")
SCHEMES = (
    MXFP4, NVFP4, int4_scheme(), int4_scheme(32), int4_scheme(64), int4_scheme(0), int4_scheme(128, zero_points=True),
    int4_scheme(32, zero_points=True), int4_scheme(0, zero_points=True),
)  # fmt: skip
MODELS = {  # top_k, hidden size, intermediate size, experts (fewer than the models have), tokens
    "gpt-oss-120b": (4, 2880, 2880, 16, (65, 257, 1500)),
    "Qwen3-30B": (8, 2048, 768, 32, (65, 300, 2000)),
    "Mixtral": (2, 4096, 1792, 8, (129,)),
    "Qwen3-Next": (10, 2048, 512, 64, (333,)),
    "small": (3, 64, 64, 5, (1, 17, 100, 700)),
}
_ALL = (Tile(16), Tile(32), Tile(32, 1, 2), Tile(48), Tile(64), Tile(64, 2, 1), Tile(128))
TILES = {True: (*_ALL, Tile(160)), False: _ALL}
"""By whether weights are scaled."""


def drawn(model: str, scheme: QuantScheme, dtype: torch.dtype, **options: Any) -> tuple[ExpertWeights, ExpertWeights]:
    """A layer on the GPU in rows, and in tiles."""
    _, hidden, size, experts, _ = MODELS[model]
    rows = moved_to(draw_quantised(experts, hidden, size, scheme, dtype, **options), CUDA)
    return rows, pack_experts(rows)


def rows_of(tokens: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of several magnitudes, between NaN."""
    room = torch.full((tokens, hidden + 128), torch.nan, dtype=dtype, device=CUDA)
    room[:, 64:-64] = torch.randn(tokens, hidden).to(dtype) * torch.exp2(torch.randint(-3, 4, (tokens, 1))).to(dtype)
    return room[:, 64:-64]


def by_name(
    rows: torch.Tensor, routing: Routing, weights: ExpertWeights, *, tile: Tile = PLANNED, num_experts: int = 0,
    activation: Activation | None = None, expert_map: torch.Tensor | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The launcher itself: few tokens would go another way by name, too."""
    out = torch.empty_like(rows, memory_format=torch.contiguous_format) if out is None else out
    call = ExpertCall(
        weights, activation or Activation(), num_experts or weights.num_local_experts, expert_map
    )  # fmt: skip
    fused_experts_launch(rows, routing.topk_weights, routing.topk_ids, call, out=out, tile=tile)
    return out


def wrong(got: torch.Tensor, rows: torch.Tensor, routing: Routing, plain: ExpertWeights, **options: Any) -> str | None:
    """Every row against float64, on the GPU."""
    with torch.device(CUDA):
        judged = judged_experts(rows, routing, plain, **options)
    return type(judged)(judged.wide.cpu(), judged.budget.cpu()).error(got)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_models(model: str, scheme: QuantScheme) -> None:
    top_k, hidden, _, experts, counts = MODELS[model]
    oss = model == "gpt-oss-120b"
    plain, weights = drawn(model, scheme, torch.bfloat16, bias=oss)
    activation = GPT_OSS_ACTIVATION if oss else Activation()
    for tokens in counts:
        rows, routing = rows_of(tokens, hidden, torch.bfloat16), draw_routing(tokens, experts, top_k, device=CUDA)
        out = poisoned(tuple(rows.shape), rows.dtype, CUDA)
        got = by_name(rows, routing, weights, activation=activation, out=out)
        assert not guard_broken(out)
        assert wrong(got, rows, routing, plain, activation=activation) is None, f"{tokens} tokens"
        mistaken = Routing(routing.topk_weights.roll(1, 1), routing.topk_ids)
        assert wrong(got, rows, mistaken, plain, activation=activation) is not None
        again = (by_name(rows, routing, weights, activation=activation) for _ in range(10))
        assert all(same_bits(one, got) for one in again)
        if tokens > 64:
            assert same_bits(fused_experts(rows, routing, weights, impl="cuda", activation=activation), got)


@pytest.mark.parametrize("scheme", [MXFP4, NVFP4, int4_scheme(), int4_scheme(32, zero_points=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_tiles(scheme: QuantScheme, dtype: torch.dtype) -> None:
    plain, weights = drawn("Qwen3-30B", scheme, dtype, bias=True)
    top_k, hidden, _, experts, _ = MODELS["Qwen3-30B"]
    scaled = scheme.weights == "e2m1" and (scheme == NVFP4 or dtype == torch.bfloat16)
    for tokens in (3, 70, 500):
        rows, routing = rows_of(tokens, hidden, dtype), draw_routing(tokens, experts, top_k, device=CUDA)
        for tile in TILES[scaled]:
            got = by_name(rows, routing, weights, tile=tile)
            assert wrong(got, rows, routing, plain) is None, f"{tokens} tokens, {tile}"
            assert all(same_bits(by_name(rows, routing, weights, tile=tile), got) for _ in range(10))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", ["float16", "not gated", "mapped", "one expert", "strange"])
def test_every_kind_of_call(kind: str, scheme: QuantScheme) -> None:
    top_k, hidden, _, experts, _ = MODELS["small"]
    dtype = torch.float16 if kind in ("float16", "not gated") else torch.bfloat16
    plain, weights = drawn("small", scheme, dtype, gated=kind != "not gated", bias=kind != "mapped")
    tokens = 210
    rows = rows_of(tokens, hidden, dtype)
    options: dict[str, Any] = {"activation": Activation("relu2") if kind == "not gated" else GPT_OSS_ACTIVATION}
    ids = torch.randint(-1, 2 * experts + 1, (tokens, top_k), dtype=torch.int64)
    if kind == "mapped":
        places = torch.arange(2 * experts)
        options["expert_map"] = torch.where(places % 2 == 0, places // 2, -1).int().to(CUDA)
        options["num_experts"] = 2 * experts
    if kind == "one expert":
        ids = torch.full((tokens, top_k), 2)
    routing = Routing(torch.rand(tokens, top_k, device=CUDA), ids.to(CUDA))
    if kind == "strange":  # NaN and infinity stay in their rows
        rows = rows.clone()
        rows[0, 3], rows[1, 5] = torch.nan, -torch.inf
    assert wrong(by_name(rows, routing, weights, **options), rows, routing, plain, **options) is None


def test_scales_at_both_ends() -> None:
    """Bytes of e8m0 at which a scale times 2^126 passes bfloat16, 255, and 0."""
    top_k, hidden, _, experts, _ = MODELS["small"]
    plain, _ = drawn("small", MXFP4, torch.bfloat16)
    assert plain.scales is not None
    bytes_ = plain.scales.w13.view(torch.uint8)
    strange = torch.tensor([0, 1, 126, 127, 128, 129, 135], dtype=torch.uint8, device=CUDA)
    bytes_.copy_(strange[torch.randint(len(strange), bytes_.shape, device=CUDA)])
    bytes_[0, 5, 1] = 255
    rows, routing = rows_of(100, hidden, torch.bfloat16), draw_routing(100, experts, top_k, device=CUDA)
    assert wrong(by_name(rows, routing, pack_experts(plain)), rows, routing, plain) is None


@pytest.mark.parametrize("scheme", [MXFP4, int4_scheme(), NVFP4], ids=str)
@pytest.mark.parametrize("model", ["gpt-oss-120b", "Qwen3-30B"])
def test_the_same_bits_over_100_runs_and_in_graphs(model: str, scheme: QuantScheme) -> None:
    top_k, hidden, _, experts, counts = MODELS[model]
    _, weights = drawn(model, scheme, torch.bfloat16)
    for tokens in counts:
        rows, routing = rows_of(tokens, hidden, torch.bfloat16), draw_routing(tokens, experts, top_k, device=CUDA)
        first = by_name(rows, routing, weights)
        assert all(same_bits(by_name(rows, routing, weights), first) for _ in range(100))
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(3):
                out = by_name(rows, routing, weights)
        other, scaled = draw_routing(tokens, experts, top_k, device=CUDA), torch.randn_like(rows)
        wanted = by_name(scaled, other, weights)
        routing.copy_(other), rows.copy_(scaled)
        captured.replay()
        assert same_bits(out, wanted), f"{tokens} tokens"


def test_nobody_has_rows() -> None:
    top_k, hidden, _, experts, _ = MODELS["small"]
    _, weights = drawn("small", MXFP4, torch.bfloat16)
    rows, routing = rows_of(100, hidden, torch.bfloat16), draw_routing(100, experts, top_k, device=CUDA)
    routing.topk_ids.fill_(-1)
    assert not by_name(rows, routing, weights).any()


def test_rows_are_interleaved() -> None:
    rows, slots = torch.randn(37, 192, device=CUDA).half(), torch.randint(0, 74, (50,), device=CUDA).int()
    out = poisoned((50, 192), torch.float16, CUDA)
    interleave(rows, slots, 2, out)
    wanted = rows[slots.long() // 2].unflatten(1, (-1, 4, 2, 2)).transpose(2, 3).flatten(1)
    assert same_bits(out, wanted) and not guard_broken(out)
    some, count = torch.zeros_like(out), torch.tensor([33], dtype=torch.int32, device=CUDA)
    interleave(rows, slots, 2, some, count=count)
    assert same_bits(some[:33], wanted[:33]) and not some[33:].any()
