"""Argument checks that name the argument, what was expected and what was got. None of them costs a host sync."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moeyard.quant import CODES, SCALES, TILE_COLUMNS, ExpertScales, QuantScheme, scale_shapes
from moeyard.values import INT32_MAX, MAX_EXPERTS, Activation, ExpertWeights, Layout, Router, Routing

ID_DTYPES = (torch.int32, torch.int64, torch.uint32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of rows that are computed with."""
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
LAYOUT_DTYPES = (torch.int32, torch.int32, torch.int32, torch.int64, torch.int32, torch.int32)
"""Of a layout's tensors, in the order of its fields."""
_ID_SET = frozenset(ID_DTYPES)


def check_int(name: str, value: object, *, low: int, high: int = INT32_MAX) -> None:
    """`value` is an integer (never a bool) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} ({value!r})")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected an integer in [{low}, {high}], got {value}")


def check_number(name: str, value: object) -> None:
    """`value` is a finite number of Python (a tensor would have to be read from its device)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} ({value!r})")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_flag(name: str, value: object) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__} ({value!r})")


def check_tensor(
    name: str,
    value: object,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    ndim: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> None:
    """`value` is a tensor of one of `dtypes` and of one of the ranks `ndim`, on `device`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    if ndim is not None and value.dim() not in ndim:
        wanted = " or ".join(f"{n}-D" for n in ndim)
        raise ValueError(f"{name}: expected a {wanted} tensor, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], why: str) -> None:
    """`value` has exactly `shape`; `why` names what the shape follows from."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape} ({why}), got {tuple(value.shape)}")


def check_out(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """`value` can be written as an output: dtype, device and shape match and it is contiguous."""
    check_tensor(name, value, dtypes=(dtype,), device=device)
    assert isinstance(value, Tensor)
    check_shape(name, value, shape, "the sizes of the inputs")
    if not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {value.stride()}")


def check_routes(topk_ids: Tensor, top_k: int | None, expert_map: Tensor | None, num_experts: int) -> int:
    """The top_k of valid ids and map."""
    if not isinstance(topk_ids, Tensor) or topk_ids.dtype not in _ID_SET or topk_ids.dim() not in (1, 2):
        check_tensor("topk_ids", topk_ids, dtypes=ID_DTYPES, ndim=(1, 2))
    shape = topk_ids.shape
    if len(shape) == 2:
        if top_k is not None and top_k != shape[1]:
            raise ValueError(f"top_k: expected {shape[1]} (topk_ids is {tuple(shape)}), got {top_k}")
        top_k = shape[1]
        if type(top_k) is not int or top_k < 1:
            check_int("topk_ids.shape[1]", top_k, low=1)
    elif top_k is None:
        top_k = 1
    else:
        check_int("top_k", top_k, low=1)
        if topk_ids.shape[0] % top_k:
            raise ValueError(f"topk_ids: expected a multiple of top_k={top_k} ids, got {topk_ids.shape[0]}")
    if expert_map is not None:
        check_tensor("expert_map", expert_map, dtypes=(torch.int32,), ndim=(1,), device=topk_ids.device)
        check_shape("expert_map", expert_map, (num_experts,), "num_experts")
    return top_k


def check_sizes(num_experts: int, num_local_experts: int, block_size: int) -> None:
    """The host integers of a layout are in range."""
    if type(num_experts) is type(num_local_experts) is type(block_size) is int:
        in_range = 1 <= num_experts <= MAX_EXPERTS and 1 <= num_local_experts <= MAX_EXPERTS
        if in_range and 1 <= block_size <= INT32_MAX:
            return
    check_int("num_experts", num_experts, low=1, high=MAX_EXPERTS)
    check_int("num_local_experts", num_local_experts, low=1, high=MAX_EXPERTS)
    check_int("block_size", block_size, low=1)


def check_layout(layout: object) -> None:
    """`layout` is a Layout whose tensors fit its sizes and each other: dtypes, lengths, one device, dense.

    Layouts that operators made are known to fit. What the tensors hold is not read.
    """
    if not isinstance(layout, Layout):
        raise TypeError(f"layout: expected a Layout, got {type(layout).__name__}")
    if layout._notes is not None:
        return
    check_sizes(layout.num_experts, layout.num_local_experts, layout.block_size)
    check_int("layout.top_k", layout.top_k, low=1)
    for name, dtype in zip(Layout.TENSORS, LAYOUT_DTYPES, strict=True):
        check_tensor(f"layout.{name}", getattr(layout, name), dtypes=(dtype,), ndim=(1,))
    device, capacity, routes = layout.route_rows.device, layout.capacity, layout.num_routes
    if routes % layout.top_k:
        raise ValueError(f"layout.route_rows: expected a multiple of top_k={layout.top_k} routes, got {routes}")
    if capacity % layout.block_size and layout.block_size > 1:
        raise ValueError(
            f"layout.sorted_token_ids: expected a multiple of block_size={layout.block_size} slots, got {capacity}"
        )
    experts = layout.num_local_experts
    lengths = (capacity, capacity // layout.block_size, 1, experts + 1, experts, routes)
    for name, length, dtype in zip(Layout.TENSORS, lengths, LAYOUT_DTYPES, strict=True):
        check_out(f"layout.{name}", getattr(layout, name), (length,), dtype, device)
    if not torch.compiler.is_compiling():
        layout.trust()


def dtypes_of_weights(rows: Tensor) -> tuple[torch.dtype, ...]:
    """Dtypes of weights beside rows: that of the rows; where autocast is to it, also float32 (masters of weights)."""
    kind = rows.device.type
    narrow = rows.dtype.itemsize == 2 and kind != "meta" and torch.is_autocast_enabled(kind)
    masters = narrow and torch.get_autocast_dtype(kind) == rows.dtype
    return (rows.dtype, torch.float32) if masters else (rows.dtype,)


def check_experts(weights: object, rows: Tensor) -> None:
    """`weights` belong to experts that take `rows` [num_tokens, hidden_size]."""
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"weights: expected ExpertWeights, got {type(weights).__name__}")
    w13, w2, scheme = weights.w13, weights.w2, weights.scheme
    if scheme is not None and not isinstance(scheme, QuantScheme):
        raise TypeError(f"weights.scheme: expected a QuantScheme or None, got {type(scheme).__name__} ({scheme!r})")
    code, per_byte = (None, 1) if scheme is None else CODES[scheme.weights]
    plain = dtypes_of_weights(rows)
    dtypes = plain if code is None else (code,)
    check_tensor("weights.w13", w13, dtypes=dtypes, ndim=(3,), device=rows.device)
    check_tensor("weights.w2", w2, dtypes=dtypes, ndim=(3,), device=rows.device)
    experts, wide, stored = w13.shape
    hidden_size = per_byte * stored
    if experts < 1 or (weights.gated and wide % 2):
        raise ValueError(
            f"weights.w13: expected shape (experts, 2 * intermediate_size, hidden_size), got {tuple(w13.shape)}"
        )
    size = wide // 2 if weights.gated else wide
    if size % per_byte:
        raise ValueError(f"weights.w13: expected an even intermediate_size for {scheme}, got {size}")
    check_shape("weights.w2", w2, (experts, hidden_size, size // per_byte), "as weights.w13 has")
    if rows.shape[1] != hidden_size:
        raise ValueError(f"hidden_states: expected {hidden_size} columns (hidden_size of weights), got {rows.shape[1]}")
    for name, bias, length in (("w13_bias", weights.w13_bias, wide), ("w2_bias", weights.w2_bias, hidden_size)):
        if bias is not None:
            check_tensor(f"weights.{name}", bias, dtypes=plain, ndim=(2,), device=rows.device)
            check_shape(f"weights.{name}", bias, (experts, length), "one row per expert")
    if scheme is None:
        if weights.scales is not None:
            raise ValueError("weights.scheme: expected the QuantScheme of weights.scales, got None")
        return
    check_scales(weights.scales, scheme, rows, (experts, hidden_size, size), weights.gated)


def check_routed(
    routing: object, hidden_states: Tensor, weights: ExpertWeights, num_experts: int | None, expert_map: Tensor | None
) -> int:
    """`routing` sends the rows of `hidden_states` to experts, by a map or without; the global number of experts."""
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}")
    ids, factors, device = routing.topk_ids, routing.topk_weights, hidden_states.device
    check_tensor("routing.topk_ids", ids, dtypes=ID_DTYPES, ndim=(2,), device=device)
    check_tensor("routing.topk_weights", factors, dtypes=(torch.float32,), ndim=(2,), device=device)
    check_int("routing.topk_ids.shape[1]", ids.shape[1], low=1)
    check_shape("routing.topk_ids", ids, (hidden_states.shape[0], ids.shape[1]), "the tokens of hidden_states")
    check_shape("routing.topk_weights", factors, tuple(ids.shape), "that of topk_ids")
    if expert_map is not None:
        check_tensor("expert_map", expert_map, dtypes=(torch.int32,), ndim=(1,), device=device)
    if num_experts is None:
        num_experts = weights.num_local_experts if expert_map is None else expert_map.shape[0]
    check_int("num_experts", num_experts, low=1, high=MAX_EXPERTS)
    if expert_map is not None:
        check_shape("expert_map", expert_map, (num_experts,), "num_experts")
    return num_experts


QUANTISED_ROWS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of rows that meet quantised weights."""


def check_scales(scales: object, scheme: QuantScheme, rows: Tensor, sizes: tuple[int, int, int], gated: bool) -> None:
    """`scales` are those of a scheme for experts of (num_local_experts, hidden_size, intermediate_size)."""
    check_tensor("hidden_states", rows, dtypes=QUANTISED_ROWS)
    if not isinstance(scales, ExpertScales):
        raise TypeError(f"weights.scales: expected ExpertScales beside a scheme, got {type(scales).__name__}")
    experts, hidden_size, size = sizes
    start, device = scales.block_start, rows.device
    check_int("weights.scales.block_start", start, low=0, high=scheme.period - 1)
    if scheme.tiled:
        check_tiles(scheme, hidden_size, size, start)
    if start % scheme.per_byte:
        raise ValueError(f"weights.scales.block_start: expected an even number for {scheme}, got {start}")
    first, second = scale_shapes(scheme, hidden_size, size, gated, start)
    dtypes = SCALES[scheme.scales]
    check_tensor("weights.scales.w13", scales.w13, dtypes=dtypes, ndim=(3,), device=device)
    check_shape("weights.scales.w13", scales.w13, (experts, *first), f"the blocks of {scheme}")
    check_tensor("weights.scales.w2", scales.w2, dtypes=(scales.w13.dtype,), ndim=(3,), device=device)
    check_shape("weights.scales.w2", scales.w2, (experts, *second), f"the blocks of {scheme}")
    halves = 2 if gated else 1
    wanted: tuple[tuple[str, Tensor | None, bool, torch.dtype, tuple[int, ...]], ...] = (
        ("w13_zero_points", scales.w13_zero_points, scheme.zero_points, torch.uint8, (experts, *first)),
        ("w2_zero_points", scales.w2_zero_points, scheme.zero_points, torch.uint8, (experts, *second)),
        ("w13_global", scales.w13_global, scheme.global_scales, torch.float32, (experts, halves)),
        ("w2_global", scales.w2_global, scheme.global_scales, torch.float32, (experts, 1)),
        ("w13_input", scales.w13_input, scheme.static, torch.float32, (experts,)),
        ("w2_input", scales.w2_input, scheme.static and not scheme.dynamic_second, torch.float32, (experts,)),
    )
    for field, tensor, needed, dtype, shape in wanted:
        name = f"weights.scales.{field}"
        if needed:
            check_tensor(name, tensor, dtypes=(dtype,), ndim=(len(shape),), device=device)
            assert tensor is not None
            check_shape(name, tensor, shape, f"scheme {scheme}")
        elif tensor is not None:
            raise ValueError(f"{name}: expected None for {scheme}, got a tensor")


def check_tiles(scheme: QuantScheme, hidden_size: int, size: int, start: int) -> None:
    """Tiles of 16 x 64 codes hold matrices of these sizes without padding."""
    for name, value in (("hidden_size", hidden_size), ("intermediate_size", size)):
        if value % TILE_COLUMNS:
            raise ValueError(f"weights: expected {name} a multiple of {TILE_COLUMNS} for {scheme}, got {value}")
    if start:
        raise ValueError(f"weights.scales.block_start: expected 0 for {scheme}, got {start}")


def check_router(
    router_logits: Tensor, router: Router, selection_bias: Tensor | None, is_padding: Tensor | None
) -> None:
    """The options of a router are in range and fit logits [T, E]."""
    num_tokens, num_experts = router_logits.shape
    top_k, scoring, renormalize, num_groups, top_k_groups, factor = router
    if type(factor) is not float or not -1e38 < factor < 1e38:
        check_number("routed_scaling_factor", factor)
    if type(renormalize) is not bool:
        check_flag("renormalize", renormalize)
    check_int("router_logits.shape[1]", num_experts, low=1, high=MAX_EXPERTS)
    if scoring not in SCORINGS:
        raise ValueError(f"scoring: expected one of {SCORINGS}, got {scoring!r}")
    if not (type(num_groups) is type(top_k_groups) is int and num_groups == top_k_groups == 1):
        check_int("num_groups", num_groups, low=1, high=num_experts)
        if num_experts % num_groups:
            raise ValueError(f"num_groups: expected a divisor of num_experts={num_experts}, got {num_groups}")
        check_int("top_k_groups", top_k_groups, low=1, high=num_groups)
    check_int("top_k", top_k, low=1, high=top_k_groups * (num_experts // num_groups))
    if selection_bias is not None:
        check_tensor("selection_bias", selection_bias, dtypes=(torch.float32,), ndim=(1,), device=router_logits.device)
        check_shape("selection_bias", selection_bias, (num_experts,), "one per expert")
    if is_padding is not None:
        check_tensor("is_padding", is_padding, dtypes=(torch.bool,), ndim=(1,), device=router_logits.device)
        check_shape("is_padding", is_padding, (num_tokens,), "one per token")


def check_routing_out(out: object, shape: tuple[int, int], device: torch.device) -> None:
    """`out` is a routing of this shape on `device`."""
    if not isinstance(out, Routing):
        raise TypeError(f"out: expected a Routing, got {type(out).__name__}")
    check_out("out.topk_weights", out.topk_weights, shape, torch.float32, device)
    check_out("out.topk_ids", out.topk_ids, shape, torch.int32, device)


def check_activation(activation: Activation | None) -> Activation:
    """The activation, silu for None; TypeError for anything else."""
    if activation is None:
        return Activation()
    if not isinstance(activation, Activation):
        raise TypeError(f"activation: expected an Activation, got {type(activation).__name__}")
    return activation
