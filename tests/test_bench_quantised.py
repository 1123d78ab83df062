"""Benchmarks of quantised experts: schemes by name, what is drawn and moved, and the check of answers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moeyard
from moeyard.bench import layers, quantised, vllm_peer, workloads
from moeyard.bench.operators import Case, Provider, operators
from moeyard.quant import FP8_BLOCK, FP8_TENSOR, MXFP4, QuantScheme
from moeyard.testing import same_bits

CPU = torch.device("cpu")
EXPERTS = operators()["fused_experts"]
SOMEONE = Provider("a", "x", len)


def case_of(scheme: str, tokens: int = 6) -> Case:
    sizes = {"num_tokens": tokens, "num_experts": 4, "top_k": 2, "hidden_size": 128, "intermediate_size": 64}
    return Case("w", "fused_experts", "uniform", (*sizes.items(), ("dtype", "bfloat16"), ("scheme", scheme)))


def test_the_grid_of_vllms_cutlass_benchmark() -> None:
    cases = workloads.load("vllm-cutlass-grid")
    keys = ("num_experts", "top_k", "hidden_size", "intermediate_size")
    grid = {tuple(case[key] for key in keys) for case in cases}
    assert grid == {
        (8, 2, 4096, 28672), (8, 2, 14336, 4096), (64, 6, 2048, 1408), (32, 8, 1024, 1024), (40, 8, 1024, 1536)
    }  # fmt: skip
    assert len(cases) == 5 * 9 and {case["num_tokens"] for case in cases} == {1, 4, 8, 16, 32, 64, 128, 256, 512}
    assert all(quantised.scheme_of_case(case) == FP8_TENSOR and case.dtype == torch.float16 for case in cases)
    small = next(case for case in workloads.load("vllm-cutlass-grid", 64) if case["num_tokens"] == 4)
    inputs = EXPERTS.inputs(small, CPU, torch.Generator().manual_seed(0))
    found = EXPERTS.providers(small, CPU)
    assert {p.name for p in found} == {"moeyard"} and "torch" in {p.impl for p in found}
    assert all(EXPERTS.failure(small, provider, inputs, CPU) is None for provider in found)


@pytest.mark.parametrize("name", quantised.SCHEMES)
def test_every_named_scheme_is_drawn_and_answered(name: str) -> None:
    case = case_of(name)
    inputs = EXPERTS.inputs(case, CPU, torch.Generator().manual_seed(0))
    again = EXPERTS.inputs(case, CPU, torch.Generator().manual_seed(0))
    quantised.weights_of.cache_clear()
    other = EXPERTS.inputs(case, CPU, torch.Generator().manual_seed(1))
    assert again.weights is inputs.weights and other.weights is not inputs.weights
    stored = inputs.weights.w13.view(torch.uint8)
    assert same_bits(other.weights.w13.view(torch.uint8), stored) and int((stored != 0).sum()) > 0.9 * stored.numel()
    providers = EXPERTS.providers(case, CPU)
    assert providers and all(EXPERTS.failure(case, provider, inputs, CPU) is None for provider in providers)
    assert EXPERTS.beside(case, providers[0].run, inputs)["error_rms"] < 0.05


def test_checks_reject_mutants() -> None:
    case = case_of("fp8 block")
    inputs = EXPERTS.inputs(case, CPU, torch.Generator().manual_seed(0))
    right = moeyard.fused_experts(inputs.hidden_states, inputs.routing, inputs.weights)
    assert EXPERTS.error(case, SOMEONE, inputs, right) is None
    weights, scales = inputs.weights, inputs.weights.scales
    assert scales is not None
    halves = torch.cat(weights.w13.view(torch.uint8).chunk(2, 1)[::-1], 1).view(weights.w13.dtype)
    mutants = [
        right * 1.1, right * torch.nan, right.flip(0), torch.zeros_like(right),
        *(
            moeyard.fused_experts(inputs.hidden_states, inputs.routing, changed)
            for changed in (
                replace(weights, w13=halves),
                replace(weights, scales=replace(scales, w2=scales.w2.roll(1, 0))),
            )
        ),
    ]  # fmt: skip
    assert all(EXPERTS.error(case, SOMEONE, inputs, wrong) for wrong in mutants)


def test_bytes_follow_the_scheme() -> None:
    tokens, values = 2 * 6 * 128 * 2, 3 * 64 * 128
    touched = 4 * (1 - 0.5**6)
    for name, per_weight in {
        "fp8 tensor": 1.0, "fp8 block": 1 + 4 / 128**2, "int4 weights": 0.5 + 4 / 128, "mxfp4 weights": 0.5 + 1 / 32,
    }.items():  # fmt: skip
        assert EXPERTS.bytes_moved(case_of(name)) == int(touched * values * per_weight + tokens)
    plain = replace(case_of("fp8 tensor"), sizes=case_of("fp8 tensor").sizes[:-1])
    assert EXPERTS.bytes_moved(plain) == int(touched * values * 2 + tokens)


def test_schemes_by_name_or_in_words(tmp_path: Path) -> None:
    assert quantised.scheme_named("fp8 block") == FP8_BLOCK
    assert quantised.scheme_named(str(MXFP4)) == MXFP4
    with pytest.raises(ValueError, match=r"scheme: expected one of .*'fp8 tensor'.* or words as 'e4m3 128x128"):
        quantised.scheme_named("fp7")
    path = tmp_path / "w.toml"
    text = (
        'description = "d"\nop = ["fused_experts"]\nrouting = ["uniform"]\n[sizes]\nnum_tokens = [1]\n'
        'num_experts = [4]\ntop_k = [2]\nhidden_size = [128]\nintermediate_size = [64]\ndtype = ["bfloat16"]\n'
    )
    path.write_text(text + 'scheme = ["fp8 tensor", "int8 channel"]\n')
    assert [case["scheme"] for case in workloads.load(str(path))] == ["fp8 tensor", "int8 channel"]
    path.write_text(text + 'scheme = ["fp7"]\n')
    with pytest.raises(ValueError, match=r"w.toml: scheme: expected one of"):
        workloads.load(str(path))
    path.write_text(text)
    assert "scheme" not in dict(workloads.load(str(path))[0].sizes)


def test_vllms_layer_of_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(vllm_peer, "function", lambda *_: lambda *a, **k: asked.append(k))
    for name, flags in {
        "fp8 tensor": {"use_fp8_w8a8": True, "per_channel_quant": True, "block_shape": None},
        "fp8 block": {"use_fp8_w8a8": True, "per_channel_quant": False, "block_shape": [128, 128]},
        "int8 channel": {"use_int8_w8a8": True, "use_fp8_w8a8": False, "per_channel_quant": True},
    }.items():
        inputs = layers.draw_layer(case_of(name), CPU, torch.Generator().manual_seed(0))
        run = vllm_peer.quantised_experts(quantised.scheme_named(name))
        assert run is not None
        run(inputs)
        assert flags.items() <= asked[-1].items()
    scales = inputs.weights.scales
    assert scales is not None and same_bits(asked[-1]["w1_scale"], scales.w13)  # type: ignore[arg-type]
    per_matrix = layers.weights_of_case(case_of("fp8 tensor"), CPU)
    first, second = vllm_peer.channel_scales(per_matrix)
    assert first.shape == (4, 128, 1) and second.shape == (4, 128, 1)
    assert per_matrix.scales is not None and bool((first[:, 64:] == per_matrix.scales.w13[:, 1:]).all())
    for other in ("fp8 weights", "mxfp4 weights"):
        assert vllm_peer.quantised_experts(quantised.scheme_named(other)) is None
    static = QuantScheme("e4m3", activations="e4m3", static=True)
    assert vllm_peer.quantised_experts(static) is None
