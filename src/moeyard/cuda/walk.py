"""Which kernels the calls of a layer ask for, over all numbers of tokens: launchers are called as they are, on meta
tensors, and what they would launch is noted (runtime/planning.py). So no GPU is needed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moeyard.cuda.align.launchers import align_launch
from moeyard.cuda.experts import few_tokens, four_bits, launchers
from moeyard.cuda.route.launchers import route_launch
from moeyard.cuda.route.route_align import route_and_align_launch
from moeyard.cuda.rows.launchers import combine_launch, moe_sum_launch, permute_launch
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.launch import Recipe
from moeyard.cuda.runtime.planning import planning
from moeyard.dispatch.call import Call, LayerFacts, WeightFacts, facts_of_experts
from moeyard.dispatch.invariance import dependence
from moeyard.dispatch.schemes import refusal_of
from moeyard.dispatch.sizes import MOST_FUSED_TOKENS, changes, layout_lengths
from moeyard.values import ExpertCall, Layout, Routing, Segments


def recipes_of(
    facts: LayerFacts, card: Card, tokens: int, experts: bool = True, device: str = "meta"
) -> dict[Recipe, None]:
    """What all operators of a layer launch for so many tokens, in the order in which they do.

    Routers, alignments of int32 ids, rows; with `experts` those too, where these kernels take their weights. Tensors
    may be on the CPU as well, where they have addresses.
    """
    with planning(card) as plan:
        for call in _calls(facts, tokens, experts, device):
            call()
    return plan.recipes


def all_recipes(facts: LayerFacts, card: Card, most_tokens: int, experts: bool = True) -> dict[Recipe, int]:
    """What a layer launches for 1 to `most_tokens` tokens, and the fewest tokens for which it does."""
    found: dict[Recipe, int] = {}
    for count in changes(lambda tokens: recipes_of(facts, card, tokens, experts).keys(), most_tokens):
        for recipe in recipes_of(facts, card, count, experts):
            found.setdefault(recipe, count)
    return found


def _calls(facts: LayerFacts, tokens: int, experts: bool, device: str) -> Iterator[Callable[[], object]]:
    weights, router, top_k = facts.weights, facts.router, facts.router.top_k
    hidden_size, local = weights.hidden_size, weights.num_local_experts

    def empty(*shape: int, dtype: torch.dtype = facts.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, logits = empty(tokens, hidden_size), empty(tokens, facts.num_experts)
    bias = empty(facts.num_experts, dtype=torch.float32) if facts.selection_bias else None
    mapping = empty(facts.num_experts, dtype=torch.int32) if facts.mapped else None
    ids = empty(tokens, top_k, dtype=torch.int32)
    routing = Routing(empty(tokens, top_k, dtype=torch.float32), ids)
    yield lambda: route_launch(logits, bias, None, router, out=routing)
    for block_size in facts.block_sizes:
        layout = _layout(tokens, top_k, facts.num_experts, local, block_size, device)
        if tokens <= MOST_FUSED_TOKENS:
            yield lambda: route_and_align_launch(logits, bias, None, mapping, router, routing, layout)  # noqa: B023
        yield lambda: align_launch(ids, mapping, layout)  # noqa: B023
    compact = _layout(tokens, top_k, facts.num_experts, local, 1, device)
    rows = empty(tokens * top_k, hidden_size)
    yield lambda: permute_launch(
        hidden, None, sorted_token_ids=compact.sorted_token_ids, route_rows=compact.route_rows, top_k=top_k, rows=rows,
        row_scales=None,
    )  # fmt: skip
    yield lambda: combine_launch(rows, routing.topk_weights, route_rows=compact.route_rows, top_k=top_k, out=hidden)
    yield lambda: moe_sum_launch(rows.view(tokens, top_k, hidden_size), None, None, out=hidden)
    if not experts:
        return
    invariant = facts.batch_invariant
    routed = ExpertCall(weights, facts.activation, facts.num_experts, mapping, batch_invariant=invariant)
    yield lambda: _experts(hidden, routing, routed)
    if invariant:  # the router's product is ours, too (`_linear_by_row` in experts.py)
        router_weight = empty(1, facts.num_experts, hidden_size)
        router_bias = None if weights.w13_bias is None else empty(1, facts.num_experts)
        one = Segments(empty(1, dtype=torch.int64), empty(1, dtype=torch.int32), batch_invariant=True)
        given = WeightFacts(facts.dtype, None, 1, facts.num_experts, hidden_size, False, "")
        if launchers.unfit_for_products(Call(hidden.device, facts.dtype, given)) is None:
            yield lambda: launchers.grouped_gemm_launch(hidden, router_weight, router_bias, None, one, out=logits)
    if facts.shared is not None:
        everyone = Routing(empty(tokens, 1, dtype=torch.float32), empty(tokens, 1, dtype=torch.int32))
        call = ExpertCall(facts.shared, facts.activation, 1, batch_invariant=invariant)
        yield lambda: _experts(hidden, everyone, call)


def _layout(tokens: int, top_k: int, num_experts: int, local: int, block_size: int, device: str) -> Layout:
    lengths = layout_lengths(tokens * top_k, local, block_size)
    int32, int64 = torch.int32, torch.int64
    kinds = (int32, int32, int32, int64, int32, int32)
    tensors = tuple(torch.empty(n, dtype=kind, device=device) for n, kind in zip(lengths, kinds, strict=True))
    return Layout.of(tensors, (num_experts, local, block_size, top_k))


def _experts(hidden: Tensor, routing: Routing, call: ExpertCall) -> None:
    """The experts, by the first of this implementation's ways that takes the call; none where all refuse."""
    ids = routing.topk_ids
    tokens, top_k = ids.shape
    facts = Call(hidden.device, hidden.dtype, facts_of_experts(call.weights), tokens, top_k, call.num_experts)
    scheme = call.weights.scheme
    for label, unfit, way in _WAYS:
        varies = dependence(label, scheme) if call.batch_invariant else None
        if refusal_of(label, scheme) is None and varies is None and unfit(facts) is None:
            way.fused_experts_launch(hidden, routing.topk_weights, ids, call, out=torch.empty_like(hidden))
            return


_WAYS: tuple[tuple[str, Callable[[Call], str | None], Any], ...] = (
    ("cuda (few tokens)", few_tokens.unfit, few_tokens),
    ("cuda (few tokens of 4 bits)", four_bits.unfit, four_bits),
    ("cuda (products)", launchers.unfit_for_experts, launchers),
)
"""The rows of the table, in their order."""


def products_refuse(facts: LayerFacts) -> str | None:
    """Why the products of this implementation do not take the experts of a layer, in words; None if they do."""
    weights = facts.weights
    call = Call(weights.w13.device, facts.dtype, facts_of_experts(weights))
    return refusal_of("cuda (products)", weights.scheme) or launchers.unfit_for_experts(call)
