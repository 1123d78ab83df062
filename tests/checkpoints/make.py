"""Made the quantised models of this folder: `python make.py TOOL` in an environment with that tool, in this folder.

- gptq: GPTQModel 7.7.0, transformers 5.24.0
- awq: AutoAWQ 0.2.9, transformers 4.51.3
- w4a8: llm-compressor 0.14.0.1, compressed-tensors 0.20.0, transformers 5.24.0

Each is one layer of Qwen3-MoE with random weights, whose files are as the tool wrote them. Of GPTQ's config.json
quantization_config.meta is left out, which names folders and options of the run. Beside the models of GPTQModel and
AutoAWQ lies what the tool's own code answers to `tokens()`: NAME.logits.safetensors.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

BASE = Path("base")


def tokens() -> torch.Tensor:
    """[1, 40] int64."""
    return (torch.arange(40) * 7 % 64)[None]


def make_base(width: int, experts: int, dtype: torch.dtype) -> None:
    """The model before it is quantised; AutoAWQ and GPTQModel want as many heads of keys as of queries here."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=width, intermediate_size=width, moe_intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=experts, num_experts_per_tok=2,
        initializer_range=0.1, tie_word_embeddings=False, max_position_embeddings=128,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(dtype).save_pretrained(BASE)


def make_tokenizer() -> Any:
    """64 words, which the tools store beside a model; calibration data are token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(64)}
    whole = Tokenizer(models.WordLevel(words, unk_token="t0"))
    made = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="t0", pad_token="t1", eos_token="t2")
    made.save_pretrained(BASE)
    return made


def samples(count: int, length: int) -> list[list[int]]:
    """Random token ids to calibrate with."""
    return torch.randint(0, 64, (count, length)).tolist()


def keep(name: str, made: Path, logits: torch.Tensor | None = None) -> None:
    """Keeps configuration and tensors of a model, and what its tool answers."""
    shutil.rmtree(name, ignore_errors=True)
    Path(name).mkdir()
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"].pop("meta", None)
    Path(name, "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(made / "model.safetensors", Path(name, "model.safetensors"))
    if logits is not None:
        save_file({"logits": logits[0].float().contiguous()}, f"{name}.logits.safetensors")
    shutil.rmtree(made)
    shutil.rmtree(BASE)


def gptq() -> None:
    """GPTQModel, with its own product in torch."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    make_base(64, 4, torch.float16)
    make_tokenizer()
    model = GPTQModel.load(str(BASE), QuantizeConfig(bits=4, group_size=32, desc_act=False, sym=True), device="cpu")
    model.quantize([{"input_ids": line, "attention_mask": [1] * len(line)} for line in samples(16, 96)], batch_size=1)
    model.save("made")
    again = GPTQModel.load("made", device="cpu", backend=BACKEND.TORCH)
    with torch.no_grad():
        keep("gptq", Path("made"), again.model(input_ids=tokens()).logits)


def awq() -> None:
    """AutoAWQ; its products run on GPUs alone, so its linear layers are dequantised by its own function."""
    from awq import AutoAWQForCausalLM
    from awq.modules.linear import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    make_base(64, 4, torch.float16)
    tokenizer = make_tokenizer()
    model = AutoAWQForCausalLM.from_pretrained(str(BASE), device_map="cpu", safetensors=True)
    how = {
        "zero_point": True,
        "q_group_size": 32,
        "w_bit": 4,
        "version": "GEMM",
        "modules_to_not_convert": ["mlp.gate"],
    }
    model.quantize(tokenizer, quant_config=how, calib_data=samples(64, 64), max_calib_samples=64, max_calib_seq_len=64)
    model.save_quantized("made")
    inner = model.model
    for name, layer in list(inner.named_modules()):
        if isinstance(layer, WQLinear_GEMM):
            weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.w_bit, layer.group_size)
            dense = torch.nn.Linear(*weight.shape, bias=False)
            dense.weight.data = weight.t().contiguous()
            parent, _, last = name.rpartition(".")
            setattr(inner.get_submodule(parent), last, dense)
    with torch.no_grad():
        keep("awq", Path("made"), inner.float().eval()(input_ids=tokens()).logits)


def w4a8() -> None:
    """llm-compressor: int4 groups of 128 with rows of e4m3, one scale per token. transformers 5.24 does not load it."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    make_base(128, 3, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    ignore = ["lm_head", "re:.*mlp.gate$", "re:.*self_attn.*"]
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W4AFP8", ignore=ignore))
    model.save_pretrained("made", save_compressed=True)
    keep("w4a8", Path("made"))


if __name__ == "__main__":
    torch.manual_seed(1)
    {"gptq": gptq, "awq": awq, "w4a8": w4a8}[sys.argv[1]]()
