"""Rows of CUDA tensors: one launch of send.cu, sum.cu or quantize.cu, straight from Python."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from moeyard.cuda.rows.plan import RowPlan, row_plan, whole_row_plan
from moeyard.cuda.runtime.cards import WARP
from moeyard.cuda.runtime.launch import SETTINGS, Launch, Recipe, Shape, launch_of
from moeyard.cuda.runtime.parameters import KINDS, division, id_type
from moeyard.cuda.runtime.planning import Noted
from moeyard.cuda.runtime.ready import Ready

_WIDEST = 16


def permute_launch(
    hidden_states: Tensor,
    scales: Tensor | None,
    *,
    sorted_token_ids: Tensor,
    route_rows: Tensor,
    top_k: int,
    rows: Tensor,
    row_scales: Tensor | None,
    chosen: RowPlan | None = None,
    programmatic: bool | None = None,
) -> None:
    """Writes each token's row and scales to the slots of its routes; both are read once. Any dtype."""
    device, route_rows = hidden_states.get_device(), route_rows.contiguous()
    hidden_states, row_bytes, stride = _as_rows(hidden_states)
    source, target = hidden_states.data_ptr(), rows.data_ptr()
    from_scales = to_scales = scale_bytes = scale_stride = scale_word = 0
    if scales is not None and row_scales is not None:
        scales, scale_bytes, scale_stride = _as_rows(scales)
        from_scales, to_scales = scales.data_ptr(), row_scales.data_ptr()
        scale_word = _word(from_scales | to_scales | scale_bytes | scale_stride) if scale_bytes else 0
    num_tokens = route_rows.shape[0] // top_k
    if not num_tokens or not (row_bytes or scale_bytes):
        return
    launch, shape = permute_ready(
        num_tokens, top_k, row_bytes, stride, source | target, device,
        SETTINGS["programmatic"] if programmatic is None else programmatic, scale_bytes, scale_stride, scale_word,
        chosen,
    )  # fmt: skip
    launch(shape, source, route_rows.data_ptr(), target, from_scales, to_scales)


def permute_ready(
    num_tokens: int,
    top_k: int,
    row_bytes: int,
    stride: int,
    address_bits: int,
    device: int,
    programmatic: bool,
    scale_bytes: int = 0,
    scale_stride: int = 0,
    scale_word: int = 0,
    chosen: RowPlan | None = None,
) -> tuple[Launch | Noted, Shape]:
    """The launch of a permutation of rows whose addresses, or-ed, are `address_bits`; and its shape."""
    word = _word(address_bits | row_bytes | stride)
    key = (
        "permute", num_tokens, top_k, row_bytes, stride, word, scale_bytes, scale_stride, scale_word,
        device, chosen, programmatic,
    )  # fmt: skip
    ready: tuple[Launch | Noted, Shape] | None = _READY.get(key)
    if ready is None:
        plan = chosen or row_plan(num_tokens, row_bytes // word, 1 if top_k > 4 else 2)
        sizes = (top_k, row_bytes // word, stride, scale_bytes // (scale_word or 1), scale_stride)
        ready = _prepare(key, "send.cu", device, plan, (("WORD", word), ("SCALE_WORD", scale_word)), 5, num_tokens,
                          row_bytes // word, sizes)  # fmt: skip
    return ready


def shuffle_rows_launch(input: Tensor, dst2src_map: Tensor, *, out: Tensor) -> None:
    """Gathers rows by an int32 or int64 map; sources out of range give zeros. Any dtype."""
    device, num_rows = input.get_device(), input.shape[0]
    input, row_bytes, stride = _as_rows(input)
    dst2src_map = dst2src_map.contiguous()
    source, target, num_results = input.data_ptr(), out.data_ptr(), out.shape[0]
    if not num_results or not row_bytes:
        return
    word, of_map = _word(source | target | row_bytes | stride), dst2src_map.dtype
    key = ("shuffle", num_results, num_rows, row_bytes, stride, word, of_map, device, SETTINGS["programmatic"])
    ready = _READY.get(key)
    if ready is None:
        words = row_bytes // word
        defines = (("WORD", word), ("SCALE_WORD", 0), ("MAP_TYPE", id_type(of_map)))
        plan = row_plan(num_results, words, 1)
        ready = _prepare(
            key, "send.cu", device, plan, defines, 3, num_results, words, (num_rows, words, stride)
        )  # fmt: skip
    launch, shape = ready
    launch(shape, source, dst2src_map.data_ptr(), target)


def combine_launch(
    rows: Tensor,
    topk_weights: Tensor | None,
    *,
    route_rows: Tensor,
    top_k: int,
    out: Tensor,
    chosen: RowPlan | None = None,
    programmatic: bool | None = None,
) -> None:
    """Sums rows in k order in float32, products and sums each rounded."""
    rows, _, stride = _as_rows(rows)
    route_rows, weights = route_rows.contiguous(), None
    if topk_weights is not None:
        topk_weights = topk_weights.contiguous()
        weights = topk_weights.data_ptr()
    _sum(rows, route_rows.data_ptr(), "MAPPED", "int", weights, 0, 0, top_k, (0, stride), out, chosen, programmatic)


def moe_sum_launch(
    rows: Tensor,
    topk_ids: Tensor | None,
    expert_map: Tensor | None,
    *,
    out: Tensor,
    chosen: RowPlan | None = None,
) -> None:
    """Sums [T, K, H] over K in k order in float32, not reading routes whose id is dropped."""
    if rows.shape[2] > 1 and rows.stride(2) != 1:
        rows = rows.contiguous()
    size, top_k = rows.element_size(), rows.shape[1]
    strides = (rows.stride(0) * size, rows.stride(1) * size)
    if topk_ids is None:
        _sum(rows, 0, "ALL_ROUTES", "int", None, 0, 0, top_k, strides, out, chosen)
        return
    topk_ids = topk_ids.contiguous()
    how, kind = "BY_ID", id_type(topk_ids.dtype)
    mapping, num_experts = 0, 2**31 - 1
    if expert_map is not None:
        expert_map = expert_map.contiguous()
        how, mapping, num_experts = "BY_MAP", expert_map.data_ptr(), expert_map.shape[0]
    _sum(rows, topk_ids.data_ptr(), how, kind, None, mapping, num_experts, top_k, strides, out, chosen)


def _sum(
    rows: Tensor,
    routes: int,
    how: str,
    of_routes: str,
    weights: int | None,
    mapping: int,
    num_experts: int,
    top_k: int,
    strides: tuple[int, int],
    out: Tensor,
    chosen: RowPlan | None,
    programmatic: bool | None = None,
) -> None:
    num_tokens, hidden_size = out.shape
    row_bytes = hidden_size * out.element_size()
    if not num_tokens or not row_bytes:
        return
    device, source, target = rows.get_device(), rows.data_ptr(), out.data_ptr()
    launch, shape = sum_ready(
        how, of_routes, weights is None, num_experts, top_k, strides, num_tokens, row_bytes, source | target, out.dtype,
        device, SETTINGS["programmatic"] if programmatic is None else programmatic, chosen,
    )  # fmt: skip
    launch(shape, source, routes, weights or 0, mapping, target)


def sum_ready(
    how: str,
    of_routes: str,
    unweighted: bool,
    num_experts: int,
    top_k: int,
    strides: tuple[int, int],
    num_tokens: int,
    row_bytes: int,
    address_bits: int,
    dtype: torch.dtype,
    device: int,
    programmatic: bool,
    chosen: RowPlan | None = None,
) -> tuple[Launch | Noted, Shape]:
    """The launch of a sum over rows whose addresses, or-ed, are `address_bits`; and its shape."""
    word = _word(address_bits | row_bytes | strides[0] | strides[1])
    key = (
        "sum", how, of_routes, unweighted, num_experts, top_k, strides, num_tokens, row_bytes, word, dtype, device,
        chosen, programmatic,
    )  # fmt: skip
    ready: tuple[Launch | Noted, Shape] | None = _READY.get(key)
    if ready is None:
        words = row_bytes // word
        defines = (
            ("ROW_KIND", KINDS[dtype]),
            ("WORD", word),
            ("STATIC_TOP_K", top_k if top_k <= _MOST_STATIC else 0),
            ("WEIGHTS", "false" if unweighted else "true"),
            ("ROUTES", how),
            ("ID", of_routes),
        )
        plan = chosen or row_plan(num_tokens, words, min(top_k, 8))
        sizes = (top_k, words, *strides, num_experts)
        ready = _prepare(key, "sum.cu", device, plan, defines, 5, num_tokens, words, sizes)
    return ready


def permute_to_fp8_launch(
    hidden_states: Tensor,
    *,
    sorted_token_ids: Tensor,
    route_rows: Tensor,
    top_k: int,
    group_size: int | None,
    rows: Tensor,
    row_scales: Tensor,
    chosen: RowPlan | None = None,
) -> None:
    """Quantises each token's row once and writes it, with its scales, to the slots of its routes."""
    quantize_launch(
        hidden_states, route_rows.contiguous(), top_k=top_k, grouped=group_size is not None, rows=rows,
        row_scales=row_scales, chosen=chosen,
    )  # fmt: skip


def quantize_launch(
    source: Tensor,
    places: Tensor | None,
    *,
    top_k: int = 1,
    grouped: bool,
    rows: Tensor,
    row_scales: Tensor,
    count: Tensor | None = None,
    programmatic: bool | None = None,
    chosen: RowPlan | None = None,
) -> None:
    """Quantises each row of `source` once to the dtype of `rows`, float8_e4m3fn or int8, with a scale per row or group.

    Row r goes to the slots `places[r * top_k]` to `places[r * top_k + top_k - 1]`, or where there are no places to row
    r; then `count` [1] int32 says how many rows there are, all unless given. A group is 128 columns, the last one of a
    row what is left.
    """
    device = source.get_device()
    source, row_bytes, stride = _as_rows(source)
    num_rows, size = source.shape[0] if places is None else places.shape[0] // top_k, source.element_size()
    if not num_rows or not row_bytes:
        return
    where = count if places is None else places
    address, target = source.data_ptr(), rows.data_ptr()
    word = _word(address | target * size | row_bytes | stride)
    if grouped and WARP * word < 128 * size:  # a group would not fit a warp: only where addresses are odd
        aligned = torch.empty_like(rows)
        dense = source.clone(memory_format=torch.contiguous_format)
        quantize_launch(
            dense, places, top_k=top_k, grouped=True, rows=aligned, row_scales=row_scales, count=count,
            programmatic=programmatic,
        )  # fmt: skip
        rows.copy_(aligned)
        return
    key = (
        "quantize", num_rows, top_k, row_bytes, stride, word, size, source.dtype, rows.dtype, grouped, places is None,
        count is None, device, chosen, SETTINGS["programmatic"] if programmatic is None else programmatic,
    )  # fmt: skip
    ready = _READY.get(key)
    if ready is None:
        words = row_bytes // word
        plan = chosen or (row_plan(num_rows, words, 2) if grouped else whole_row_plan(num_rows, words))
        defines = (
            ("ROW_KIND", KINDS[source.dtype]),
            ("WORD", word),
            ("CODE_IS_INT8", "true" if rows.dtype == torch.int8 else "false"),
            ("IN_PLACE", "true" if places is None else "false"),
            ("COUNTED", "true" if count is not None else "false"),
            ("GROUPS", "true" if grouped else "false"),
            ("WHOLE_ROW", "true" if words <= plan.team * plan.loads else "false"),
            ("THREADS_A_ROW", plan.team),
        )
        blocks = None if grouped else -(-num_rows // (plan.threads // plan.team))
        sizes = (top_k, words, stride)
        ready = _prepare(key, "quantize.cu", device, plan, defines, 4, num_rows, words, sizes, blocks)
    launch, shape = ready
    launch(shape, address, 0 if where is None else where.data_ptr(), target, row_scales.data_ptr())


_READY = Ready()
"""Launches by all that they depend on."""
_MOST_STATIC = 10
_NAMES = {"permute": "permute_kernel", "shuffle": "shuffle_kernel", "sum": "sum_kernel", "quantize": "quantize_kernel"}


def _prepare(
    key: tuple[Any, ...],
    source: str,
    device: int,
    plan: RowPlan,
    defines: tuple[tuple[str, Any], ...],
    pointers: int,
    rows: int,
    words: int,
    sizes: tuple[int, ...],
    blocks: int | None = None,
) -> tuple[Launch | Noted, Shape]:
    """A launch over `rows` rows of `words` words, one warp per piece; or of so many `blocks`."""
    pieces = max(1, -(-words // (WARP * plan.loads)))
    given = {"BLOCK": plan.threads, "LOADS": plan.loads, "STORE": plan.store, "MAP_TYPE": "int"} | dict(defines)
    defined = tuple((name, str(value)) for name, value in given.items())
    sizes = (rows, pieces, *division(pieces), *sizes)
    recipe = Recipe(source, _NAMES[key[0]], defined, plan.threads, pointers + len(sizes), programmatic=key[-1])
    grid = blocks or -(-rows * pieces // (plan.threads // WARP))
    shape = Shape(grid, 4 * WARP if source == "quantize.cu" else 0, sizes)
    kept: tuple[Launch | Noted, Shape] = _READY.add(key, (launch_of(recipe, device), shape))
    return kept


def _as_rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """A tensor whose rows are dense, with the bytes of a row and the bytes from row to row."""
    row_bytes = prod(tensor.shape[1:]) * tensor.element_size()
    if tensor.dim() > 2 or (tensor.dim() == 2 and tensor.shape[1] > 1 and tensor.stride(1) != 1):
        tensor = tensor.contiguous()
    return tensor, row_bytes, tensor.stride(0) * tensor.element_size()


def _word(bits: int) -> int:
    """The widest word, in bytes, that addresses and sizes are multiples of: their bits come or-ed together."""
    return min(bits & -bits, _WIDEST) if bits else _WIDEST
