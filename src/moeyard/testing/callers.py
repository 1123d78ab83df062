"""Every public operator with drawn inputs: what callers may ask, in a form that one test can ask in many ways.

A `Question` is an operator, its tensors by name and its options. `ask` calls the operator with them; the tensors may be
others of the same shapes, lie elsewhere in memory, be fake or need gradients.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

import moeyard
from moeyard.quant import ExpertScales, QuantScheme
from moeyard.testing.draws import (
    SCALES,
    Sizes,
    Tensors,
    draw_activate,
    draw_align,
    draw_batched,
    draw_combine,
    draw_experts,
    draw_experts_at_a_scheme,
    draw_gemm_by_counts,
    draw_gemm_by_layout,
    draw_gemm_by_offsets,
    draw_layer,
    draw_lora,
    draw_moe_sum,
    draw_permute,
    draw_permute_to_fp8,
    draw_quantised_experts,
    draw_route,
    draw_route_and_align,
    draw_shuffle,
)
from moeyard.values import ExpertWeights, Layout, Permuted, Routing


class Operator(NamedTuple):
    """A public operator, as tests call it."""

    op: str
    """Its name in the table of implementations; of a composite, the operator that `impl` chooses."""
    draw: Callable[[Sizes, Random], tuple[Tensors, dict[str, Any]]]
    """Its tensors, named as in errors, and its options."""
    call: Callable[..., Any]
    """(tensors, impl, **options) -> the answer; `out` is among the options where the operator takes it."""
    dtypes: tuple[torch.dtype, ...]
    takes_out: bool = True
    differentiable: tuple[str, ...] = ()
    defined: Callable[[Any, Tensors, dict[str, Any]], list[Tensor]] = lambda answer, _tensors, _options: tensors(answer)
    """The parts of an answer that the operator promises to write."""


class Question(NamedTuple):
    """A drawn call."""

    name: str
    sizes: Sizes
    tensors: Tensors
    options: dict[str, Any]

    @property
    def operator(self) -> Operator:
        """What is asked."""
        return OPERATORS[self.name]

    def ask(self, impl: str, tensors: Tensors | None = None, **more: Any) -> Any:
        """The answer for these tensors, or for others of the same shapes."""
        return self.operator.call(self.tensors if tensors is None else tensors, impl, **self.options, **more)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Question":
        """The question with the tensors of its options moved."""
        options = dict(self.options)
        if "layout" in options:
            options["layout"] = rebuilt(options["layout"], move)
        return self._replace(options=options)

    def defined(self, answer: Any, given: Tensors | None = None) -> list[Tensor]:
        """The defined parts of an answer."""
        return self.operator.defined(answer, self.tensors if given is None else given, self.options)


def _parts(answer: Any) -> Iterator[Tensor]:
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, Layout):
        yield from answer.tensors
    elif isinstance(answer, Permuted):
        yield from (t for t in (answer.rows, answer.scales) if t is not None)
    elif isinstance(answer, Routing):
        yield from (answer.topk_weights, answer.topk_ids)
    else:
        for one in answer:
            yield from _parts(one)


def tensors(answer: Any) -> list[Tensor]:
    """The tensors of an answer, in order."""
    return list(_parts(answer))


def rebuilt(answer: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """An answer of the same type and sizes whose tensors are those that `make` gives for the ones of `answer`."""
    if isinstance(answer, Tensor):
        return make(answer)
    if isinstance(answer, Layout):
        sizes = (answer.num_experts, answer.num_local_experts, answer.block_size, answer.top_k)
        return Layout.of([make(t) for t in answer.tensors], sizes)
    if isinstance(answer, Permuted):
        return Permuted(make(answer.rows), None if answer.scales is None else make(answer.scales))
    if isinstance(answer, Routing):
        return Routing(make(answer.topk_weights), make(answer.topk_ids))
    return tuple(rebuilt(one, make) for one in answer)


# Calls


def _call_experts(
    given: Tensors, impl: str, *, gated: bool, scheme: QuantScheme | None = None, block_start: int = 0, **options: Any
) -> Any:
    routing = Routing(given["topk_weights"], given["topk_ids"])
    options["expert_map"] = given.get("expert_map")
    weights = weights_of(given, gated, scheme, block_start)
    return moeyard.fused_experts(given["hidden_states"], routing, weights, impl=impl, **options)


def _call_at_a_scheme(given: Tensors, impl: str, *, gated: bool, scheme: QuantScheme, **options: Any) -> Any:
    routing = Routing(given["topk_weights"], given["topk_ids"])
    options["expert_map"] = given.get("expert_map")
    weights = weights_of(given, gated)
    return moeyard.straight_through_experts(given["hidden_states"], routing, weights, scheme, impl=impl, **options)


def weights_of(given: Tensors, gated: bool, scheme: QuantScheme | None = None, block_start: int = 0) -> ExpertWeights:
    """The weights among the tensors of a question."""
    scales = None
    if scheme is not None:
        fields = {field: given[name] for name, field in SCALES.items() if name in given}
        scales = ExpertScales(**fields, block_start=block_start)
    return ExpertWeights(given["w13"], given["w2"], given.get("w13_bias"), given.get("w2_bias"), gated, scheme, scales)


def _call_layer(given: Tensors, impl: str, *, gated: bool, **options: Any) -> Any:
    options.update({name: given.get(name) for name in ("router_bias", "is_padding")})
    weights = weights_of(given, gated)
    return moeyard.moe_layer(given["hidden_states"], given["router_weight"], weights, impl=impl, **options)


def _calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """A call that passes every tensor by name."""
    return lambda given, impl, **options: function(**given, impl=impl, **options)


def _held(answer: Any, _given: Tensors, options: dict[str, Any]) -> list[Tensor]:
    layout = options["layout"]
    return [t[layout.sorted_token_ids < layout.num_routes] for t in tensors(answer)]


def _up_to_the_last_offset(answer: Any, given: Tensors, _options: dict[str, Any]) -> list[Tensor]:
    bounds = given["expert_offsets"].clamp(0, answer.shape[0]).cummax(0).values
    row = torch.arange(answer.shape[0], device=answer.device)
    return [answer[(row >= bounds[0]) & (row < bounds[-1])]]


def _up_to_the_counts(answer: Any, given: Tensors, _options: dict[str, Any]) -> list[Tensor]:
    counts = given["expert_num_tokens"].unsqueeze(1)
    return [answer[torch.arange(answer.shape[1], device=answer.device).unsqueeze(0) < counts]]


def _of_routes(answer: Any, _given: Tensors, options: dict[str, Any]) -> list[Tensor]:
    return [answer[options["layout"].route_rows >= 0]]


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDE = (*_FLOATS, torch.float64)
_ANY = (*_WIDE, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64)
_IDS = (torch.int32,)

OPERATORS: dict[str, Operator] = {
    "align": Operator("moe_align_block_size", draw_align, _calls(moeyard.moe_align_block_size), _IDS),
    "batched": Operator(
        "batched_moe_align_block_size", draw_batched, _calls(moeyard.batched_moe_align_block_size), _IDS
    ),
    "lora": Operator(
        "moe_lora_align_block_size", draw_lora, _calls(moeyard.moe_lora_align_block_size), _IDS, takes_out=False
    ),
    "permute": Operator(
        "permute", draw_permute, _calls(moeyard.permute), _ANY, differentiable=("hidden_states",), defined=_held
    ),
    "permute_to_fp8": Operator(
        "permute_to_fp8", draw_permute_to_fp8, _calls(moeyard.permute_to_fp8), _FLOATS, defined=_held
    ),
    "shuffle_rows": Operator(
        "shuffle_rows", draw_shuffle, _calls(moeyard.shuffle_rows), _ANY, differentiable=("input",)
    ),
    "combine": Operator(
        "combine", draw_combine, _calls(moeyard.combine), _WIDE, differentiable=("rows", "topk_weights")
    ),
    "moe_sum": Operator("moe_sum", draw_moe_sum, _calls(moeyard.moe_sum), _WIDE, differentiable=("rows",)),
    "route": Operator("route", draw_route, _calls(moeyard.route), _FLOATS, differentiable=("router_logits",)),
    "route_and_align": Operator(
        "route",
        draw_route_and_align,
        _calls(moeyard.route_and_align),
        _FLOATS,
        takes_out=False,
        differentiable=("router_logits",),
    ),
    "grouped_gemm by layout": Operator(
        "grouped_gemm",
        draw_gemm_by_layout,
        _calls(moeyard.grouped_gemm),
        _WIDE,
        differentiable=("rows", "weight", "bias", "topk_weights"),
        defined=_of_routes,
    ),
    "grouped_gemm by offsets": Operator(
        "grouped_gemm",
        draw_gemm_by_offsets,
        _calls(moeyard.grouped_gemm),
        _WIDE,
        differentiable=("rows", "weight", "bias"),
        defined=_up_to_the_last_offset,
    ),
    "grouped_gemm by counts": Operator(
        "grouped_gemm",
        draw_gemm_by_counts,
        _calls(moeyard.grouped_gemm),
        _WIDE,
        differentiable=("rows", "weight", "bias"),
        defined=_up_to_the_counts,
    ),
    "activate": Operator("activate", draw_activate, _calls(moeyard.activate), _WIDE, differentiable=("rows",)),
    "fused_experts": Operator(
        "fused_experts",
        draw_experts,
        _call_experts,
        _WIDE,
        differentiable=("hidden_states", "topk_weights", "w13", "w2", "w13_bias", "w2_bias"),
    ),
    "quantised experts": Operator("fused_experts", draw_quantised_experts, _call_experts, _FLOATS),
    "experts at a scheme": Operator(
        "fused_experts",
        draw_experts_at_a_scheme,
        _call_at_a_scheme,
        _FLOATS,
        takes_out=False,
        differentiable=("hidden_states", "topk_weights", "w13", "w2", "w13_bias", "w2_bias"),
    ),
    "moe_layer": Operator(
        "fused_experts",
        draw_layer,
        _call_layer,
        _WIDE,
        takes_out=False,
        differentiable=("hidden_states", "w13", "w2", "w13_bias", "w2_bias", "router_weight", "router_bias"),
    ),
}
"""By name; an operator that takes rows in several ways is there once for each."""


def question(name: str, sizes: Sizes, rng: Random, device: torch.device | str = "cpu") -> Question:
    """Draws the tensors and options of an operator, from `rng` and torch's own generator."""
    given, options = OPERATORS[name].draw(sizes, rng)
    asked = Question(name, sizes, {key: t.to(device) for key, t in given.items()}, options)
    return asked.moved(lambda t: t.to(device))
