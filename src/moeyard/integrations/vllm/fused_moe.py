"""vLLM's layer of experts, quantised or not, and what its Triton kernel is called with."""

from typing import Any

import torch
from torch import Tensor

import moeyard
from moeyard.dispatch.checks import check_int, check_out, check_shape, check_tensor
from moeyard.integrations.vllm.activation import activation_of
from moeyard.integrations.vllm.router.fused_topk_router import fused_topk
from moeyard.integrations.vllm.router.grouped_topk_router import grouped_topk
from moeyard.integrations.vllm.weights import expert_weights

__all__ = [
    "fused_experts",
    "fused_topk",
    "grouped_topk",
    "invoke_fused_moe_triton_kernel",
    "try_get_optimal_moe_config",
]


def fused_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: object = "silu",
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: Tensor | None = None,
    quant_config: object = None,
) -> Tensor:
    """vLLM's `fused_experts`.

    Args:
        hidden_states: [T, H] float32, bfloat16 or float16.
        w1, w2: [E, 2I, H] (without a gate [E, I, H]) and [E, H, I]: of the dtype of `hidden_states`, or codes of
            float8_e4m3fn or int8 beside a `quant_config`.
        topk_weights, topk_ids: [T, top_k]; ids int32, int64 or uint32. Those out of range are dropped.
        activation: one of vLLM's `MoEActivation`, or its value: silu, gelu, gelu_tanh, swigluoai_uninterleave, and
            silu_no_mul, gelu_no_mul, gelu_tanh_no_mul, relu2_no_mul. swigluoai, whose rows interleave gate and up, is
            refused. `gemm1_alpha`, `gemm1_beta` and `gemm1_clamp_limit` of the `quant_config` are theirs
            (`activation_of`); vLLM's function of this name ignores them, its `TritonExperts` does not.
        apply_router_weight_on_input: whether weights multiply the rows before they are quantised, not the results.
            Either way each weight counts once.
        global_num_experts: -1 for as many as `w1` or `expert_map` has. Without a map fewer than `w1` has count as
            that many, as in vLLM.
        expert_map: [global_num_experts] int32, the local expert of each global one or -1.
        quant_config: None, or a `FusedMoEQuantConfig`, or an object of vLLM's class, of which the same names are read.

    Returns [T, H]. Rows are quantised once per product: in groups with `block_shape`, with `a1_scale` and `a2_scale`
    where given, else with a scale per row. vLLM has one scale for all rows there unless `per_act_token_quant` says
    otherwise, so that its results depend on the other rows of a batch. With `a1_scale` alone the second product's rows
    have a scale each. Raises TypeError or ValueError naming the argument, for `expert_weights` of
    `integrations/vllm_quantised.py`, too.
    """
    act, gated = activation_of(activation, quant_config)
    check_tensor("hidden_states", hidden_states, ndim=(2,))
    weights = expert_weights(w1, w2, quant_config, hidden_states.dtype, gated=gated)
    return moeyard.fused_experts(
        hidden_states,
        moeyard.Routing(topk_weights.float(), topk_ids),
        weights,
        activation=act,
        num_experts=experts_in_all(global_num_experts, weights.num_local_experts, expert_map),
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )


def experts_in_all(global_num_experts: int, num_local_experts: int, expert_map: Tensor | None) -> int | None:
    """The global number of experts that moeyard's operators are told; None for what weights or map say."""
    if global_num_experts == -1:
        return None
    return global_num_experts if expert_map is not None else max(global_num_experts, num_local_experts)


def try_get_optimal_moe_config(
    w1_shape: tuple[int, ...],
    w2_shape: tuple[int, ...],
    top_k: int,
    dtype: str | None,
    M: int,
    block_shape: list[int] | None = None,
) -> dict[str, int]:
    """A block size for `moe_align_block_size`, in the form of vLLM's `try_get_optimal_moe_config`.

    Args:
        w1_shape, w2_shape: of the experts' weights; the first number of `w2_shape` is that of experts.
        top_k, M: routes per token, and tokens.
        dtype, block_shape: of vLLM's quantised kernels; not read.

    Returns a dict with BLOCK_SIZE_M alone: the power of two from 16 to 128 that holds the mean of an expert's routes.
    vLLM's other keys are tile sizes of its Triton kernel, which moeyard does not launch.
    """
    check_int("M", M, low=0)
    check_int("top_k", top_k, low=1)
    mean = -(-M * top_k // w2_shape[0])
    size = 16
    while size < min(mean, 128):
        size *= 2
    return {"BLOCK_SIZE_M": size}


def invoke_fused_moe_triton_kernel(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    A_scale: Tensor | None,
    B_scale: Tensor | None,
    topk_weights: Tensor | None,
    sorted_token_ids: Tensor | None,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    mul_routed_weight: bool,
    top_k: int,
    config: dict[str, Any],
    compute_type: object = None,
    use_fp8_w8a8: bool = False,
    use_int8_w8a8: bool = False,
    use_int8_w8a16: bool = False,
    use_int4_w4a16: bool = False,
    per_channel_quant: bool = False,
    block_shape: list[int] | None = None,
    B_bias: Tensor | None = None,
) -> None:
    """vLLM's call of its Triton product: C[route] = A[token of route] times B[expert of route], for unquantised B.

    Args:
        A: [T, K], a token's row for all its routes (`top_k` routes per row); [T * top_k, K] beside a `top_k` of 1.
        B: [E, N, K] of the dtype of A.
        C: [T, routes per token, N] of that dtype; overwritten. Routes that no block has, and those of blocks of expert
            -1, get zeros.
        topk_weights: [T, routes per token] float32, which multiply the results if `mul_routed_weight`.
        sorted_token_ids, expert_ids, num_tokens_post_padded: as `moe_align_block_size` gives them, for blocks of
            `config["BLOCK_SIZE_M"]`. None for sorted ids: `expert_ids` [routes] are the expert of each route.
        B_bias: [E, N], of the dtype of A or float32 (then rounded to it), added before the weights multiply.
        config: BLOCK_SIZE_M is read. `compute_type` is that of A in any case.

    Raises ValueError for a quantised call (`fused_experts` takes those), and as `grouped_gemm` does.
    """
    flags = {
        "use_fp8_w8a8": use_fp8_w8a8, "use_int8_w8a8": use_int8_w8a8, "use_int8_w8a16": use_int8_w8a16,
        "use_int4_w4a16": use_int4_w4a16, "per_channel_quant": per_channel_quant,
        "A_scale": A_scale is not None, "B_scale": B_scale is not None, "block_shape": block_shape is not None,
    }  # fmt: skip
    asked = [name for name, value in flags.items() if value]
    if asked:
        raise ValueError(f"{asked[0]}: expected none (quantised products go through fused_experts), got one")
    check_tensor("B", B, ndim=(3,))
    check_tensor("C", C, ndim=(3,))
    check_int("top_k", top_k, low=1)
    routes = A.shape[0] * top_k
    if C.shape[0] * C.shape[1] != routes:
        raise ValueError(f"C: expected {routes} routes (rows of A times top_k), got shape {tuple(C.shape)}")
    check_out("C", C, (*C.shape[:2], B.shape[1]), A.dtype, A.device)
    experts = _experts_of_routes(sorted_token_ids, expert_ids, num_tokens_post_padded, config, routes)
    layout = moeyard.moe_align_block_size(experts, num_experts=B.shape[0], block_size=1, top_k=top_k)
    weights = None
    if mul_routed_weight:
        check_tensor("topk_weights", topk_weights, ndim=(2,), device=A.device)
        assert topk_weights is not None
        weights = topk_weights.float().reshape(-1, top_k)
    bias = B_bias if B_bias is None or B_bias.dtype == A.dtype else B_bias.to(A.dtype)
    product = moeyard.grouped_gemm(A, B, bias=bias, topk_weights=weights, layout=layout)
    C.view(routes, -1).copy_(product.masked_fill((layout.route_rows < 0).unsqueeze(1), 0))


def _experts_of_routes(
    sorted_token_ids: Tensor | None, expert_ids: Tensor, total: Tensor, config: dict[str, Any], routes: int
) -> Tensor:
    """[routes] int32: the expert of each route, -1 where no block has it."""
    if sorted_token_ids is None:
        check_shape("expert_ids", expert_ids, (routes,), "one per route")
        return expert_ids
    check_tensor("sorted_token_ids", sorted_token_ids, dtypes=(torch.int32,), ndim=(1,))
    slot = torch.arange(sorted_token_ids.shape[0], device=sorted_token_ids.device)
    block = (slot // int(config["BLOCK_SIZE_M"])).clamp(max=max(expert_ids.shape[0] - 1, 0))
    used = (slot < total) & (sorted_token_ids < routes) & (sorted_token_ids >= 0)
    experts = torch.full((routes + 1,), -1, dtype=torch.int32, device=expert_ids.device)
    experts[torch.where(used, sorted_token_ids, routes).long()] = expert_ids[block].to(torch.int32)
    return experts[:routes]
