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
from moeyard.testing.layers import draw_weights
from moeyard.testing.routings import ROUTINGS
from moeyard.values import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Layout, Permuted, Routing

Tensors = dict[str, Tensor]


class Sizes(NamedTuple):
    """What inputs are drawn with; an operator reads what it has."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    columns: int
    """Columns of a product, or intermediate_size of experts."""
    block: int
    dtype: torch.dtype


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


# Inputs


def _rows(*shape: int, dtype: torch.dtype) -> Tensor:
    """Normal values of a float dtype; any bytes of another."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.randn(shape).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype)
    return (
        torch.randint(0, 127, shape).to(torch.uint8).view(dtype) if dtype.itemsize == 1 else torch.randint(0, 9, shape)
    )


def _ids(sizes: Sizes, rng: Random, dtype: torch.dtype = torch.int32) -> Tensor:
    """Routings of models, sometimes with ids that no expert has."""
    tokens, top_k, experts = sizes.tokens, sizes.top_k, sizes.experts
    if not tokens:
        return torch.empty(0, top_k, dtype=dtype)
    name = rng.choice(sorted(ROUTINGS))
    ids = ROUTINGS[name](tokens, experts, top_k, torch.Generator().manual_seed(rng.randrange(2**31))).long()
    if rng.random() < 0.3:
        wild = torch.tensor(
            [-1, -(2**31), experts, 2**31 - 1, *([2**32 + 1, -(2**40)] if dtype == torch.int64 else [])]
        )
        ids = torch.where(torch.rand(ids.shape) < 0.2, wild[torch.randint(0, len(wild), ids.shape)], ids)
    return ids.to(torch.int32).view(torch.uint32) if dtype == torch.uint32 else ids.to(dtype)


def _map(experts: int, rng: Random) -> Tensor:
    """Local experts in another order; some, or all, are elsewhere."""
    where = torch.randperm(experts).int()
    return where.masked_fill(torch.rand(experts) < rng.choice([0.0, 0.3, 0.3, 1.0]), -1)


def _layout(sizes: Sizes, rng: Random) -> Layout:
    return moeyard.moe_align_block_size(
        _ids(sizes, rng),
        num_experts=sizes.experts,
        block_size=sizes.block,
        impl="reference" if sizes.tokens < 9 else "torch",
    )


def _id_dtype(rng: Random) -> torch.dtype:
    return rng.choice([torch.int32, torch.int32, torch.int64, torch.uint32])


def _draw_align(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given = {"topk_ids": _ids(sizes, rng, _id_dtype(rng))}
    options: dict[str, Any] = {"num_experts": sizes.experts, "block_size": sizes.block}
    if rng.random() < 0.4:
        given["expert_map"] = _map(sizes.experts, rng)
        options["num_local_experts"] = rng.choice([None, max(1, sizes.experts // 2)])
    if rng.random() < 0.3:
        given["topk_ids"] = given["topk_ids"].flatten()
        options["top_k"] = sizes.top_k
    return given, options


def _draw_batched(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    most = -(-sizes.tokens // sizes.experts)
    counts = torch.randint(-1, most + rng.randint(1, 3), (sizes.experts,), dtype=torch.int32)
    return {"expert_num_tokens": counts}, {"max_num_tokens": most, "block_size": sizes.block}


def _draw_lora(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given, options = _draw_align(sizes, rng)
    loras = rng.choice([1, 2, 5])
    mapping = torch.randint(-1, loras + 1, (sizes.tokens,), dtype=rng.choice([torch.int32, torch.int64]))
    return {**given, "token_lora_mapping": mapping}, {**options, "max_loras": loras}


def _draw_permute(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given = {"hidden_states": _rows(sizes.tokens, sizes.hidden, dtype=sizes.dtype)}
    if rng.random() < 0.5:
        shape = rng.choice([(sizes.tokens,), (sizes.tokens, 3)])
        given["scales"] = _rows(*shape, dtype=rng.choice([torch.float32, torch.uint8, torch.bfloat16]))
    return given, {"layout": _layout(sizes, rng)}


def _draw_permute_to_fp8(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    group = rng.choice([None, 128])
    hidden = max(1, sizes.hidden) if group is None else -(-max(1, sizes.hidden) // 128) * 128
    given = {"hidden_states": _rows(sizes.tokens, hidden, dtype=sizes.dtype)}
    return given, {"layout": _layout(sizes, rng), "group_size": group}


def _draw_shuffle(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    dtype = rng.choice([torch.int32, torch.int64])
    rows = rng.choice([sizes.tokens, 1, sizes.tokens + 3])
    sources = torch.randint(-1, rows + 2, (sizes.tokens,)).to(dtype)
    return {"input": _rows(rows, sizes.hidden, dtype=sizes.dtype), "dst2src_map": sources}, {}


def _draw_combine(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    layout = _layout(sizes, rng)
    rows = _rows(layout.capacity, sizes.hidden, dtype=sizes.dtype)
    given = {"rows": rows}
    if rng.random() < 0.7:
        given["topk_weights"] = torch.rand(sizes.tokens, sizes.top_k)
    return given, {"layout": layout}


def _draw_moe_sum(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given = {"rows": _rows(sizes.tokens, sizes.top_k, sizes.hidden, dtype=sizes.dtype)}
    if rng.random() < 0.7:
        given["topk_ids"] = _ids(sizes, rng, _id_dtype(rng))
        if rng.random() < 0.5:
            given["expert_map"] = _map(sizes.experts, rng)
    return given, {}


def _draw_route(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given = {"router_logits": (torch.randn(sizes.tokens, sizes.experts) * rng.choice([1, 4, 30])).to(sizes.dtype)}
    options: dict[str, Any] = {
        "top_k": sizes.top_k,
        "scoring": rng.choice(["softmax", "sigmoid"]),
        "renormalize": rng.random() < 0.5,
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
    }
    groups = rng.choice([g for g in (1, 1, 2, 4, 8) if sizes.experts % g == 0])
    if groups > 1:
        kept = [n for n in range(1, groups + 1) if n * (sizes.experts // groups) >= sizes.top_k]
        options.update(num_groups=groups, top_k_groups=rng.choice(kept))
    if rng.random() < 0.5:
        given["selection_bias"] = torch.randn(sizes.experts)
    if rng.random() < 0.3:
        given["is_padding"] = torch.rand(sizes.tokens) < 0.2
    return given, options


def _draw_route_and_align(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given, options = _draw_route(sizes, rng)
    if rng.random() < 0.4:
        given["expert_map"] = _map(sizes.experts, rng)
    return given, {**options, "block_size": sizes.block}


def _draw_gemm(sizes: Sizes, rows: Tensor, rng: Random) -> Tensors:
    weight = torch.randn(sizes.experts, sizes.columns, sizes.hidden) / max(1, sizes.hidden) ** 0.5
    given = {"rows": rows, "weight": weight.to(sizes.dtype)}
    if rng.random() < 0.5:
        given["bias"] = _rows(sizes.experts, sizes.columns, dtype=sizes.dtype)
    return given


def _draw_gemm_by_layout(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    rows = sizes.tokens * rng.choice([1, sizes.top_k])
    given = _draw_gemm(sizes, _rows(rows, sizes.hidden, dtype=sizes.dtype), rng)
    if rng.random() < 0.5:
        given["topk_weights"] = torch.rand(sizes.tokens, sizes.top_k)
    return given, {"layout": _layout(sizes, rng)}


def _draw_gemm_by_offsets(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    offsets = torch.randint(0, sizes.tokens + 1, (sizes.experts + 1,)).sort().values
    given = _draw_gemm(sizes, _rows(sizes.tokens, sizes.hidden, dtype=sizes.dtype), rng)
    return {**given, "expert_offsets": offsets}, {}


def _draw_gemm_by_counts(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    most = -(-sizes.tokens // sizes.experts)
    given = _draw_gemm(sizes, _rows(sizes.experts, most, sizes.hidden, dtype=sizes.dtype), rng)
    return {**given, "expert_num_tokens": torch.randint(-1, most + 2, (sizes.experts,), dtype=torch.int32)}, {}


def _draw_activate(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    gated = rng.random() < 0.7
    rows = _rows(sizes.tokens, (1 + gated) * sizes.columns, dtype=sizes.dtype) * 4
    return {"rows": rows}, {"activation": _activation(rng), "gated": gated}


def _activation(rng: Random) -> Activation:
    drawn = (Activation(), Activation("gelu"), Activation("gelu_tanh"), Activation("relu2"), GPT_OSS_ACTIVATION)
    return rng.choice([*drawn, Activation("silu", limit=0.5), Activation("relu2", limit=1.5)])


def _draw_experts(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    gated = rng.random() < 0.7
    weights = draw_weights(
        sizes.experts, sizes.hidden, sizes.columns, sizes.dtype, gated=gated, bias=rng.random() < 0.5
    )
    given = {
        "hidden_states": _rows(sizes.tokens, sizes.hidden, dtype=sizes.dtype),
        "topk_weights": torch.rand(sizes.tokens, sizes.top_k),
        "topk_ids": _ids(sizes, rng, _id_dtype(rng)),
        "w13": weights.w13,
        "w2": weights.w2,
    }
    if weights.w13_bias is not None and weights.w2_bias is not None:
        given.update(w13_bias=weights.w13_bias, w2_bias=weights.w2_bias)
    if rng.random() < 0.3:
        given["expert_map"] = _map(sizes.experts, rng)
    return given, {
        "activation": _activation(rng), "gated": gated, "apply_router_weight_on_input": rng.random() < 0.3,
    }  # fmt: skip


def _draw_layer(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given, options = _draw_experts(sizes, rng)
    kept = {name: t for name, t in given.items() if name not in ("topk_weights", "topk_ids", "expert_map")}
    kept["router_weight"] = torch.randn(sizes.experts, sizes.hidden).to(sizes.dtype)
    if rng.random() < 0.4:
        kept["router_bias"] = torch.randn(sizes.experts).to(sizes.dtype)
    if rng.random() < 0.3:
        kept["is_padding"] = torch.rand(sizes.tokens) < 0.2
    del options["apply_router_weight_on_input"]
    return kept, {**options, "top_k": sizes.top_k, "renormalize": rng.random() < 0.5}


# Calls


def _call_experts(given: Tensors, impl: str, *, gated: bool, **options: Any) -> Any:
    routing = Routing(given["topk_weights"], given["topk_ids"])
    options["expert_map"] = given.get("expert_map")
    return moeyard.fused_experts(given["hidden_states"], routing, weights_of(given, gated), impl=impl, **options)


def weights_of(given: Tensors, gated: bool) -> ExpertWeights:
    """The weights among the tensors of a question."""
    return ExpertWeights(given["w13"], given["w2"], given.get("w13_bias"), given.get("w2_bias"), gated)


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
    "align": Operator("moe_align_block_size", _draw_align, _calls(moeyard.moe_align_block_size), _IDS),
    "batched": Operator(
        "batched_moe_align_block_size", _draw_batched, _calls(moeyard.batched_moe_align_block_size), _IDS
    ),
    "lora": Operator(
        "moe_lora_align_block_size", _draw_lora, _calls(moeyard.moe_lora_align_block_size), _IDS, takes_out=False
    ),
    "permute": Operator(
        "permute", _draw_permute, _calls(moeyard.permute), _ANY, differentiable=("hidden_states",), defined=_held
    ),
    "permute_to_fp8": Operator(
        "permute_to_fp8", _draw_permute_to_fp8, _calls(moeyard.permute_to_fp8), _FLOATS, defined=_held
    ),
    "shuffle_rows": Operator(
        "shuffle_rows", _draw_shuffle, _calls(moeyard.shuffle_rows), _ANY, differentiable=("input",)
    ),
    "combine": Operator(
        "combine", _draw_combine, _calls(moeyard.combine), _WIDE, differentiable=("rows", "topk_weights")
    ),
    "moe_sum": Operator("moe_sum", _draw_moe_sum, _calls(moeyard.moe_sum), _WIDE, differentiable=("rows",)),
    "route": Operator("route", _draw_route, _calls(moeyard.route), _FLOATS, differentiable=("router_logits",)),
    "route_and_align": Operator(
        "route", _draw_route_and_align, _calls(moeyard.route_and_align), _FLOATS, takes_out=False
    ),
    "grouped_gemm by layout": Operator(
        "grouped_gemm", _draw_gemm_by_layout, _calls(moeyard.grouped_gemm), _WIDE, defined=_of_routes
    ),
    "grouped_gemm by offsets": Operator(
        "grouped_gemm", _draw_gemm_by_offsets, _calls(moeyard.grouped_gemm), _WIDE, defined=_up_to_the_last_offset
    ),
    "grouped_gemm by counts": Operator(
        "grouped_gemm", _draw_gemm_by_counts, _calls(moeyard.grouped_gemm), _WIDE, defined=_up_to_the_counts
    ),
    "activate": Operator("activate", _draw_activate, _calls(moeyard.activate), _WIDE),
    "fused_experts": Operator("fused_experts", _draw_experts, _call_experts, _WIDE),
    "moe_layer": Operator("fused_experts", _draw_layer, _call_layer, _WIDE, takes_out=False),
}
"""By name; an operator that takes rows in several ways is there once for each."""


def question(name: str, sizes: Sizes, rng: Random, device: torch.device | str = "cpu") -> Question:
    """Draws the tensors and options of an operator, from `rng` and torch's own generator."""
    given, options = OPERATORS[name].draw(sizes, rng)
    asked = Question(name, sizes, {key: t.to(device) for key, t in given.items()}, options)
    return asked.moved(lambda t: t.to(device))
