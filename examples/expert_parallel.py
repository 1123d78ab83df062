"""A layer of experts, and a Qwen3-MoE of transformers, over several processes.

    torchrun --nproc-per-node 4 examples/expert_parallel.py [--tokens N] [--device cuda]

Every process has tokens of its own and a quarter of the experts. What the processes compute is compared with one
process that has all experts: bit by bit in the same order of sums. Weights are random; nothing is downloaded. Without
transformers the model is left out.
"""

import argparse
import importlib.util

import torch
import torch.distributed as dist

import moeyard
from moeyard import ExpertWeights, Routing, parallel


def layer(tokens: int, device: torch.device) -> list[str]:
    """One layer: placement from load, agreement, the call, and the comparison with one process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)  # all processes draw alike, so that each can check the others
    hidden, size, experts, top_k = 128, 96, 6 * ranks, 4

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    everything = ExpertWeights(draw(experts, 2 * size, hidden) / 11, draw(experts, hidden, size) / 10)
    rows = draw(tokens * ranks, hidden)
    chosen = torch.softmax(draw(tokens * ranks, experts) + 3 * draw(experts), 1).topk(top_k)
    routing = Routing(chosen.values, chosen.indices.int())

    load = torch.bincount(chosen.indices.flatten(), minlength=experts)
    plan = parallel.plan_experts(load, ranks, slots=7)
    mine = parallel.slice_experts(everything, plan, rank)
    connection = parallel.connect(mine, plan, top_k=top_k, max_tokens=tokens)
    own = slice(rank * tokens, (rank + 1) * tokens)
    answer = parallel.fused_experts(
        rows[own], Routing(routing.topk_weights[own], routing.topk_ids[own]), mine, connection
    )

    alone = parallel.experts_in_order(rows, routing, everything, plan, tokens_per_rank=[tokens] * ranks)
    plain = moeyard.fused_experts(rows, routing, everything)
    before, after = parallel.contiguous_plan(experts, ranks).loads(load), plan.loads(load)
    return [
        f"load of the busiest rank over the mean: {max(before) * ranks / sum(before):.2f}, with "
        f"{plan.num_slots - experts} replicas {max(after) * ranks / sum(after):.2f}",
        str(connection.explanation),
        f"same bits as one process in that order: {torch.equal(answer, alone[own])}; largest difference from "
        f"fused_experts: {float((answer - plain[own]).abs().max()):.1e}",
    ]


def model(tokens: int, device: torch.device) -> list[str]:
    """A small Qwen3-MoE, sharded by one call; every process has a batch of its own."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    def make() -> Qwen3MoeForCausalLM:
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, moe_intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4 * dist.get_world_size(),
            num_experts_per_tok=4,
        )  # fmt: skip
        return Qwen3MoeForCausalLM(config).eval().to(device)

    text = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(dist.get_rank())).to(device)
    whole, sharded = make(), make()
    layers = parallel.shard_model(sharded)
    with torch.no_grad():
        error = (sharded(text).logits - whole(text).logits).abs().max()
    held = sum(p.numel() for p in sharded.parameters()) / sum(p.numel() for p in whole.parameters())
    return [str(layers[0]), f"{held:.0%} of the parameters per process; largest difference of the logits {error:.1e}"]


def main() -> None:
    """Joins the processes that torchrun started, and prints what rank 0 finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50, help="tokens per process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    dist.init_process_group("nccl" if given.device == "cuda" else "gloo")
    device = torch.device(given.device, dist.get_rank() if given.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    lines = layer(given.tokens, device)
    if importlib.util.find_spec("transformers") is not None:
        lines += model(given.tokens, device)
    if dist.get_rank() == 0:
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
