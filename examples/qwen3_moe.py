"""A Qwen3-MoE of transformers whose experts are moeyard's: the same logits, for text as bytes.

    python examples/qwen3_moe.py [--tokens N] [--layers N]

The model is small and its weights are random; nothing is downloaded. Logits of both are compared with those of the same
model in float64: errors of both are those of the dtype (in bfloat16 mostly of the layers around the experts).
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moeyard.integrations.transformers  # noqa: F401 - registers "moeyard"


def make_model(layers: int) -> Qwen3MoeForCausalLM:
    """Random weights, 32 experts of which a token visits 4; a byte is a token."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, moe_intermediate_size=192, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32, num_experts=32, num_experts_per_tok=4,
        norm_topk_prob=True, max_position_embeddings=4096, initializer_range=0.05,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def logits_of(model: Qwen3MoeForCausalLM, tokens: Tensor, experts: str) -> tuple[Tensor, float]:
    """Logits with an experts implementation, and the seconds of a second call."""
    model.set_experts_implementation(experts)
    with torch.no_grad():
        model(tokens)
        start = time.perf_counter()
        return model(tokens).logits, time.perf_counter() - start


def compare(num_tokens: int, layers: int) -> list[tuple[str, str, float, float, float]]:
    """(dtype, experts, largest and root-mean-square error of the logits against float64, seconds) of both."""
    text = (Path(__file__).parents[1] / "README.md").read_bytes()[:num_tokens]
    tokens = torch.tensor(list(text)).unsqueeze(0)
    model, rows = make_model(layers), []
    for dtype in (torch.float32, torch.bfloat16):
        lossy = copy.deepcopy(model).to(dtype)
        wide, _ = logits_of(copy.deepcopy(lossy).double(), tokens, "eager")
        for experts in ("eager", "moeyard"):
            got, seconds = logits_of(lossy, tokens, experts)
            error = (got.double() - wide).abs()
            name = str(dtype).removeprefix("torch.")
            rows.append((name, experts, float(error.max()), float(error.square().mean().sqrt()), seconds))
    return rows


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="bytes of the text")
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    print(f"{'dtype':10} {'experts':8} {'largest error':>14} {'rms error':>10} {'ms':>8}")
    for dtype, experts, largest, rms, seconds in compare(arguments.tokens, arguments.layers):
        print(f"{dtype:10} {experts:8} {largest:14.2e} {rms:10.2e} {seconds * 1e3:8.1f}")


if __name__ == "__main__":
    main()
