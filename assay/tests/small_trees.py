"""Trees of one file each, that sum so many numbers, and `assay ab` of two of them."""

import json
import sys
from pathlib import Path
from typing import Any

from assay.__main__ import main

WORK = "total = 0\nfor i in range({units} * 10000): total += i * i\n"
CALL = "def work(n):\n    total = n\n    for i in range({units} * 10000): total += i * i\n    return total\n"
ANY_LOAD = ["--most-foreign", "1e9"]  # tests run beside each other


def tree(folder: Path, units: int, more: str = "", text: str = WORK) -> Path:
    folder.mkdir()
    (folder / "work.py").write_text(text.format(units=units) + more)
    (folder / "inputs.py").write_text("def make(seed):\n    return (seed,)\n")
    return folder


def ab(a: Path, b: Path, raw: Path, *options: str) -> int:
    return main(["ab", str(a), str(b), "--out", str(raw), *options, "--", sys.executable, "-S", "work.py"])


def call(a: Path, b: Path, raw: Path, *options: str) -> int:
    given = ["--call", "work:work", "--inputs", "inputs:make", *ANY_LOAD, *options]
    return main(["ab", str(a), str(b), "--out", str(raw), *given])


def rows(raw: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in raw.read_text().splitlines()]
