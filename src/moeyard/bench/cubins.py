"""The cubins that a wheel brings along: `python -m moeyard.bench.cubins FOLDER ARCH...` compiles the kernels of all
models of bench/workloads into a folder, for architectures such as 90a.
"""

import argparse
import shutil
from pathlib import Path

from moeyard.bench.served import models, options_of, served
from moeyard.cuda.ahead import Unit, units_of
from moeyard.cuda.runtime.compile import cubin, packaged_path, write_cubin
from moeyard.dispatch.processes import in_processes
from moeyard.warmup import cores, facts_of

MAX_BYTES = 20 << 20
_MAX_TOKENS = 16384


def fill(folder: Path, archs: list[str], jobs: int) -> tuple[int, int]:
    """Compiles into a folder; returns the number of cubins and their bytes. ValueError if they pass `MAX_BYTES`."""
    units: dict[Unit, None] = {}
    for name in models():
        layer = served(name)
        facts = facts_of(layer.weights, **options_of(layer))
        for arch in archs:
            digits = arch.rstrip("a")
            units |= dict.fromkeys(units_of(facts, (int(digits[:-1]), int(digits[-1])), _MAX_TOKENS))
    ordered = sorted(units, key=lambda unit: unit[0] != "experts.cu")
    in_processes("moeyard.cuda.ahead:compile_unit", ordered, jobs)
    for unit in ordered:
        write_cubin(packaged_path(*unit, folder=folder), cubin(*unit))
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MAX_BYTES:
        raise ValueError(f"ARCH: expected cubins of at most {MAX_BYTES} bytes, got {size} for {archs}")
    return len(ordered), size


def main() -> None:
    """Fills the folder, whose earlier content is dropped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("arch", nargs="+")
    parser.add_argument("--jobs", type=int, default=cores())
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    count, size = fill(given.folder, given.arch, given.jobs)
    print(f"{count} cubins, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
