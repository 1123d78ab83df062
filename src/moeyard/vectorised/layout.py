"""Layouts by one stable sort; every output is then gathered, so no write can collide and nothing waits for the host."""

import torch
from torch import Tensor

from moeyard.dispatch.ids import local_expert_ids
from moeyard.values import Layout


def align_launch(topk_ids: Tensor, expert_map: Tensor | None, out: Layout) -> None:
    """Fills the layout of int32 or int64 ids of any shape."""
    local = local_expert_ids(topk_ids.reshape(1, -1), expert_map, out.num_experts, out.num_local_experts)
    _align_stacked(local, out.num_local_experts, out.block_size, [tensor.unsqueeze(0) for tensor in out.tensors])


def batched_align_launch(expert_num_tokens: Tensor, max_num_tokens: int, out: Layout) -> None:
    """Fills the layout of a batched buffer: its routes are in order already, the valid ones of an expert first."""
    position = torch.arange(max_num_tokens, device=expert_num_tokens.device)
    expert = torch.arange(out.num_local_experts, device=expert_num_tokens.device).unsqueeze(1)
    local = torch.where(position < expert_num_tokens.unsqueeze(1), expert, -1).view(1, -1)
    _align_stacked(local, out.num_local_experts, out.block_size, [tensor.unsqueeze(0) for tensor in out.tensors])


def lora_align_launch(topk_ids: Tensor, token_lora_mapping: Tensor, expert_map: Tensor | None, out: Layout) -> None:
    """Fills one layout an adapter, all in one pass over [max_loras, n]."""
    local = local_expert_ids(topk_ids.reshape(-1), expert_map, out.num_experts, out.num_local_experts)
    loras = torch.arange(out.sorted_token_ids.shape[0], device=topk_ids.device).unsqueeze(1)
    adapter = token_lora_mapping.repeat_interleave(out.top_k, output_size=local.shape[0])
    chosen = torch.where(adapter == loras, local, -1)
    _align_stacked(chosen, out.num_local_experts, out.block_size, list(out.tensors))


def _align_stacked(local: Tensor, num_local_experts: int, block_size: int, out: list[Tensor]) -> None:
    """Fills stacked layouts from the local expert of each route.

    Args:
        local: [L, n] int64, in [-1, num_local_experts).
        out: the six tensors of a Layout, each with a leading axis of L.
    """
    sorted_token_ids, expert_ids, num_tokens_post_padded, expert_offsets, expert_counts, route_rows = out
    stack, num_routes = local.shape
    device = local.device
    keys, order = torch.sort(torch.where(local < 0, num_local_experts, local), dim=1, stable=True)

    # first[:, e]: where expert e starts among the sorted routes; the last entry is the number of valid ones
    experts = torch.arange(num_local_experts + 1, device=device).expand(stack, -1).contiguous()
    first = torch.searchsorted(keys, experts)
    counts = first[:, 1:] - first[:, :-1]
    expert_counts.copy_(counts)
    expert_offsets.zero_()
    ends = torch.cumsum(_round_up(counts, block_size), dim=1)
    expert_offsets[:, 1:] = ends
    total = ends[:, -1:]
    num_tokens_post_padded.copy_(total)

    # every slot looks up its expert, its rank there, and the route of that rank
    slots = torch.arange(sorted_token_ids.shape[1], device=device).expand(stack, -1).contiguous()
    of_slot = torch.searchsorted(ends, slots, right=True).clamp_(max=num_local_experts - 1)
    rank = slots - expert_offsets.gather(1, of_slot)
    held = (slots < total) & (rank < counts.gather(1, of_slot))
    source = torch.where(held, first.gather(1, of_slot) + rank, 0)
    if num_routes:
        sorted_token_ids.copy_(torch.where(held, order.gather(1, source), num_routes))
    blocks = slots[:, ::block_size]
    expert_ids.copy_(torch.where(blocks < total, of_slot[:, ::block_size], -1))

    # and every sorted route writes its slot back to where it came from
    expert = keys.clamp(max=num_local_experts - 1)
    rank = torch.arange(num_routes, device=device) - first.gather(1, expert)
    row = torch.where(keys < num_local_experts, expert_offsets.gather(1, expert) + rank, -1)
    route_rows.scatter_(1, order, row.to(torch.int32))


def _round_up(values: Tensor, multiple: int) -> Tensor:
    """`tiles.round_up`, elementwise."""
    return (values + (multiple - 1)).div(multiple, rounding_mode="floor") * multiple
