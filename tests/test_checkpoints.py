"""Conversion of interleaved weights: against transformers' own gpt-oss experts, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

import moeyard
from moeyard import GPT_OSS_ACTIVATION, ExpertWeights, Routing

SIZES = EXPERTS, HIDDEN, SIZE = 5, 48, 32


def draw() -> dict[str, torch.Tensor]:
    return {
        "gate_up_proj": torch.randn(EXPERTS, HIDDEN, 2 * SIZE) / HIDDEN**0.5,
        "down_proj": torch.randn(EXPERTS, SIZE, HIDDEN) / SIZE**0.5,
        "gate_up_proj_bias": torch.randn(EXPERTS, 2 * SIZE),
        "down_proj_bias": torch.randn(EXPERTS, HIDDEN),
    }


def test_a_layer_of_converted_weights_is_that_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    stored = draw()
    config = SimpleNamespace(
        num_experts=EXPERTS, num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=SIZE, hidden_act="silu",
        swiglu_alpha=1.702, swiglu_limit=7.0, _experts_implementation="eager",
    )  # fmt: skip
    theirs = GptOssExperts(config)
    for name, tensor in stored.items():
        getattr(theirs, name).data = tensor
    rows, ids = torch.randn(30, HIDDEN), torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(30)])
    factors = torch.rand(30, 2)
    with torch.no_grad():
        expected = theirs(rows, ids, factors)
    weights = moeyard.experts_from_interleaved(**stored)  # type: ignore[arg-type]
    routing = Routing(factors, ids.int())

    def off(some: ExpertWeights) -> float:
        got = moeyard.fused_experts(rows, routing, some, activation=GPT_OSS_ACTIVATION)
        return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())

    assert off(weights) < 1e-6
    halves = stored["gate_up_proj"].transpose(1, 2).contiguous()  # the mutant: halves taken as they lie
    assert off(ExpertWeights(halves, weights.w2, weights.w13_bias, weights.w2_bias)) > 0.1


def test_both_orders_give_the_same_weights() -> None:
    stored = draw()
    one = moeyard.experts_from_interleaved(**stored)  # type: ignore[arg-type]
    turned = {name: t.transpose(1, 2).contiguous() if t.dim() == 3 else t for name, t in stored.items()}
    two = moeyard.experts_from_interleaved(**turned, transposed=False)  # type: ignore[arg-type]
    for name in ("w13", "w2", "w13_bias", "w2_bias"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert one.w13.is_contiguous() and one.w2.is_contiguous()
    assert torch.equal(one.w13[:, :SIZE], stored["gate_up_proj"][:, :, 0::2].transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("gate_up_proj", torch.zeros(EXPERTS, HIDDEN, 2 * SIZE + 1), "gate_up_proj: expected an even number"),
        ("down_proj", torch.zeros(EXPERTS, HIDDEN, SIZE), "down_proj: expected shape"),
        ("gate_up_proj_bias", torch.zeros(EXPERTS, SIZE), "gate_up_proj_bias"),
        ("down_proj_bias", torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64), "down_proj_bias"),
        ("gate_up_proj", torch.zeros(EXPERTS, HIDDEN, 2 * SIZE, dtype=torch.int32), "gate_up_proj"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: torch.Tensor, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        moeyard.experts_from_interleaved(**{**draw(), name: value})  # type: ignore[arg-type]
