"""save_experts: bit by bit back through load_experts, and beside what is there already."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
from moeyard.checkpoints import files
from moeyard.quant import (
    CODES,
    FP8_BLOCK,
    FP8_BLOCK_WEIGHTS,
    FP8_CHANNEL,
    FP8_TENSOR,
    FP8_TENSOR_STATIC,
    FP8_WEIGHTS,
    INT8_CHANNEL,
    INT8_WEIGHTS,
    MXFP4,
    NVFP4,
    SCALES,
    ExpertScales,
    QuantScheme,
    int4_scheme,
    scale_shapes,
)  # fmt: skip
from moeyard.testing import SOURCE
from moeyard.values import ExpertWeights

PREFIX = "model.layers.0.mlp.experts"
MXFP8 = QuantScheme("e4m3", (1, 32), "e8m0")
SCHEMES = (
    FP8_TENSOR, FP8_TENSOR_STATIC, FP8_CHANNEL, FP8_BLOCK, FP8_WEIGHTS, FP8_BLOCK_WEIGHTS, INT8_CHANNEL, INT8_WEIGHTS,
    MXFP4, NVFP4, MXFP8, int4_scheme(), int4_scheme(32, zero_points=True), int4_scheme(0), QuantScheme("int8", (1, 64)),
    QuantScheme("int4", (1, 128), activations="e4m3"), QuantScheme("e2m1", (1, 32), "e8m0", activations="e4m3"),
    QuantScheme("int8", (1, 32), activations="int8"),
)  # fmt: skip


def draw(
    scheme: QuantScheme | None,
    *,
    experts: int = 2,
    hidden_size: int = 160,
    size: int = 192,
    gated: bool = True,
    bias: bool = False,
) -> ExpertWeights:
    """Experts of random codes and scales."""
    halves = 2 if gated else 1
    shapes = (experts, halves * size, hidden_size), (experts, hidden_size, size)
    b13, b2 = (torch.randn(shape[:2]).bfloat16() if bias else None for shape in shapes)
    if scheme is None:
        w13, w2 = (torch.randn(shape).bfloat16() for shape in shapes)
        return ExpertWeights(w13, w2, b13, b2, gated)
    dtype, per_byte = CODES[scheme.weights]

    def codes(shape: tuple[int, int, int]) -> torch.Tensor:
        return torch.randint(0, 256, (*shape[:2], shape[2] // per_byte), dtype=torch.uint8).view(dtype)

    def scale(shape: tuple[int, int]) -> torch.Tensor:
        if scheme.scales == "float":
            return torch.rand(experts, *shape) + 0.1
        return torch.randint(0, 120, (experts, *shape), dtype=torch.uint8).view(SCALES[scheme.scales][0])

    grids = scale_shapes(scheme, hidden_size, size, gated)
    zeros = [torch.randint(0, 16, (experts, *grid)).to(torch.uint8) if scheme.zero_points else None for grid in grids]
    divisors = [torch.rand(experts, number) + 0.5 for number in (halves, 1)]
    factors = [torch.div(torch.ones(()), one) if scheme.global_scales else None for one in divisors]
    inputs = [torch.rand(experts) + 0.1 if scheme.static else None for _ in (1, 2)]
    scales = ExpertScales(scale(grids[0]), scale(grids[1]), *zeros, *factors, *inputs)
    return ExpertWeights(codes(shapes[0]), codes(shapes[1]), b13, b2, gated, scheme, scales)


def same(one: ExpertWeights, two: ExpertWeights) -> None:
    """Bit by bit."""
    assert (one.scheme, one.gated) == (two.scheme, two.gated)
    tensors = [
        (
            weights.w13,
            weights.w2,
            weights.w13_bias,
            weights.w2_bias,
            *(weights.scales.tensors if weights.scales else ()),
        )
        for weights in (one, two)
    ]
    for first, second in zip(*tensors, strict=True):
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            assert first.dtype == second.dtype and first.shape == second.shape
            assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def load(folder: Path, prefix: str = PREFIX, **options: Any) -> ExpertWeights:
    return moeyard.load_experts(folder, prefix, device="cpu", **options)


@pytest.mark.parametrize("scheme", [None, *SCHEMES], ids=str)
def test_a_round_trip_keeps_every_bit(scheme: QuantScheme | None, tmp_path: Path) -> None:
    for names, gated, bias in ((("gate_proj", "up_proj", "down_proj"), True, True), (("w1", "w3", "w2"), False, False)):
        weights = draw(scheme, gated=gated, bias=bias)
        file = moeyard.save_experts(weights, tmp_path / str(gated), PREFIX, names=names)
        assert file == tmp_path / str(gated) / f"{PREFIX}.safetensors"
        same(load(tmp_path / str(gated), gated=gated), weights)


@pytest.mark.parametrize("scheme", [FP8_CHANNEL, int4_scheme(32, zero_points=True), NVFP4], ids=str)
def test_experts_that_lie_anywhere_are_saved(scheme: QuantScheme, tmp_path: Path) -> None:
    """Weights that are every second expert of a larger tensor."""
    weights = draw(scheme, experts=4)
    assert weights.scales is not None
    every = [None if tensor is None else tensor[::2] for tensor in weights.scales.tensors]
    half = ExpertWeights(weights.w13[::2], weights.w2[::2], scheme=scheme, scales=ExpertScales(*every))  # type: ignore[arg-type]
    moeyard.save_experts(half, tmp_path, PREFIX)
    same(load(tmp_path), half)


def test_what_safetensors_reads(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    weights = draw(FP8_CHANNEL, bias=True)
    file = moeyard.save_experts(weights, tmp_path, PREFIX)
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        got = opened.get_tensor(f"{PREFIX}.1.up_proj.weight")
        assert torch.equal(got.view(torch.uint8), weights.w13[1, 192:].view(torch.uint8))
        assert torch.equal(opened.get_tensor(f"{PREFIX}.1.down_proj.bias"), weights.w2_bias[1])  # type: ignore[index]
        assert len(list(opened.keys())) == 2 * 3 * 3


def test_layers_of_different_schemes_share_a_folder(tmp_path: Path) -> None:
    """config.json and the index are extended; other keys, other layers' groups and other tensors stay."""
    told = {"model_type": "x", "hidden_size": 160}
    (tmp_path / "config.json").write_text(json.dumps(told))
    files.write_file(tmp_path / "model.safetensors", [files.Part.of("lm_head.weight", torch.ones(2, 2))])
    layers = [draw(scheme) for scheme in (FP8_CHANNEL, int4_scheme(32), None, FP8_CHANNEL)]
    prefixes = [f"model.layers.{number}.mlp.experts" for number in (1, 10, 11, 2)]
    for again in (False, True):
        for prefix, weights in zip(prefixes, layers, strict=True):
            moeyard.save_experts(weights, tmp_path, prefix)
        for prefix, weights in zip(prefixes, layers, strict=True):
            same(load(tmp_path, prefix), weights)
        config = json.loads((tmp_path / "config.json").read_text())
        quantization = config.pop("quantization_config")
        assert config == told and quantization["format"] == "mixed-precision", again
        assert [len(group["targets"]) for group in quantization["config_groups"].values()] == [2, 1]
        assert len(quantization["ignore"]) == 1
        index = json.loads((tmp_path / files.INDEX).read_text())["weight_map"]
        assert index["lm_head.weight"] == "model.safetensors" and len(set(index.values())) == 5
    moeyard.save_experts(layers[0], tmp_path, prefixes[1])  # another scheme in the place of the second
    same(load(tmp_path, prefixes[1]), layers[0])
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == "float-quantized" and len(quantization["config_groups"]) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method: expected compressed-tensors, got 'gptq'"),
        ({"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": ["re:.*experts.*"]},
         f"quantization_config: expected targets that leave '{PREFIX}' alone, got one that makes it unquantised"),
    ],
)  # fmt: skip
def test_configurations_that_say_otherwise_are_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(ValueError, match=re.escape(words)):
        moeyard.save_experts(draw(FP8_CHANNEL), tmp_path, PREFIX)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    weights = draw(FP8_CHANNEL)
    files.write_file(tmp_path / "model.safetensors", [files.Part.of(f"{PREFIX}.0.w1.weight", torch.ones(2, 2))])
    with pytest.raises(ValueError, match=rf"tensor {PREFIX}.0.w1.weight: expected no tensors of '{PREFIX}' in other"):
        moeyard.save_experts(weights, tmp_path, PREFIX)
    for change, words in (
        ({"prefix": "a/b"}, "prefix: expected a name of letters"),
        ({"names": ("w1", "w2", "w3")}, "names: expected those of gate, up and down"),
        ({"weights": draw(QuantScheme("e2m1", (1, 64)))}, "weights.scheme: expected one that compressed-tensors has"),
    ):
        arguments: dict[str, Any] = {"weights": weights, "path": tmp_path / "new", "prefix": PREFIX, **change}
        with pytest.raises(ValueError, match=re.escape(words)):
            moeyard.save_experts(**arguments)
    whole = draw(FP8_BLOCK, size=384)
    moeyard.save_experts(whole, tmp_path / "whole", PREFIX)
    part = load(tmp_path / "whole", tensor_parallel=(1, 2))
    with pytest.raises(ValueError, match=re.escape("weights.scales.block_start: expected 0")):
        moeyard.save_experts(part, tmp_path / "part", PREFIX)
    with pytest.raises(TypeError, match="weights: expected ExpertWeights, got dict"):
        moeyard.save_experts({}, tmp_path, PREFIX)  # type: ignore[arg-type]


def test_global_scales_without_a_divisor_are_told(tmp_path: Path) -> None:
    """Where 1 / x is coarser than x, the nearest divisor is written, and a warning says it."""
    weights = draw(NVFP4)
    assert weights.scales is not None and weights.scales.w2_global is not None
    weights.scales.w2_global[0] = torch.nextafter(torch.tensor(2.0), torch.tensor(0.0))
    with pytest.warns(UserWarning, match=r"0.down_proj.weight_global_scale: no float32 divisor gives back 1.99999988"):
        moeyard.save_experts(weights, tmp_path, PREFIX)
    got = load(tmp_path).scales
    assert got is not None and got.w2_global is not None
    torch.testing.assert_close(got.w2_global, weights.scales.w2_global, rtol=2.0**-23, atol=0)


STOPPED = """
import os, sys, torch, moeyard
cpu, calls = torch.Tensor.cpu, []
def stopping(self):
    calls.append(1)
    if len(calls) == 5:
        print([name for name in os.listdir(sys.argv[1])])
        raise KeyboardInterrupt
    return cpu(self)
torch.Tensor.cpu = stopping
weights = moeyard.ExpertWeights(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4))
try:
    moeyard.save_experts(weights, sys.argv[1], "m.experts")
except KeyboardInterrupt:
    print(os.listdir(sys.argv[1]))
"""


def test_an_interrupt_leaves_what_was_there(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", STOPPED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()
    assert "m.experts.safetensors" in before and after == "[]"
