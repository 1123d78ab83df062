"""The specification of products, activations and experts: in float64, row by row."""

from functools import lru_cache

import torch
from torch import Tensor

from moeyard.reference.layout import host, local_experts
from moeyard.reference.quant import dequantised_expert, quantise_rows
from moeyard.values import Activation, ExpertCall, ExpertWeights, Layout, Routing, Segments


def activate(rows: Tensor, activation: Activation, *, gated: bool = True) -> Tensor:
    """[R, 2I] -> [R, I] (without a gate [R, I] -> [R, I]), in float64, rounded once."""
    wide = rows.double()
    gate, up = wide.chunk(2, dim=1) if gated else (wide, None)
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = None if up is None else up.clamp(-activation.limit, activation.limit)
    if activation.name == "silu":
        result = gate / (1 + (-activation.alpha * gate).exp())
    elif activation.name == "gelu":
        result = gate * (1 + torch.erf(gate / 2**0.5)) / 2
    elif activation.name == "gelu_tanh":
        result = gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) / 2
    else:
        result = gate.clamp(min=0) ** 2
    return (result if up is None else result * (up + activation.beta)).to(rows.dtype)


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    topk_weights: Tensor | None = None,
    layout: Layout | None = None,
    expert_offsets: Tensor | None = None,
    expert_num_tokens: Tensor | None = None,
) -> Tensor:
    """Each row times the weights of its expert, in float64, rounded once; rows of no expert are zero here."""
    flat = rows.reshape(-1, rows.shape[-1])
    num_experts, columns, _ = weight.shape
    members: list[tuple[int, int, int]] = []  # (row of the result, row read, expert)
    if layout is not None:
        divisor = layout.top_k if len(flat) != layout.num_routes else 1
        for expert, (first, count) in enumerate(
            zip(layout.expert_offsets.tolist(), layout.expert_counts.tolist(), strict=False)
        ):
            routes = layout.sorted_token_ids[first : first + count].tolist()
            members += [(route, route // divisor, expert) for route in routes]
        result = torch.zeros(layout.num_routes, columns, dtype=rows.dtype)
    elif expert_offsets is not None:
        bounds = expert_offsets.clamp(0, len(flat)).cummax(0).values.tolist()
        for expert in range(num_experts):
            members += [(row, row, expert) for row in range(bounds[expert], bounds[expert + 1])]
        result = torch.zeros(len(flat), columns, dtype=rows.dtype)
    else:
        assert expert_num_tokens is not None
        batch = rows.shape[1]
        for expert, count in enumerate(expert_num_tokens.tolist()):
            kept = min(max(count, 0), batch)
            members += [(expert * batch + j, expert * batch + j, expert) for j in range(kept)]
        result = torch.zeros(len(flat), columns, dtype=rows.dtype)
    factors = None if topk_weights is None else topk_weights.reshape(-1).double()
    for target, source, expert in members:
        value = weight[expert].double() @ flat[source].double()
        if bias is not None:
            value = value + bias[expert].double()
        result[target] = (value if factors is None else value * factors[target]).to(rows.dtype)
    return result.view(*rows.shape[:-1], columns) if rows.dim() == 3 else result


def fused_experts(
    hidden_states: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    *,
    activation: Activation | None = None,
    num_experts: int | None = None,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """Every token through its experts, one by one, in float64; rounded once at the end.

    Beside quantised weights a row is rounded to the dtype of the hidden states before each product, then quantised if
    the scheme says so.
    """
    local = weights.num_local_experts
    matrices = lru_cache(16)(lambda expert: dequantised_expert(weights, expert))
    if num_experts is None:
        num_experts = local if expert_map is None else len(expert_map)
    experts = local_experts(routing.topk_ids, num_experts, expert_map, local)
    num_tokens, top_k = routing.topk_ids.shape
    result = torch.zeros(num_tokens, weights.hidden_size, dtype=torch.float64)
    for route, expert in enumerate(experts):
        if expert < 0:
            continue
        token, k = divmod(route, top_k)
        factor = routing.topk_weights[token, k]
        row = hidden_states[token]
        if apply_router_weight_on_input:
            row = row.double() * factor.double() if weights.scheme is None else (row.float() * factor).to(row.dtype)
        w13, w2 = matrices(expert)
        row = w13 @ _operand(row, weights, expert, False)
        if weights.w13_bias is not None:
            row = row + weights.w13_bias[expert].double()
        row = activate(row.unsqueeze(0), activation or Activation(), gated=weights.gated)[0]
        row = w2 @ _operand(row if weights.scheme is None else row.to(hidden_states.dtype), weights, expert, True)
        if weights.w2_bias is not None:
            row = row + weights.w2_bias[expert].double()
        result[token] += row if apply_router_weight_on_input else row * factor.double()
    return result.to(hidden_states.dtype)


def _operand(row: Tensor, weights: ExpertWeights, expert: int, second: bool) -> Tensor:
    """A row as it meets the first or second matrix of an expert, in float64."""
    scheme, scales = weights.scheme, weights.scales
    if scheme is None or scales is None or scheme.activations == "none":
        return row.double()
    static = scales.w2_input if second else scales.w13_input
    start = scales.block_start if second else 0
    return quantise_rows(row.unsqueeze(0), scheme, None if static is None else static[expert], start).values[0]


# The same functions as launchers.


def activate_launch(rows: Tensor, activation: Activation, *, gated: bool, out: Tensor) -> None:
    out.copy_(activate(rows.detach().cpu(), activation, gated=gated))


def grouped_gemm_launch(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    segments: Segments,
    *,
    out: Tensor,
) -> None:
    rows, weight = rows.detach().cpu(), weight.detach().cpu()
    bias, topk_weights, ids = map(host, (bias, topk_weights, segments.slots))
    firsts, counts = segments.first_rows.tolist(), segments.row_counts.tolist()
    for expert, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        slots = torch.arange(first, first + count)
        targets = slots if ids is None else ids[slots].long()
        value = rows[targets // segments.divisor].double() @ weight[expert].double().t()
        if bias is not None:
            value = value + bias[expert].double()
        if topk_weights is not None:
            value = value * topk_weights.reshape(-1, 1)[targets].double()
        out[targets.to(out.device)] = value.to(out)


def fused_experts_launch(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, call: ExpertCall, *, out: Tensor
) -> None:
    weights = call.weights
    mine = ExpertWeights(
        weights.w13.detach().cpu(), weights.w2.detach().cpu(), host(weights.w13_bias), host(weights.w2_bias),
        weights.gated, weights.scheme,
        None if weights.scales is None else weights.scales.moved(lambda tensor: tensor.detach().cpu()),
    )  # fmt: skip
    result = fused_experts(
        hidden_states.detach().cpu(),
        Routing(topk_weights.detach().cpu(), topk_ids.cpu()),
        mine,
        activation=call.activation,
        num_experts=call.num_experts,
        expert_map=host(call.expert_map),
        apply_router_weight_on_input=call.weight_on_input,
    )
    out.copy_(result)
