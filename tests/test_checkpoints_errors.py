"""load_experts: what is refused, by the names of file and tensor, and what is accepted although it looks strange."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard.testing import checkpoints
from moeyard.testing.checkpoints import FORMS, FP8, INT4, INT8, PREFIX, TOKENS, Form, compressed
from moeyard.values import ExpertWeights

pytest.importorskip("safetensors")
SIZES = {"experts": 2, "hidden_size": 64, "intermediate_size": 64}
Tensors = dict[str, Tensor]


def stored(folder: Path, name: str, layout: str = "apart") -> Tensors:
    """The tensors of a checkpoint of a form, which is written to the folder."""
    from safetensors.torch import load_file

    checkpoints.write(folder, FORMS[name], layout, **SIZES)  # type: ignore[arg-type]
    return load_file(folder / "model.safetensors")


def load(folder: Path, **options: Any) -> ExpertWeights:
    return moeyard.load_experts(folder, PREFIX, **{"device": "cpu", **options})


def refused(folder: Path, words: str, **options: Any) -> None:
    """Loading is a ValueError with these words in it."""
    with pytest.raises(ValueError, match=re.escape(words)):
        load(folder, **options)


DOWN = f"{PREFIX}.1.down_proj"
FILE = "model.safetensors: tensor "


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("fp8 channel", lambda t: t.pop(f"{DOWN}.weight_scale"), f"{FILE}{DOWN}.weight_scale is missing"),
        ("fp8 channel", lambda t: t.pop(f"{DOWN}.weight"), f"{FILE}{DOWN}.weight is missing"),
        ("fp8 tensor static", lambda t: t.pop(f"{DOWN}.input_scale"), f"{FILE}{DOWN}.input_scale is missing"),
        ("nvfp4", lambda t: t.pop(f"{DOWN}.weight_global_scale"), f"{FILE}{DOWN}.weight_global_scale is missing"),
        ("gptq v1", lambda t: t.pop(f"{DOWN}.qzeros"), f"{FILE}{DOWN}.qzeros is missing"),
        ("fp8 channel", lambda t: [t.pop(f"{DOWN}.{what}") for what in ("weight", "weight_scale")],
         f"tensor {DOWN}.* is missing"),
        ("fp8 channel", lambda t: t.update({f"{PREFIX}.1.gate_proj.lora": torch.ones(1)}),
         f"{FILE}{PREFIX}.1.gate_proj.lora: expected no such tensor"),
        ("bfloat16", lambda t: t.update({f"{DOWN}.weight_scale": torch.ones(1)}),
         f"{FILE}{DOWN}.weight_scale: expected no such tensor beside weights of unquantised"),
        ("fp8 channel", lambda t: t.update({f"{PREFIX}.router.weight": torch.ones(1)}),
         f"{FILE}{PREFIX}.router.weight: expected tensors of experts alone"),
        ("fp8 channel", lambda t: t.update({f"{PREFIX}.7.down_proj.weight": t[f"{DOWN}.weight"].clone()}),
         f"tensor {PREFIX}.2.down_proj.* is missing"),
        ("fp8 channel", lambda t: t.update({f"{PREFIX}.1.w2.weight": t[f"{DOWN}.weight"].clone()}),
         "expected one down layer per expert"),
        ("deepseek", lambda t: t.update({f"{DOWN}.weight_scale": torch.ones(1, 1)}), "expected one scale per layer"),
        ("fp8 channel", lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"][:-1].clone()}),
         f"{FILE}{DOWN}.weight: expected shape (64, 64)"),
        ("fp8 channel", lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"].t().contiguous()}),
         f"{DOWN}.weight_scale: expected shape (64, 1) or (64,) (hidden_size 64, intermediate_size 64), got (1, 64)"),
        ("fp8 channel", lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].bfloat16()}),
         f"{FILE}{DOWN}.weight: expected dtype F8_E4M3, got BF16"),
        ("fp8 channel", lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].view(torch.int8)}),
         f"{FILE}{DOWN}.weight: expected dtype F8_E4M3, got I8"),
        ("fp8 channel", lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].view(torch.float8_e4m3fnuz)}),
         "got F8_E4M3FNUZ (the configuration says float-quantized (e4m3 1x*, e4m3 per row); floats of another bias"),
        ("fp8 channel", lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"].float()}),
         f"{FILE}{DOWN}.weight_scale: expected dtype BF16, which {PREFIX}.0.gate_proj.weight_scale has, got F32"),
        ("bfloat16", lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].half()}),
         f"{FILE}{DOWN}.weight: expected dtype BF16"),
        ("bfloat16", lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].to(torch.float8_e4m3fn)}),
         "expected dtype F32 or F16 or BF16 or F64, got F8_E4M3"),
        ("bfloat16", lambda t: t.update({f"{DOWN}.bias": torch.zeros(64).bfloat16()}),
         f"{FILE}{PREFIX}.0.down_proj.bias is missing, others have one"),
        ("int4 packed", lambda t: t.update({f"{DOWN}.weight_shape": torch.tensor([64, 60])}),
         "expected [64, 64], got [[64, 60]]"),
        ("nvfp4", lambda t: t.update({f"{DOWN}.weight_global_scale": torch.zeros(1)}),
         f"{FILE}{DOWN}.weight_global_scale: expected positive numbers, got [inf]"),
        ("fp8 tensor static", lambda t: t.update({f"{DOWN}.input_scale": torch.full((1,), float("nan"))}),
         f"{FILE}{DOWN}.input_scale: expected positive numbers, got [nan]"),
        ("gptq v1", lambda t: t.update({f"{DOWN}.g_idx": torch.arange(64).flip(0).to(torch.int32) // 32}),
         "expected columns in the order of their groups; columns in the order of activations (act-order)"),
        ("int4 packed", lambda t: t.update({f"{DOWN}.weight_g_idx": torch.arange(64).to(torch.int32) % 2}),
         "(act-order)"),
        ("int4 packed", lambda t: t.update({f"{DOWN}.weight_zero_point": torch.zeros(8, 2, dtype=torch.int32)}),
         f"{FILE}{DOWN}.weight_zero_point: expected 8 in all zero points of a symmetric scheme, got [0]"),
        ("awq symmetric", lambda t: t[f"{DOWN}.qzeros"].fill_(0x77777777), "expected 8 in all zero points"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    name: str, change: Callable[[Tensors], Any], words: str, tmp_path: Path
) -> None:
    """Traps 3, 5, 6, 8, 16, 17, 22, 24, 34."""
    tensors = stored(tmp_path, name)
    change(tensors)
    checkpoints.save(tmp_path, tensors, FORMS[name].config)
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("name", "add"),
    [
        ("fp8 channel", {"k_scale": torch.ones(1), "v_scale": torch.ones(1), "output_scale": torch.ones(1)}),
        ("fp8 channel", {"input_scale": torch.ones(1)}),  # dynamic: ignored
        ("fp8 channel", {"weight_zero_point": torch.zeros(64, 1, dtype=torch.int8)}),
        ("int4 packed", {"weight_g_idx": (torch.arange(64) // 32).to(torch.int32)}),
        ("int4 packed", {"weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}),
        ("int4 packed", {"weight_zero_point": torch.full((8, 2), -0x77777778, dtype=torch.int32)}),
        ("nvfp4", {"input_global_scale": torch.ones(1)}),
    ],
)
def test_what_says_nothing_is_dropped(name: str, add: Tensors, tmp_path: Path) -> None:
    """Traps 17, 21, 22: attention's scales, trivial g_idx, zero points of symmetric schemes, inputs of dynamic ones."""
    tensors = stored(tmp_path, name)
    wanted = load(tmp_path)
    tensors |= {f"{DOWN}.{what}": tensor for what, tensor in add.items()}
    checkpoints.save(tmp_path, tensors, FORMS[name].config)
    got = load(tmp_path)
    assert torch.equal(got.w2.view(torch.uint8), wanted.w2.view(torch.uint8))


def group(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **more}}}


CHANNEL = {**FP8, "strategy": "channel", "symmetric": True}
INPUTS = {**FP8, **TOKENS}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "quark"}, "quantization_config.quant_method: expected one of compressed-tensors, fp8"),
        ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "transform_config: expected none"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "quantization_config.sparsity_config: expected none"),
        ({"moe_sparsity_config": {"method": "novice", "num_experts": [2]}}, "moe_sparsity_config: expected"),
        (group({**INT4, "num_bits": 3, "strategy": "channel"}) | {"format": "pack-quantized"},
         "config_groups.group_0.weights: expected int of 4 bits, int of 8 bits for pack-quantized, got int of 3 bits"),
        (group({**INT4, "num_bits": 6, "type": "float", "strategy": "channel"}) | {"format": "mxfp6-pack-quantized"},
         "config_groups.group_0.format: expected one of float-quantized, "),
        (group({**CHANNEL, "symmetric": False}), "weights.symmetric: expected true for float of 8 bits"),
        (group({**INT8, "strategy": "channel", "symmetric": False}) | {"format": "int-quantized"}, "weights.symmetric"),
        (group({**CHANNEL, "actorder": "group"}), "weights.actorder: expected null, 'weight' or 'static', got 'group'"),
        (group(CHANNEL, output_activations=INPUTS), "group_0.output_activations: expected none for experts"),
        (group(CHANNEL, input_activations={**FP8, "dynamic": True, "strategy": "tensor"}), "activations: expected"),
        (group(CHANNEL, input_activations={**FP8, **TOKENS, "symmetric": False}), "expected 8 bits, symmetric"),
        (group(CHANNEL) | {"format": "dense"}, "group_0.format: expected one of float-quantized"),
    ],
)  # fmt: skip
def test_configurations_that_mean_something_else_are_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Traps 10, 17, 19, 22, 23."""
    tensors = stored(tmp_path, "fp8 channel")
    config = FORMS["fp8 channel"].config
    assert config is not None
    checkpoints.save(tmp_path, tensors, {**config, **change})
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "_config.bits: expected one of 4, 8, got 3"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False}, "_config.sym: expected true"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "checkpoint_format: "),
        ({"quant_method": "gptq", "bits": 4}, "group_size: expected a number of columns or -1, got None"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "_config.version: expected 'gemm'"),
        ({"quant_method": "awq", "bits": 8, "group_size": 32}, "quantization_config.bits: expected 4, got 8"),
        ({"quant_method": "fp8", "fmt": "e4m3fnuz"}, "quantization_config.fmt: expected one of"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size: expected two sizes, got [128]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "expected 'dynamic'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo: expected one of 'NVFP4', 'FP8', got "),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size: expected 16 for NVFP4"),
    ],
)  # fmt: skip
def test_other_methods_are_refused_by_name(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, stored(tmp_path, "fp8 channel"), config)
    refused(tmp_path, words)


def test_real_act_order_needs_its_g_idx(tmp_path: Path) -> None:
    """Trap 17: with desc_act and without g_idx nobody knows which group a column belongs to."""
    tensors = {name: tensor for name, tensor in stored(tmp_path, "gptq v1").items() if not name.endswith("g_idx")}
    config = {**(FORMS["gptq v1"].config or {}), "desc_act": True}
    checkpoints.save(tmp_path, tensors, config)
    refused(tmp_path, "g_idx is missing")
    checkpoints.save(tmp_path, tensors, {**config, "desc_act": False})
    load(tmp_path)


def test_schemes_that_differ_inside_a_layer_are_named(tmp_path: Path) -> None:
    """Trap 20: a group for one projection, an expert that is ignored, an override of GPTQ."""
    tensors = stored(tmp_path, "fp8 channel")
    config = FORMS["fp8 channel"].config
    assert config is not None
    two = {**config["config_groups"]}
    two["group_1"] = {
        "targets": ["re:.*down_proj$"],
        "weights": {**FP8, "strategy": "tensor"},
        "format": "naive-quantized",
    }
    checkpoints.save(tmp_path, tensors, {**config, "config_groups": two})
    refused(
        tmp_path,
        "config.json: quantization_config: expected one scheme for the experts of a layer, got float-quantized "
        f"(e4m3 1x*, e4m3 per row) for {PREFIX}.0.gate_proj and naive-quantized (e4m3 *x*) for {PREFIX}.0.down_proj",
    )
    checkpoints.save(tmp_path, tensors, {**config, "ignore": [f"{PREFIX}.1.up_proj"]})
    with pytest.raises(ValueError, match=r"expected one scheme .* unquantised"):
        load(tmp_path)
    tensors = stored(tmp_path, "gptq v1")
    override = {**(FORMS["gptq v1"].config or {}), "dynamic": {r"+:.*down_proj$": {"bits": 8, "sym": True}}}
    checkpoints.save(tmp_path, tensors, override)
    with pytest.raises(ValueError, match=r"expected one scheme .* GPTQ .int8 1x32."):
        load(tmp_path)


def test_targets_and_ignored_layers(tmp_path: Path) -> None:
    """Trap 20: names before patterns before classes; whole layers ignored; a group's own format; GPTQ's "-:"."""
    config = FORMS["fp8 channel"].config
    assert config is not None
    mine = config["config_groups"]["group_0"]
    other = {"weights": {**INT4, "strategy": "channel"}}
    names = [f"{PREFIX}.{expert}.{part}_proj" for expert in range(2) for part in ("gate", "up", "down")]
    for targets, others in ((["re:.*experts.*"], ["Linear"]), (names, ["Linear", "re:.*experts.*"])):
        both = {**mine, "targets": targets, "format": "float-quantized"}
        groups = {"group_0": {**other, "targets": others}, "group_1": both}
        checkpoints.write(tmp_path, Form({**config, "format": "mixed-precision", "config_groups": groups},
                                         FORMS["fp8 channel"].draw), "apart", **SIZES)  # fmt: skip  # type: ignore[arg-type]
        assert str(load(tmp_path).scheme) == "e4m3 1x*, e4m3 per row"
    plain = FORMS["bfloat16"].draw
    gptq = FORMS["gptq v1"].config or {}
    for ignoring, layout in (
        ({**config, "ignore": ["re:.*mlp.*"]}, "apart"), ({**config, "ignore": ["re:.*gate_proj", *names]}, "fused"),
        ({**config, "ignore": [PREFIX]}, "stacked"), ({**gptq, "dynamic": {"-:.*experts": {}}}, "apart"),
        ({**checkpoints.DEEPSEEK, "modules_to_not_convert": ["mlp.experts"]}, "w1"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["experts"]}, "apart"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["model.layers.3*"]}, "apart"),
        (compressed("pack-quantized", {**INT4, "strategy": "channel"}) | {"config_groups": {}}, "apart"),
    ):  # fmt: skip
        checkpoints.write(tmp_path, Form(ignoring, plain), layout, **SIZES)  # type: ignore[arg-type]
        assert load(tmp_path).scheme is None


def test_names_that_only_begin_alike_do_not_count(tmp_path: Path) -> None:
    """A layer whose number begins alike, and a module of a name that begins alike, are other modules."""
    tensors = stored(tmp_path, "bfloat16")
    more = {name.replace("layers.3.", "layers.30."): tensor.clone() for name, tensor in tensors.items()}
    more |= {name.replace("experts", "experts_shared"): tensor.clone() for name, tensor in tensors.items()}
    config = {**checkpoints.DEEPSEEK, "modules_to_not_convert": ["mlp.expert", "layers.3.mlp.experts"]}
    checkpoints.save(tmp_path, tensors | more, config)
    assert load(tmp_path).num_local_experts == 2
    config["modules_to_not_convert"] = ["mlp.expert"]
    checkpoints.save(tmp_path, tensors | more, config)
    refused(tmp_path, "gate_proj.weight_scale_inv is missing, which block fp8 has beside weights")


def test_fused_blocks_that_straddle_gate_and_up_are_refused(tmp_path: Path) -> None:
    """Trap 11: a grid over both halves whose second half begins inside a block."""
    sizes = {"experts": 1, "hidden_size": 128, "intermediate_size": 192}
    checkpoints.write(tmp_path, FORMS["fp8 blocks"], "fused", **sizes)  # type: ignore[arg-type]
    refused(tmp_path, "expected gate and up to begin with a block of 128 rows, got 192 rows of each, gate first")
    checkpoints.write(tmp_path, FORMS["fp8 blocks"], "fused", **{**sizes, "intermediate_size": 256})  # type: ignore[arg-type]
    load(tmp_path)
    refused(tmp_path, "expected gate and up to begin with a block of 128 rows", gate_up_order="in turn")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tensor_parallel": (2, 2)}, ValueError, "tensor_parallel[0]: expected an integer in [0, 1], got 2"),
        ({"tensor_parallel": 2}, TypeError, "tensor_parallel: expected (rank, size), got 2"),
        (
            {"tensor_parallel": (0, 3)},
            ValueError,
            "tensor_parallel: expected equal parts of intermediate_size 64, got 3",
        ),
        ({"expert_parallel": (0, 3)}, ValueError, "expert_parallel: expected at most 2 ranks (num_experts), got 3"),
        ({"gate_up_order": "gate"}, ValueError, "gate_up_order: expected one of"),
        (
            {"gate_up_order": "in turn"},
            ValueError,
            "gate_up_order: expected None for gate and up that are stored apart",
        ),
        ({"dtype": torch.int8}, TypeError, "dtype: expected one of"),
        ({"gated": 1}, TypeError, "gated: expected a bool"),
        ({"gated": False}, ValueError, "expected ['down', 'up'] of experts alone (gated is False)"),
        ({"num_experts": 3}, ValueError, f"tensor {PREFIX}.2.down_proj.* is missing"),
        ({"num_experts": 1}, ValueError, "expected experts below 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    stored(tmp_path, "fp8 channel")
    with pytest.raises(error, match=re.escape(words)):
        load(tmp_path, **options)


def test_the_number_of_experts_comes_from_the_configuration(tmp_path: Path) -> None:
    tensors = stored(tmp_path, "bfloat16")
    for told in ({"num_local_experts": 3}, {"text_config": {"n_routed_experts": 3}}):
        checkpoints.save(tmp_path, tensors, None, **told)
        refused(tmp_path, f"tensor {PREFIX}.2.down_proj.* is missing")
    checkpoints.save(tmp_path, stored(tmp_path, "bfloat16", "stacked"), None, num_experts=3)
    refused(tmp_path, "expected 3 experts, got shape (2, 64, 64)")


def test_other_prefixes_are_named(tmp_path: Path) -> None:
    stored(tmp_path, "bfloat16")
    for prefix, words in (
        ("model.layers.9", "prefix: expected tensors in"),
        ("model.", "prefix: expected a name without"),
    ):
        with pytest.raises(ValueError, match=words):
            moeyard.load_experts(tmp_path, prefix, device="cpu")


def test_modelopts_own_file_is_read(tmp_path: Path) -> None:
    tensors = stored(tmp_path, "modelopt fp8")
    checkpoints.save(tmp_path, tensors, None)
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(told))
    assert str(load(tmp_path).scheme) == "e4m3 *x*, e4m3 static"
