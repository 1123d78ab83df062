"""Quantised models under transformers with moeyard's experts: the logits of the dequantised model.

The models in tests/checkpoints are as GPTQModel, AutoAWQ and llm-compressor wrote them (`make.py` there says how).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard.quant import MXFP4, int4_scheme

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeyard.integrations import transformers as ours
from moeyard.testing import checkpoints

MADE = Path(__file__).parent / "checkpoints"
TOKENS = (torch.arange(40) * 7 % 64)[None]
ROUNDED = 1e-5  # float32 sums in another order
IMPLS = ("cpu", "torch")


def off(got: Tensor, wanted: Tensor) -> float:
    """The root mean square of what differs, as a share of what is wanted."""
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits[0].float()


# What files mean, written down once more: nothing here is shared with moeyard.checkpoints


def nibbles(words: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[..., W] int32 -> [..., 8 W]: of eight places of a word the lowest four bits first, `order[i]` is place i's."""
    parts = [(words >> 4 * place) & 15 for place in range(8)]
    return torch.stack([parts[order.index(column)] for column in range(8)], -1).flatten(-2)


def dense_gptq(held: dict[str, Tensor]) -> Tensor:
    """[rows, columns]: codes along columns of a transposed matrix; zero points are stored less 1."""
    codes, zeros = nibbles(held["qweight"].t()), nibbles(held["qzeros"]) + 1
    group = torch.arange(codes.shape[1]) // 32
    return (codes - zeros.t()[:, group]).float() * held["scales"].float().t()[:, group]


def dense_awq(held: dict[str, Tensor]) -> Tensor:
    """[rows, columns]: codes along rows of a transposed matrix, in AutoAWQ's order of a word."""
    codes, zeros = (nibbles(held[name], (0, 2, 4, 6, 1, 3, 5, 7)) for name in ("qweight", "qzeros"))
    group = torch.arange(len(codes)) // 32
    return ((codes - zeros[group]).float() * held["scales"].float()[group]).t()


def dense_bytes(held: dict[str, Tensor]) -> Tensor:
    """[rows, columns]: a code of 4 bits per byte, one scale for 128 columns, which are all."""
    assert held["weight_scale"].shape[1] == 1
    return held["weight"].float() * held["weight_scale"].float()


FORMS = {"gptq": (dense_gptq, "qweight"), "awq": (dense_awq, "qweight"), "w4a8": (dense_bytes, "weight_scale")}


def dense_model(name: str) -> Any:
    """The model of a tool in float32, every linear layer of it dequantised."""
    config = json.loads((MADE / name / "config.json").read_text())
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**config, "quantization_config": None, "dtype": "float32"}))
    dense, word = FORMS[name]
    stored, state = load_file(MADE / name / "model.safetensors"), {}
    for key, tensor in stored.items():
        layer, _, last = key.rpartition(".")
        if last == word:
            begins = f"{layer}."
            held = {part.removeprefix(begins): stored[part] for part in stored if part.startswith(begins)}
            state[f"{layer}.weight"] = dense(held)
        elif last in ("weight", "bias") and f"{layer}.{word}" not in stored:
            state[key] = tensor.float()
    experts = "model.layers.0.mlp.experts"
    parts = {
        part: torch.stack([state.pop(f"{experts}.{expert}.{part}.weight") for expert in range(config_experts(config))])
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    state[f"{experts}.gate_up_proj"] = torch.cat((parts["gate_proj"], parts["up_proj"]), 1)
    state[f"{experts}.down_proj"] = parts["down_proj"]
    model.load_state_dict(state)
    return model.eval()


def config_experts(config: dict[str, Any]) -> int:
    return int(config.get("num_experts") or config["num_local_experts"])


@pytest.mark.parametrize(
    ("name", "scheme", "theirs"),
    [
        ("gptq", int4_scheme(32), 2e-2),  # its own product computes in bfloat16
        ("awq", int4_scheme(32, zero_points=True), 2e-3),  # its own function dequantises to float16
        ("w4a8", int4_scheme(128, activations="e4m3"), 5e-2),  # beside rows of float32, which become e4m3
    ],
)
def test_a_model_that_a_tool_made_has_the_logits_of_the_dequantised_one(
    name: str, scheme: moeyard.QuantScheme, theirs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dense_model(name)
    wanted = logits(model)
    told = wanted if name == "w4a8" else load_file(MADE / f"{name}.logits.safetensors")["logits"]
    found = ours.load_quantised(model, MADE / name)
    assert [way.way for way in found] == [f"fused_experts: {moeyard.Activation()}, weights of {scheme}"]
    assert ours.prepare(model) == found
    model.set_experts_implementation("moeyard")
    quantised = logits(model)
    assert off(quantised, told) < theirs
    experts = model.model.layers[0].mlp.experts
    assert all(parameter.is_meta for parameter in experts.parameters())
    held, activation, dtype = vars(experts)["_moeyard_quantised"]
    assert held.scheme == scheme
    plain = dataclasses.replace(held, scheme=dataclasses.replace(scheme, activations="none"))
    monkeypatch.setitem(vars(experts), "_moeyard_quantised", (plain, activation, dtype))
    honest = moeyard.fused_experts
    for impl in IMPLS:
        monkeypatch.setattr(moeyard, "fused_experts", lambda *a, impl=impl, **k: honest(*a, **k, impl=impl))
        assert off(logits(model), wanted) < ROUNDED, impl
    if scheme.activations != "none":
        assert ROUNDED < off(quantised, wanted) < theirs
    w13 = torch.cat(plain.w13.chunk(2, 1)[::-1], 1)
    swapped = dataclasses.replace(plain, w13=w13)
    vars(experts)["_moeyard_quantised"] = (swapped, activation, dtype)
    assert off(logits(model), told) > 2 * theirs, "codes of up where those of gate should be"


def gpt_oss(folder: Path) -> None:
    """A small gpt-oss in MXFP4: the names, blocks of 16 bytes, scales, and rows in turn of OpenAI's files."""
    config = GptOssConfig(
        vocab_size=64, hidden_size=96, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        initializer_range=0.2, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    state = {name: tensor.bfloat16() for name, tensor in GptOssForCausalLM(config).state_dict().items()}
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for part, rows in (("gate_up_proj", 192), ("down_proj", 96)):
            del state[f"{experts}.{part}"]
            state[f"{experts}.{part}_blocks"] = torch.randint(0, 256, (4, rows, 3, 16), dtype=torch.uint8)
            state[f"{experts}.{part}_scales"] = torch.randint(119, 124, (4, rows, 3), dtype=torch.uint8)
            state[f"{experts}.{part}_bias"] = torch.randn(4, rows).bfloat16()
    checkpoints.save(
        folder, state, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
        **json.loads(config.to_json_string()),
    )  # fmt: skip


def test_gpt_oss_in_mxfp4_has_the_logits_of_what_transformers_dequantises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt_oss(tmp_path)
    model = GptOssForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    ).eval()
    wanted = logits(model)
    assert all(f"weights of {MXFP4}" in way.way for way in ours.load_quantised(model, tmp_path))
    model.set_experts_implementation("moeyard")
    honest = moeyard.fused_experts
    for impl in IMPLS:
        monkeypatch.setattr(moeyard, "fused_experts", lambda *a, impl=impl, **k: honest(*a, **k, impl=impl))
        assert off(logits(model), wanted) < ROUNDED, impl


@pytest.mark.full
def test_quantised_experts_of_a_model_generate_and_compile(tmp_path: Path) -> None:
    gpt_oss(tmp_path)
    model = GptOssForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    ).eval()
    wanted = logits(model)
    ours.load_quantised(model, tmp_path)
    model.set_experts_implementation("moeyard")
    with torch.no_grad():
        generated = model.generate(TOKENS[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 12)
    torch._dynamo.reset()
    assert off(logits(torch.compile(model, backend="aot_eager")), wanted) < ROUNDED


def test_what_is_no_quantised_model_is_refused(tmp_path: Path) -> None:
    gpt_oss(tmp_path)
    model = dense_model("gptq")
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts"):
        ours.load_quantised(model, tmp_path)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(
        ValueError, match=r"path: expected quantised experts model.layers.0.mlp.experts, got torch.float32"
    ):
        ours.load_quantised(model, tmp_path / "dense")
    with pytest.raises(ValueError, match=r"device: expected a device for the weights .*, got 'meta'"):
        ours.load_quantised(Qwen3MoeForCausalLM(model.config).to("meta"), MADE / "gptq")
    ours.load_quantised(model, MADE / "gptq", packed=True)
    model.set_experts_implementation("moeyard")
    with pytest.raises(ValueError, match=r"int4 1x32 tiled"):
        logits(model)  # which no implementation takes on a CPU
    ours.load_quantised(model, MADE / "gptq")
    assert logits(model).isfinite().all()
