"""Training at a scheme: the forward of rounded weights, and gradients as if nothing had been rounded."""

import importlib.util
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import moeyard
from moeyard import Activation, ExpertWeights, Routing
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR_STATIC, INT8_CHANNEL, MXFP4, NVFP4, QuantScheme
from moeyard.testing import CPU, differing, draw_routing, draw_weights, impls_on, same_bits, sub_batches
from moeyard.testing.straight_through import gradients_of, rounded_experts

TOKENS, EXPERTS, HIDDEN, INSIDE = 60, 4, 136, 130
needs_cpu = pytest.mark.skipif("cpu" not in impls_on("fused_experts", CPU), reason="numba is not installed")
Given = tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]


def drawn(dtype: torch.dtype) -> Given:
    """(hidden states, router weights, float32 masters and biases), ids, the upstream gradient."""
    masters, routing = draw_weights(EXPERTS, HIDDEN, INSIDE, torch.float32, bias=True), draw_routing(TOKENS, EXPERTS, 2)
    of_masters = [t for t in (masters.w13, masters.w2, masters.w13_bias, masters.w2_bias) if t is not None]
    rows, upstream = (torch.randn(TOKENS, HIDDEN).to(dtype) for _ in range(2))
    return (rows, routing.topk_weights, *of_masters), routing.topk_ids, upstream


def errors(
    given: Given, scheme: QuantScheme, dtype: torch.dtype, call: Any, activation: Activation | None = None
) -> list[tuple[float, float]]:
    """Of output and gradients against float64: (of `call`, of a plain computation at the dtype)."""
    tensors, ids, upstream = given
    codes = moeyard.quantize_experts(ExpertWeights(*tensors[2:]), scheme)

    def plain(rows: torch.Tensor, routing: Routing, masters: ExpertWeights) -> torch.Tensor:
        return rounded_experts(rows, routing, masters, codes, activation, dtype=dtype)

    wide = (tensors[0].double(), *tensors[1:])
    exact, honest = gradients_of(plain, wide, ids, upstream), gradients_of(plain, tensors, ids, upstream)
    ours = gradients_of(call, tensors, ids, upstream)
    assert [one.dtype for one in ours[1:]] == [one.dtype for one in tensors], "each has the dtype of its tensor"

    def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found.double() - wanted).square().mean().sqrt())

    return [(off(a, c), off(b, c)) for a, b, c in zip(ours, honest, exact, strict=True)]


@pytest.mark.parametrize("impl", ["auto", pytest.param("torch", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (FP8_BLOCK, torch.bfloat16),
        (FP8_BLOCK, torch.float32),
        pytest.param(FP8_CHANNEL, torch.float16, marks=pytest.mark.full),
        pytest.param(INT8_CHANNEL, torch.bfloat16, marks=pytest.mark.full),
        pytest.param(MXFP4, torch.bfloat16, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_gradients_are_as_good_as_honest_ones(scheme: QuantScheme, dtype: torch.dtype, impl: str) -> None:
    activation = Activation("gelu_tanh") if scheme == INT8_CHANNEL else None

    def call(*layer: Any) -> torch.Tensor:
        return moeyard.straight_through_experts(*layer, scheme, activation=activation, impl=impl)

    found = errors(drawn(dtype), scheme, dtype, call, activation)
    times = 1.3 if dtype.itemsize == 2 else 2  # what rounding leaves open may become another code
    assert all(ours <= times * honest for ours, honest in found), found


@pytest.mark.parametrize("mutant", ["rows", pytest.param("weights", marks=pytest.mark.full)])
def test_gradients_of_values_that_are_not_rounded_are_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    room = sys.modules["moeyard.straight_through"]

    def call(rows: torch.Tensor, routing: Routing, masters: ExpertWeights) -> torch.Tensor:
        if mutant == "weights":
            plain = ExpertWeights(*(None if t is None else t.to(rows.dtype) for t in masters_of(masters)))
            return moeyard.fused_experts(rows, routing, plain)
        return moeyard.straight_through_experts(rows, routing, masters, FP8_BLOCK)

    if mutant == "rows":
        monkeypatch.setattr(room, "_rounded_rows", lambda rows, _: rows)
    found = errors(drawn(torch.bfloat16), FP8_BLOCK, torch.bfloat16, call)
    assert any(ours > 1.3 * honest for ours, honest in found), found


def masters_of(masters: ExpertWeights) -> tuple[torch.Tensor | None, ...]:
    return masters.w13, masters.w2, masters.w13_bias, masters.w2_bias


def test_the_forward_is_that_of_quantised_weights() -> None:
    """Bit by bit, with codes made in the call or given; and gradients are equal either way, too."""
    (rows, factors, *of_masters), ids, _ = drawn(torch.bfloat16)
    masters = ExpertWeights(*(t.requires_grad_() for t in of_masters))
    codes = moeyard.quantize_experts(ExpertWeights(*(t.detach() for t in of_masters)), FP8_BLOCK)
    biases = [None if t is None else t.detach().bfloat16() for t in (masters.w13_bias, masters.w2_bias)]
    plain = ExpertWeights(codes.w13, codes.w2, *biases, scheme=FP8_BLOCK, scales=codes.scales)
    mapping = torch.tensor([1, -1, 0, 3], dtype=torch.int32)
    for options in ({}, {"expert_map": mapping}):
        routing, found = Routing(factors, ids), []
        wanted = moeyard.fused_experts(rows, routing, plain, **options)
        for quantized in (None, codes):
            got = moeyard.straight_through_experts(rows, routing, masters, FP8_BLOCK, quantized=quantized, **options)
            assert same_bits(got, wanted)
            found.append(torch.autograd.grad(got.float().square().sum(), of_masters))
        assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        assert same_bits(
            moeyard.straight_through_experts(rows, Routing(factors, ids), masters, FP8_BLOCK, **options), got
        )


def test_errors_name_the_argument() -> None:
    (rows, factors, *of_masters), ids, _ = drawn(torch.bfloat16)
    masters, routing = ExpertWeights(*of_masters), Routing(factors, ids)
    call = moeyard.straight_through_experts
    with pytest.raises(TypeError, match="scheme: expected a QuantScheme, got str"):
        call(rows, routing, masters, "fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scheme: expected one in rows whose scales of activations are dynamic"):
        call(rows, routing, masters, FP8_TENSOR_STATIC)
    codes = moeyard.quantize_experts(masters, INT8_CHANNEL)
    with pytest.raises(ValueError, match=r"quantized: expected weights of scheme 'e4m3 128x128.*', got 'int8 1x"):
        call(rows, routing, masters, FP8_BLOCK, quantized=codes)
    few = moeyard.quantize_experts(ExpertWeights(*(t[:2] for t in of_masters)), FP8_BLOCK)
    with pytest.raises(ValueError, match=r"quantized: expected \(experts, rows, columns, gated, device\) of weights"):
        call(rows, routing, masters, FP8_BLOCK, quantized=few)
    with pytest.raises(ValueError, match=r"weights\.scheme: expected None"):
        call(rows, routing, codes, INT8_CHANNEL)
    with pytest.raises(ValueError, match="hidden_states: expected 136 columns"):
        call(rows[:, :64], routing, masters, FP8_BLOCK)
    with pytest.raises(TypeError, match="hidden_states: expected dtype"):
        call(rows.double(), routing, masters, FP8_BLOCK)
    masters.w2.requires_grad_()
    with pytest.raises(ValueError, match="create_graph: expected False for straight_through_experts"):
        torch.autograd.grad(call(rows, routing, masters, NVFP4).sum(), masters.w2, create_graph=True)
    scales = moeyard.quantize_experts(ExpertWeights(*(t.detach() for t in of_masters)), FP8_BLOCK)
    assert scales.scales is not None
    scales.scales.w13.requires_grad_()
    with pytest.raises(ValueError, match="w13_scale: expected a tensor that needs no gradient"):
        call(rows, routing, masters, FP8_BLOCK, quantized=scales)


@needs_cpu
def test_no_gradient_of_a_token_depends_on_its_batch() -> None:
    (rows, factors, *of_masters), ids, upstream = drawn(torch.bfloat16)
    masters = ExpertWeights(*of_masters)

    def call(rows: torch.Tensor, factors: torch.Tensor, ids: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
        given = [t.clone().requires_grad_() for t in (rows, factors)]
        answer = moeyard.straight_through_experts(
            given[0], Routing(given[1], ids), masters, FP8_BLOCK, batch_invariant=True
        )
        return torch.cat([one.float() for one in torch.autograd.grad(answer, given, upstream)], 1)

    count, wrong, first = differing(call, (rows, factors, ids, upstream), sub_batches(TOKENS, 5, Random(1)))
    assert (count, wrong) == (5, 0), first


@pytest.mark.full
def test_the_backward_is_in_the_graph() -> None:
    torch._dynamo.reset()
    graphs: list[set[str]] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append({str(node.target).split(".")[1] for node in graph.graph.nodes if "moeyard" in str(node.target)})
        return make_boxed_func(graph.forward)

    (rows, factors, *of_masters), ids, _ = drawn(torch.float32)
    leaves = [t.requires_grad_() for t in (rows, factors, *of_masters)]

    def loss(rows: torch.Tensor, factors: torch.Tensor, *masters: torch.Tensor) -> torch.Tensor:
        experts = ExpertWeights(*masters)
        return moeyard.straight_through_experts(rows, Routing(factors, ids), experts, FP8_BLOCK).square().sum()

    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    found = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(plain, found, strict=True))
    forward, backward = graphs
    assert "straight_through_experts" in forward and {"grouped_outer", "grouped_gemm"} <= backward


@pytest.mark.full
def test_a_model_trains_in_fp8_as_in_float32() -> None:
    """The first steps of the example, in which most of the loss is lost."""
    path = Path(__file__).parents[1] / "examples" / "train_moe.py"
    spec = importlib.util.spec_from_file_location("train_moe", path)
    assert spec is not None and spec.loader is not None
    sys.modules["train_moe"] = example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rounded, again = (example.train(40, autocast=True, fp8=True, batch=2) for _ in range(2))
    plain = example.train(40, autocast=True, batch=2)
    assert all(same_bits(a, b) for a, b in zip(rounded.weights, again.weights, strict=True))
    last, wanted = (sum(run.losses[-10:]) / 10 for run in (rounded, plain))
    assert last < wanted + 0.03 and last < 4.0 < rounded.losses[0], (last, wanted)
    assert rounded.losses != plain.losses, "nothing was rounded"


def test_opcheck() -> None:
    """Without the comparison of inputs, for which torch would have to multiply float8."""
    (rows, factors, *of_masters), ids, _ = drawn(torch.float32)
    codes = moeyard.quantize_experts(ExpertWeights(*of_masters), FP8_BLOCK)
    assert codes.scales is not None
    leaves = [t.requires_grad_() for t in of_masters]
    told = (codes.w13, codes.w2, *codes.scales.tensors[:6], str(FP8_BLOCK), True, "silu", 1.0, 0.0, None, EXPERTS)
    call = (rows.requires_grad_(), factors.clone(), ids, None, *leaves, *told, "auto")
    op = torch.ops.moeyard.straight_through_experts.default
    torch.library.opcheck(op, call, test_utils=("test_autograd_registration", "test_faketensor"))
