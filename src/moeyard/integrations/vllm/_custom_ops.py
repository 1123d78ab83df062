"""vLLM's operators that write into tensors of the caller, by the names and argument orders of `vllm._custom_ops`."""

import torch
from torch import Tensor

import moeyard
from moeyard.dispatch.checks import ID_DTYPES, check_shape, check_tensor
from moeyard.integrations.vllm.moe_align_block_size import batched_moe_align_block_size as batched_aligned
from moeyard.integrations.vllm.moe_align_block_size import moe_align_block_size as aligned
from moeyard.integrations.vllm.moe_align_block_size import triple_lengths
from moeyard.integrations.vllm.router.fused_topk_bias_router import fused_topk_bias
from moeyard.values import Routing


def moe_sum(input: Tensor, output: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None) -> None:
    """vLLM's `moe_sum`: output [T, H] = input [T, top_k, H] summed over top_k, skipping dropped routes."""
    moeyard.moe_sum(input, topk_ids=topk_ids, expert_map=expert_map, out=output)


def shuffle_rows(input_tensor: Tensor, dst2src_map: Tensor) -> Tensor:
    """vLLM's `shuffle_rows`: rows gathered by a map; zeros where it points outside."""
    return moeyard.shuffle_rows(input_tensor, dst2src_map)


def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    expert_map: Tensor | None = None,
    scatter_idx: Tensor | None = None,
) -> None:
    """vLLM's operator of this name: num_experts comes before block_size, results go into the caller's tensors.

    Args:
        sorted_token_ids: [at least as many as `moe_align_block_size` returns] int32; the number of routes behind them.
        experts_ids: int32, local experts beside a map; -1 behind the used blocks.
        num_tokens_post_pad: [1] int32.
        expert_map: [num_experts] int32; routes of other ranks are dropped.
        scatter_idx: [routes, 1] int32: the number of each route, -1 where it is dropped.

    Raises ValueError where a tensor has no room.
    """
    made = aligned(
        topk_ids, block_size, num_experts, expert_map, ignore_invalid_experts=expert_map is not None,
        return_scatter_idx=scatter_idx is not None,
    )  # fmt: skip
    fills = (("sorted_token_ids", sorted_token_ids, topk_ids.numel()), ("experts_ids", experts_ids, -1))
    for (name, target, fill), source in zip(fills, made[:2], strict=True):
        _overwrite(name, target, source, fill)
    _overwrite("num_tokens_post_pad", num_tokens_post_pad, made[2], 0)
    if scatter_idx is not None:
        _overwrite("scatter_idx", scatter_idx.view(-1), made[3].view(-1), -1)


def batched_moe_align_block_size(
    max_tokens_per_batch: int,
    block_size: int,
    expert_num_tokens: Tensor,
    sorted_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_pad: Tensor,
) -> None:
    """vLLM's operator of this name: `batched_moe_align_block_size` into the caller's int32 tensors."""
    made = batched_aligned(max_tokens_per_batch, block_size, expert_num_tokens)
    _overwrite("sorted_ids", sorted_ids, made[0], expert_num_tokens.shape[0] * max_tokens_per_batch)
    _overwrite("expert_ids", expert_ids, made[1], -1)
    _overwrite("num_tokens_post_pad", num_tokens_post_pad, made[2], 0)


def moe_lora_align_block_size(
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    num_experts: int,
    block_size: int,
    max_loras: int,
    max_num_tokens_padded: int,
    max_num_m_blocks: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    adapter_enabled: Tensor,
    lora_ids: Tensor,
    expert_map: Tensor | None = None,
) -> None:
    """vLLM's operator of this name: one alignment per adapter, each into its part of the caller's int32 tensors.

    Args:
        token_lora_mapping: [T] int32, the adapter of each token; -1 for none.
        max_num_tokens_padded, max_num_m_blocks: slots and blocks of a part.
        sorted_token_ids: [max_loras * max_num_tokens_padded].
        experts_ids: [max_loras * max_num_m_blocks], -1 behind the used blocks.
        num_tokens_post_pad: [max_loras].
        adapter_enabled: [max_loras or more] int32; the tokens of an adapter with 0 are in no part.
        lora_ids: not read; the mapping says which adapters there are. vLLM leaves parts of other adapters unwritten,
            here they are empty.
    """
    check_tensor("adapter_enabled", adapter_enabled, ndim=(1,), device=topk_ids.device)
    check_tensor("token_lora_mapping", token_lora_mapping, ndim=(1,), device=topk_ids.device)
    adapter = token_lora_mapping.long()
    known = (adapter >= 0) & (adapter < min(max_loras, adapter_enabled.shape[0]))
    known = known & (adapter_enabled[torch.where(known, adapter, 0)] != 0)
    layouts = moeyard.moe_lora_align_block_size(
        topk_ids, torch.where(known, adapter, -1), num_experts=num_experts, block_size=block_size,
        max_loras=max_loras, expert_map=expert_map,
    )  # fmt: skip
    length, blocks = triple_lengths(topk_ids.numel(), num_experts, block_size, False)
    slots, experts = sorted_token_ids.view(max_loras, -1), experts_ids.view(max_loras, -1)
    check_shape("sorted_token_ids", slots, (max_loras, max_num_tokens_padded), "max_loras parts")
    check_shape("experts_ids", experts, (max_loras, max_num_m_blocks), "max_loras parts")
    for i, layout in enumerate(layouts):
        _overwrite("sorted_token_ids", slots[i], layout.sorted_token_ids[:length], topk_ids.numel())
        _overwrite("experts_ids", experts[i], layout.expert_ids[:blocks], -1)
        num_tokens_post_pad[i : i + 1].copy_(layout.num_tokens_post_padded)


def _overwrite(name: str, target: Tensor, source: Tensor, fill: int) -> None:
    """Copies into the front of a tensor and fills the rest."""
    check_tensor(name, target, dtypes=(torch.int32,), ndim=(1,), device=source.device)
    held, wanted = target.shape[0], source.shape[0]
    if held < wanted:
        raise ValueError(f"{name}: expected at least {wanted} elements, got {held}")
    target[:wanted].copy_(source)
    if held > wanted:
        target[wanted:].fill_(fill)


def topk_softmax(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    e_score_correction_bias: Tensor | None = None,
    is_padding: Tensor | None = None,
) -> None:
    """vLLM's `topk_softmax`: the choice by softmax scores.

    Args:
        topk_weights: [T, top_k] float32, overwritten as the two below.
        topk_ids: [T, top_k] int32, int64 or uint32; -1 for padding tokens.
        token_expert_indices: [T, top_k] int32: k * T + t.
        gating_output: [T, num_experts] logits.
        e_score_correction_bias: [num_experts], added to scores for the choice alone.
        is_padding: [T] bool.
    """
    _choose(
        topk_weights, topk_ids, token_expert_indices, gating_output, "softmax", renormalize, 1.0,
        e_score_correction_bias, is_padding,
    )  # fmt: skip


def topk_sigmoid(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    e_score_correction_bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    is_padding: Tensor | None = None,
) -> None:
    """vLLM's `topk_sigmoid`: as `topk_softmax`, by sigmoid scores, which the factor multiplies at the end."""
    _choose(
        topk_weights, topk_ids, token_expert_indices, gating_output, "sigmoid", renormalize, routed_scaling_factor,
        e_score_correction_bias, is_padding,
    )  # fmt: skip


def topk_hash_softplus_sqrt(
    topk_weights: Tensor,
    topk_indices: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Tensor | None = None,
    input_tokens: Tensor | None = None,
    hash_indices_table: Tensor | None = None,
    is_padding: Tensor | None = None,
) -> None:
    """vLLM's `topk_hash_softplus_sqrt`: as `topk_sigmoid`, by scores sqrt(log(1 + exp(logit))).

    With `hash_indices_table` and `input_tokens` the table is the choice, as in `fused_topk_bias`.
    """
    if hash_indices_table is None:
        _choose(
            topk_weights, topk_indices, token_expert_indices, gating_output, "sqrtsoftplus", renormalize,
            routed_scaling_factor, e_score_correction_bias, is_padding,
        )  # fmt: skip
        return
    weights, ids = fused_topk_bias(
        gating_output, gating_output, "sqrtsoftplus", None, topk_indices.shape[1], renormalize, None, input_tokens,
        hash_indices_table, routed_scaling_factor,
    )  # fmt: skip
    if is_padding is not None:
        padding = is_padding.unsqueeze(1)
        weights, ids = weights.masked_fill(padding, 0), ids.masked_fill(padding, -1)
    topk_weights.copy_(weights)
    _as_signed(topk_indices).copy_(ids)
    _number(token_expert_indices)


def _choose(
    weights: Tensor,
    ids: Tensor,
    indices: Tensor,
    logits: Tensor,
    scoring: str,
    renormalize: bool,
    factor: float,
    bias: Tensor | None,
    is_padding: Tensor | None,
) -> None:
    check_tensor("topk_ids", ids, dtypes=ID_DTYPES, ndim=(2,), device=logits.device)
    signed = _as_signed(ids)
    chosen = signed if signed.dtype == torch.int32 else torch.empty_like(signed, dtype=torch.int32)
    moeyard.route(
        logits, top_k=ids.shape[1], scoring=scoring, renormalize=renormalize,
        selection_bias=None if bias is None else bias.float(), routed_scaling_factor=factor, is_padding=is_padding,
        out=Routing(weights, chosen),
    )  # fmt: skip
    if chosen is not signed:
        signed.copy_(chosen)
    _number(indices)


def _as_signed(ids: Tensor) -> Tensor:
    return ids.view(torch.int32) if ids.dtype == torch.uint32 else ids


def _number(indices: Tensor) -> None:
    """token_expert_indices[t, k] = k * T + t."""
    tokens, top_k = indices.shape
    own = torch.arange(tokens * top_k, dtype=torch.int32, device=indices.device)
    indices.copy_(own.view(top_k, tokens).t())


def grouped_topk(
    scores: Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: Tensor,
    scoring_func: int = 0,
) -> tuple[Tensor, Tensor]:
    """vLLM's operator of this name for logits: (topk_weights [T, topk] float32, topk_ids [T, topk] int32).

    `scoring_func` is 1: scores are sigmoids of the logits `scores`. With 0 vLLM takes scores that are computed already;
    moeyard routes logits alone, so this is a ValueError (`fused_grouped_topk` takes logits of either kind).
    """
    if scoring_func != 1:
        raise ValueError(f"scoring_func: expected 1 (sigmoid of logits; else fused_grouped_topk), got {scoring_func}")
    routing = moeyard.route(
        scores, top_k=topk, scoring="sigmoid", renormalize=renormalize, selection_bias=bias.float(),
        num_groups=num_expert_group or 1, top_k_groups=topk_group or 1, routed_scaling_factor=routed_scaling_factor,
    )  # fmt: skip
    return routing.topk_weights, routing.topk_ids
