"""The specification: every operator in plain PyTorch on the CPU, with wide accumulation and no cleverness.

Each function has the name and the arguments of the public operator and returns what it must return; slots and
rows that the operator leaves unwritten are zero here. Tests compare every implementation with this file, which
is never chosen except by name. The launchers at the end let it stand in the table of implementations.
"""

import math
from typing import Any

import torch
from torch import Tensor

from moeyard.values import INT32_MAX, Layout, Permuted, Routing


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


def _gather(source: Tensor, sorted_token_ids: Tensor, num_routes: int, top_k: int) -> Tensor:
    rows = source.new_zeros(len(sorted_token_ids), *source.shape[1:])
    for slot, route in enumerate(sorted_token_ids.tolist()):
        if route < num_routes:
            rows[slot] = source[route // top_k]
    return rows


def permute(hidden_states: Tensor, layout: Layout, *, scales: Tensor | None = None) -> Permuted:
    """Copies the row of token `route // top_k` (and its scales) to each slot that holds a route."""
    where = (layout.sorted_token_ids, layout.num_routes, layout.top_k)
    return Permuted(_gather(hidden_states, *where), None if scales is None else _gather(scales, *where))


FP8_MAX = 448.0


def permute_to_fp8(hidden_states: Tensor, layout: Layout, *, group_size: int | None = None) -> Permuted:
    """Quantises each row to float8_e4m3fn in float32, then permutes the rows and their scales.

    The scale of a row, or of `group_size` neighbours, is max(largest magnitude, 1e-10) / 448.
    """
    num_tokens, hidden_size = hidden_states.shape
    size = group_size or hidden_size
    groups = hidden_states.float().reshape(num_tokens, hidden_size // size, size)
    scales = groups.abs().amax(2).clamp(min=1e-10) / FP8_MAX
    values = (groups / scales.unsqueeze(2)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return permute(
        values.reshape(num_tokens, hidden_size), layout, scales=scales[:, 0] if group_size is None else scales
    )


def shuffle_rows(input: Tensor, dst2src_map: Tensor) -> Tensor:
    """Row i of the result is row `dst2src_map[i]` of the input, or zero where that is out of range."""
    result = input.new_zeros(len(dst2src_map), input.shape[1])
    for destination, source in enumerate(dst2src_map.tolist()):
        if 0 <= source < len(input):
            result[destination] = input[source]
    return result


def _sum_routes(rows: Tensor, row_of_route: list[int], top_k: int, topk_weights: Tensor | None) -> Tensor:
    result = torch.zeros(len(row_of_route) // top_k, rows.shape[1], dtype=torch.float64)
    for route, row in enumerate(row_of_route):
        if row >= 0:
            token, k = divmod(route, top_k)
            weight = 1.0 if topk_weights is None else float(topk_weights[token, k])
            result[token] += weight * rows[row].double()
    return result.to(rows.dtype)


def combine(rows: Tensor, layout: Layout, topk_weights: Tensor | None = None) -> Tensor:
    """Sums each token's rows in k order, weighted, in float64; dropped routes count as zero."""
    return _sum_routes(rows, layout.route_rows.tolist(), layout.top_k, topk_weights)


def moe_sum(rows: Tensor, *, topk_ids: Tensor | None = None, expert_map: Tensor | None = None) -> Tensor:
    """Sums rows [T, K, H] over K in float64, skipping routes whose id is dropped if ids are given."""
    num_tokens, top_k, hidden_size = rows.shape
    row_of_route = list(range(num_tokens * top_k))
    if topk_ids is not None:
        num_experts = INT32_MAX if expert_map is None else len(expert_map)
        experts = local_experts(topk_ids, num_experts, expert_map, INT32_MAX)
        row_of_route = [row if expert >= 0 else -1 for row, expert in enumerate(experts)]
    return _sum_routes(rows.reshape(-1, hidden_size), row_of_route, top_k, None)


def _scores(logits: Tensor, scoring: str) -> Tensor:
    """Float32 scores of float64 logits; what is NaN or infinite counts as 0."""
    if scoring == "softmax":
        exponentials = (logits - logits.amax(1, keepdim=True)).exp()
        scores = exponentials / exponentials.sum(1, keepdim=True)
    else:
        scores = 1 / (1 + (-logits).exp())
    return torch.where(scores.isfinite(), scores, 0).float()


def _best(keys: list[float], count: int, among: list[int]) -> list[int]:
    """The `count` positions of `among` with the largest keys: the lower position on ties, NaN as low as -inf."""
    ranked = {i: -math.inf if math.isnan(keys[i]) else keys[i] for i in among}
    return sorted(among, key=lambda i: (-ranked[i], i))[:count]


def route(
    router_logits: Tensor,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = False,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    routed_scaling_factor: float = 1.0,
    is_padding: Tensor | None = None,
) -> Routing:
    """Chooses experts token by token.

    Experts are ranked by their logits; with a bias by score + bias in float32. A softmax row without a value (a NaN or
    +inf in it, or nothing but -inf) ranks all experts alike. Of several groups, those with the largest keys are kept
    first: the largest member, with a bias the float32 sum of the two largest.
    """
    num_tokens, num_experts = router_logits.shape
    logits = router_logits.double()
    scores = _scores(logits, scoring)
    keys = logits if selection_bias is None else (scores + selection_bias.float()).double()
    if scoring == "softmax" and selection_bias is None:
        keys = torch.where((scores.sum(1, keepdim=True) > 0), keys, 0)
    size = num_experts // num_groups
    weights, ids = torch.zeros(num_tokens, top_k), torch.full((num_tokens, top_k), -1, dtype=torch.int32)
    for token in range(num_tokens):
        if is_padding is not None and bool(is_padding[token]):
            continue
        key: list[float] = keys[token].tolist()
        among = list(range(num_experts))
        if num_groups > 1:
            best_of = [_best(key, 2, among[g * size : (g + 1) * size]) for g in range(num_groups)]
            if selection_bias is None:
                group_keys = [key[best[0]] for best in best_of]
            else:
                group_keys = [float(torch.tensor([key[i] for i in best]).sum()) for best in best_of]
            kept = _best(group_keys, top_k_groups, list(range(num_groups)))
            among = [i for i in among if i // size in kept]
        chosen = torch.tensor(_best(key, top_k, among), dtype=torch.int64)
        weight = scores[token, chosen].double()
        if renormalize and float(weight.sum()) > 0:
            weight = weight / weight.sum()
        weights[token] = (weight * routed_scaling_factor).float()
        ids[token] = chosen.int()
    return Routing(weights, ids)


# The same functions as launchers: outputs are given, results are copied into them.


def _host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu()


def align_launch(topk_ids: Tensor, expert_map: Tensor | None, out: Layout) -> None:
    result = moe_align_block_size(
        topk_ids.cpu(),
        num_experts=out.num_experts,
        block_size=out.block_size,
        expert_map=_host(expert_map),
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
        expert_map=_host(expert_map),
        num_local_experts=out.num_local_experts,
        top_k=out.top_k,
    )
    for lora, layout in enumerate(layouts):
        for mine, theirs in zip(out.tensors, layout.tensors, strict=True):
            mine[lora].copy_(theirs)


def permute_launch(
    hidden_states: Tensor,
    scales: Tensor | None,
    *,
    sorted_token_ids: Tensor,
    route_rows: Tensor,
    top_k: int,
    rows: Tensor,
    row_scales: Tensor | None,
) -> None:
    where = (sorted_token_ids.cpu(), route_rows.numel(), top_k)
    held = sorted_token_ids < route_rows.numel()  # what the operator leaves unwritten stays as it was
    for source, out in ((hidden_states, rows), (scales, row_scales)):
        if source is not None and out is not None and out.numel():
            moved = _gather(source.detach().cpu().contiguous(), *where).to(out.device)
            _bytes(out)[held] = _bytes(moved)[held]


def permute_to_fp8_launch(
    hidden_states: Tensor,
    *,
    sorted_token_ids: Tensor,
    route_rows: Tensor,
    top_k: int,
    group_size: int | None,
    rows: Tensor,
    row_scales: Tensor,
) -> None:
    where = Layout.of([sorted_token_ids.cpu(), *[route_rows.cpu()] * 5], (0, 0, 1, top_k))
    moved = permute_to_fp8(hidden_states.detach().cpu(), where, group_size=group_size)
    held = sorted_token_ids < route_rows.numel()
    for out, source in ((rows, moved.rows), (row_scales, moved.scales)):
        if out.numel() and source is not None:
            _bytes(out)[held] = _bytes(source.to(out.device))[held]


def _bytes(tensor: Tensor) -> Tensor:
    """[R, ...] as [R, bytes], for dtypes that indexing lacks."""
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)


def shuffle_rows_launch(input: Tensor, dst2src_map: Tensor, *, out: Tensor) -> None:
    out.copy_(shuffle_rows(input.detach().cpu(), dst2src_map.cpu()))


def combine_launch(rows: Tensor, topk_weights: Tensor | None, *, route_rows: Tensor, top_k: int, out: Tensor) -> None:
    out.copy_(_sum_routes(rows.detach().cpu(), route_rows.tolist(), top_k, _host(topk_weights)))


def moe_sum_launch(rows: Tensor, topk_ids: Tensor | None, expert_map: Tensor | None, *, out: Tensor) -> None:
    out.copy_(moe_sum(rows.detach().cpu(), topk_ids=_host(topk_ids), expert_map=_host(expert_map)))


def route_launch(
    router_logits: Tensor, selection_bias: Tensor | None, is_padding: Tensor | None, *, out: Routing, **options: Any
) -> None:
    top_k = out.topk_ids.shape[1]
    bias, padding = _host(selection_bias), _host(is_padding)
    out.copy_(route(router_logits.detach().cpu(), top_k=top_k, selection_bias=bias, is_padding=padding, **options))
