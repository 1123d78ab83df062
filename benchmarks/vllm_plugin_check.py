"""The plugin in a real vLLM: `python benchmarks/vllm_plugin_check.py [--out FILE]`, on a machine with vLLM and a GPU.

Each question is answered by two fresh processes, without the plugin and with `MOEYARD_VLLM=1`, and the answers are
compared:

- operators: alignment, routers, permutation, sums, `fused_experts` and `TritonExperts` in bfloat16, by vLLM's names;
- a model: a Mixture-of-Experts model of random weights (made here, one per scheme) through `vllm.LLM`, whose log
  probabilities of the first token after each prompt and whose greedy tokens are compared.

Ids and layouts must be equal; sums may differ as sums of the dtype do. Prints a line per question, and exits with 1
where an answer is off, where the plugin is not active, or where a process fails. vLLM loads plugins that are installed,
so moeyard must be installed (an editable install serves).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import torch

_MOE = "vllm.model_executor.layers.fused_moe"
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 1024, "head_dim": 128,
    "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4, "intermediate_size": 2048,
    "moe_intermediate_size": 384, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 4096, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1, "attention_bias": False,
}  # fmt: skip
SCHEMES = {"bf16": None, "fp8": "fp8"}
PROMPTS, LENGTH, TOKENS = 8, 96, 24
NEAR = 0.1
"""Largest difference between log probabilities of a first token."""


def operators() -> dict[str, torch.Tensor]:
    """Answers of vLLM's functions, by name."""
    import importlib

    from vllm.config import VllmConfig, set_current_vllm_config

    align = importlib.import_module(f"{_MOE}.moe_align_block_size")
    permute = importlib.import_module(f"{_MOE}.moe_permute_unpermute")
    router = importlib.import_module(f"{_MOE}.router.fused_topk_router")
    grouped = importlib.import_module(f"{_MOE}.router.grouped_topk_router")
    experts = importlib.import_module(f"{_MOE}.fused_moe")
    ops = importlib.import_module("vllm._custom_ops")
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for tokens in (1, 33, 2048):
        hidden = torch.randn(tokens, 1024, device="cuda").bfloat16()
        logits = torch.randn(tokens, 64, device="cuda")
        w1 = torch.randn(64, 768, 1024, device="cuda").bfloat16() / 32
        w2 = torch.randn(64, 1024, 384, device="cuda").bfloat16() / 20
        with set_current_vllm_config(VllmConfig()):
            weights, ids, _ = router.fused_topk(hidden, logits, 8, True)
            bias = torch.randn(64, device="cuda")
            chosen = grouped.fused_grouped_topk(hidden, logits, 8, True, bias, 8, 4, "sigmoid", 2.5)
            order = chosen[1].sort(1)
            found[f"ids fused_topk {tokens}"], found[f"sum fused_topk {tokens}"] = ids, weights
            found[f"ids grouped {tokens}"] = order.values
            found[f"sum grouped {tokens}"] = chosen[0].gather(1, order.indices)
            slots, blocks, total = align.moe_align_block_size(ids, 64, 64)
            found[f"ids blocks {tokens}"], found[f"ids total {tokens}"] = blocks, total
            if tokens < 64:  # one block per expert, inside which vLLM promises no order
                found[f"ids slots {tokens}"] = slots[: int(total)].view(-1, 64).sort(1).values
            rows, _, offsets, inverse, _ = permute.moe_permute(hidden, None, ids, 64)
            found[f"ids offsets {tokens}"] = offsets
            out = torch.empty_like(hidden)
            permute.moe_unpermute(out, rows, weights, inverse, offsets)
            found[f"sum unpermute {tokens}"] = out
            summed = torch.empty_like(hidden)
            ops.moe_sum(rows.view(tokens, 8, -1)[:, :8].contiguous(), summed)
            found[f"sum moe_sum {tokens}"] = summed
            found[f"sum fused_experts {tokens}"] = experts.fused_experts(hidden, w1, w2, weights, ids)
    return found


def model(scheme: str) -> dict[str, torch.Tensor]:
    """Log probabilities after each prompt, and greedy tokens, of a model of random weights."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        engine = LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, quantization=SCHEMES[scheme], seed=0,
            max_model_len=1024, gpu_memory_utilization=0.3, enable_prefix_caching=False,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(2, CONFIG["vocab_size"], (PROMPTS, LENGTH), generator=generator)  # type: ignore[call-overload]
        asked = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=20, ignore_eos=True, detokenize=False)
        replies = engine.generate([{"prompt_token_ids": row.tolist()} for row in prompts], asked)
    first = torch.full((PROMPTS, CONFIG["vocab_size"]), -torch.inf)  # type: ignore[arg-type]
    for i, reply in enumerate(replies):
        for token, entry in reply.outputs[0].logprobs[0].items():
            first[i, token] = entry.logprob
    greedy = torch.tensor([list(reply.outputs[0].token_ids) for reply in replies])
    return {"first": first, "greedy": greedy}


def answer(question: str, file: Path) -> None:
    """A process of its own: writes its answer, and which of vLLM's functions are moeyard's."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found = operators() if question == "operators" else model(question)
    from moeyard.integrations.vllm import plugin

    states = plugin.activate(plugin.parts_asked_for())
    torch.save({"found": {key: value.cpu() for key, value in found.items()}, "states": states}, file)


def ask(question: str, active: bool, folder: Path) -> dict[str, Any]:
    """The answer of a fresh process, with or without the plugin."""
    file = folder / f"{question}-{active}.pt"
    environment = {**os.environ, "MOEYARD_VLLM": "1" if active else "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    command = [sys.executable, __file__, "--answer", question, "--out", str(file)]
    subprocess.run(command, check=True, env=environment, timeout=900)
    answer: dict[str, Any] = torch.load(file)
    return answer


def difference(question: str, without: dict[str, torch.Tensor], with_it: dict[str, torch.Tensor]) -> list[str]:
    """What is off between two answers, in words."""
    wrong = []
    for name, one in without.items():
        other = with_it[name]
        if name.startswith("ids"):
            if not torch.equal(one.long(), other.long()):
                wrong.append(f"{name}: {int((one != other).sum())} of {one.numel()} differ")
        elif name.startswith("sum"):
            off = float((one.double() - other.double()).square().mean().sqrt() / one.double().square().mean().sqrt())
            if not off <= 0.01:
                wrong.append(f"{name}: differs by {off:.1e} of its size")
        elif name == "first":
            both = one.isfinite() & other.isfinite()
            off = float((one - other)[both].abs().max())
            if not (off <= NEAR and bool(both.sum(1).ge(10).all())):
                wrong.append(f"{question}: log probabilities of the first token differ by {off:.3f}")
    return wrong


def main() -> int:
    """Asks everything twice; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file of what was found")
    parser.add_argument("--only", nargs="*", default=["operators", *SCHEMES], help="operators, bf16, fp8")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.answer:
        answer(asked.answer, asked.out)
        return 0
    if not any(point.name == "moeyard" for point in entry_points(group="vllm.general_plugins")):
        parser.error("moeyard is not installed with its entry point (pip install -e . does)")
    report: dict[str, Any] = {
        "vllm": version("vllm"), "torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "questions": {},
    }  # fmt: skip
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for question in asked.only:
            without, with_it = (ask(question, active, Path(folder)) for active in (False, True))
            wrong = difference(question, without["found"], with_it["found"])
            states = with_it["states"]
            active = [path for path, state in states.items() if state == "active"]
            if not active:
                wrong.append("no function is moeyard's")
            line = f"{question}: {'; '.join(wrong) or 'as without the plugin'}; {len(active)} of {len(states)} active"
            if "greedy" in without["found"]:
                same = without["found"]["greedy"] == with_it["found"]["greedy"]
                line += f"; {float(same.float().mean()):.0%} of greedy tokens are equal"
            print(line)
            report["questions"][question] = {"wrong": wrong, "states": states, "said": line}
            failed = failed or bool(wrong)
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
