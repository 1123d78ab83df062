"""Inputs of every public operator, drawn: tensors by the names that errors have for them, and options."""

from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

import moeyard
from moeyard.quant import FP8_BLOCK, FP8_WEIGHTS, INT8_CHANNEL
from moeyard.testing.layers import draw_weights
from moeyard.testing.quantised import SCHEMES, draw_quantised
from moeyard.testing.routings import ROUTINGS
from moeyard.values import GPT_OSS_ACTIVATION, Activation, Layout

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


def draw_align(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given = {"topk_ids": _ids(sizes, rng, _id_dtype(rng))}
    options: dict[str, Any] = {"num_experts": sizes.experts, "block_size": sizes.block}
    if rng.random() < 0.4:
        given["expert_map"] = _map(sizes.experts, rng)
        options["num_local_experts"] = rng.choice([None, max(1, sizes.experts // 2)])
    if rng.random() < 0.3:
        given["topk_ids"] = given["topk_ids"].flatten()
        options["top_k"] = sizes.top_k
    return given, options


def draw_batched(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    most = -(-sizes.tokens // sizes.experts)
    counts = torch.randint(-1, most + rng.randint(1, 3), (sizes.experts,), dtype=torch.int32)
    return {"expert_num_tokens": counts}, {"max_num_tokens": most, "block_size": sizes.block}


def draw_lora(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given, options = draw_align(sizes, rng)
    loras = rng.choice([1, 2, 5])
    mapping = torch.randint(-1, loras + 1, (sizes.tokens,), dtype=rng.choice([torch.int32, torch.int64]))
    return {**given, "token_lora_mapping": mapping}, {**options, "max_loras": loras}


def draw_permute(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given = {"hidden_states": _rows(sizes.tokens, sizes.hidden, dtype=sizes.dtype)}
    if rng.random() < 0.5:
        shape = rng.choice([(sizes.tokens,), (sizes.tokens, 3)])
        given["scales"] = _rows(*shape, dtype=rng.choice([torch.float32, torch.uint8, torch.bfloat16]))
    return given, {"layout": _layout(sizes, rng)}


def draw_permute_to_fp8(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    group = rng.choice([None, 128])
    hidden = max(1, sizes.hidden) if group is None else -(-max(1, sizes.hidden) // 128) * 128
    given = {"hidden_states": _rows(sizes.tokens, hidden, dtype=sizes.dtype)}
    return given, {"layout": _layout(sizes, rng), "group_size": group}


def draw_shuffle(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    dtype = rng.choice([torch.int32, torch.int64])
    rows = rng.choice([sizes.tokens, 1, sizes.tokens + 3])
    sources = torch.randint(-1, rows + 2, (sizes.tokens,)).to(dtype)
    return {"input": _rows(rows, sizes.hidden, dtype=sizes.dtype), "dst2src_map": sources}, {}


def draw_combine(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    layout = _layout(sizes, rng)
    rows = _rows(layout.capacity, sizes.hidden, dtype=sizes.dtype)
    given = {"rows": rows}
    if rng.random() < 0.7:
        given["topk_weights"] = torch.rand(sizes.tokens, sizes.top_k)
    return given, {"layout": layout}


def draw_moe_sum(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given = {"rows": _rows(sizes.tokens, sizes.top_k, sizes.hidden, dtype=sizes.dtype)}
    if rng.random() < 0.7:
        given["topk_ids"] = _ids(sizes, rng, _id_dtype(rng))
        if rng.random() < 0.5:
            given["expert_map"] = _map(sizes.experts, rng)
    return given, {}


def draw_route(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given = {"router_logits": (torch.randn(sizes.tokens, sizes.experts) * rng.choice([1, 4, 30])).to(sizes.dtype)}
    options: dict[str, Any] = {
        "top_k": sizes.top_k,
        "scoring": rng.choice(["softmax", "sigmoid", "sqrtsoftplus"]),
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


def draw_route_and_align(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given, options = draw_route(sizes, rng)
    if rng.random() < 0.4:
        given["expert_map"] = _map(sizes.experts, rng)
    return given, {**options, "block_size": sizes.block}


def draw_gemm(sizes: Sizes, rows: Tensor, rng: Random) -> Tensors:
    weight = torch.randn(sizes.experts, sizes.columns, sizes.hidden) / max(1, sizes.hidden) ** 0.5
    given = {"rows": rows, "weight": weight.to(sizes.dtype)}
    if rng.random() < 0.5:
        given["bias"] = _rows(sizes.experts, sizes.columns, dtype=sizes.dtype)
    return given


def draw_gemm_by_layout(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    rows = sizes.tokens * rng.choice([1, sizes.top_k])
    given = draw_gemm(sizes, _rows(rows, sizes.hidden, dtype=sizes.dtype), rng)
    if rng.random() < 0.5:
        given["topk_weights"] = torch.rand(sizes.tokens, sizes.top_k)
    return given, {"layout": _layout(sizes, rng)}


def draw_gemm_by_offsets(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    offsets = torch.randint(0, sizes.tokens + 1, (sizes.experts + 1,)).sort().values
    given = draw_gemm(sizes, _rows(sizes.tokens, sizes.hidden, dtype=sizes.dtype), rng)
    return {**given, "expert_offsets": offsets}, {}


def draw_gemm_by_counts(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    most = -(-sizes.tokens // sizes.experts)
    given = draw_gemm(sizes, _rows(sizes.experts, most, sizes.hidden, dtype=sizes.dtype), rng)
    return {**given, "expert_num_tokens": torch.randint(-1, most + 2, (sizes.experts,), dtype=torch.int32)}, {}


def draw_activate(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    gated = rng.random() < 0.7
    rows = _rows(sizes.tokens, (1 + gated) * sizes.columns, dtype=sizes.dtype) * 4
    return {"rows": rows}, {"activation": _activation(rng), "gated": gated}


def _activation(rng: Random) -> Activation:
    drawn = (Activation(), Activation("gelu"), Activation("gelu_tanh"), Activation("relu2"), GPT_OSS_ACTIVATION)
    return rng.choice([*drawn, Activation("silu", limit=0.5), Activation("relu2", limit=1.5)])


def draw_experts(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
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
        "save": rng.choice(["product", "inputs"]),
    }  # fmt: skip


SCALES = {
    "w13_scale": "w13", "w2_scale": "w2", "w13_zero_points": "w13_zero_points", "w2_zero_points": "w2_zero_points",
    "w13_global_scale": "w13_global", "w2_global_scale": "w2_global", "w13_input_scale": "w13_input",
    "w2_input_scale": "w2_input",
}  # fmt: skip
"""The fields of `ExpertScales` by the names that the registered operator has for them."""


def draw_quantised_experts(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    """Experts of any scheme; odd sizes have no codes of four bits."""
    scheme = rng.choice([one for one in SCHEMES if not (sizes.hidden % one.per_byte or sizes.columns % one.per_byte)])
    given, options = draw_experts(sizes, rng)
    start = rng.choice([0, rng.randrange(scheme.period)]) // scheme.per_byte * scheme.per_byte
    weights = draw_quantised(
        sizes.experts, sizes.hidden, sizes.columns, scheme, sizes.dtype, gated=options["gated"], block_start=start
    )
    assert weights.scales is not None
    given.update(w13=weights.w13, w2=weights.w2)
    for name, field in SCALES.items():
        tensor = getattr(weights.scales, field)
        if tensor is not None:
            given[name] = tensor
    return given, {**options, "scheme": scheme, "block_start": start}


def draw_experts_at_a_scheme(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    """Masters of the dtype of the rows, and a scheme."""
    given, options = draw_experts(sizes, rng)
    scheme = rng.choice([FP8_BLOCK, INT8_CHANNEL, FP8_WEIGHTS])
    return given, {"activation": options["activation"], "gated": options["gated"], "scheme": scheme}


def draw_layer(sizes: Sizes, rng: Random) -> tuple[Tensors, dict[str, Any]]:
    given, options = draw_experts(sizes, rng)
    kept = {name: t for name, t in given.items() if name not in ("topk_weights", "topk_ids", "expert_map")}
    kept["router_weight"] = torch.randn(sizes.experts, sizes.hidden).to(sizes.dtype)
    if rng.random() < 0.4:
        kept["router_bias"] = torch.randn(sizes.experts).to(sizes.dtype)
    if rng.random() < 0.3:
        kept["is_padding"] = torch.rand(sizes.tokens) < 0.2
    del options["apply_router_weight_on_input"]
    return kept, {**options, "top_k": sizes.top_k, "renormalize": rng.random() < 0.5}
