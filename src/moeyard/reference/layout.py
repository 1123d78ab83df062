"""The specification of layouts: a list of routes per expert."""

import torch
from torch import Tensor

from moeyard.values import Layout


def round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def local_experts(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None, num_local_experts: int) -> list[int]:
    """The local expert of each route; -1 where the route is dropped.

    Dropped are ids below 0, ids of `num_experts` and above, and ids that `expert_map` sends below 0 or to
    `num_local_experts` and above. Ids are taken as they are, never narrowed: 2^32 + 3 is not expert 3.
    """
    result: list[int] = []
    mapping = None if expert_map is None else expert_map.tolist()
    for expert in topk_ids.reshape(-1).tolist():
        local = expert if 0 <= expert < num_experts else -1
        if mapping is not None and local >= 0:
            local = mapping[local]
        result.append(local if 0 <= local < num_local_experts else -1)
    return result


def _layout(
    routes_of: list[list[int]], num_routes: int, capacity: int, block_size: int, top_k: int, num_experts: int
) -> Layout:
    """The Layout of the given ascending routes of each local expert."""
    sorted_token_ids = torch.full((capacity,), num_routes, dtype=torch.int32)
    expert_ids = torch.full((capacity // block_size,), -1, dtype=torch.int32)
    route_rows = torch.full((num_routes,), -1, dtype=torch.int32)
    offsets = [0]
    for expert, routes in enumerate(routes_of):
        first, end = offsets[-1], offsets[-1] + round_up(len(routes), block_size)
        sorted_token_ids[first : first + len(routes)] = torch.tensor(routes, dtype=torch.int32)
        route_rows[torch.tensor(routes, dtype=torch.int64)] = torch.arange(
            first, first + len(routes), dtype=torch.int32
        )
        expert_ids[first // block_size : end // block_size] = expert
        offsets.append(end)
    return Layout(
        sorted_token_ids=sorted_token_ids,
        expert_ids=expert_ids,
        num_tokens_post_padded=torch.tensor([offsets[-1]], dtype=torch.int32),
        expert_offsets=torch.tensor(offsets, dtype=torch.int64),
        expert_counts=torch.tensor([len(routes) for routes in routes_of], dtype=torch.int32),
        route_rows=route_rows,
        block_size=block_size,
        top_k=top_k,
        num_experts=num_experts,
        num_local_experts=len(routes_of),
    )


def moe_align_block_size(
    topk_ids: Tensor,
    *,
    num_experts: int,
    block_size: int,
    expert_map: Tensor | None = None,
    num_local_experts: int | None = None,
    top_k: int | None = None,
) -> Layout:
    """Groups routes by local expert, ascending inside an expert, each expert padded to whole blocks."""
    num_local = num_experts if num_local_experts is None else num_local_experts
    num_routes = topk_ids.numel()
    routes_of: list[list[int]] = [[] for _ in range(num_local)]
    for route, expert in enumerate(local_experts(topk_ids, num_experts, expert_map, num_local)):
        if expert >= 0:
            routes_of[expert].append(route)
    capacity = num_routes + num_local * (block_size - 1)
    if num_routes < num_local:
        capacity = min(capacity, num_routes * block_size)
    if top_k is None:
        top_k = topk_ids.shape[1] if topk_ids.dim() == 2 else 1
    return _layout(routes_of, num_routes, round_up(capacity, block_size), block_size, top_k, num_experts)


def batched_moe_align_block_size(expert_num_tokens: Tensor, *, max_num_tokens: int, block_size: int) -> Layout:
    """The layout of a batched buffer [num_experts, max_num_tokens, ...]: route e * max_num_tokens + j.

    Counts are taken into [0, max_num_tokens].
    """
    counts = [min(max(count, 0), max_num_tokens) for count in expert_num_tokens.tolist()]
    routes_of = [[e * max_num_tokens + j for j in range(count)] for e, count in enumerate(counts)]
    capacity = len(counts) * round_up(max_num_tokens, block_size)
    return _layout(routes_of, len(counts) * max_num_tokens, capacity, block_size, 1, len(counts))


def moe_lora_align_block_size(
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    *,
    num_experts: int,
    block_size: int,
    max_loras: int,
    expert_map: Tensor | None = None,
    num_local_experts: int | None = None,
    top_k: int | None = None,
) -> tuple[Layout, ...]:
    """One layout an adapter, over the routes of the tokens that use it; other tokens are in none."""
    if top_k is None:
        top_k = topk_ids.shape[1] if topk_ids.dim() == 2 else 1
    adapter = token_lora_mapping.to(torch.int64).repeat_interleave(top_k)
    ids = topk_ids.reshape(-1).to(torch.int64)
    return tuple(
        moe_align_block_size(
            torch.where(adapter == lora, ids, -1),
            num_experts=num_experts,
            block_size=block_size,
            expert_map=expert_map,
            num_local_experts=num_local_experts,
            top_k=top_k,
        )
        for lora in range(max_loras)
    )


# The same functions as launchers: outputs are given, results are copied into them.


def host(tensor: Tensor | None) -> Tensor | None:
    """A tensor without gradient on the CPU."""
    return None if tensor is None else tensor.detach().cpu()


def align_launch(topk_ids: Tensor, expert_map: Tensor | None, out: Layout) -> None:
    result = moe_align_block_size(
        topk_ids.cpu(),
        num_experts=out.num_experts,
        block_size=out.block_size,
        expert_map=host(expert_map),
        num_local_experts=out.num_local_experts,
    )
    out.copy_(result)


def batched_align_launch(expert_num_tokens: Tensor, max_num_tokens: int, out: Layout) -> None:
    out.copy_(
        batched_moe_align_block_size(expert_num_tokens.cpu(), max_num_tokens=max_num_tokens, block_size=out.block_size)
    )


def lora_align_launch(topk_ids: Tensor, token_lora_mapping: Tensor, expert_map: Tensor | None, out: Layout) -> None:
    layouts = moe_lora_align_block_size(
        topk_ids.cpu(),
        token_lora_mapping.cpu(),
        num_experts=out.num_experts,
        block_size=out.block_size,
        max_loras=len(out.sorted_token_ids),
        expert_map=host(expert_map),
        num_local_experts=out.num_local_experts,
        top_k=out.top_k,
    )
    for lora, layout in enumerate(layouts):
        for mine, theirs in zip(out.tensors, layout.tensors, strict=True):
            mine[lora].copy_(theirs)
