"""Products of 8-bit codes on Hopper: whole layers against float64 by the rule, in every height of tiles, repeatable."""

import pytest
import torch

import moeyard
from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Routing
from moeyard.cuda.experts.coded import fused_coded_experts_launch
from moeyard.cuda.experts.plan import Way
from moeyard.dispatch import table
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, INT8_CHANNEL, QuantScheme
from moeyard.testing import guard_broken, poisoned, same_bits
from moeyard.testing.budgets import judged_experts
from moeyard.testing.quantised import draw_quantised, moved_to
from moeyard.values import ExpertCall

REFUSAL = table.explain("grouped_gemm", "cuda").reasons["cuda"]
pytestmark = pytest.mark.skipif(REFUSAL != "chosen", reason=f"cuda: {REFUSAL}")
CUDA = torch.device("cuda")
SCHEMES = (FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL, QuantScheme("int8", activations="int8"))
TENSOR_CORE_UNIT = 2.0**-13
"""What tensor cores round of a sum of 8-bit floats, which they align to about 14 bits."""
SIZES = {  # tokens, experts, top_k, hidden size, intermediate size
    "few rows": (24, 8, 2, 512, 256),
    "odd sizes": (150, 5, 2, 400, 272),
    "many tiles": (700, 24, 4, 384, 528),
    "tall tiles": (900, 4, 2, 1040, 912),
}


def draw(tokens: int, experts: int, top_k: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, Routing]:
    rows = torch.randn(tokens, hidden).to(dtype) * torch.exp2(torch.randint(-3, 4, (tokens, 1))).to(dtype)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int()
    return rows, Routing(torch.rand(tokens, top_k), ids)


def answer(
    rows: torch.Tensor, routing: Routing, weights: ExpertWeights, activation: Activation, way: Way | None
) -> torch.Tensor:
    """In memory that was full of NaN, which a launch may get for what lies between its products."""
    for words in (1 << 22, 1 << 19, 1 << 16):
        torch.full((words,), torch.nan, device=CUDA)
    out = poisoned(tuple(rows.shape), rows.dtype, CUDA)
    call = ExpertCall(weights, activation, weights.num_local_experts)
    fused_coded_experts_launch(rows, routing.topk_weights, routing.topk_ids, call, out=out, way=way)
    assert not guard_broken(out)
    return out


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_layers(size: str, scheme: QuantScheme) -> None:
    torch.manual_seed(0)
    tokens, experts, top_k, hidden, middle = SIZES[size]
    host = draw_quantised(experts, hidden, middle, scheme, bias=size == "odd sizes")
    weights = moved_to(host, CUDA)
    rows, routing = draw(tokens, experts, top_k, hidden, torch.bfloat16)
    there = Routing(routing.topk_weights.to(CUDA), routing.topk_ids.to(CUDA))
    judged = judged_experts(rows, routing, host, unit=TENSOR_CORE_UNIT)
    mistaken = judged_experts(
        rows, Routing(routing.topk_weights.roll(1, 1), routing.topk_ids), host, unit=TENSOR_CORE_UNIT
    )
    ways = [
        None,
        *(Way(copied, tile) for copied, tile in ((False, 16), (True, 32), (False, 64), (True, 128), (False, 192))),
    ]
    for way in ways:
        if way is not None and way.rows > 128 and scheme == FP8_BLOCK:
            continue
        got = answer(rows.to(CUDA), there, weights, Activation(), way)
        assert judged.error(got) is None, way
        assert mistaken.error(got) is not None
        assert all(same_bits(answer(rows.to(CUDA), there, weights, Activation(), way), got) for _ in range(3))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", ["gpt-oss", "not gated", "mapped"])
def test_every_kind_of_call(kind: str, scheme: QuantScheme) -> None:
    torch.manual_seed(0)
    gated, dtype = kind != "not gated", torch.bfloat16 if kind == "mapped" else torch.float16
    host = draw_quantised(6, 272, 144, scheme, dtype, gated=gated, bias=kind == "gpt-oss")
    activation = {"gpt-oss": GPT_OSS_ACTIVATION, "not gated": Activation("relu2"), "mapped": Activation()}[kind]
    expert_map = torch.tensor([3, -1, 0, 5, 1, -1, 2, 4], dtype=torch.int32) if kind == "mapped" else None
    rows, routing = draw(200, 6 if expert_map is None else 8, 3, 272, dtype)
    got = moeyard.fused_experts(
        rows.to(CUDA), Routing(routing.topk_weights.to(CUDA), routing.topk_ids.to(CUDA)), moved_to(host, CUDA),
        activation=activation, expert_map=None if expert_map is None else expert_map.to(CUDA), impl="cuda",
    )  # fmt: skip
    judged = judged_experts(rows, routing, host, activation=activation, expert_map=expert_map, unit=TENSOR_CORE_UNIT)
    assert judged.error(got) is None


@pytest.mark.parametrize("scheme", (FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL), ids=str)
def test_many_experts_at_once_agree_with_torch(scheme: QuantScheme) -> None:
    """Blocks that take many tiles, while others still read the layout: what small layers do not show."""
    torch.manual_seed(0)
    weights = moved_to(draw_quantised(128, 512, 384, scheme), CUDA)
    rows, routing = draw(1024, 128, 8, 512, torch.bfloat16)
    rows, routing = rows.to(CUDA), Routing(routing.topk_weights.to(CUDA), routing.topk_ids.to(CUDA))
    wanted = moeyard.fused_experts(rows, routing, weights, impl="torch").double()
    for way in (None, Way(False, 64), Way(True, 128)):
        for _ in range(5):
            got = answer(rows, routing, weights, Activation(), way).double()
            error = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
            assert float(error.max()) < 0.06, way  # codes that fall on the other side
