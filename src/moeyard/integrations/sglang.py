"""SGLang's MoE operators by the names and argument orders of its `sgl_kernel`, and an alignment that allocates.

Import them from here instead of from `sgl_kernel`. What differs from SGLang is in docs/notes/sglang.md: orders are
stable, routers rank by logits, and ids below -1 or of num_experts and above are dropped, where SGLang reads past its
tables.
"""

import torch
from torch import Tensor

import moeyard
from moeyard.combine import combine_routes
from moeyard.dispatch.checks import ID_DTYPES, check_flag, check_int, check_number, check_shape, check_tensor
from moeyard.dispatch.ids import narrow_ids
from moeyard.values import MAX_EXPERTS, Routing

__all__ = ["align_block_size", "moe_align_block_size", "moe_sum", "moe_sum_reduce", "topk_sigmoid", "topk_softmax"]


def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    cumsum_buffer: Tensor | None = None,
    pad_sorted_token_ids: bool = False,
    ignore_invalid_expert: bool = False,
) -> None:
    """`sgl_kernel.moe_align_block_size`: ids are shifted by one, so that -1 has blocks of its own, before all others.

    Args:
        topk_ids: [T, top_k] int32, int64 or uint32, -1 for routes of other ranks. Other ids outside
            [0, num_experts - 1) are dropped.
        num_experts: of the model plus 1.
        sorted_token_ids: int32, overwritten: routes grouped by expert. Slots without a route hold the number of routes
            if `pad_sorted_token_ids`, else what they held.
        experts_ids: int32: the expert of each used block, -1 for those of routes of id -1. Others keep what they held.
        num_tokens_post_pad: [1] int32: used slots.
        cumsum_buffer: SGLang's workspace; not read and not written.
        ignore_invalid_expert: whether routes of id -1 are dropped, too, and have no block.

    Raises TypeError or ValueError naming the argument, also where a tensor has less room than a routing may need: whole
    blocks of n + min(n, num_experts) * (block_size - 1) slots for n routes.
    """
    for name, flag in (
        ("pad_sorted_token_ids", pad_sorted_token_ids),
        ("ignore_invalid_expert", ignore_invalid_expert),
    ):
        check_flag(name, flag)
    check_int("num_experts", num_experts, low=2, high=MAX_EXPERTS)
    check_tensor("topk_ids", topk_ids, dtypes=ID_DTYPES, ndim=(1, 2))
    device = topk_ids.device
    outputs = {"sorted_token_ids": sorted_token_ids, "experts_ids": experts_ids}
    for name, tensor in (outputs | {"num_tokens_post_pad": num_tokens_post_pad}).items():
        check_tensor(name, tensor, dtypes=(torch.int32,), ndim=(1,), device=device)
    check_shape("num_tokens_post_pad", num_tokens_post_pad, (1,), "one number")
    slots, blocks, total = _align(topk_ids, num_experts - 1, block_size, ignore_invalid_expert)
    n = topk_ids.numel()
    most = (n + min(n, num_experts) * (block_size - 1)) // block_size
    for (name, tensor), needed in zip(outputs.items(), (most * block_size, most), strict=True):
        if tensor.shape[0] < needed:
            raise ValueError(f"{name}: expected at least {needed} elements, got {tensor.shape[0]}")
    _keep(sorted_token_ids, slots, (slots < n) | pad_sorted_token_ids)
    if pad_sorted_token_ids:
        sorted_token_ids[slots.shape[0] :].fill_(n)
    _keep(experts_ids, blocks, torch.arange(blocks.shape[0], device=device) * block_size < total)
    num_tokens_post_pad.copy_(total)


def align_block_size(
    topk_ids: Tensor, block_size: int, num_experts: int, ignore_invalid_expert: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """SGLang's alignment for callers: (sorted_token_ids, expert_ids, num_tokens_post_padded), all int32.

    Here `num_experts` is that of the model, and comes last. Routes of id -1 have blocks of expert -1 before all others,
    unless `ignore_invalid_expert`. Lengths are SGLang's: n * block_size slots for n routes below num_experts + 1, else
    n + (num_experts + 1) * (block_size - 1). Slots without a route hold n; blocks that are not used hold -1, where
    SGLang leaves them unwritten.
    """
    check_int("num_experts", num_experts, low=1, high=MAX_EXPERTS - 1)
    check_flag("ignore_invalid_expert", ignore_invalid_expert)
    check_tensor("topk_ids", topk_ids, dtypes=ID_DTYPES, ndim=(1, 2))
    n = topk_ids.numel()
    length = n * block_size if n < num_experts + 1 else n + (num_experts + 1) * (block_size - 1)
    slots, blocks, total = _align(topk_ids, num_experts, block_size, ignore_invalid_expert)
    found = slots.new_full((length,), n), blocks.new_full((-(-length // block_size),), -1)
    for target, source in zip(found, (slots, blocks), strict=True):
        _keep(target, source, True)
    return *found, total


def _align(topk_ids: Tensor, num_experts: int, block_size: int, ignore: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(slots, expert of each block, used slots) of ids that are shifted by one; -1 past the used blocks."""
    ids = narrow_ids(topk_ids)
    shifted = ids.long() + 1
    if ignore:
        shifted = torch.where(ids < 0, -1, shifted)
    layout = moeyard.moe_align_block_size(shifted, num_experts=num_experts + 1, block_size=block_size)
    return layout.sorted_token_ids, (layout.expert_ids - 1).clamp(min=-1), layout.num_tokens_post_padded


def _keep(target: Tensor, source: Tensor, written: Tensor | bool) -> None:
    """Copies the written elements of a source into the front of a target, as far as there is room."""
    count = min(target.shape[0], source.shape[0])
    if written is True:
        target[:count].copy_(source[:count])
    else:
        assert isinstance(written, Tensor)
        target[:count].copy_(torch.where(written[:count], source[:count], target[:count]))


def topk_softmax(
    topk_weights: Tensor,
    topk_ids: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    moe_softcapping: float = 0.0,
    correction_bias: Tensor | None = None,
) -> None:
    """`sgl_kernel.topk_softmax`: the choice by softmax scores.

    Args:
        topk_weights: [T, top_k] float32, overwritten, as `topk_ids` [T, top_k] int32 are.
        gating_output: [T, num_experts] float32, bfloat16 or float16 logits.
        moe_softcapping: c above 0 replaces a logit x by c * tanh(x / c).
        correction_bias: [num_experts] float32, added to the logits before the softmax, so that weights show it. (In
            `topk_sigmoid`, and in vLLM, a bias counts for the choice alone.)
    """
    check_number("moe_softcapping", moe_softcapping)
    logits = gating_output
    if moe_softcapping:
        logits = torch.tanh(logits.float() / moe_softcapping) * moe_softcapping
    if correction_bias is not None:
        check_tensor("correction_bias", correction_bias, dtypes=(torch.float32,), ndim=(1,), device=logits.device)
        check_shape("correction_bias", correction_bias, (logits.shape[1],), "one per expert")
        logits = logits.float() + correction_bias
    out = Routing(topk_weights, topk_ids)
    moeyard.route(logits, top_k=topk_ids.shape[1], renormalize=renormalize, out=out)


def topk_sigmoid(
    topk_weights: Tensor,
    topk_ids: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    correction_bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    num_fused_shared_experts: int = 0,
) -> None:
    """`sgl_kernel.topk_sigmoid`: the choice by sigmoid scores; arguments as in `topk_softmax`.

    `correction_bias` counts for the choice alone; the factor multiplies the weights. Shared experts as routes are
    refused: `num_fused_shared_experts` must be 0.
    """
    check_int("num_fused_shared_experts", num_fused_shared_experts, low=0, high=0)
    moeyard.route(
        gating_output,
        top_k=topk_ids.shape[1],
        scoring="sigmoid",
        renormalize=renormalize,
        selection_bias=correction_bias,
        routed_scaling_factor=routed_scaling_factor,
        out=Routing(topk_weights, topk_ids),
    )


def moe_sum(input_tensor: Tensor, output_tensor: Tensor) -> None:
    """`sgl_kernel.moe_sum`: output [T, H] = input [T, top_k, H] summed over top_k, in float32."""
    moeyard.moe_sum(input_tensor, out=output_tensor)


def moe_sum_reduce(input_tensor: Tensor, output_tensor: Tensor, routed_scaling_factor: float = 0) -> None:
    """`sgl_kernel.moe_sum_reduce`: output [T, H] = factor * input [T, top_k, H] summed over top_k.

    Terms are multiplied and summed in float32, in k order. The factor's default is SGLang's, which gives zeros.
    """
    check_tensor("input_tensor", input_tensor, ndim=(3,))
    check_number("routed_scaling_factor", routed_scaling_factor)
    tokens, top_k, hidden_size = input_tensor.shape
    device = input_tensor.device
    factors = torch.full((tokens, top_k), float(routed_scaling_factor), device=device)
    routes = torch.arange(tokens * top_k, dtype=torch.int32, device=device)
    rows = input_tensor.reshape(-1, hidden_size)
    combine_routes(rows, routes, factors, top_k, out=output_tensor, impl="auto")
