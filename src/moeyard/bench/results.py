"""Result files: benchmarks/results/<machine>/<name>.json, every row with what was measured where."""

import importlib
import json
import os
import platform
import subprocess
import warnings
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
ROW_KEYS = (
    "op", "workload", "routing", "sizes", "provider", "impl", "mode",
    "time_us", "time_us_p10", "time_us_p90", "floor_us", "correct",
)  # fmt: skip
"""Keys of a row. time_us is a median; a wrong provider has no times, and `wrong` says why."""


def machine(device: torch.device, copy_gb_s: float) -> dict[str, Any]:
    """What the numbers were measured on."""
    facts: dict[str, Any] = {
        "name": f"cpu-{os.cpu_count()}core",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "copy_gb_s": round(copy_gb_s, 2),
    }
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        facts["name"] = name.removeprefix("NVIDIA").strip().split()[0].lower()
        facts["gpu"] = name
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["cuda"] = torch.version.cuda
    return facts


def peers(vllm: str) -> dict[str, str]:
    """Versions of what took part."""
    versions = {"torch": torch.__version__, "vllm": vllm}
    for package in ("numpy", "numba", "triton", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = ""
    return {name: version for name, version in versions.items() if version}


@cache
def peer_version(package: str) -> str:
    """The version of an importable peer; "" if it is not there or does not load."""
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError:
        return ""
    except Exception as problem:  # a library of it that is missing, a compiler that is not found
        warnings.warn(f"{package} takes no part, it does not load: {problem}", stacklevel=2)
        return ""
    return str(getattr(module, "__version__", "unknown"))


def document(rows: list[dict[str, Any]], machine: dict[str, Any], peers: dict[str, str]) -> dict[str, Any]:
    """A whole result file."""
    here = Path(__file__).parent
    commit = os.environ.get("MOEYARD_COMMIT", "")  # a copy of the tree may be told
    if not commit:
        commit = _output("git", "-C", str(here), "rev-parse", "--short=12", "HEAD")
        if commit and _output("git", "-C", str(here), "status", "--porcelain", "--", ":/src"):
            commit += " with changes"
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit or "unknown",
        "machine": machine,
        "peers": peers,
        "rows": rows,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a result file; an interrupted write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    head = json.dumps({**content, "rows": None}, indent=1).removesuffix("null\n}")
    body = ",\n".join("  " + json.dumps(row) for row in content["rows"])
    part.write_text(f"{head}[\n{body}\n ]\n}}\n")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A result file; ValueError says what is not one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as problem:
        raise ValueError(f"result file: expected JSON of `moeyard bench --out`, got {path}: {problem}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("rows"), list):
        raise ValueError(f"result file: expected schema {SCHEMA} with rows, got {path}")
    for row in content["rows"]:
        missing = [key for key in ROW_KEYS if key not in row]
        if missing:
            raise ValueError(f"result file: expected rows with {ROW_KEYS}, got one without {missing} in {path}")
    return content


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
