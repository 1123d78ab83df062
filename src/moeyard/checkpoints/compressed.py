"""compressed-tensors' quantization_config -> `Storage`, and back.

Source: compressed-tensors 0.20 (https://github.com/vllm-project/compressed-tensors). Where that package is installed,
its `QuantizationConfig` checks the configuration first and fills in what it leaves out.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeyard.checkpoints import packing
from moeyard.checkpoints.storage import UNQUANTISED, Config, Storage
from moeyard.quant import QuantScheme

NAIVE = ("float-quantized", "int-quantized", "naive-quantized")
FORMATS = (*NAIVE, "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
MX_GROUP = 32
_SCALES: dict[str, tuple[str, ...]] = {"scale": ("weight_scale", "scale"), "input": ("input_scale",)}
_PACKED: dict[str, tuple[str, ...]] = {
    "scale": ("weight_scale",), "shape": ("weight_shape",), "order": ("weight_g_idx",), "input": ("input_scale",),
}  # fmt: skip


def reads(found: Config, where: str) -> Callable[[Sequence[str]], Storage]:
    """How a linear layer that goes by these names is stored."""
    for key in ("transform_config", "sparsity_config"):
        part = found.get(key)
        if part and not (isinstance(part, Mapping) and part.get("format") == "dense"):
            raise ValueError(f"{where}.{key}: expected none (it changes what weights mean), got {part!r}")
    sparse = found.get("moe_sparsity_config")
    if sparse and not (isinstance(sparse, Mapping) and sparse.get("method") == "prune"):
        raise ValueError(f"{where}.moe_sparsity_config: expected experts that are pruned or none, got {sparse!r}")
    groups = {target: (name, group) for name, group in _groups(found, where).items() for target in group["targets"]}
    exact_first = sorted(groups, key=lambda target: ("re:" in target, target))
    ignore = found.get("ignore") or []
    storages: dict[str, Storage] = {}

    def read(names: Sequence[str]) -> Storage:
        if any(matches(target, name) for target in ignore for name in names):
            return UNQUANTISED
        target = next((target for target in exact_first if any(matches(target, name) for name in names)), None)
        if target is None and "Linear" not in groups:
            return UNQUANTISED
        name, group = groups[target or "Linear"]
        if name not in storages:
            storages[name] = _storage(
                group, str(group.get("format") or found.get("format")), f"{where}.config_groups.{name}"
            )
        return storages[name]

    return read


def matches(target: str, name: str) -> bool:
    """Whether a target that is no class, a name or "re:" and a pattern, means the module of this name."""
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _groups(found: Config, where: str) -> dict[str, dict[str, Any]]:
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping):
        raise ValueError(f"{where}.config_groups: expected an object, got {groups!r}")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        order = (weights or {}).get("actorder")
        if order is True or str(order).lower() in ("group", "dynamic"):
            raise ValueError(
                f"{where}.config_groups.{name}.weights.actorder: expected null, 'weight' or 'static', got {order!r} "
                "(act-order, columns in the order of activations, is not supported)"
            )
    groups = _checked(found, where).get("config_groups", {})
    for name, group in groups.items():
        targets = group.get("targets") if isinstance(group, Mapping) else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ValueError(
                f"{where}.config_groups.{name}.targets: expected a list of names, got {group!r} (presets need the "
                "package compressed-tensors: pip install 'moeyard[checkpoints]')"
            )
    return dict(groups)


def _checked(found: Config, where: str) -> Config:
    """The configuration as compressed-tensors' own model has it, where that package is installed."""
    try:
        from compressed_tensors.quantization import QuantizationConfig
    except ModuleNotFoundError:
        return found
    try:
        filled: Config = QuantizationConfig.model_validate(dict(found)).model_dump()
    except (ValueError, KeyError, NotImplementedError) as problem:
        raise ValueError(f"{where}: compressed-tensors refuses it: {problem}") from None
    return filled


def _storage(group: Config, form: str, where: str) -> Storage:
    """How the linear layers of a group are stored."""
    if form not in FORMATS:
        raise ValueError(f"{where}.format: expected one of {', '.join(FORMATS)}, got {form!r}")
    weights = group.get("weights")
    if weights is None:
        return UNQUANTISED
    if group.get("output_activations"):
        raise ValueError(f"{where}.output_activations: expected none for experts, got {group['output_activations']!r}")
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    wanted = {
        "float-quantized": [("float", 8)],
        "int-quantized": [("int", size) for size in range(2, 9)],
        "naive-quantized": [("float", 8), *(("int", size) for size in range(2, 9))],
        "pack-quantized": [("int", 4), ("int", 8)],
        "mxfp8-quantized": [("float", 8)],
    }.get(form, [("float", 4)])
    if (kind, bits) not in wanted:
        names = ", ".join(f"{one} of {size} bits" for one, size in wanted)
        raise ValueError(f"{where}.weights: expected {names} for {form}, got {kind} of {bits} bits")
    symmetric = weights.get("symmetric", True)
    zero_points = not symmetric and form == "pack-quantized" and bits == 4
    if not symmetric and not zero_points:
        raise ValueError(f"{where}.weights.symmetric: expected true for {kind} of {bits} bits in {form}, got false")
    block = _block(weights, where)
    if "fp4" in form or form.startswith("mxfp"):
        size = 16 if form.startswith("nv") else MX_GROUP
        if block != (1, size):
            raise ValueError(
                f"{where}.weights.group_size: expected {size} for {form}, got {weights.get('group_size')!r}"
            )
    activations, note = _activations(group.get("input_activations"), f"{where}.input_activations")
    of_bits = "e2m1" if bits == 4 else "e4m3"
    code, per, static = activations or ("none", 0, False)
    if kind == "int":  # codes of 4 bits beside int8 rows stay int8, which kernels multiply as they are
        of_bits = "int4" if bits == 4 and code != "int8" else "int8"
    scheme = QuantScheme(
        of_bits, block, "e8m0" if form.startswith("mxfp") else "e4m3" if form.startswith("nv") else "float",
        zero_points, form.startswith("nv"), code, per, static,
    )  # fmt: skip
    return _with_tensors(Storage(form, scheme, packing.PLAIN, note=note), bits)


def _with_tensors(storage: Storage, bits: int) -> Storage:
    """The storage with what its tensors are called and how they lie."""
    form, scheme = storage.format, storage.scheme
    assert scheme is not None
    if form == "pack-quantized":
        names = {**_PACKED, "zero" if scheme.zero_points else "checked": ("weight_zero_point",)}
        zero = packing.ZEROS if scheme.zero_points else None
        return storage._replace(
            weight=packing.WORDS[bits], scale=packing.SCALES, zero=zero, names=names,
            weight_names=("weight_packed", "packed"), trivial=(1 << (bits - 1),),
        )  # fmt: skip
    if scheme.weights == "e2m1":
        names = {"scale": ("weight_scale", "scale"), "input": ("input_global_scale", "input_scale")}
        if scheme.global_scales:
            names["global"] = ("weight_global_scale", "global_scale")
        scale = packing.E4M3_SCALES if scheme.global_scales else packing.POWERS
        weight_names = ("weight_packed", "packed")
        return storage._replace(
            weight=packing.PAIRS, scale=scale, names=names, weight_names=weight_names, divides=scheme.global_scales
        )
    scale = packing.POWERS if form == "mxfp8-quantized" else packing.SCALES
    weight = {"e4m3": packing.E4M3, "int8": packing.INT8, "int4": packing.INT4_IN_BYTES}[scheme.weights]
    return storage._replace(weight=weight, scale=scale, names={**_SCALES, "checked": ("weight_zero_point",)})


def _block(weights: Config, where: str) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    size, structure = weights.get("group_size"), weights.get("block_structure")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.get("strategy") or default
    if strategy == "tensor":
        return 0, 0
    if strategy == "channel":
        return 1, 0
    if strategy in ("group", "tensor_group") and type(size) is int and size > 0:
        return 1, size
    if strategy == "block" and isinstance(structure, str):
        structure = [int(part) for part in structure.split("x")]
    if strategy == "block" and isinstance(structure, list) and len(structure) == 2:
        return structure[0], structure[1]
    raise ValueError(
        f"{where}.weights.strategy: expected tensor, channel, group with group_size, or block with block_structure, "
        f"got {strategy!r}, {size!r}, {structure!r}"
    )


def _activations(found: Config | None, where: str) -> tuple[tuple[str, int, bool] | None, str]:
    """(code, columns of a group, whether static) of activations, None if they stay as they are; and a note."""
    if found is None:
        return None, ""
    kind, bits = found.get("type", "int"), found.get("num_bits", 8)
    dynamic, strategy = found.get("dynamic", False), found.get("strategy")
    if bits == 4 and kind == "float":  # NVFP4's and MXFP4's
        return None, "activations of 4 bits are not quantised: rows stay in their dtype"
    if bits == 8 and "uint8" in str(found.get("scale_dtype")):  # MXFP8's
        return None, "activations whose scales are powers of two are not quantised: rows stay in their dtype"
    if bits != 8 or not found.get("symmetric", True):
        raise ValueError(f"{where}: expected 8 bits, symmetric, got {dict(found)!r}")
    code = "e4m3" if kind == "float" else "int8"
    if dynamic is True and strategy == "token":
        return (code, 0, False), ""
    if dynamic is True and strategy == "group" and type(found.get("group_size")) is int:
        return (code, found["group_size"], False), ""
    if dynamic is False and strategy in (None, "tensor"):
        return (code, 0, True), ""
    raise ValueError(
        f"{where}: expected dynamic scales per token or group, or static ones per tensor, got dynamic {dynamic!r} with "
        f"strategy {strategy!r}"
    )


def format_of(scheme: QuantScheme) -> str:
    """The format that a scheme is written in; ValueError if there is none."""
    rows, columns = scheme.block
    group = rows == 1 and columns > 0
    if scheme.weights == "e2m1":
        if (scheme.block, scheme.scales, scheme.global_scales) == ((1, 16), "e4m3", True):
            return "nvfp4-pack-quantized"
        if (scheme.block, scheme.scales, scheme.global_scales) == ((1, MX_GROUP), "e8m0", False):
            return "mxfp4-pack-quantized"
    elif scheme.weights == "e4m3" and scheme.scales == "e8m0":
        if scheme.block == (1, MX_GROUP) and not scheme.global_scales:
            return "mxfp8-quantized"
    elif scheme.scales == "float" and not scheme.global_scales and (not rows) <= (not columns):
        if scheme.weights == "int4" and rows <= 1:
            return "pack-quantized"
        if scheme.weights == "int8":
            return "int-quantized" if scheme.activations != "none" or not group else "pack-quantized"
        if scheme.weights == "e4m3":
            return "naive-quantized" if scheme.activations == "none" else "float-quantized"
    raise ValueError(f"weights.scheme: expected one that compressed-tensors has a format for, got {str(scheme)!r}")


def group_of(scheme: QuantScheme) -> dict[str, Any]:
    """A scheme as an entry of config_groups, without its targets."""
    bits, kind = {"e4m3": (8, "float"), "int8": (8, "int"), "int4": (4, "int"), "e2m1": (4, "float")}[scheme.weights]
    rows, columns = scheme.block
    weights: dict[str, Any] = {
        "num_bits": bits, "type": kind, "symmetric": not scheme.zero_points, "dynamic": False,
    }  # fmt: skip
    if rows > 1:
        weights |= {"strategy": "block", "block_structure": [rows, columns]}
    elif columns:
        weights |= {"strategy": "tensor_group" if scheme.global_scales else "group", "group_size": columns}
    else:
        weights["strategy"] = "channel" if rows else "tensor"
    if scheme.scales != "float":
        weights["scale_dtype"] = "torch.uint8" if scheme.scales == "e8m0" else "torch.float8_e4m3fn"
    inputs: dict[str, Any] | None = None
    if scheme.activations != "none":
        kind, group = "float" if scheme.activations == "e4m3" else "int", scheme.activation_group
        inputs = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": not scheme.static}
        inputs |= {"strategy": "tensor" if scheme.static else "group" if group else "token"}
        if group:
            inputs["group_size"] = group
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": format_of(scheme)}


def merged(found: Config | None, target: str, scheme: QuantScheme | None, where: str) -> dict[str, Any] | None:
    """A quantization_config that gives the modules of `target` ("re:...") a scheme; None if none is needed."""
    if found is None and scheme is None:
        return None
    result: dict[str, Any] = dict(found or {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": []})
    if result.get("quant_method", "compressed-tensors") != "compressed-tensors":
        raise ValueError(f"{where}.quant_method: expected compressed-tensors, got {result['quant_method']!r}")
    groups = {}
    for name, group in result.get("config_groups", {}).items():
        targets = [other for other in group["targets"] if other != target]
        if targets:
            groups[name] = {**group, "targets": targets, "format": group.get("format") or result.get("format")}
    ignore = [other for other in result.get("ignore") or [] if other != target]
    if scheme is None:
        ignore.append(target)
    else:
        mine = group_of(scheme)
        like = [group for group in groups.values() if {key: group.get(key) for key in mine} == mine]
        if like:
            like[0]["targets"].append(target)
        else:
            number = next(number for number in range(len(groups) + 1) if f"group_{number}" not in groups)
            groups[f"group_{number}"] = {"targets": [target], **mine}
    formats = {group["format"] for group in groups.values()}
    form = formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense"
    result |= {"config_groups": groups, "ignore": ignore, "format": form, "quantization_status": "compressed"}
    return result
