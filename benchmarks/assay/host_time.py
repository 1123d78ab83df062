"""What calls cost on the host, as a workload for `assay ab`: every operator again and again on small tensors.

W=benchmarks/assay/host_time.py
assay ab A B --call $W:eager --inputs $W:cpu --delta 0.03
assay ab A B --call $W:eager --inputs $W:cuda --delta 0.03

One call makes CALLS calls of align, align with out=, permute, combine, route and fused_experts. On a GPU the kernels
take less time than their launches, so the host is what is timed.
"""

import torch
from torch import Tensor

import moeyard

CALLS = 100
TOKENS, TOP_K, EXPERTS, HIDDEN, SIZE = 4, 2, 8, 64, 32


def eager(ids: Tensor, rows: Tensor, factors: Tensor, logits: Tensor, w13: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
    """The last answers."""
    sizes = {"num_experts": EXPERTS, "block_size": 1}
    out = moeyard.empty_layout(TOKENS * TOP_K, top_k=TOP_K, device=ids.device, **sizes)
    weights = moeyard.ExpertWeights(w13, w2)
    for _ in range(CALLS):
        layout = moeyard.moe_align_block_size(ids, **sizes)
        moeyard.moe_align_block_size(ids, out=out, **sizes)
        permuted = moeyard.permute(rows, layout)
        summed = moeyard.combine(permuted.rows, layout, factors)
        routing = moeyard.route(logits, top_k=TOP_K)
        result = moeyard.fused_experts(rows, routing, weights)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return out.route_rows.cpu(), summed.float().cpu(), routing.topk_ids.cpu(), result.float().cpu()


def _inputs(seed: int, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed % 2**63)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K, dim=1).indices.int()
    dense = (draw(TOKENS, HIDDEN), draw(EXPERTS, 2 * SIZE, HIDDEN), draw(EXPERTS, HIDDEN, SIZE))
    rows, w13, w2 = ((t / 8).bfloat16().to(device) for t in dense)
    factors = torch.rand(TOKENS, TOP_K, generator=generator)
    return ids.to(device), rows, factors.to(device), draw(TOKENS, EXPERTS).to(device), w13, w2


def cpu(seed: int) -> tuple[Tensor, ...]:
    """On the CPU."""
    torch.set_num_threads(1)
    return _inputs(seed, "cpu")


def cuda(seed: int) -> tuple[Tensor, ...]:
    """On the GPU."""
    return _inputs(seed, "cuda")
