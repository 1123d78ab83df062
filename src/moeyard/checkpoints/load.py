"""`load_experts`: a checkpoint on disk -> `ExpertWeights` on a device."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moeyard.checkpoints import packing
from moeyard.checkpoints.files import DTYPES, READ, Entry, Reader
from moeyard.checkpoints.layer import Layer, check_dtype, read_layer
from moeyard.checkpoints.packing import Stored
from moeyard.checkpoints.plan import Share, Unit, cut_of, units_of
from moeyard.checkpoints.progress import progress
from moeyard.checkpoints.small import check_small, has, matrix_scales
from moeyard.dispatch.checks import FLOATS, check_flag, check_int
from moeyard.quant import CODES, SCALES, ExpertScales, QuantScheme, scale_shapes
from moeyard.values import MAX_EXPERTS, ExpertWeights


def load_experts(
    path: str | os.PathLike[str],
    prefix: str,
    *,
    device: str | torch.device,
    tensor_parallel: tuple[int, int] = (0, 1),
    expert_parallel: tuple[int, int] = (0, 1),
    gated: bool = True,
    gate_up_order: str | None = None,
    num_experts: int | None = None,
    dtype: torch.dtype | None = None,
    show_progress: bool | None = None,
) -> ExpertWeights:
    """Loads the experts of one layer from safetensors files, as they are stored: nothing is dequantised.

    Tensors are read one after the other in the order of the files, each part that this rank needs alone. They are
    converted on the device, in its current stream. Host memory beyond the result stays below the largest tensor.

    Args:
        path: a folder with safetensors files, their index if they have one, and config.json; or one such file.
        prefix: what stands before experts' names, such as "model.layers.0.mlp.experts".
        device: where the weights go.
        tensor_parallel: (rank, size): each rank has an equal part of the rows of gate and up and of the columns of w2.
            Rank 0 alone has the bias of w2, so that a sum over ranks adds it once.
        expert_parallel: (rank, size): each rank has consecutive experts; the first ranks have one more if they do not
            divide evenly.
        gated: whether experts have a gate; without one, `up_proj` alone stands before the activation.
        gate_up_order: "gate first", "up first" or "in turn" (gate 0, up 0, gate 1, ...), for gate and up that are
            stored in one matrix. Unless given, "in turn" for gpt-oss and "gate first" for others.
        num_experts: experts of the layer; what config.json says unless given, or else as many as there are.
        dtype: of unquantised weights and of biases; as they are stored unless given.
        show_progress: whether a bar on stderr shows what was read; where stderr is a terminal unless given.

    Formats: compressed-tensors (float-, int-, naive-, pack-, nvfp4-pack-, mxfp4-pack- and mxfp8-quantized), blocks of
    DeepSeek-V3, gpt-oss's MXFP4, ModelOpt's NVFP4 and FP8, GPTQ, AWQ, and unquantised weights; experts one by one or
    stacked, gate and up apart or in one. Where the package compressed-tensors is installed, it checks its
    configurations. Activations of NVFP4, MXFP4 and MXFP8 are not quantised, which a warning says.

    Raises TypeError or ValueError naming the argument, or the file and the tensor: what is missing, extra, doubled, cut
    off, of another shape, or of another dtype than the configuration says; experts of different schemes; floats of
    another bias (fnuz); transforms and sparsity; act-order.
    """
    check_flag("gated", gated)
    experts, rows = _share("expert_parallel", expert_parallel), _share("tensor_parallel", tensor_parallel)
    if num_experts is not None:
        check_int("num_experts", num_experts, low=1, high=MAX_EXPERTS)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype: expected one of {FLOATS} or None, got {dtype!r}")
    if not isinstance(prefix, str) or not prefix or prefix.endswith("."):
        raise ValueError(f"prefix: expected a name without a dot behind it, got {prefix!r}")
    layer = read_layer(Path(path), prefix, gated=gated, gate_up_order=gate_up_order, num_experts=num_experts)
    if layer.storage.note:
        warnings.warn(f"{prefix}: {layer.storage.note}", stacklevel=2)
    share = _share_of(layer, experts, rows)
    return _load(layer, share, torch.device(device), dtype, prefix, show_progress)


def _share(name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{name}: expected (rank, size), got {value!r}")
    rank, size = value
    check_int(f"{name}[1]", size, low=1)
    check_int(f"{name}[0]", rank, low=0, high=size - 1)
    return rank, size


def _share_of(layer: Layer, experts: tuple[int, int], rows: tuple[int, int]) -> Share:
    """What a rank has of a layer."""
    (rank, ranks), (part, parts) = experts, rows
    if ranks > layer.num_experts:
        raise ValueError(f"expert_parallel: expected at most {layer.num_experts} ranks (num_experts), got {ranks}")
    least, more = divmod(layer.num_experts, ranks)
    size, rest = divmod(layer.intermediate_size, parts)
    per_byte = 1 if layer.storage.scheme is None else layer.storage.scheme.per_byte
    if rest or size % per_byte:
        even = " of an even number of rows" if per_byte > 1 else ""
        raise ValueError(
            f"tensor_parallel: expected equal parts{even} of intermediate_size {layer.intermediate_size}, got {parts}"
        )
    return Share(rank * least + min(rank, more), least + (rank < more), part * size, size)


def _load(
    layer: Layer, share: Share, device: torch.device, dtype: torch.dtype | None, prefix: str, shown: bool | None
) -> ExpertWeights:
    units, weights = _planned(layer, share, device, dtype)
    units.sort(key=lambda unit: (unit.span.file, unit.span.start))
    largest = max(unit.span.size for unit in units)
    size = max((unit.span.size for unit in units if unit.target is None), default=0)
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    total = sum(unit.span.size for unit in units)
    with Reader(device, largest) as reader, progress(prefix, total, shown) as advance:
        scales = weights.scales
        if layer.storage.scheme is not None and scales is not None:
            _read_small(reader, layer, share, scales)
        for unit in units:
            raw = buffer[: unit.span.size] if unit.target is None else unit.target
            reader.read(unit.span, raw)
            if unit.apply is not None:
                unit.apply(raw)
            advance(unit.span.size)
    return weights


def _read_small(reader: Reader, layer: Layer, share: Share, scales: ExpertScales) -> None:
    """Scales of matrices and of activations, read on the host; and checks of what has to be trivial."""
    for linear, roles in layer.linears:
        if has(share, linear):
            check_small(reader, layer, linear, roles)
    if scales.w13_global is not None and scales.w2_global is not None:
        first, second = matrix_scales(reader, layer, share, "global")
        scales.w13_global.copy_(first)
        scales.w2_global.copy_(second)
    if scales.w13_input is not None and scales.w2_input is not None:
        first, second = matrix_scales(reader, layer, share, "input")
        scales.w13_input.copy_(first.amax(1))  # gate and up have one input
        scales.w2_input.copy_(second[:, 0])


def _planned(
    layer: Layer, share: Share, device: torch.device, dtype: torch.dtype | None
) -> tuple[list[Unit], ExpertWeights]:
    """What is read, and the weights that it fills."""
    scheme, halves = layer.storage.scheme, 2 if layer.gated else 1
    experts, hidden_size, size = share.num_experts, layer.hidden_size, share.size
    code, per_byte = (dtype or _dtype_of(layer, "weight"), 1) if scheme is None else CODES[scheme.weights]
    shapes = (halves * size, hidden_size // per_byte), (hidden_size, size // per_byte)
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for mine, shape in zip(tensors, shapes, strict=True):
        mine["weight"] = torch.empty(experts, *shape, dtype=code, device=device)
    biased = {linear.part == "down" for linear, roles in layer.linears if "bias" in roles}
    for second in biased if share.start == 0 else biased - {True}:
        kind = dtype or _dtype_of(layer, "bias")
        tensors[second]["bias"] = torch.empty(experts, shapes[second][0], 1, dtype=kind, device=device)
    scales = None if scheme is None else _empty_scales(layer, scheme, share, tensors, device)
    first_bias, second_bias = (mine["bias"].squeeze(-1) if "bias" in mine else None for mine in tensors)
    weights = ExpertWeights(
        tensors[0]["weight"], tensors[1]["weight"], first_bias, second_bias, layer.gated, scheme, scales
    )
    return list(_units(layer, share, tensors, dtype, _most(layer, device))), weights


def _empty_scales(
    layer: Layer, scheme: QuantScheme, share: Share, tensors: tuple[dict[str, Tensor], ...], device: torch.device
) -> ExpertScales:
    """Scales that are not filled yet; those that files have by blocks are put into `tensors`, too."""
    start, halves = share.start % scheme.period, 2 if layer.gated else 1
    kinds = SCALES[scheme.scales]
    kind = _dtype_of(layer, "scale")
    kind = kind if kind in kinds else kinds[0]
    for mine, shape in zip(
        tensors, scale_shapes(scheme, layer.hidden_size, share.size, layer.gated, start), strict=True
    ):
        mine["scale"] = torch.empty(share.num_experts, *shape, dtype=kind, device=device)
        if scheme.zero_points:
            mine["zero"] = torch.empty(share.num_experts, *shape, dtype=torch.uint8, device=device)

    def numbers(there: bool, *shape: int) -> Tensor | None:
        return torch.empty(share.num_experts, *shape, dtype=torch.float32, device=device) if there else None

    return ExpertScales(
        tensors[0]["scale"], tensors[1]["scale"], tensors[0].get("zero"), tensors[1].get("zero"),
        numbers(scheme.global_scales, halves), numbers(scheme.global_scales, 1), numbers(scheme.static),
        numbers(scheme.static), start,
    )  # fmt: skip


def _units(
    layer: Layer, share: Share, tensors: tuple[dict[str, Tensor], ...], dtype: torch.dtype | None, most: int
) -> Iterator[Unit]:
    storage = layer.storage
    block = (0, 0) if storage.scheme is None else storage.scheme.block
    ways: tuple[tuple[str, Stored | None, tuple[int, int]], ...] = (
        ("weight", storage.weight, (1, 1)), ("scale", storage.scale, block), ("zero", storage.zero, block),
        ("bias", packing.PLAIN, (1, 0)),
    )  # fmt: skip
    for linear, roles in layer.linears:
        if not has(share, linear):
            continue
        mine = tensors[linear.part == "down"]
        for role, stored, values in ways:
            if role not in mine or stored is None:
                continue
            if role not in roles:
                raise ValueError(f"{roles['weight'].file}: tensor {linear.name}.{role} is missing, others have one")
            entry = roles[role]
            check_dtype(entry, stored, storage)
            if role in ("weight", "bias", "scale") and dtype is None:
                _check_like(entry, _entry_of(layer, role))
            cut = cut_of(layer, share, linear.part, values, str(entry))
            yield from units_of(layer, share, linear, entry, stored, cut, mine[role], most)


def _most(layer: Layer, device: torch.device) -> int:
    """Bytes that are converted at once: few on the host, where a conversion takes several times as many."""
    entries = [roles["weight"] for _, roles in layer.linears]
    largest = max(entry.size // (layer.num_experts if layer.stacked else 1) for entry in entries)
    return min(READ, largest // 16) if device.type == "cpu" else READ


def _entry_of(layer: Layer, role: str) -> Entry:
    return next(roles[role] for _, roles in layer.linears if role in roles)


def _dtype_of(layer: Layer, role: str) -> torch.dtype:
    """The dtype that the file has for a role."""
    entry = _entry_of(layer, role)
    if entry.dtype not in DTYPES:
        raise ValueError(f"{entry}: expected a known dtype, got {entry.dtype}")
    return DTYPES[entry.dtype]


def _check_like(entry: Entry, first: Entry) -> None:
    if entry.dtype != first.dtype:
        raise ValueError(f"{entry}: expected dtype {first.dtype}, which {first.name} has, got {entry.dtype}")
