"""What config.json says about the experts of a layer -> `Storage`: their scheme, and how files store it.

Sources: AutoGPTQ and GPTQModel (`gptq`, `gptq_v2`), AutoAWQ (`gemm`), NVIDIA's ModelOpt (`NVFP4`, `FP8`), DeepSeek-V3
and transformers (`fp8`), OpenAI's gpt-oss (`mxfp4`). compressed.py reads what compressed-tensors writes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from moeyard.checkpoints import compressed, packing
from moeyard.checkpoints.files import read_json
from moeyard.checkpoints.storage import UNQUANTISED, Config, Storage, told
from moeyard.quant import FP8_TENSOR, FP8_TENSOR_STATIC, MXFP4, NVFP4, QuantScheme, int4_scheme

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
Reads = Callable[[Sequence[str]], Storage]
"""The names that a linear layer goes by, its own first -> how it is stored."""


class Model(NamedTuple):
    """The configuration of a checkpoint."""

    file: Path
    """config.json, for errors; it may not exist."""
    config: Config
    quantization: Config | None
    """quantization_config, or what ModelOpt writes beside config.json."""

    @property
    def text(self) -> Config:
        """The part about the language model."""
        part = self.config.get("text_config")
        return part if isinstance(part, Mapping) else self.config

    def num_experts(self) -> int | None:
        """Routed experts per layer, if the configuration says it."""
        for key in EXPERT_COUNTS:
            for part in (self.text, self.config):
                if type(part.get(key)) is int:
                    return int(part[key])
        return None


def read_model(path: Path) -> Model:
    """config.json beside the tensors; an empty one if there is none."""
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    config: Config = read_json(file) if file.exists() else {}
    model = Model(file, config, None)
    for part in (config, model.text):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part.get(key), Mapping):
                return model._replace(quantization=part[key])
    beside = folder / "hf_quant_config.json"
    if beside.exists():
        found = read_json(beside).get("quantization")
        if not isinstance(found, Mapping):
            raise ValueError(f"{beside}: expected an object quantization, got {found!r}")
        return Model(beside, config, {"quant_method": "modelopt", **found})
    return model


def storage_of(model: Model, linears: Sequence[Sequence[str]]) -> Storage:
    """How the linear layers of a layer's experts are stored; ValueError if they differ. `linears`: names of each."""
    if model.quantization is None:
        return UNQUANTISED
    method = model.quantization.get("quant_method")
    if method is None and "config_groups" in model.quantization:
        method = "compressed-tensors"
    where = f"{model.file}: quantization_config"
    if method not in METHODS:
        raise ValueError(f"{where}.quant_method: expected one of {', '.join(METHODS)}, got {method!r}")
    read = METHODS[method](model.quantization, where)
    first = read(linears[0])
    for names in linears[1:]:
        other = read(names)
        if other != first:
            raise ValueError(
                f"{where}: expected one scheme for the experts of a layer, got {told(first)} for {linears[0][0]} and "
                f"{told(other)} for {names[0]}"
            )
    return first


def _one_of(where: str, found: Config, key: str, known: Sequence[Any], default: Any = None) -> Any:
    value = found.get(key, default)
    if value not in known:
        raise ValueError(f"{where}.{key}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def _modules(where: str, found: Config, *keys: str) -> list[str]:
    names: Any = next((found[key] for key in keys if found.get(key)), [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}.{keys[0]}: expected a list of names, got {names!r}")
    return list(names)


def _except(modules: Sequence[str], storage: Storage) -> Reads:
    """`storage` for all linear layers but those in modules; a module's name may leave out what stands before it."""
    return lambda names: (
        UNQUANTISED if any(f".{module}." in f".{name}." for module in modules for name in names) else storage
    )


def _group(where: str, found: Config, *keys: str) -> int:
    size = next((found[key] for key in keys if key in found), None)
    if type(size) is not int or not (size == -1 or size > 0):
        raise ValueError(f"{where}.{keys[0]}: expected a number of columns or -1, got {size!r}")
    return max(0, size)


def _fp8(found: Config, where: str) -> Reads:
    """DeepSeek-V3's blocks, whose weight_scale_inv multiplies, and one scale per matrix."""
    _one_of(where, found, "fmt", ("e4m3", "e4m3fn", "float8_e4m3fn"), "e4m3")
    activations = _one_of(where, found, "activation_scheme", ("dynamic", "static"), "dynamic")
    modules = _modules(where, found, "modules_to_not_convert", "ignored_layers")
    block = found.get("weight_block_size")
    names: dict[str, tuple[str, ...]] = {
        "scale": ("weight_scale_inv", "scale_inv", "weight_scale"),
        "input": ("input_scale", "activation_scale"),
    }
    if block is None:
        scheme = FP8_TENSOR_STATIC if activations == "static" else FP8_TENSOR
        return _except(modules, Storage("fp8", scheme, packing.E4M3, packing.SCALES, names=names))
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(f"{where}.weight_block_size: expected two sizes, got {block!r}")
    if activations == "static":
        raise ValueError(f"{where}.activation_scheme: expected 'dynamic' beside weight_block_size, got 'static'")
    scheme = QuantScheme("e4m3", (block[0], block[1]), activations="e4m3", activation_group=block[1])
    return _except(modules, Storage("block fp8", scheme, packing.E4M3, packing.EXACT_SCALES, names=names))


def _gptq(found: Config, where: str) -> Reads:
    version = 2 if _one_of(where, found, "checkpoint_format", ("gptq", "gptq_v2"), "gptq") == "gptq_v2" else 1
    overrides = found.get("dynamic") or {}
    if not isinstance(overrides, Mapping):
        raise ValueError(f"{where}.dynamic: expected an object, got {overrides!r}")

    def read(names: Sequence[str]) -> Storage:
        for pattern, change in overrides.items():
            if any(re.match(pattern.removeprefix("+:").removeprefix("-:"), name) for name in names):
                if pattern.startswith("-:"):
                    return UNQUANTISED
                return _gptq_storage({**found, **change}, where, version)
        return _gptq_storage(found, where, version)

    return read


def _gptq_storage(found: Config, where: str, version: int) -> Storage:
    bits = _one_of(where, found, "bits", (4, 8))
    group = _group(where, found, "group_size")
    names: dict[str, tuple[str, ...]] = {"scale": ("scales",), "order": ("g_idx",)}
    symmetric = found.get("sym", True) is True
    storage = Storage(
        "GPTQ", None, packing.GPTQ[bits], packing.TURNED_SCALES, names=names, weight_names=("qweight",),
        orders=found.get("desc_act", False) is True,
    )  # fmt: skip
    if symmetric:  # 8 (128), of which version 1 stores one less; some files say 1 and are 2
        names["checked"] = ("qzeros",)
        scheme = int4_scheme(group) if bits == 4 else QuantScheme("int8", (1, group))
        middle = 1 << (bits - 1)
        return storage._replace(scheme=scheme, trivial=(middle - 1, middle))
    if bits == 8:
        raise ValueError(f"{where}.sym: expected true for 8 bits, got false (int4 alone has zero points)")
    names["zero"] = ("qzeros",)
    return storage._replace(scheme=int4_scheme(group, zero_points=True), zero=packing.GPTQ_ZEROS[version])


def _awq(found: Config, where: str) -> Reads:
    if found.get("bits", found.get("w_bit")) != 4:
        raise ValueError(f"{where}.bits: expected 4, got {found.get('bits', found.get('w_bit'))!r}")
    version = str(found.get("version", "gemm")).lower()
    if version != "gemm":
        raise ValueError(f"{where}.version: expected 'gemm', got {version!r}")
    group = _group(where, found, "group_size", "q_group_size")
    zero_points = found.get("zero_point", True) is True
    names = {"scale": ("scales",), "zero" if zero_points else "checked": ("qzeros",)}
    storage = Storage(
        "AWQ", int4_scheme(group, zero_points=zero_points), packing.AWQ, packing.TURNED_SCALES,
        packing.AWQ_ZEROS if zero_points else None, names, weight_names=("qweight",), trivial=(8,),
    )  # fmt: skip
    return _except(_modules(where, found, "modules_to_not_convert"), storage)


def _mxfp4(found: Config, where: str) -> Reads:
    """gpt-oss's, whose rows of gate and up are in turn."""
    storage = Storage(
        "MXFP4", MXFP4, packing.BLOCKS, packing.POWERS, names={"scale": ("scales",)}, weight_names=("blocks",),
    )  # fmt: skip
    return _except(_modules(where, found, "modules_to_not_convert"), storage)


def _modelopt(found: Config, where: str) -> Reads:
    names: dict[str, tuple[str, ...]] = {"scale": ("weight_scale",), "input": ("input_scale",)}
    if _one_of(where, found, "quant_algo", ("NVFP4", "FP8")) == "FP8":
        storage = Storage("ModelOpt FP8", FP8_TENSOR_STATIC, packing.E4M3, packing.SCALES, names=names)
    else:
        size = found.get("group_size", 16)
        if size != 16:
            raise ValueError(f"{where}.group_size: expected 16 for NVFP4, got {size!r}")
        names["global"] = ("weight_scale_2",)
        note = "activations of 4 bits are not quantised: rows stay in their dtype"
        storage = Storage("ModelOpt NVFP4", NVFP4, packing.PAIRS, packing.E4M3_SCALES, names=names, note=note)
    modules = _modules(where, found, "exclude_modules", "ignore")

    def read(names: Sequence[str]) -> Storage:
        apart = any(
            fnmatchcase(name, module) or f"{name}.".startswith(f"{module}.") for module in modules for name in names
        )
        return UNQUANTISED if apart else storage

    return read


METHODS: dict[str, Callable[[Config, str], Reads]] = {
    "compressed-tensors": compressed.reads,
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
}
