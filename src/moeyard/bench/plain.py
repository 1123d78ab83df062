"""What one writes in eager torch without a library."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeyard import Permuted, Routing, tiles
from moeyard.bench.workloads import Case

OPS = ("moe_align_block_size", "permute", "permute_to_fp8", "combine", "moe_sum", "ids_to_rows", "route")


def plain(case: Case) -> Callable[[Any], Any]:
    """The answer to a case of one of `OPS`."""
    if case.op == "moe_align_block_size":
        return lambda x: _plain_align(x.topk_ids, case["num_experts"], case["block_size"])
    if case.op == "permute":
        out: dict[str, Tensor] = {}

        def permute(x: Any) -> Tensor:
            tokens = torch.div(x.layout.sorted_token_ids, x.layout.top_k, rounding_mode="floor")
            tokens = tokens.clamp(max=x.hidden_states.shape[0] - 1)
            if not out:
                out["rows"] = torch.index_select(x.hidden_states, 0, tokens)
            return torch.index_select(x.hidden_states, 0, tokens, out=out["rows"])

        return permute
    if case.op == "combine":

        def combine(x: Any) -> Tensor:
            taken = x.rows[x.layout.route_rows.clamp(min=0)].view(*x.topk_weights.shape, -1)
            dropped = (x.layout.route_rows < 0).view(*x.topk_weights.shape, 1)
            weighted = (taken * x.topk_weights.unsqueeze(2)).masked_fill(dropped, 0)
            total: Tensor = weighted.sum(1).to(x.rows.dtype)
            return total

        return combine
    if case.op == "ids_to_rows":
        return lambda x: x.hidden_states[x.topk_ids.view(-1).argsort(stable=True) // case["top_k"]]
    if case.op == "permute_to_fp8":
        return lambda x: _to_fp8(x, case["group_size"] or case["hidden_size"])
    if case.op == "route":
        return lambda x: _route(x.router_logits, x.options)
    return lambda x: x.rows.sum(1)


def _to_fp8(x: Any, size: int) -> Permuted:
    tokens, hidden = x.hidden_states.shape
    groups = x.hidden_states.float().view(tokens, hidden // size, size)
    largest = groups.abs().amax(2).clamp(min=1e-10)
    scales = largest / torch.full_like(largest, 448.0)
    values = (groups / scales.unsqueeze(2)).clamp(-448, 448).to(torch.float8_e4m3fn).view(tokens, hidden)
    source = (x.layout.sorted_token_ids // x.layout.top_k).clamp(max=tokens - 1)
    rows = values.view(torch.uint8)[source].view(torch.float8_e4m3fn)
    return Permuted(rows, scales[source])


def _route(logits: Tensor, options: Any) -> Routing:
    """Ties go where topk sends them."""
    if options.get("scoring") == "sigmoid":
        scores = torch.sigmoid(logits.float())
        keys = scores + options["selection_bias"]
        groups = keys.view(len(keys), options["num_groups"], -1)
        best = groups.topk(2, dim=2).values.sum(2).topk(options["top_k_groups"], dim=1).indices
        kept = torch.zeros(groups.shape[:2], dtype=torch.bool, device=keys.device).scatter_(1, best, True)
        ids = groups.masked_fill(~kept.unsqueeze(2), -torch.inf).flatten(1).topk(options["top_k"], dim=1).indices
        weights = scores.gather(1, ids)
    else:
        weights, ids = torch.softmax(logits.float(), 1).topk(options["top_k"], dim=1)
    weights = weights / weights.sum(1, keepdim=True) * options.get("routed_scaling_factor", 1.0)
    return Routing(weights, ids.int())


def _plain_align(topk_ids: Tensor, num_experts: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = topk_ids.reshape(-1).long()
    n, device = ids.shape[0], ids.device
    keys = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    blocks = (counts + block_size - 1) // block_size
    ends = torch.cumsum(blocks * block_size, 0)
    order = torch.argsort(keys, stable=True)[: int(counts.sum())]
    shift = (ends - blocks * block_size) - (torch.cumsum(counts, 0) - counts)
    slots = torch.arange(order.shape[0], device=device) + shift.repeat_interleave(counts)
    capacity = tiles.layout_capacity(n, num_experts, block_size)
    sorted_token_ids = torch.full((capacity,), n, dtype=torch.int32, device=device)
    sorted_token_ids[slots] = order.int()
    expert_ids = torch.full((capacity // block_size,), -1, dtype=torch.int32, device=device)
    experts = torch.arange(num_experts, dtype=torch.int32, device=device).repeat_interleave(blocks)
    expert_ids[: experts.shape[0]] = experts
    return sorted_token_ids, expert_ids, ends[-1:].int()
