"""vLLM's weighted sum of what experts gave."""

import torch
from torch import Tensor

from moeyard.combine import combine_routes
from moeyard.dispatch.checks import check_shape, check_tensor
from moeyard.dispatch.ids import local_expert_ids, narrow_ids


def moe_fused_mul_sum(
    inputs: Tensor,
    topk_weights: Tensor,
    outputs: Tensor | None = None,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> Tensor:
    """vLLM's `moe_fused_mul_sum`: the sum over top_k of inputs [T, top_k, H] times topk_weights [T, top_k].

    With `expert_map` [num_experts] int32 and `topk_ids` [T, top_k] the routes whose expert is not on this rank are
    skipped, and so are ids out of range. Sums are float32, in k order. Returns `outputs` [T, H], new unless given.
    """
    check_tensor("inputs", inputs, ndim=(3,))
    check_tensor("topk_weights", topk_weights, ndim=(2,), device=inputs.device)
    tokens, top_k, hidden_size = inputs.shape
    check_shape("topk_weights", topk_weights, (tokens, top_k), "the tokens and top_k of inputs")
    route_rows = torch.arange(tokens * top_k, dtype=torch.int32, device=inputs.device)
    if expert_map is not None:
        check_tensor("topk_ids", topk_ids, ndim=(2,), device=inputs.device)
        assert topk_ids is not None
        check_shape("topk_ids", topk_ids, (tokens, top_k), "the tokens and top_k of inputs")
        local = local_expert_ids(narrow_ids(topk_ids), expert_map)
        route_rows = torch.where(local.view(-1) >= 0, route_rows, -1)
    rows = inputs.reshape(-1, hidden_size)
    return combine_routes(rows, route_rows, topk_weights.float(), top_k, out=outputs, impl="auto")
