"""Checkpoints of small layers in every format, written value by value, with what their weights are.

Nothing here is shared with `moeyard.checkpoints`: words are put together as numbers, and each format says in one place
what its tensors are.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
GROUP = 32
BLOCK = 128
PREFIX = "model.layers.3.mlp.experts"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


class Drawn(NamedTuple):
    """A linear layer."""

    values: Tensor
    """[rows, columns] float64: what the weight is."""
    tensors: Tensors
    """What stands behind the layer's name in a file -> tensor."""


class Form(NamedTuple):
    """A format."""

    config: dict[str, Any] | None
    """quantization_config."""
    draw: Callable[[int, int], Drawn]
    """(rows, columns) -> a layer with random weights."""


class Written(NamedTuple):
    """The experts of a layer, as float64."""

    w13: Tensor
    """[experts, 2 * intermediate_size, hidden_size], gate first."""
    w2: Tensor


def words(codes: Tensor, bits: int, order: tuple[int, ...] = ()) -> Tensor:
    """Codes along the last axis -> int32 words, the first code in the lowest bits; `order`: which code comes when."""
    per = 32 // bits
    codes = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.shape[-1] % per))
    parts = codes.unflatten(-1, (-1, per))
    number = torch.zeros(parts.shape[:-1], dtype=torch.int64)
    for position in range(per):
        number += parts[..., order[position] if order else position] << (bits * position)
    return torch.where(number >= 1 << 31, number - (1 << 32), number).to(torch.int32)


def _spread(scale: Tensor, rows: int, columns: int, block: tuple[int, int]) -> Tensor:
    """The scale of every weight, float64."""
    down, across = (torch.arange(size) // (per or size) for size, per in ((rows, block[0]), (columns, block[1])))
    return scale.double()[down][:, across]


def _grid(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    down, across = (-(-size // (per or size)) for size, per in ((rows, block[0]), (columns, block[1])))
    return down, across


def _scales(rows: int, columns: int, block: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(_grid(rows, columns, block)) + 0.5).to(dtype)


def _powers(rows: int, columns: int) -> Tensor:
    return torch.randint(100, 140, _grid(rows, columns, (1, 32)), dtype=torch.uint8)


def e4m3(rows: int, columns: int) -> Tensor:
    """Random e4m3, none of them NaN."""
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    return torch.where((codes & 127) == 127, 0, codes).to(torch.uint8).view(torch.float8_e4m3fn)


def _naive(block: tuple[int, int], kind: str, names: str = "weight_scale", dtype: torch.dtype = torch.float32) -> Any:
    def draw(rows: int, columns: int) -> Drawn:
        codes = e4m3(rows, columns)
        if kind == "int8":
            codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
        scale = _scales(rows, columns, block, dtype)
        if dtype == torch.float8_e8m0fnu:
            scale = torch.randint(100, 140, scale.shape, dtype=torch.uint8).view(dtype)
        stored = scale.flatten() if block == (0, 0) else scale
        return Drawn(codes.double() * _spread(scale.float(), rows, columns, block), {"weight": codes, names: stored})

    return draw


def _static(draw: Callable[[int, int], Drawn], scalar: bool) -> Any:
    def also(rows: int, columns: int) -> Drawn:
        values, tensors = draw(rows, columns)
        shape = () if scalar else (1,)
        tensors["input_scale"] = torch.rand(shape) + 0.1
        tensors["weight_scale"] = tensors["weight_scale"].view(shape)
        return Drawn(values, tensors)

    return also


def _pack(bits: int, zero_points: bool = False) -> Any:
    def draw(rows: int, columns: int) -> Drawn:
        codes = torch.randint(0, 1 << bits, (rows, columns))
        scale = _scales(rows, columns, (1, GROUP), torch.bfloat16)
        tensors = {
            "weight_packed": words(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        zero = torch.full(scale.shape, 1 << (bits - 1))
        if zero_points:
            zero = torch.randint(0, 16, scale.shape)
            tensors["weight_zero_point"] = words(zero.t(), 4).t().contiguous()
        spread = _spread(zero, rows, columns, (1, GROUP))
        return Drawn((codes - spread) * _spread(scale, rows, columns, (1, GROUP)), tensors)

    return draw


def _pairs(codes: Tensor) -> Tensor:
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)


def _nvfp4(global_name: str, weight_name: str) -> Any:
    def draw(rows: int, columns: int) -> Drawn:
        codes = torch.randint(0, 16, (rows, columns))
        scale = _scales(rows, columns, (1, 16)).to(torch.float8_e4m3fn)
        stored = torch.rand(1) + 0.5
        factor = stored if global_name == "weight_scale_2" else torch.ones(1) / stored
        values = _E2M1[codes] * _spread(scale.float(), rows, columns, (1, 16)) * factor.double()
        return Drawn(values, {weight_name: _pairs(codes), "weight_scale": scale, global_name: stored})

    return draw


def _mxfp4(rows: int, columns: int) -> Drawn:
    codes, powers = torch.randint(0, 16, (rows, columns)), _powers(rows, columns)
    scale = torch.ldexp(torch.ones(powers.shape, dtype=torch.float64), powers.double() - 127)
    values = _E2M1[codes] * _spread(scale, rows, columns, (1, 32))
    return Drawn(values, {"weight_packed": _pairs(codes), "weight_scale": powers})


def _mxfp8(rows: int, columns: int) -> Drawn:
    codes, powers = e4m3(rows, columns), _powers(rows, columns)
    scale = torch.ldexp(torch.ones(powers.shape, dtype=torch.float64), powers.double() - 127)
    return Drawn(codes.double() * _spread(scale, rows, columns, (1, 32)), {"weight": codes, "weight_scale": powers})


def _gptq(bits: int, version: int, symmetric: bool) -> Any:
    def draw(rows: int, columns: int) -> Drawn:
        codes = torch.randint(0, 1 << bits, (rows, columns))
        scale = _scales(rows, columns, (1, GROUP), torch.float16)
        zero = torch.randint(0, 1 << bits, scale.shape) if not symmetric else torch.full(scale.shape, 1 << (bits - 1))
        stored = (zero - int(version == 1)) % (1 << bits)
        tensors = {
            "qweight": words(codes, bits).t().contiguous(),
            "qzeros": words(stored.t().contiguous(), bits), "scales": scale.t().contiguous(),
            "g_idx": (torch.arange(columns) // GROUP).to(torch.int32),
        }  # fmt: skip
        spread = _spread(zero, rows, columns, (1, GROUP))
        return Drawn((codes - spread) * _spread(scale, rows, columns, (1, GROUP)), tensors)

    return draw


def _awq(zero_points: bool) -> Any:
    def draw(rows: int, columns: int) -> Drawn:
        codes = torch.randint(0, 16, (rows, columns))
        scale = _scales(rows, columns, (1, GROUP), torch.float16)
        zero = torch.randint(0, 16, scale.shape) if zero_points else torch.full(scale.shape, 8)
        tensors = {
            "qweight": words(codes.t().contiguous(), 4, AWQ_ORDER), "scales": scale.t().contiguous(),
            "qzeros": words(zero.t().contiguous(), 4, AWQ_ORDER),
        }  # fmt: skip
        spread = _spread(zero, rows, columns, (1, GROUP))
        return Drawn((codes - spread) * _spread(scale, rows, columns, (1, GROUP)), tensors)

    return draw


def _plain(dtype: torch.dtype) -> Any:
    def draw(rows: int, columns: int) -> Drawn:
        weight = torch.randn(rows, columns).to(dtype)
        return Drawn(weight.double(), {"weight": weight})

    return draw


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A quantization_config as compressed-tensors writes it: all linear layers but the head."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head", "re:.*mlp[.]gate$"],
        "quantization_status": "compressed", "config_groups": {"group_0": group}, "kv_cache_scheme": None, **more,
    }  # fmt: skip


FP8, INT8, INT4, FP4 = (
    {"num_bits": bits, "type": kind} for bits, kind in ((8, "float"), (8, "int"), (4, "int"), (4, "float"))
)
TOKENS = {"symmetric": True, "dynamic": True, "strategy": "token"}
BLOCKS = {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
GROUPS = {"strategy": "group", "group_size": GROUP}
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
_GPTQ = {"quant_method": "gptq", "group_size": GROUP, "desc_act": False}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
_E8M0 = torch.float8_e8m0fnu

FORMS: dict[str, Form] = {
    "bfloat16": Form(None, _plain(torch.bfloat16)),
    "float16": Form(None, _plain(torch.float16)),
    "float32": Form(None, _plain(torch.float32)),
    "fp8 tensor": Form(
        compressed("float-quantized", {**FP8, "strategy": "tensor"}, {**FP8, **TOKENS}), _naive((0, 0), "e4m3")
    ),
    "fp8 tensor static": Form(
        compressed("float-quantized", {**FP8, "strategy": "tensor"}, {**FP8, "dynamic": False, "strategy": "tensor"}),
        _static(_naive((0, 0), "e4m3"), False),
    ),
    "fp8 channel": Form(
        compressed("float-quantized", {**FP8, "strategy": "channel"}, {**FP8, **TOKENS}),
        _naive((1, 0), "e4m3", dtype=torch.bfloat16),
    ),
    "fp8 blocks": Form(
        compressed(
            "float-quantized", {**FP8, **BLOCKS}, {**FP8, "dynamic": True, "strategy": "group", "group_size": BLOCK}
        ),
        _naive((BLOCK, BLOCK), "e4m3"),
    ),
    "fp8 weights": Form(compressed("naive-quantized", {**FP8, "strategy": "channel"}), _naive((1, 0), "e4m3")),
    "int8 channel": Form(
        compressed("int-quantized", {**INT8, "strategy": "channel"}, {**INT8, **TOKENS}), _naive((1, 0), "int8")
    ),
    "int4 packed": Form(compressed("pack-quantized", {**INT4, **GROUPS}), _pack(4)),
    "int4 packed, zero points": Form(
        compressed("pack-quantized", {**INT4, **GROUPS, "symmetric": False}), _pack(4, True)
    ),
    "int8 packed": Form(compressed("pack-quantized", {**INT8, **GROUPS}), _pack(8)),
    "nvfp4": Form(
        compressed("nvfp4-pack-quantized", {**FP4, "strategy": "tensor_group", "group_size": 16}),
        _nvfp4("weight_global_scale", "weight_packed"),
    ),
    "mxfp4": Form(compressed("mxfp4-pack-quantized", {**FP4, **GROUPS, "scale_dtype": "torch.uint8"}), _mxfp4),
    "mxfp8": Form(compressed("mxfp8-quantized", {**FP8, **GROUPS, "scale_dtype": "torch.uint8"}), _mxfp8),
    "deepseek": Form(DEEPSEEK, _naive((BLOCK, BLOCK), "e4m3", "weight_scale_inv")),
    "deepseek ue8m0": Form(DEEPSEEK, _naive((BLOCK, BLOCK), "e4m3", "weight_scale_inv", _E8M0)),
    "modelopt fp8": Form({"quant_method": "modelopt", "quant_algo": "FP8"}, _static(_naive((0, 0), "e4m3"), True)),
    "modelopt nvfp4": Form({"quant_method": "modelopt", "quant_algo": "NVFP4"}, _nvfp4("weight_scale_2", "weight")),
    "gptq v1": Form({**_GPTQ, "bits": 4, "sym": False}, _gptq(4, 1, False)),
    "gptq v2": Form({**_GPTQ, "bits": 4, "sym": False, "checkpoint_format": "gptq_v2"}, _gptq(4, 2, False)),
    "gptq symmetric": Form({**_GPTQ, "bits": 4, "sym": True}, _gptq(4, 1, True)),
    "gptq 8 bits": Form({**_GPTQ, "bits": 8, "sym": True}, _gptq(8, 1, True)),
    "awq": Form({**_AWQ, "zero_point": True}, _awq(True)),
    "awq symmetric": Form({**_AWQ, "zero_point": False}, _awq(False)),
}
LAYOUTS = ("apart", "w1", "fused", "stacked", "stacked fused")


def write(
    folder: Path, form: Form, layout: str, *, experts: int = 3, hidden_size: int = 192, intermediate_size: int = 160,
    prefix: str = PREFIX, order: str = "gate first",
) -> Written:  # fmt: skip
    """Writes the experts of a layer as one file with a config.json, and says what their weights are."""
    size = intermediate_size
    names = ("w1", "w3", "w2", "w13") if layout == "w1" else ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
    tensors: Tensors = {}
    first, second = [], []
    for expert in range(experts):
        rows = {names[3]: 2 * size} if "fused" in layout else {names[0]: size, names[1]: size}
        drawn = {name: form.draw(height, hidden_size) for name, height in rows.items()}
        values = torch.cat([layer.values for layer in drawn.values()])
        if "fused" in layout and order != "gate first":
            halves = (values[0::2], values[1::2]) if order == "in turn" else (values[size:], values[:size])
            values = torch.cat(halves)
        first.append(values)
        drawn[names[2]] = form.draw(hidden_size, size)
        second.append(drawn[names[2]].values)
        for name, layer in drawn.items():
            for what, tensor in layer.tensors.items():
                tensors[f"{prefix}.{expert}.{name}.{what}"] = tensor
    if "stacked" in layout:
        apart, tensors = tensors, {}
        for name in [name for name in apart if name.startswith(f"{prefix}.0.")]:
            every = torch.stack(
                [apart[name.replace(f"{prefix}.0.", f"{prefix}.{expert}.")] for expert in range(experts)]
            )
            tensors[name.replace(f"{prefix}.0.", f"{prefix}.")] = every
    save(folder, tensors, form.config)
    return Written(torch.stack(first), torch.stack(second))


def save(
    folder: Path, tensors: Tensors, config: dict[str, Any] | None, file: str = "model.safetensors", **model: Any
) -> None:
    """Writes a file of safetensors with that package, and config.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    told = {**model, **({} if config is None else {"quantization_config": config})}
    (folder / "config.json").write_text(json.dumps(told))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / file)
