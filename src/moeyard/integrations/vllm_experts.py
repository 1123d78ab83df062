"""vLLM's layers of experts, quantised or not: `fused_experts`, the CUTLASS names, and the batched format."""

import torch
from torch import Tensor

import moeyard
from moeyard.dispatch.checks import check_flag, check_out, check_shape, check_tensor
from moeyard.integrations.vllm_quantised import FusedMoEQuantConfig, expert_weights

_E4M3 = torch.float8_e4m3fn
_OUT = (torch.float16, torch.bfloat16, torch.float32)
_ACTIVATIONS = {
    **{name: moeyard.Activation(name) for name in ("silu", "gelu", "gelu_tanh")},
    **{f"{name}_no_mul": moeyard.Activation(name) for name in moeyard.Activation.NAMES},
    "swigluoai_uninterleave": moeyard.GPT_OSS_ACTIVATION,
}


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
            refused.
        apply_router_weight_on_input: whether weights multiply the rows before they are quantised, not the results.
            Either way each weight counts once.
        global_num_experts: -1 for as many as `w1` or `expert_map` has.
        expert_map: [global_num_experts] int32, the local expert of each global one or -1.
        quant_config: None, or a `FusedMoEQuantConfig`, or an object of vLLM's class, of which the same names are read.

    Returns [T, H]. Rows are quantised once per product: in groups with `block_shape`, with `a1_scale` and `a2_scale`
    where given, else with a scale per row. vLLM has one scale for all rows there unless `per_act_token_quant` says
    otherwise, so that its results depend on the other rows of a batch. With `a1_scale` alone the second product's rows
    have a scale each. Raises TypeError or ValueError naming the argument, for `expert_weights` of
    `integrations/vllm_quantised.py`, too.
    """
    act, gated = _activation_of(activation)
    return moeyard.fused_experts(
        hidden_states,
        moeyard.Routing(topk_weights.float(), topk_ids),
        expert_weights(w1, w2, quant_config, gated=gated),
        activation=act,
        num_experts=None if global_num_experts == -1 else global_num_experts,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )


def cutlass_moe_fp8(
    a: Tensor,
    w1_q: Tensor,
    w2_q: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    ab_strides1: Tensor | None,
    ab_strides2: Tensor | None,
    c_strides1: Tensor | None,
    c_strides2: Tensor | None,
    quant_config: object,
    activation: object = "silu",
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
) -> Tensor:
    """vLLM's `cutlass_moe_fp8`, in the form of its last releases that had one (0.11): `fused_experts` of fp8.

    `w1_q`, `w2_q` are float8_e4m3fn; `quant_config` quantises rows, too. The four strides are accepted for vLLM's
    callers and not read: tensors have their own. vLLM applies router weights twice with
    `apply_router_weight_on_input`; here they count once. Returns [T, H] of the dtype of `a`; errors as in
    `fused_experts`.
    """
    check_tensor("w1_q", w1_q, dtypes=(_E4M3,), ndim=(3,))
    if getattr(quant_config, "quant_dtype", None) != _E4M3:
        raise ValueError(
            f"quant_config.quant_dtype: expected {_E4M3}, got {getattr(quant_config, 'quant_dtype', None)}"
        )
    return fused_experts(
        a, w1_q, w2_q, topk_weights, topk_ids, activation, apply_router_weight_on_input, global_num_experts,
        expert_map, quant_config,
    )  # fmt: skip


def run_cutlass_moe_fp8(
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_ids: Tensor,
    activation: object,
    global_num_experts: int,
    expert_map: Tensor | None,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    a1q_scale: Tensor | None,
    a2_scale: Tensor | None,
    ab_strides1: Tensor | None,
    ab_strides2: Tensor | None,
    c_strides1: Tensor | None,
    c_strides2: Tensor | None,
    workspace13: Tensor | None,
    workspace2: Tensor | None,
    expert_num_tokens: Tensor | None,
    out_dtype: torch.dtype,
    per_act_token: bool,
    per_out_ch: bool,
    use_batched_format: bool,
    topk_weights: Tensor | None,
    permute_scratch: object = None,
) -> None:
    """vLLM's `run_cutlass_moe_fp8`: experts of fp8 whose rows are quantised already.

    Args:
        output: [T, H], batched [E, M, H], of `out_dtype`; overwritten.
        hidden_states: [T, H] float8_e4m3fn; batched [E, M, H], whose first `expert_num_tokens[e]` rows count.
        a1q_scale: float32. One, batched also [E, 1, 1]; with `per_act_token` [T, 1], batched [E, M, 1].
        a2_scale: one float32, beside a single `a1q_scale`; else the second product's rows have a scale each.
        topk_ids, topk_weights: [T, top_k], with `use_batched_format` not read. Weights multiply the results, so a
            caller who has multiplied the rows passes ones.
        per_out_ch: whether weights have a scale per row.

    Strides, workspaces and scratch are accepted for vLLM's callers and not read. Other arguments are those of
    `fused_experts`. Batched rows from `expert_num_tokens[e]` on give zeros. Codes under a single scale are multiplied
    as they are. With `per_act_token` rows are code times scale, rounded to `out_dtype`, and quantised again: codes
    stay where the largest of a row is 448, as in rows of `out_dtype` that were quantised per token. vLLM's own kernel
    has no scale below 1 / (448 * 512); rows below 1 / 512 get a finer one here.
    """
    for name, value in (("per_act_token", per_act_token), ("use_batched_format", use_batched_format)):
        check_flag(name, value)
    if use_batched_format != (expert_num_tokens is not None):
        wanted = "a tensor" if use_batched_format else "None"
        got = "None" if expert_num_tokens is None else "a tensor"
        raise ValueError(f"expert_num_tokens: expected {wanted} for use_batched_format={use_batched_format}, got {got}")
    check_tensor("hidden_states", hidden_states, dtypes=(_E4M3,), ndim=(3 if use_batched_format else 2,))
    check_tensor("w1", w1, dtypes=(_E4M3,), ndim=(3,), device=hidden_states.device)
    if out_dtype not in _OUT:
        raise TypeError(f"out_dtype: expected one of {_OUT}, got {out_dtype}")
    check_out("output", output, tuple(hidden_states.shape), out_dtype, hidden_states.device)
    act, gated = _activation_of(activation)
    config = FusedMoEQuantConfig(_E4M3, per_act_token, per_out_ch, None, w1_scale, w2_scale, None, a2_scale)
    rows, row_scale = _rows_of(hidden_states, a1q_scale, out_dtype, config, w1.shape[0])
    weights = expert_weights(w1, w2, config, gated=gated, row_scale=row_scale, prefix="")
    if expert_num_tokens is not None:
        _batched(rows, expert_num_tokens, weights, act, output)
        return
    check_tensor("topk_weights", topk_weights, ndim=(2,), device=hidden_states.device)
    assert topk_weights is not None
    moeyard.fused_experts(
        rows,
        moeyard.Routing(topk_weights.float(), topk_ids),
        weights,
        activation=act,
        num_experts=None if expert_map is not None or global_num_experts == -1 else global_num_experts,
        expert_map=expert_map,
        out=output,
    )


def batched_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    expert_num_tokens: Tensor,
    activation: object = "silu",
    quant_config: object = None,
    a1q_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Experts in vLLM's batched format, in which its classes for dispatched tokens have them; nothing is weighted.

    Args:
        hidden_states: [E, M, H], of whose rows the first `expert_num_tokens[e]` count. float32, bfloat16 or float16;
            or codes of the dtype of `w1`, beside `a1q_scale`.
        expert_num_tokens: [E] int32; above M as M, below 0 as 0.
        quant_config: as in `fused_experts`.
        a1q_scale: float32 of codes. One or [E, 1, 1]; with `per_act_token_quant` [E, M, 1]; with `block_shape`
            [E, M, ceil(H / columns)]. Codes meet the weights as in `run_cutlass_moe_fp8`.
        out_dtype: of the result of codes.

    Returns [E, M, H], of the dtype of float rows; rows from `expert_num_tokens[e]` on are zero. What lies in such rows
    of `hidden_states` has no effect. Raises TypeError or ValueError naming the argument.
    """
    check_tensor("hidden_states", hidden_states, ndim=(3,))
    check_tensor("w1", w1, ndim=(3,), device=hidden_states.device)
    act, gated = _activation_of(activation)
    rows, row_scale = hidden_states, None
    if hidden_states.dtype.itemsize == 1:
        check_tensor("hidden_states", hidden_states, dtypes=(w1.dtype,))
        if out_dtype not in _OUT:
            raise TypeError(f"out_dtype: expected one of {_OUT}, got {out_dtype}")
        rows, row_scale = _rows_of(hidden_states, a1q_scale, out_dtype, quant_config, w1.shape[0])
    elif a1q_scale is not None:
        raise ValueError(f"a1q_scale: expected None beside rows of {hidden_states.dtype}, got a tensor")
    weights = expert_weights(w1, w2, quant_config, gated=gated, row_scale=row_scale)
    output = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    _batched(rows, expert_num_tokens, weights, act, output)
    return output


def _batched(
    rows: Tensor,
    expert_num_tokens: Tensor,
    weights: moeyard.ExpertWeights,
    activation: moeyard.Activation,
    output: Tensor,
) -> None:
    """Every row that counts has one route, to the expert whose it is."""
    experts, batch, hidden_size = rows.shape
    check_tensor("expert_num_tokens", expert_num_tokens, dtypes=(torch.int32,), ndim=(1,), device=rows.device)
    check_shape("expert_num_tokens", expert_num_tokens, (experts,), "one per expert of hidden_states")
    check_shape("hidden_states", rows, (weights.num_local_experts, batch, hidden_size), "the experts of w1")
    place = torch.arange(batch, dtype=torch.int32, device=rows.device)
    own = torch.arange(experts, dtype=torch.int32, device=rows.device).unsqueeze(1)
    ids = torch.where(place < expert_num_tokens.unsqueeze(1), own, -1).view(-1, 1)
    routing = moeyard.Routing(torch.ones(ids.shape, device=rows.device), ids)
    flat = rows.reshape(-1, hidden_size)
    moeyard.fused_experts(flat, routing, weights, activation=activation, out=output.view(-1, hidden_size))


def _rows_of(
    codes: Tensor, scale: Tensor | None, out_dtype: torch.dtype, quant_config: object, experts: int
) -> tuple[Tensor, Tensor | None]:
    """(rows of `out_dtype`, a scale that is still to multiply them) of rows that come as codes."""
    check_tensor("a1q_scale", scale, dtypes=(torch.float32,), device=codes.device)
    assert scale is not None
    *leading, hidden_size = codes.shape
    block = getattr(quant_config, "block_shape", None)
    if block is None and not getattr(quant_config, "per_act_token_quant", False):
        shapes = {(experts, 1, 1)} if codes.dim() == 3 else set()
        if scale.numel() != 1 and tuple(scale.shape) not in shapes:
            more = "".join(f" or of shape {shape}" for shape in shapes)
            raise ValueError(f"a1q_scale: expected one scale{more}, got shape {tuple(scale.shape)}")
        return codes.to(out_dtype), scale
    columns = hidden_size if block is None else block[1]
    check_shape("a1q_scale", scale, (*leading, -(-hidden_size // columns)), "a scale per row and group of columns")
    factor = scale if block is None else scale.repeat_interleave(columns, -1)[..., :hidden_size]
    return (codes.float() * factor).to(out_dtype), None


def _activation_of(activation: object) -> tuple[moeyard.Activation, bool]:
    """(activation, whether there is a gate) of vLLM's name or enumeration."""
    name = str(getattr(activation, "value", activation))
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name], not name.endswith("_no_mul")
