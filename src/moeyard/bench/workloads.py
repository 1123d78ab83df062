"""TOML files -> cases: one op at one size under one routing; sizes are crossed lists, or a list of points."""

import itertools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeyard.bench import traces
from moeyard.bench.operators import Case, operators
from moeyard.bench.quantised import scheme_named
from moeyard.testing import ROUTINGS

FOLDER = Path(__file__).parent / "workloads"
_SCALED = ("hidden_size", "intermediate_size", "shared_size")
_MODEL = {
    "scoring": str, "renormalize": bool, "selection_bias": bool, "num_groups": int, "top_k_groups": int,
    "routed_scaling_factor": float, "activation": str, "bias": bool, "shared_size": int, "shared_gate": bool,
    "transformers": str,
}  # fmt: skip
"""What a workload's [model] table may say, and its kind."""
_KEYS = ("description", "op", "routing", "sizes", "points", "model")
DTYPES = ("bfloat16", "float16", "float32")


def names() -> dict[str, str]:
    """The workloads that come with the package, with their descriptions."""
    return {path.stem: _read(path)["description"] for path in sorted(FOLDER.glob("*.toml"))}


def load(name: str, scale: int = 1) -> list[Case]:
    """The cases of a workload, by name, or by the path of a TOML file or a trace. ValueError says what a file lacks.

    `scale` divides hidden and intermediate sizes, to multiples of 64, for machines that a whole model does not fit.
    """
    path = Path(name) if name.endswith((".toml", traces.SUFFIX)) else FOLDER / f"{name}.toml"
    if not path.is_file():
        files = f"the path of a .toml or {traces.SUFFIX} file"
        raise ValueError(f"workload: expected one of {', '.join(names())} or {files}, got {name!r}")
    if path.suffix == traces.SUFFIX:
        return traces.cases(path, scale, _shrink)
    table = _read(path)
    _check_keys(table, path)
    cases = []
    for op, routing in itertools.product(_several(table, "op", path), _several(table, "routing", path)):
        if op not in operators():
            raise ValueError(f"{path}: op: expected one of {sorted(operators())}, got {op!r}")
        if routing not in ROUTINGS:
            raise ValueError(f"{path}: routing: expected one of {sorted(ROUTINGS)}, got {routing!r}")
        sizes = table.get("sizes", {})
        said = operators()[op].from_model if "model" in table else ()
        keys = [key for key in operators()[op].sizes if key not in said]
        given = _several(table, "points", path)[0] if "points" in table else sizes
        keys += [key for key in operators()[op].optional if key in given]
        if "points" in table:
            points = [tuple((key, _present(one, key, path)) for key in keys) for one in _several(table, "points", path)]
        else:
            axes = [[(key, value) for value in _several(sizes, key, path)] for key in keys]
            points = list(itertools.product(*axes))
        for point in points:
            _check_point(dict(point), path, operators()[op].values)
            shrunk = tuple((key, _shrink(key, value, scale)) for key, value in point)
            cases.append(Case(path.stem, op, routing, shrunk, _model(table, path, scale)))
    return cases


def _check_keys(table: dict[str, Any], path: Path) -> None:
    """Nothing in a workload is passed over: not a key of the file, of its sizes or of a point."""
    unknown = sorted(set(table) - set(_KEYS))
    if unknown:
        raise ValueError(f"{path}: expected keys of {list(_KEYS)}, got {unknown}")
    if "points" in table and "sizes" in table:
        raise ValueError(f"{path}: sizes: expected none beside points, got {sorted(table['sizes'])}")
    known = list(dict.fromkeys(key for one in operators().values() for key in (*one.sizes, *one.optional)))
    places = [("sizes", table.get("sizes", {}))]
    places += [("points", point) for point in (_several(table, "points", path) if "points" in table else [])]
    for place, sizes in places:
        if not isinstance(sizes, dict):
            raise ValueError(f"{path}: {place}: expected a table, got {sizes!r}")
        unknown = sorted(set(sizes) - set(known))
        if unknown:
            raise ValueError(f"{path}: {place}: expected keys of {known}, got {unknown}")


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


def _check_point(sizes: dict[str, Any], path: Path, values: Mapping[str, tuple[int, ...]]) -> None:
    for key, value in sizes.items():
        if key == "dtype":
            if value not in DTYPES:
                raise ValueError(f"{path}: dtype: expected one of {DTYPES}, got {value!r}")
        elif key == "scheme":
            try:
                scheme_named(value)
            except ValueError as problem:
                raise ValueError(f"{path}: {problem}") from None
        elif key in values:
            if value not in values[key]:
                raise ValueError(f"{path}: {key}: expected one of {values[key]}, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {key}: expected integers of 1 and above, got {value!r}")
    if "num_experts" in sizes and sizes["num_experts"] < sizes.get("top_k", 1):
        raise ValueError(f"{path}: top_k: expected at most num_experts={sizes['num_experts']}, got {sizes['top_k']}")
