"""Checkpoints between moeyard and compressed-tensors, with its own compressors and decompressors, and transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, INT8_CHANNEL, MXFP4, NVFP4, QuantScheme, int4_scheme
from moeyard.reference.quant import dequantised
from moeyard.testing import checkpoints

pytest.importorskip(
    "compressed_tensors", reason="compressed-tensors is not installed: pip install 'moeyard[checkpoints]'"
)
EXPERTS, HIDDEN, SIZE = 2, 256, 384
PREFIX = "model.layers.0.mlp.experts"
PARTS = {"gate_proj": (SIZE, HIDDEN), "up_proj": (SIZE, HIDDEN), "down_proj": (HIDDEN, SIZE)}
PRESETS = (
    "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A8", "W4A16", "W4A16_ASYM", "W8A16", "NVFP4A16", "MXFP4A16",
    "MXFP8A16",
)  # fmt: skip


def group_of(preset: str) -> Any:
    """A preset as the package's own model has it, its format as the package chooses it."""
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme

    group = preset_name_to_scheme(preset, ["Linear"])
    group.format = infer_module_format(torch.nn.Linear, group).value
    return group


def state_of(weight: torch.Tensor, group: Any) -> dict[str, torch.Tensor]:
    """What a module of this weight has before it is compressed: scales from its largest magnitudes."""
    args = group.weights
    rows, columns = weight.shape
    down, across = {
        "tensor": (rows, columns), "channel": (1, columns), "group": (1, args.group_size or 0),
        "tensor_group": (1, args.group_size or 0), "block": tuple(args.block_structure or ()),
    }[args.strategy]  # fmt: skip
    tiles = weight.view(rows // down, down, columns // across, across)
    largest = tiles.abs().amax((1, 3))
    top = {("float", 8): 448.0, ("float", 4): 6.0, ("int", 8): 127.0, ("int", 4): 7.0}[args.type, args.num_bits]
    state = {"weight": weight}
    scale = largest / top
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = 448 * 6 / weight.abs().max().view(1)
        scale = (scale * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    if str(args.scale_dtype) == "torch.uint8":
        scale = 2 ** scale.log2().ceil()
    if not args.symmetric:
        scale = (tiles.amax((1, 3)) - tiles.amin((1, 3))) / 15
        state["weight_zero_point"] = (-8 - tiles.amin((1, 3)) / scale).round().clamp(-8, 7).to(torch.int8)
    state["weight_scale"] = scale.view(1) if args.strategy == "tensor" else scale
    if group.input_activations is not None and group.input_activations.dynamic is False:
        state["input_scale"] = torch.rand(1) + 0.1
    return state


@pytest.mark.parametrize("preset", PRESETS)
def test_what_its_compressors_write_is_read(preset: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    group = group_of(preset)
    compressor = BaseCompressor.get_value_from_registry(group.format)
    tensors, wanted = {}, {}
    for expert in range(EXPERTS):
        for part, shape in PARTS.items():
            stored = compressor.compress(state_of(torch.randn(shape), group), group)
            wanted[expert, part] = compressor.decompress(stored, group)["weight"]
            tensors |= {f"{PREFIX}.{expert}.{part}.{name}": tensor for name, tensor in stored.items()}
    config = QuantizationConfig(config_groups={"group_0": group}, format=group.format, ignore=["lm_head"])
    checkpoints.save(tmp_path, tensors, json.loads(config.model_dump_json()))
    got = moeyard.load_experts(tmp_path, PREFIX, device="cpu")
    first, second = dequantised(got)
    for (expert, part), values in wanted.items():
        mine = {"gate_proj": first[expert, :SIZE], "up_proj": first[expert, SIZE:], "down_proj": second[expert]}[part]
        assert values.dtype in (torch.float32, torch.bfloat16)
        near = 2.0**-22 if values.dtype == torch.float32 else 2.0**-7  # theirs is rounded to that dtype
        torch.testing.assert_close(mine, values.double(), rtol=near, atol=0)


SCHEMES = (
    FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL, MXFP4, NVFP4, int4_scheme(), int4_scheme(32, zero_points=True),
    QuantScheme("int8", (1, 64)), QuantScheme("e4m3", (1, 32), "e8m0"), QuantScheme("e4m3", (1, 0)),
    QuantScheme("int4", (1, 128), activations="e4m3"),
)  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_we_write_is_read_by_its_decompressors(scheme: QuantScheme, tmp_path: Path) -> None:
    """With the group and the format that the package's own models find in our config.json."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name
    from safetensors.torch import load_file

    plain = moeyard.ExpertWeights(torch.randn(EXPERTS, 2 * SIZE, HIDDEN), torch.randn(EXPERTS, HIDDEN, SIZE))
    weights = moeyard.quantize_experts(plain, scheme)
    assert weights.scales is not None
    for factor in (weights.scales.w13_global, weights.scales.w2_global):
        if factor is not None:  # what some float32 divisor gives
            factor.reciprocal_().reciprocal_()
    file = moeyard.save_experts(weights, tmp_path, PREFIX)
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )
    (group,) = config.config_groups.values()
    stored, (first, second) = load_file(file), dequantised(weights)
    for expert in range(EXPERTS):
        for part in PARTS:
            linear = f"{PREFIX}.{expert}.{part}"
            assert any(match_name(linear, target) for target in group.targets)
            mine = {name.removeprefix(f"{linear}."): t for name, t in stored.items() if name.startswith(f"{linear}.")}
            values = BaseCompressor.get_value_from_registry(group.format).decompress(mine, group)["weight"]
            wanted = {"gate_proj": first[expert, :SIZE], "up_proj": first[expert, SIZE:], "down_proj": second[expert]}
            near = 2.0**-22 if values.dtype == torch.float32 else 2.0**-7
            torch.testing.assert_close(values.double(), wanted[part], rtol=near, atol=0)


def test_presets_are_known_through_the_package(tmp_path: Path) -> None:
    """config_groups may be the name of a preset and its targets."""
    form = checkpoints.FORMS["fp8 channel"]
    assert form.config is not None
    config = {**form.config, "config_groups": {"FP8_DYNAMIC": ["Linear"]}}
    checkpoints.write(tmp_path, checkpoints.Form(config, form.draw), "apart")
    assert moeyard.load_experts(tmp_path, checkpoints.PREFIX, device="cpu").scheme == FP8_CHANNEL


def test_what_the_package_refuses_is_refused(tmp_path: Path) -> None:
    form = checkpoints.FORMS["fp8 channel"]
    assert form.config is not None
    group = {"targets": ["Linear"], "weights": {**checkpoints.FP8, "strategy": "channel", "speed": 3}}
    config = {**form.config, "config_groups": {"group_0": group}}
    checkpoints.write(tmp_path, checkpoints.Form(config, form.draw), "apart")
    with pytest.raises(ValueError, match=r"(?s)quantization_config: compressed-tensors refuses it: .*speed"):
        moeyard.load_experts(tmp_path, checkpoints.PREFIX, device="cpu")


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize(("preset", "impl"), [("W4A16", "reference"), ("W4A16", "torch"), ("FP8_DYNAMIC", "reference")])
def test_a_quantised_model_of_transformers_has_our_logits(preset: str, impl: str, tmp_path: Path) -> None:
    """A small Qwen3-MoE in compressed-tensors' format: transformers dequantises it, we load its experts as they are.

    Transformers leaves activations as they are, so ours are, too, for the comparison: equal up to float32 sums.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file
    from transformers import CompressedTensorsConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=128, moe_intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    group = group_of(preset)
    compressor = BaseCompressor.get_value_from_registry(group.format)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        stored = compressor.compress(state_of(tensors.pop(name), group), group)
        tensors |= {f"{name.removesuffix('weight')}{what}": tensor for what, tensor in stored.items()}
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*mlp[.]gate$"]
    told = QuantizationConfig(
        config_groups={"group_0": group}, format=group.format, ignore=ignore, quantization_status="compressed"
    )
    model = json.loads((tmp_path / "config.json").read_text())
    checkpoints.save(tmp_path, tensors, json.loads(told.model_dump_json()), **model)

    loaded = Qwen3MoeForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).eval()  # fmt: skip
    ours = [moeyard.load_experts(tmp_path, f"model.layers.{layer}.mlp.experts", device="cpu") for layer in range(2)]
    of = {}
    for block, weights in zip(loaded.model.layers, ours, strict=True):
        assert weights.scheme is not None
        scheme = dataclasses.replace(weights.scheme, activations="none")
        of[id(block.mlp.experts)] = dataclasses.replace(weights, scheme=scheme)

    def experts(self: Any, rows: torch.Tensor, ids: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return moeyard.fused_experts(rows, moeyard.Routing(factors.float(), ids.int()), of[id(self)], impl=impl)

    ALL_EXPERTS_FUNCTIONS.register("loaded by moeyard", experts)
    tokens = torch.randint(0, 64, (1, 40))
    with torch.no_grad():
        theirs = loaded(tokens).logits
        loaded.set_experts_implementation("loaded by moeyard")
        mine = loaded(tokens).logits
    off = float((mine - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())
    assert off < 1e-5
