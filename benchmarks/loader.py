"""`load_experts` beside a plain read of the same files: `python benchmarks/loader.py --out FILE [--rounds N]`.

A layer of experts is written in each format. In each round its file is read in order, 16 MB at a time into one buffer,
and loaded to the CPU, in random order; before each the system is told to drop the file's pages. FILE has medians and
the median of the rounds' ratios. Where pages stay in memory all the same, `dropped` is false, and the rates are those
of memory.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import moeyard
from moeyard.bench import results
from moeyard.bench.timing import Rates, matrix_tflops
from moeyard.testing import checkpoints

FORMS = ("bfloat16", "fp8 channel", "int4 packed", "gptq v1", "awq", "mxfp4", "nvfp4")
EXPERTS, HIDDEN, SIZE = 16, 2048, 1024
GOAL = 0.8
"""Of the plain read's rate."""
_READ = 1 << 24
_SLOW_GB_S = 6.0  # what a disk of these machines does not reach


def drop(file: Path) -> None:
    """Tells the system that nobody needs the pages of a file."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(file: Path) -> None:
    """In order, into one buffer."""
    buffer = bytearray(_READ)
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while opened.readinto(buffer):
            pass


def measure(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Rates in GB/s of the bytes of a file."""
    layer = checkpoints.FORMS[name]
    checkpoints.write(folder, layer, "apart", experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=SIZE)
    file = folder / "model.safetensors"
    ways = {
        "plain": lambda: read_plainly(file),
        "loaded": lambda: moeyard.load_experts(folder, checkpoints.PREFIX, device="cpu", show_progress=False),
    }
    bytes_, seen = file.stat().st_size, {way: [] for way in ways}
    for number in range(-1, rounds):
        for way in random.sample(list(ways), len(ways)):
            drop(file)
            begin = time.perf_counter()
            ways[way]()
            if number >= 0:
                seen[way].append(time.perf_counter() - begin)
    times = sorted(seconds * 1e6 for seconds in seen["loaded"])
    plain = statistics.median(seen["plain"])
    ratio = statistics.median(one / other for one, other in zip(seen["plain"], seen["loaded"], strict=True))
    return {
        "mode": "eager", "time_us": round(statistics.median(times)), "time_us_p10": round(times[len(times) // 10]),
        "time_us_p90": round(times[-1 - len(times) // 10]), "copy_time_us": None, "product_time_us": None,
        "read_time_us": round(plain * 1e6), "needed_bytes": bytes_, "rounds": rounds,
        "plain_gb_s": round(bytes_ / plain / 1e9, 3), "loaded_gb_s": round(bytes_ / statistics.median(times) / 1e3, 3),
        "loaded_over_plain": round(ratio, 3), "dropped": bytes_ / plain / 1e9 < _SLOW_GB_S,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measures every format and writes the file; 1 if a ratio misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, help="where files are written; the system's folder for such unless given"
    )
    given = parser.parse_args(arguments)
    load, rows, cpu = os.getloadavg()[0], [], torch.device("cpu")
    sizes = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": SIZE}
    for name in FORMS:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            rows.append({
                "op": "load_experts", "workload": f"checkpoint {name}", "routing": "none", "sizes": sizes,
                "provider": "moeyard", "impl": "cpu", "correct": True,
                **measure(name, Path(folder), given.rounds),
            })  # fmt: skip
        print(name, rows[-1])
    slowest = min(row["plain_gb_s"] for row in rows)
    machine = results.machine(cpu, Rates(slowest, slowest, matrix_tflops(cpu, torch.float32, 1024), "float32"))
    machine = {key: value for key, value in machine.items() if not key.endswith(("_gb_s", "_tflops"))}
    content = results.document(rows, machine, {"torch": torch.__version__, "safetensors": version("safetensors")})
    results.write(given.out, {"load_at_start": round(load, 1), "goal_loaded_over_plain": GOAL, **content})
    return int(any(row["loaded_over_plain"] < GOAL for row in rows))


if __name__ == "__main__":
    sys.exit(main())
