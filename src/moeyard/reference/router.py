"""The specification of routers, token by token."""

import math

import torch
from torch import Tensor

from moeyard.reference.layout import host
from moeyard.values import Router, Routing


def _scores(logits: Tensor, scoring: str) -> Tensor:
    """Float32 scores of float64 logits; what is NaN or infinite counts as 0."""
    if scoring == "softmax":
        exponentials = (logits - logits.amax(1, keepdim=True)).exp()
        scores = exponentials / exponentials.sum(1, keepdim=True)
    elif scoring == "sigmoid":
        scores = 1 / (1 + (-logits).exp())
    else:  # softplus is log(1 + exp(x)), of which large x leave nothing finite
        scores = (logits.clamp(min=0) + (-logits.abs()).exp().log1p()).sqrt()
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
    weights = torch.zeros(num_tokens, top_k, dtype=torch.float32)
    ids = torch.full((num_tokens, top_k), -1, dtype=torch.int32)
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
                pairs = [torch.tensor([key[i] for i in best], dtype=torch.float32) for best in best_of]
                group_keys = [float(pair.sum()) for pair in pairs]
            kept = _best(group_keys, top_k_groups, list(range(num_groups)))
            among = [i for i in among if i // size in kept]
        chosen = torch.tensor(_best(key, top_k, among), dtype=torch.int64)
        weight = scores[token, chosen].double()
        if renormalize and float(weight.sum()) > 0:
            weight = weight / weight.sum()
        weights[token] = (weight * routed_scaling_factor).float()
        ids[token] = chosen.int()
    return Routing(weights, ids)


# The function as a launcher: outputs are given, results are copied into them.


def route_launch(
    router_logits: Tensor, selection_bias: Tensor | None, is_padding: Tensor | None, router: Router, *, out: Routing
) -> None:
    result = route(
        router_logits.detach().cpu(), selection_bias=host(selection_bias), is_padding=host(is_padding),
        **router._asdict(),
    )  # fmt: skip
    out.copy_(result)
