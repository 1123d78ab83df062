"""The specification of what moves and sums rows, slot by slot."""

import torch
from torch import Tensor

from moeyard.reference.layout import host, local_experts
from moeyard.values import INT32_MAX, Layout, Permuted


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


# The same functions as launchers: outputs are given, results are copied into them.


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
    out.copy_(_sum_routes(rows.detach().cpu(), route_rows.tolist(), top_k, host(topk_weights)))


def moe_sum_launch(rows: Tensor, topk_ids: Tensor | None, expert_map: Tensor | None, *, out: Tensor) -> None:
    out.copy_(moe_sum(rows.detach().cpu(), topk_ids=host(topk_ids), expert_map=host(expert_map)))
