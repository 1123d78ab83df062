"""Result files: benchmarks/results/<machine>/<name>.json, every row with what was measured where."""

import json
import os
import platform
import subprocess
import tomllib
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import moeyard
from moeyard.bench.timing import Rates

SCHEMA = 2
ROW_KEYS = (
    "op", "workload", "routing", "sizes", "provider", "impl", "mode",
    "time_us", "time_us_p10", "time_us_p90", "correct",
)  # fmt: skip
"""Keys of a row. time_us is a median; a wrong provider has no times, and `wrong` says why."""
NO_COMMIT = "unknown"
"""What the commit of a result begins with where there is none."""
RATE_KEYS = {1: ("floor_us",), SCHEMA: ("copy_time_us", "read_time_us", "product_time_us")}
"""Schema -> keys of a row that say what its bytes and operations take at the machine's rates; see `yardstick_us`.

Files of schema 1 have only `floor_us`: bytes over copy bandwidth or, where it is longer and the machine has
`matrix_tflops`, operations over that rate.
"""


def yardstick_us(row: dict[str, Any]) -> float | None:
    """Bytes over copy bandwidth, or operations over the rate of products, whichever takes longer; None if unknown.

    It is no bound from below: who mostly reads may be quicker.
    """
    if "floor_us" in row:
        floor: float | None = row["floor_us"]
        return floor
    return max((row[key] for key in ("copy_time_us", "product_time_us") if row[key] is not None), default=None)


def machine(device: torch.device, rates: Rates) -> dict[str, Any]:
    """What the numbers were measured on."""
    facts: dict[str, Any] = {
        "name": f"cpu-{os.cpu_count()}core",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: float(f"{rate:.4g}") if name != "matrix_dtype" else rate for name, rate in asdict(rates).items()},
    }
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        facts["name"] = name.removeprefix("NVIDIA").strip().split()[0].lower()
        facts["gpu"] = name
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["cuda"] = torch.version.cuda
    return facts


def document(rows: list[dict[str, Any]], machine: dict[str, Any], peers: dict[str, str]) -> dict[str, Any]:
    """A whole result file."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit_of(Path(__file__).parent),
        "version": moeyard.__version__,
        "machine": machine,
        "peers": peers,
        "rows": rows,
    }


def commit_of(folder: Path) -> str:
    """The commit of the checkout of moeyard that has bench/ at `folder`; without one, `NO_COMMIT` and the version.

    `MOEYARD_COMMIT` says it for a copy of a tree. A repository that holds an installed moeyard, in an environment or
    as a copy of its files, is not a checkout of it.
    """
    told = os.environ.get("MOEYARD_COMMIT", "")
    if told:
        return told
    top = _output("git", "-C", str(folder), "rev-parse", "--show-toplevel")
    if not top or not _is_own(Path(top), folder):
        return f"{NO_COMMIT}: moeyard {moeyard.__version__} outside a checkout that git can read"
    commit = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    return commit + (
        " with changes" if _output("git", "-C", str(folder), "status", "--porcelain", "--", ":/src") else ""
    )


def _is_own(top: Path, folder: Path) -> bool:
    """Whether a repository's project is moeyard and has `folder` as its bench/."""
    if folder.resolve() != (top / "src" / "moeyard" / "bench").resolve():
        return False
    try:
        project = tomllib.loads((top / "pyproject.toml").read_text())["project"]["name"]
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return False
    return bool(project == "moeyard" and _output("git", "-C", str(folder), "ls-files"))


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a result file; an interrupted write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    last = {**{key: value for key, value in content.items() if key != "rows"}, "rows": None}
    head = json.dumps(last, indent=1).removesuffix("null\n}")
    body = ",\n".join("  " + json.dumps(row) for row in content["rows"])
    part.write_text(f"{head}[\n{body}\n ]\n}}\n")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A result file; ValueError says what is not one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as problem:
        raise ValueError(f"result file: expected JSON of `moeyard bench --out`, got {path}: {problem}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in RATE_KEYS or not isinstance(content.get("rows"), list):
        raise ValueError(f"result file: expected schema {' or '.join(map(str, RATE_KEYS))} with rows, got {path}")
    wanted = (*ROW_KEYS, *RATE_KEYS[schema])
    for row in content["rows"]:
        missing = [key for key in wanted if key not in row]
        if missing:
            raise ValueError(f"result file: expected rows with {wanted}, got one without {missing} in {path}")
    found: dict[str, Any] = content
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str:
    """What a command prints; "" if it fails. Git looks at the folder that it is given, not at GIT_DIR."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
