"""The benchmarks whose results are kept: `python -m moeyard.bench.suite cpu|cuda [--out FOLDER]`."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

SUITES = {
    "cpu": {
        "layout": ["--workload", "seed", "--workload", "ids", "--workload", "routing", "--cold"],
        "vllm-grid": ["--workload", "vllm-grid"],
        "rows": ["--workload", "rows"],
    },
    "cuda": {
        "align": ["--workload", "align", "--workload", "routing", "--workload", "ids"],
        "vllm-grid": ["--workload", "vllm-grid"],
        "rows": ["--workload", "rows"],
    },
}
"""Device -> result file -> arguments of `moeyard bench`."""
LIMIT_S = {"cpu": 600, "cuda": 150}
"""Seconds that one result file may take."""


def main() -> int:
    """Runs every part of a suite, each under its own time limit; a part that fails does not stop the next."""
    parser = argparse.ArgumentParser(prog="python -m moeyard.bench.suite", description=__doc__)
    parser.add_argument("device", choices=sorted(SUITES))
    parser.add_argument(
        "--out", type=Path, help="folder of the result files; benchmarks/results/<machine> unless given"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("suite cuda: skipped, torch sees no GPU", file=sys.stderr)
        return 0
    folder = arguments.out or Path("benchmarks/results") / f"cpu-{os.cpu_count()}core"
    failed = []
    for name, options in SUITES[arguments.device].items():
        out = ["--device", arguments.device, "--out", str(folder / f"{name}.json")]
        start = time.monotonic()
        try:
            status = subprocess.run(
                [sys.executable, "-m", "moeyard", "bench", *options, *out],
                timeout=LIMIT_S[arguments.device],
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
        print(f"{name}: exit status {status} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if status:
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
