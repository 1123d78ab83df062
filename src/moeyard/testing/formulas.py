"""The first defined part of the answers of differentiable operators, in plain torch that autograd can follow."""

from collections.abc import Callable

import torch
from torch import Tensor

import moeyard
from moeyard.testing.callers import Question, weights_of
from moeyard.testing.draws import Tensors
from moeyard.testing.layers import plain_activation
from moeyard.testing.oracles import wide_scores
from moeyard.values import Layout, Routing


def _permute(given: Tensors, question: Question, _answer: list[Tensor]) -> Tensor:
    layout = question.options["layout"]
    held = layout.sorted_token_ids[layout.sorted_token_ids < layout.num_routes]
    return given["hidden_states"][held.long() // layout.top_k]


def _shuffle_rows(given: Tensors, _question: Question, _answer: list[Tensor]) -> Tensor:
    rows, sources = given["input"], given["dst2src_map"].long()
    valid = (sources >= 0) & (sources < rows.shape[0])
    return torch.where(valid.unsqueeze(1), rows[torch.where(valid, sources, 0)], 0)


def _combine(given: Tensors, question: Question, _answer: list[Tensor]) -> Tensor:
    layout = question.options["layout"]
    taken = given["rows"][layout.route_rows.long().clamp(min=0)]
    if "topk_weights" in given:
        taken = taken * given["topk_weights"].reshape(-1, 1)
    taken = torch.where(layout.route_rows.unsqueeze(1) >= 0, taken, 0)
    return taken.view(-1, layout.top_k, taken.shape[1]).sum(1)


def _moe_sum(given: Tensors, _question: Question, _answer: list[Tensor]) -> Tensor:
    rows, ids, mapping = given["rows"], given.get("topk_ids"), given.get("expert_map")
    if ids is None:
        return rows.sum(1)
    ids = (ids.view(torch.int32) if ids.dtype == torch.uint32 else ids).long()
    taken = (ids >= 0) & (ids < 2**31 - 1)
    if mapping is not None:
        taken = taken & (ids < len(mapping)) & (mapping[ids.clamp(0, len(mapping) - 1)] >= 0)
    return torch.where(taken.unsqueeze(2), rows, 0).sum(1)


def _route(given: Tensors, question: Question, answer: list[Tensor]) -> Tensor:
    """The weights of the experts that were chosen."""
    logits, ids = given["router_logits"], answer[1].long()
    scores = wide_scores(logits, question.options["scoring"])
    chosen = torch.where(ids >= 0, scores.gather(1, ids.clamp(min=0)), 0)
    if question.options["renormalize"]:
        kept = answer[0].sum(1, keepdim=True) > 0  # where float32 holds a score
        chosen = torch.where(kept, chosen / torch.where(kept, chosen.sum(1, keepdim=True), 1), 0)
    factor: float = question.options["routed_scaling_factor"]
    return chosen * factor


def _products(rows: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    """Each row times the weights of its expert; rows of expert -1 are zero."""
    parts, order = [rows.new_zeros(int((expert < 0).sum()), weight.shape[1])], [torch.where(expert < 0)[0]]
    for one in expert[expert >= 0].unique().tolist():
        (mine,) = torch.where(expert == one)
        product = rows[mine] @ weight[one].t()
        parts.append(product if bias is None else product + bias[one])
        order.append(mine)
    return torch.cat(parts)[torch.cat(order).argsort()]


def _experts_of_routes(layout: Layout) -> Tensor:
    bounds, rows = layout.expert_offsets, layout.route_rows.long()
    return torch.where(rows >= 0, torch.searchsorted(bounds, rows, right=True) - 1, -1)


def _gemm_by_layout(given: Tensors, question: Question, _answer: list[Tensor]) -> Tensor:
    layout = question.options["layout"]
    rows, expert = given["rows"], _experts_of_routes(layout)
    if len(rows) != layout.num_routes:
        rows = rows.repeat_interleave(layout.top_k, 0)
    result = _products(rows, given["weight"], given.get("bias"), expert)
    if "topk_weights" in given:
        result = result * given["topk_weights"].reshape(-1, 1)
    return result[expert >= 0]


def _gemm_by_offsets(given: Tensors, _question: Question, _answer: list[Tensor]) -> Tensor:
    rows = given["rows"]
    bounds, row = given["expert_offsets"].clamp(0, len(rows)).cummax(0).values, torch.arange(len(rows))
    row = row.to(rows.device)
    held = (row >= bounds[0]) & (row < bounds[-1])
    expert = torch.where(held, torch.searchsorted(bounds, row, right=True) - 1, -1)
    return _products(rows, given["weight"], given.get("bias"), expert)[held]


def _gemm_by_counts(given: Tensors, _question: Question, _answer: list[Tensor]) -> Tensor:
    rows = given["rows"]
    experts, most, _ = rows.shape
    place = torch.arange(most, device=rows.device).unsqueeze(0)
    held = place < given["expert_num_tokens"].unsqueeze(1)
    expert = torch.where(held, torch.arange(experts, device=rows.device).unsqueeze(1), -1).flatten()
    return _products(rows.flatten(0, 1), given["weight"], given.get("bias"), expert)[held.flatten()]


def _activate(given: Tensors, question: Question, _answer: list[Tensor]) -> Tensor:
    return plain_activation(given["rows"], question.options["activation"], question.options["gated"])


def _fused_experts(given: Tensors, question: Question, _answer: list[Tensor]) -> Tensor:
    """The first product is rounded as the operator rounds it: a limit or a kink parts values that lie close."""
    options, hidden, factors = question.options, given["hidden_states"], given["topk_weights"]
    weights, on_input = weights_of(given, options["gated"]), options["apply_router_weight_on_input"]
    ids, mapping, top_k = given["topk_ids"], given.get("expert_map"), factors.shape[1]
    ids = (ids.view(torch.int32) if ids.dtype == torch.uint32 else ids).long().flatten()
    expert = torch.where((ids >= 0) & (ids < weights.num_local_experts), ids, -1)
    if mapping is not None:
        expert = torch.where(expert >= 0, mapping.long()[expert.clamp(min=0)], -1)
    rows = hidden.repeat_interleave(top_k, 0)
    rows = rows * factors.reshape(-1, 1) if on_input else rows
    before = _products(rows, weights.w13, weights.w13_bias, expert)
    before = before + (before.to(question.sizes.dtype).to(before.dtype) - before).detach()
    middle = plain_activation(before, options["activation"], weights.gated)
    result = _products(middle, weights.w2, weights.w2_bias, expert)
    result = result if on_input else result * factors.reshape(-1, 1)
    return result.view(-1, top_k, hidden.shape[1]).sum(1)


def layer_by_steps(given: Tensors, question: Question, impl: str) -> Tensor:
    """`moe_layer` by the operators that it is made of, whose gradients are judged by themselves."""
    options = question.options
    logits = torch.nn.functional.linear(given["hidden_states"], given["router_weight"], given.get("router_bias"))
    routing: Routing = moeyard.route(
        logits.float() if logits.dtype == torch.float64 else logits,
        top_k=options["top_k"], renormalize=options["renormalize"], is_padding=given.get("is_padding"),
    )  # fmt: skip
    return moeyard.fused_experts(
        given["hidden_states"], routing, weights_of(given, options["gated"]), activation=options["activation"],
        save=options["save"], impl=impl,
    )  # fmt: skip


FORMULAS: dict[str, Callable[[Tensors, Question, list[Tensor]], Tensor]] = {
    "permute": _permute,
    "shuffle_rows": _shuffle_rows,
    "combine": _combine,
    "moe_sum": _moe_sum,
    "route": _route,
    "route_and_align": _route,
    "grouped_gemm by layout": _gemm_by_layout,
    "grouped_gemm by offsets": _gemm_by_offsets,
    "grouped_gemm by counts": _gemm_by_counts,
    "activate": _activate,
    "fused_experts": _fused_experts,
}
"""By the name of an operator: (tensors, question, tensors of its answer) -> the part that has a gradient."""
