"""The benchmarks whose results are kept: `python -m moeyard.bench.suite cpu|cuda [--out FOLDER]`."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

from moeyard.bench import results

_MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "qwen3-next-80b-a3b", "deepseek-v3", "gpt-oss-20b", "olmoe-1b-7b")
_ROUTERS = [part for model in _MODELS for part in ("--workload", model)]
_EXPERTS = ["--op", "fused_experts", "--provider", "moeyard:cpu", "--provider", "transformers", "--rounds", "15"]
SUITES = {
    "cpu": {
        "layout": ["--workload", "seed", "--workload", "ids", "--workload", "routing", "--cold"],
        "vllm-grid": ["--workload", "vllm-grid"],
        "rows": ["--workload", "rows"],
        "routers": [*_ROUTERS, "--op", "route"],
        "experts-qwen3": ["--workload", "qwen3-30b-a3b", *_EXPERTS],
        "experts-mixtral": ["--workload", "mixtral-8x7b", "--scale", "2", *_EXPERTS],
    },
    "cuda": {
        "align": ["--workload", "align", "--workload", "routing", "--workload", "ids"],
        "first-calls": ["--workload", "seed", "--cold"],
        "vllm-grid": ["--workload", "vllm-grid"],
        "rows": [
            *("--workload", "models", "--workload", "fp8", "--workload", "router", "--workload", "grouped"),
            *("--workload", "decode", "--rounds", "15", "--provider", "moeyard:cuda"),
            *("--provider", "moeyard:cuda-one-by-one", "--provider", "vllm"),
        ],
    },
}
"""Device -> result file -> arguments of `moeyard bench`."""
LIMIT_S = {"cpu": 600, "cuda": 240}
"""Seconds that one result file may take."""


def main() -> int:
    """Runs every part of a suite, each under its own time limit; a part that fails does not stop the next."""
    parser = argparse.ArgumentParser(prog="python -m moeyard.bench.suite", description=__doc__)
    parser.add_argument("device", choices=sorted(SUITES))
    parser.add_argument(
        "--out", type=Path, help="folder of the result files; benchmarks/results/<machine> unless given"
    )
    parser.add_argument("--tests", type=Path, help="JUnit XML of the tests on that device: its summary goes along")
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
        if arguments.tests and (folder / f"{name}.json").is_file():
            content = results.read(folder / f"{name}.json")
            results.write(folder / f"{name}.json", {"tests": test_summary(arguments.tests), **content})
    return 1 if failed else 0


def test_summary(path: Path) -> dict[str, float]:
    """How many tests of a JUnit XML file passed, failed and were skipped, and the seconds they took."""
    suite = ElementTree.parse(path).getroot().find("testsuite")  # noqa: S314 - a file that our own tests wrote
    if suite is None:
        raise ValueError(f"--tests: expected JUnit XML with a testsuite, got {path}")
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return {"passed": passed, "failed": failed, "skipped": count["skipped"], "seconds": float(suite.get("time", 0))}


if __name__ == "__main__":
    sys.exit(main())
