"""`save_experts`: `ExpertWeights` -> a checkpoint that compressed-tensors, and what reads its formats, can load."""

import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeyard.checkpoints import compressed, packing
from moeyard.checkpoints.config import read_model, storage_of
from moeyard.checkpoints.files import INDEX, Part, entries_under, names_of, read_json, replacing, shards_of, write_file
from moeyard.checkpoints.names import PARTS
from moeyard.checkpoints.storage import told
from moeyard.dispatch.checks import check_experts
from moeyard.quant import QuantScheme
from moeyard.values import ExpertWeights

NAMES = ("gate_proj", "up_proj", "down_proj")


def save_experts(
    weights: ExpertWeights,
    path: str | os.PathLike[str],
    prefix: str,
    *,
    names: tuple[str, str, str] = NAMES,
) -> Path:
    """Writes the experts of one layer as safetensors, each expert's matrices apart, in compressed-tensors' formats.

    Args:
        weights: all experts of a layer, on any device. A slice that begins inside a block is refused.
        path: a folder, made if it does not exist. Its index and config.json are made or extended: what they say about
            other layers stays.
        prefix: what stands before experts' names, such as "model.layers.0.mlp.experts".
        names: what gate, up and down are called; ("w1", "w3", "w2") as in Mixtral.

    Codes and scales are written as they are, and `load_experts` gives their bits back. A global scale is written as a
    divisor: the float32 that gives it back, or the nearest if none does, which a warning says. Tensors pass through the
    host one by one. A file is written under another name first, so that an interrupt leaves no half file.

    Returns the safetensors file. Raises TypeError or ValueError naming the argument, or the file and what is in it: a
    scheme that compressed-tensors has no format for, tensors of this prefix in other files, a configuration that would
    give these experts another scheme.
    """
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"weights: expected ExpertWeights, got {type(weights).__name__}")
    _check(weights)
    if len(names) != 3 or [PARTS.get(name) for name in names] != ["gate", "up", "down"]:
        raise ValueError(f"names: expected those of gate, up and down, as {NAMES}, got {names!r}")
    if not isinstance(prefix, str) or not prefix or not re.fullmatch(r"[\w.]*\w", prefix):
        raise ValueError(f"prefix: expected a name of letters, digits, dots and underscores, got {prefix!r}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{prefix}.safetensors"
    index = _index(folder, file, prefix)
    config = _config(folder, weights, prefix, names)
    parts = list(_parts(weights, prefix, names))
    write_file(file, parts)
    index["weight_map"] |= {part.name: file.name for part in parts}
    sizes = (child.stat().st_size for child in {folder / home for home in index["weight_map"].values()})
    index["metadata"] = {**index.get("metadata", {}), "total_size": sum(sizes)}
    for target, content in ((folder / INDEX, index), (folder / "config.json", config)):
        if content is not None:
            with replacing(target) as draft:
                draft.write_text(json.dumps(content, indent=2) + "\n")
    return file


def _check(weights: ExpertWeights) -> None:
    dtype = weights.w13.dtype
    if weights.scheme is not None:
        bias = weights.w13_bias if weights.w2_bias is None else weights.w2_bias
        dtype = torch.bfloat16 if bias is None else bias.dtype
    check_experts(weights, torch.empty(0, weights.hidden_size, dtype=dtype, device=weights.w13.device))
    if weights.scheme is not None and weights.scheme.tiled:
        raise ValueError(f"weights.scheme: expected one in rows (unpack_experts comes first), got {weights.scheme}")
    if weights.scales is not None and weights.scales.block_start:
        start = weights.scales.block_start
        raise ValueError(f"weights.scales.block_start: expected 0 (all of a matrix is written), got {start}")


def _index(folder: Path, file: Path, prefix: str) -> dict[str, Any]:
    """The index of the folder without the tensors of this prefix, which no other file may have."""
    if not list(folder.glob("*.safetensors*")):
        return {"weight_map": {}}
    files, home = shards_of(folder)
    for entry in entries_under(folder, prefix).values():
        if entry.file != file:
            raise ValueError(f"{entry}: expected no tensors of {prefix!r} in other files than {file.name}")
    if home is None:
        home = {name: other.name for other in files for name in names_of(other)}
        return {"weight_map": {name: where for name, where in home.items() if where != file.name}}
    indices = list(folder.glob("*.safetensors.index.json"))
    if indices != [folder / INDEX]:
        raise ValueError(f"path: expected {INDEX} as the index, got {indices[0].name}")
    return {
        **read_json(folder / INDEX),
        "weight_map": {name: where for name, where in home.items() if where != file.name},
    }


def _config(folder: Path, weights: ExpertWeights, prefix: str, names: Sequence[str]) -> dict[str, Any] | None:
    """config.json with the scheme of these experts; None if there is none and none is needed."""
    model = read_model(folder)
    target = f"re:{re.escape(prefix)}[.][0-9]+[.]({'|'.join(names)})$"
    where = f"{model.file}: quantization_config"
    quantization = compressed.merged(model.quantization, target, weights.scheme, where)
    if quantization is None:
        return None
    found = storage_of(model._replace(quantization=quantization), [[f"{prefix}.0.{name}"] for name in names])
    if found.scheme != weights.scheme:
        raise ValueError(f"{where}: expected targets that leave {prefix!r} alone, got one that makes it {told(found)}")
    return {**model.config, "quantization_config": quantization}


def _parts(weights: ExpertWeights, prefix: str, names: tuple[str, str, str]) -> Iterator[Part]:
    """The tensors of a file, in its order."""
    size = weights.intermediate_size
    halves = (names[0], names[1]) if weights.gated else (names[1],)
    for expert in range(weights.num_local_experts):
        for half, name in enumerate(halves):
            yield from _linear(
                weights, f"{prefix}.{expert}.{name}", expert, half, len(halves), (size, weights.hidden_size)
            )
        yield from _linear(weights, f"{prefix}.{expert}.{names[2]}", expert, None, 1, (weights.hidden_size, size))


def _linear(
    weights: ExpertWeights, name: str, expert: int, half: int | None, halves: int, shape: tuple[int, int]
) -> Iterator[Part]:
    """The tensors of one linear layer of [rows, columns] `shape`. `half`: of w13; None: w2."""
    first, scheme, scales = half is not None, weights.scheme, weights.scales

    def mine(tensor: Tensor) -> Tensor:
        return tensor[expert].chunk(halves)[half or 0]

    bias = weights.w13_bias if first else weights.w2_bias
    weight = mine(weights.w13 if first else weights.w2)
    if bias is not None:
        yield Part.of(f"{name}.bias", mine(bias))
    if scheme is None or scales is None:
        yield Part.of(f"{name}.weight", weight)
        return
    yield Part.of(f"{name}.weight_scale", _scale(mine(scales.w13 if first else scales.w2), scheme))
    yield from _weight(name, weight, scheme, shape)
    zero_points = scales.w13_zero_points if first else scales.w2_zero_points
    if zero_points is not None:
        codes = mine(zero_points).t()
        words = torch.Size((-(-codes.shape[1] // 8), codes.shape[0]))
        yield Part(f"{name}.weight_zero_point", torch.int32, words, lambda: packing.words_of(packing.paired(codes)).t())
    factor = scales.w13_global if first else scales.w2_global
    if factor is not None:
        yield Part.of(f"{name}.weight_global_scale", _divisor(factor[expert, half or 0], name))
    factor = scales.w13_input if first else scales.w2_input
    if factor is not None:
        yield Part.of(f"{name}.input_scale", factor[expert].view(1))


def _scale(scale: Tensor, scheme: QuantScheme) -> Tensor:
    if scheme.scales == "e8m0":
        return scale.view(torch.uint8)
    return scale.flatten() if scheme.block == (0, 0) else scale


def _weight(name: str, weight: Tensor, scheme: QuantScheme, shape: tuple[int, int]) -> Iterator[Part]:
    """The codes of a matrix, and what belongs to them."""
    form = compressed.format_of(scheme)
    if form != "pack-quantized":
        yield Part.of(f"{name}.{'weight_packed' if scheme.weights == 'e2m1' else 'weight'}", weight)
        return

    def words() -> Tensor:
        raw = weight.contiguous().view(torch.uint8)
        return packing.words_of(raw ^ 0x80 if scheme.weights == "int8" else raw)

    width = -(-weight.shape[1] // 4)
    yield Part(f"{name}.weight_packed", torch.int32, torch.Size((weight.shape[0], width)), words)
    yield Part.of(f"{name}.weight_shape", torch.tensor(shape))


def _divisor(factor: Tensor, name: str) -> Tensor:
    """[1] float32: what 1 is divided by for a global scale."""
    wanted = factor.detach().to("cpu", torch.float32).view(1)
    one = torch.ones_like(wanted)
    near = torch.div(one, wanted)
    for direction in (near, torch.zeros_like(near), torch.full_like(near, torch.inf)):
        tried = near if direction is near else torch.nextafter(near, direction)
        if torch.equal(torch.div(one, tried), wanted):
            return tried
    warnings.warn(
        f"{name}.weight_global_scale: no float32 divisor gives back {float(wanted)!r}; {float(near)!r} is the nearest",
        stacklevel=2,
    )
    return near
