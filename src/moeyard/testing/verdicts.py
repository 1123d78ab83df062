"""Is the answer to a question right? Movement bit by bit, sums within a bound of their roundings."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import moeyard
from moeyard import reference
from moeyard.testing.budgets import judged_experts
from moeyard.testing.callers import Question, weights_of
from moeyard.testing.comparisons import same_bits
from moeyard.testing.draws import Tensors
from moeyard.testing.layers import plain_activation
from moeyard.testing.lies import dense
from moeyard.testing.oracles import routing_error, sum_error, wide_scores
from moeyard.values import ExpertWeights, Routing

_MOVES = ("align", "batched", "lora", "permute", "permute_to_fp8", "shuffle_rows")
"""Their answers have the bits of the reference."""
_STABLE = ("cpu", "cuda")
"""Implementations whose sums do not depend on where tensors lie."""
_SLACK = 1.01
"""On bounds that leave out products of two roundings."""


def error(question: Question, given: Tensors, impl: str, answer: Any) -> str | None:
    """What is wrong with the answer of an implementation to a question with tensors `given`; None if nothing is."""
    plain = {name: dense(t.resolve_neg().resolve_conj().detach()) for name, t in given.items()}
    parts = question.defined(answer, plain)
    if question.name == "moe_layer":
        return _layer_error(question, given, impl, parts)
    wrong = _error(question.moved(torch.Tensor.cpu), {k: t.cpu() for k, t in plain.items()}, [t.cpu() for t in parts])
    if wrong is None and (impl in _STABLE or question.name in _MOVES):
        again = question.defined(question.ask(impl, plain), plain)
        wrong = difference(parts, again, "the answer for dense clones")
    return wrong


def difference(got: list[Tensor], wanted: list[Tensor], whose: str) -> str | None:
    """The first part that has other bits than it should."""
    if len(got) != len(wanted):
        return f"{len(got)} tensors where {whose} has {len(wanted)}"
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if not same_bits(a, b):
            return f"part {i} differs from {whose}: {_first(a, b)}"
    return None


def _first(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(a.shape)} {a.dtype} instead of {tuple(b.shape)} {b.dtype}"
    a, b = a.cpu().reshape(-1), b.cpu().reshape(-1)
    where = int((a.view(torch.uint8) != b.view(torch.uint8)).nonzero()[0]) // a.element_size()
    return f"element {where} of {a.numel()} is {a[where].item()} instead of {b[where].item()}"


def _by_reference(question: Question, plain: Tensors) -> Any:
    """The answer of the specification, by itself: neither checks nor the table of implementations take part."""
    function: Callable[..., Any] = getattr(reference, question.operator.op)
    return function(**plain, **question.options)


def _error(question: Question, plain: Tensors, parts: list[Tensor]) -> str | None:
    name = question.name
    if name in _MOVES:
        return difference(parts, question.defined(_by_reference(question, plain), plain), "the reference")
    if name == "route":
        return _routing_error(question, plain, Routing(*parts))
    if name == "route_and_align":
        return _routing_error(question, plain, Routing(*parts[:2])) or _layout_error(question, plain, parts)
    options = question.options
    if name == "quantised experts":
        codes = weights_of(plain, options["gated"], options["scheme"], options["block_start"])
        return _quantised_error(question, plain, codes, parts[0])
    if name == "experts at a scheme":
        codes = moeyard.quantize_experts(weights_of(plain, options["gated"]), options["scheme"])
        return _quantised_error(question, plain, codes, parts[0])
    wide, bound = answer_and_bound(question, plain)
    if name in ("combine", "moe_sum"):
        return sum_error(wide[0], parts[0], question.sizes.top_k)
    return _beyond(parts[0], wide[0], bound[0])


def _quantised_error(question: Question, plain: Tensors, weights: ExpertWeights, got: Tensor) -> str | None:
    options = question.options
    ids = plain["topk_ids"]
    routing = Routing(plain["topk_weights"], ids.view(torch.int32) if ids.dtype == torch.uint32 else ids)
    judged = judged_experts(
        plain["hidden_states"], routing, weights, activation=options["activation"], expert_map=plain.get("expert_map"),
        apply_router_weight_on_input=options.get("apply_router_weight_on_input", False),
    )  # fmt: skip
    return judged.error(got)


def _beyond(got: Tensor, wide: Tensor, bound: Tensor) -> str | None:
    """What lies beyond its bound; NaN does."""
    if got.shape != wide.shape:
        return f"shape {tuple(got.shape)}, not {tuple(wide.shape)}"
    error = (got.double() - wide).abs()
    wrong = ~(error <= bound)
    if not bool(wrong.any()):
        return None
    where = tuple(int(i) for i in wrong.nonzero()[0])
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements; first {where} is {float(got[where])} instead of "
        f"{float(wide[where])} within {float(bound[where]):.2e}"
    )


def _layout_error(question: Question, plain: Tensors, parts: list[Tensor]) -> str | None:
    layout = reference.moe_align_block_size(
        parts[1],
        num_experts=plain["router_logits"].shape[1],
        block_size=question.options["block_size"],
        expert_map=plain.get("expert_map"),
    )
    return difference(parts[2:], list(layout.tensors), "the layout of its ids")


def _routing_error(question: Question, plain: Tensors, got: Routing) -> str | None:
    logits, padding = plain["router_logits"], plain.get("is_padding")
    if padding is not None:
        if bool((got.topk_ids[padding] != -1).any()) or bool((got.topk_weights[padding] != 0).any()):
            return "padding tokens are routed"
        got = Routing(got.topk_weights[~padding], got.topk_ids[~padding])
        logits = logits[~padding]
    if not logits.numel():
        return None
    names = ("scoring", "renormalize", "num_groups", "top_k_groups", "routed_scaling_factor")
    options = {name: question.options[name] for name in names if name in question.options}
    if "selection_bias" not in plain:  # the choice is exact
        wanted = reference.route(logits, top_k=question.options["top_k"], **options)
        if not torch.equal(got.topk_ids, wanted.topk_ids):
            return "topk_ids differ from the reference"
        close = torch.allclose(got.topk_weights, wanted.topk_weights, rtol=1e-5, atol=1e-30)
        return None if close else "topk_weights are off"
    wrong = _tiny_error(got, options)
    scores = wide_scores(logits.double(), options["scoring"])
    chosen = scores.gather(1, got.topk_ids.long().clamp(0, logits.shape[1] - 1)).amin(1)
    held = (chosen > 1e-36) | (not options["renormalize"])  # of the others float32 has no ratios
    logits, got = logits[held], Routing(got.topk_weights[held], got.topk_ids[held])
    if wrong or not logits.numel():
        return wrong
    return routing_error(logits, got, selection_bias=plain["selection_bias"], **options)


def _tiny_error(got: Routing, options: dict[str, Any]) -> str | None:
    """A bias may choose experts whose scores float32 holds badly or as 0: weights still are shares of their sum."""
    weights = got.topk_weights.double() / options["routed_scaling_factor"]
    most = torch.inf if options["scoring"] == "sqrtsoftplus" and not options["renormalize"] else 1 + 1e-6
    if not bool(((weights >= 0) & (weights <= most)).all()):  # NaN fails too
        return "topk_weights are no shares"
    total = weights.sum(1)
    near = ((total - 1).abs() < 1e-5) | (total == 0)
    return None if not options["renormalize"] or bool(near.all()) else "topk_weights do not add up to 1"


def _layer_error(question: Question, given: Tensors, impl: str, parts: list[Tensor]) -> str | None:
    """The layer has the bits of its steps, on tensors that lie in the same places; torch's products vary a little."""
    hidden, router, options = given["hidden_states"], given["router_weight"], question.options
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(hidden.detach(), router.detach(), given.get("router_bias"))
    logits = logits.float() if logits.dtype == torch.float64 else logits
    routing = moeyard.route(
        logits, top_k=options["top_k"], renormalize=options["renormalize"], is_padding=given.get("is_padding")
    )
    weights = weights_of(given, options["gated"])
    steps = moeyard.fused_experts(hidden.detach(), routing, weights, activation=options["activation"], impl=impl)
    if impl in _STABLE or len(parts) != 1 or parts[0].shape != steps.shape:
        return difference(parts, [steps], "its steps")
    bound = (2 if steps.dtype.itemsize == 2 else 64) * torch.finfo(steps.dtype).eps
    largest = float(steps.abs().max()) if steps.numel() else 0.0
    near = torch.allclose(parts[0].double(), steps.double(), rtol=bound, atol=bound * largest, equal_nan=True)
    return None if near else "the layer differs from its steps"


# Sums: the float64 answer, and how far an honest one may be from it


def answer_and_bound(question: Question, plain: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """The defined parts of the float64 answer, and for each element what roundings may add up to."""
    if question.name == "fused_experts":
        wide, bound = _experts(question, plain)
        return [wide], [bound]
    floats = {name: t for name, t in plain.items() if t.is_floating_point() and name != "topk_weights"}
    wide_tensors = {**plain, **{name: t.double() for name, t in floats.items()}}
    wide = _by_reference(question, wide_tensors)
    parts = question.defined(wide, plain)
    rows = plain["rows"]
    eps, small = torch.finfo(rows.dtype).eps, torch.finfo(torch.promote_types(rows.dtype, torch.float32)).eps
    if question.name == "activate":
        # gelu's error function cancels: what is left of large negative values is small against them
        share = 0.51 * eps if rows.dtype.itemsize == 2 else 8 * small
        return parts, [part.abs() * share + (4e-6 if small > 1e-10 else 1e-13) for part in parts]
    magnitudes = {name: t.abs() for name, t in wide_tensors.items() if t.is_floating_point()}
    sums = question.defined(_by_reference(question, {**wide_tensors, **magnitudes}), plain)
    roundings = 4 + 2 * rows.shape[-1] ** 0.5
    bounds = [a.abs() * eps * 0.51 + b * small * roundings + 1e-30 for a, b in zip(parts, sums, strict=True)]
    if rows.dtype == torch.float16:
        bounds = [bound + 2.0**-24 for bound in bounds]
    return parts, bounds


def _experts(question: Question, plain: Tensors) -> tuple[Tensor, Tensor]:
    """Tokens through their experts in float64, and the roundings of every step, carried through the later ones."""
    options, hidden = question.options, plain["hidden_states"]
    weights, on_input = weights_of(plain, options["gated"]), options["apply_router_weight_on_input"]
    small = torch.finfo(torch.promote_types(hidden.dtype, torch.float32)).eps
    half = 0.51 * max(torch.finfo(hidden.dtype).eps, small)
    tiny = 2.0**-24 if hidden.dtype == torch.float16 else 0.0
    ids, mapping = plain["topk_ids"], plain.get("expert_map")
    ids = (ids.view(torch.int32) if ids.dtype == torch.uint32 else ids).long()
    if mapping is not None:
        known = (ids >= 0) & (ids < len(mapping))
        ids = torch.where(known, mapping.long()[ids.clamp(0, len(mapping) - 1)], -1)
    total, spread = (torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device) for _ in range(2))
    for expert in range(weights.num_local_experts):
        token, k = torch.where(ids == expert)
        if not len(token):
            continue
        w13, w2, b13, b2 = (
            None if t is None else t[expert].double()
            for t in (weights.w13, weights.w2, weights.w13_bias, weights.w2_bias)
        )
        assert w13 is not None and w2 is not None
        factor = plain["topk_weights"][token, k].double().unsqueeze(1)
        x = hidden[token].double() * (factor if on_input else 1)
        before = x @ w13.t() + (0 if b13 is None else b13)
        size = x.abs() @ w13.abs().t() + (0 if b13 is None else b13.abs())
        e_before = size * (small * (4 + 2 * x.shape[1] ** 0.5) + (half if on_input else 0)) + tiny
        middle, e_middle = _activated(before, e_before, options["activation"], weights.gated, half, small)
        row = middle @ w2.t() + (0 if b2 is None else b2)
        size = middle.abs() @ w2.abs().t() + (0 if b2 is None else b2.abs())
        e_row = (e_middle + tiny) @ w2.abs().t() + size * small * (4 + 2 * middle.shape[1] ** 0.5) + row.abs() * half
        factor = torch.ones_like(factor) if on_input else factor
        total.index_add_(0, token, row * factor)
        spread.index_add_(0, token, (e_row + row.abs() * (half + 4 * small)) * factor + tiny)
    return total, _SLACK * spread + total.abs() * half + 1e-30 + tiny


def _activated(
    before: Tensor, e_before: Tensor, activation: Any, gated: bool, half: float, small: float
) -> tuple[Tensor, Tensor]:
    """The activation of rows in float64, and its error where those of `before` are `e_before`."""
    middle = plain_activation(before, activation, gated)
    gate, up = before.chunk(2, 1) if gated else (before, None)
    e_gate, e_up = e_before.chunk(2, 1) if gated else (e_before, None)
    steep = 2 * (gate.abs() + e_gate) if activation.name == "relu2" else torch.full_like(gate, 1.2)
    if up is None or e_up is None:
        return middle, e_gate * steep + middle.abs() * (half + 16 * small) + 4 * small
    if activation.limit is not None:
        up = up.clamp(-activation.limit, activation.limit)
    level = plain_activation(gate, activation, False).abs()
    other = (up + activation.beta).abs() + e_up
    return middle, e_gate * steep * other + level * e_up + middle.abs() * (half + 16 * small) + 4 * small * other
