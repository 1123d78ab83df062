"""TOML files -> cases: one op at one size under one routing; sizes are crossed lists, or a list of points."""

import itertools
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeyard.testing import ROUTINGS

FOLDER = Path(__file__).parent / "workloads"
ALIGN_SIZES = ("num_tokens", "num_experts", "top_k", "block_size")
SIZES_OF = {
    "moe_align_block_size": ALIGN_SIZES,
    "permute": (*ALIGN_SIZES, "hidden_size", "dtype"),
    "combine": (*ALIGN_SIZES, "hidden_size", "dtype"),
    "moe_sum": ("num_tokens", "top_k", "hidden_size", "dtype"),
    "ids_to_rows": (*ALIGN_SIZES, "hidden_size", "dtype"),
    "permute_to_fp8": (*ALIGN_SIZES, "hidden_size", "group_size", "dtype"),
    "route": ("num_tokens", "num_experts", "top_k", "num_groups", "dtype"),
    "route_and_align": (*ALIGN_SIZES, "dtype"),
    "fused_experts": ("num_tokens", "num_experts", "top_k", "hidden_size", "intermediate_size", "dtype"),
    "grouped_gemm": ("num_tokens", "num_experts", "top_k", "hidden_size", "intermediate_size", "dtype"),
    "moe_layer": ("num_tokens", "num_experts", "top_k", "hidden_size", "intermediate_size", "dtype"),
}
"""The ops that can be benchmarked and the sizes that each needs.

grouped_gemm is a layer's first product, gate and up together, for rows that are sorted by expert already.
ids_to_rows is alignment and permute together, as vLLM's moe_permute does both. A route of one group is a softmax,
renormalised; one of several is DeepSeek-V3's: sigmoid scores, a bias, half of the groups; with a [model] table it has
no num_groups, since the model says what its router is. A group_size of 0 quantises by token.
"""
_KEYS = tuple(dict.fromkeys(key for keys in SIZES_OF.values() for key in keys))
_SCALED = ("hidden_size", "intermediate_size", "shared_size")
_MODEL = {
    "scoring": str, "renormalize": bool, "selection_bias": bool, "num_groups": int, "top_k_groups": int,
    "routed_scaling_factor": float, "activation": str, "bias": bool, "shared_size": int, "shared_gate": bool,
    "transformers": str,
}  # fmt: skip
"""What a workload's [model] table may say, and its kind."""
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Case:
    """One op at one size under one routing."""

    workload: str
    op: str
    routing: str
    sizes: tuple[tuple[str, int | str], ...]
    model: dict[str, Any] = field(default_factory=dict)
    """How a model's router, activation and shared expert are; empty for ops without a model."""

    def __getitem__(self, name: str) -> Any:
        return dict(self.sizes)[name]

    def __str__(self) -> str:
        return f"{self.op} " + " ".join(f"{name}={value}" for name, value in self.sizes) + f" {self.routing}"


def names() -> dict[str, str]:
    """The workloads that come with the package, with their descriptions."""
    return {path.stem: _read(path)["description"] for path in sorted(FOLDER.glob("*.toml"))}


def load(name: str, scale: int = 1) -> list[Case]:
    """The cases of a workload, by name or by the path of a TOML file. ValueError says what the file lacks.

    `scale` divides hidden and intermediate sizes, to multiples of 64, for machines that a whole model does not fit.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise ValueError(f"workload: expected one of {', '.join(names())} or the path of a TOML file, got {name!r}")
    table = _read(path)
    cases = []
    for op, routing in itertools.product(_several(table, "op", path), _several(table, "routing", path)):
        if op not in SIZES_OF:
            raise ValueError(f"{path}: op: expected one of {sorted(SIZES_OF)}, got {op!r}")
        if routing not in ROUTINGS:
            raise ValueError(f"{path}: routing: expected one of {sorted(ROUTINGS)}, got {routing!r}")
        sizes = table.get("sizes", {})
        unknown = set(sizes) - set(_KEYS)
        if unknown:
            raise ValueError(f"{path}: sizes: expected keys of {_KEYS}, got {sorted(unknown)}")
        keys = [key for key in SIZES_OF[op] if not (key == "num_groups" and "model" in table)]
        if "points" in table:
            points = [tuple((key, _present(one, key, path)) for key in keys) for one in _several(table, "points", path)]
        else:
            axes = [[(key, value) for value in _several(sizes, key, path)] for key in keys]
            points = list(itertools.product(*axes))
        for point in points:
            _check_point(dict(point), path)
            shrunk = tuple((key, _shrink(key, value, scale)) for key, value in point)
            cases.append(Case(path.stem, op, routing, shrunk, _model(table, path, scale)))
    return cases


def _shrink(key: str, value: Any, scale: int) -> Any:
    return max(64, value // scale // 64 * 64) if key in _SCALED and scale > 1 else value


def _model(table: dict[str, Any], path: Path, scale: int) -> dict[str, Any]:
    model = table.get("model", {})
    for key, value in model.items():
        if key not in _MODEL or not isinstance(value, _MODEL[key]):
            wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in _MODEL.items())
            raise ValueError(f"{path}: model: expected keys of {wanted}, got {key} = {value!r}")
    return {key: _shrink(key, value, scale) for key, value in model.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: expected TOML, got {error}") from None


def _several(table: dict[str, Any], key: str, path: Path) -> list[Any]:
    value = table.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path}: {key}: expected a list of at least one value, got {value!r}")
    return value


def _present(table: dict[str, Any], key: str, path: Path) -> Any:
    if key not in table:
        raise ValueError(f"{path}: points: expected every point to have {key}, got {table}")
    return table[key]


def _check_point(sizes: dict[str, Any], path: Path) -> None:
    for key, value in sizes.items():
        if key == "dtype":
            if value not in DTYPES:
                raise ValueError(f"{path}: dtype: expected one of {DTYPES}, got {value!r}")
        elif key == "group_size":
            if value not in (0, 128):
                raise ValueError(f"{path}: group_size: expected 0 or 128, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {key}: expected integers of 1 and above, got {value!r}")
    if sizes.get("num_experts", sizes["top_k"]) < sizes["top_k"]:
        raise ValueError(f"{path}: top_k: expected at most num_experts={sizes['num_experts']}, got {sizes['top_k']}")
