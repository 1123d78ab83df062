"""The first defined part of the answers of differentiable operators, in plain torch that autograd can follow."""

from collections.abc import Callable

import torch
from torch import Tensor

from moeyard.testing.callers import Question
from moeyard.testing.draws import Tensors
from moeyard.testing.oracles import wide_scores


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


FORMULAS: dict[str, Callable[[Tensors, Question, list[Tensor]], Tensor]] = {
    "permute": _permute,
    "shuffle_rows": _shuffle_rows,
    "combine": _combine,
    "moe_sum": _moe_sum,
    "route": _route,
}
"""By the name of an operator: (tensors, question, tensors of its answer) -> the part that has a gradient."""
