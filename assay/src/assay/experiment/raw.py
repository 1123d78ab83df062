"""RAW, as it is read: rows, the judgement that they lead to."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from assay.contract.rows import VERSION, Judged
from assay.experiment.blocks import Blocks
from assay.statistics.looks import LOOKS, Judgement


def replay(lines: Sequence[str]) -> tuple[Judgement, dict[str, Any]]:
    """The judgement that RAW's blocks lead to, and its header. ValueError says what is missing or not RAW."""
    rows = rows_of(lines)
    blocks = Blocks(rows[0]["plan"]["workloads"], rows[0]["plan"]["workload"]["rounds"])
    for row in rows[1:]:
        if row["kind"] == "block":
            blocks.add(row)
            seen = blocks.decision(rows[0]["plan"]["delta"])
            if seen is not None and seen.verdict != "continue":
                return seen, rows[0]
    raise ValueError(f"RAW: expected blocks up to a look that decides, got {len(blocks.seconds['base'])} clean ones")


def rows_of(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of RAW, header first. ValueError if it is not RAW, or of another protocol."""
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as problem:
        raise ValueError(f"RAW: expected JSON lines, got {problem}") from None
    if not rows or rows[0].get("kind") != "header" or rows[0].get("schema") != VERSION:
        raise ValueError(f"RAW: expected a header of schema {VERSION} in the first line")
    looks = [[look.blocks, look.alpha] for look in LOOKS]
    if rows[0]["plan"]["looks"] != looks:
        raise ValueError(f"RAW: expected the looks of this version, {looks}, got {rows[0]['plan']['looks']}")
    return rows


def verdict_row(seen: Judgement) -> dict[str, Any]:
    """A judgement as a row of RAW."""
    return asdict(
        Judged(
            verdict=seen.verdict,
            reason=seen.reason,
            estimate=_finite(seen.estimate),
            interval=[_finite(seen.interval.low), _finite(seen.interval.high)],
            blocks=seen.blocks,
            alpha=seen.alpha,
            material=seen.material,
            detectable=_finite(seen.detectable),
        )
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def whole_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that was perhaps cut off in the middle of a line, which is taken away."""
    if not file.exists():
        return []
    data = file.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with file.open("r+b") as stream:
            stream.truncate(end)
    lines = data[:end].decode().splitlines()
    if lines and json.loads(lines[0])["kind"] == "failed":
        return [json.loads(line) for line in lines]
    return rows_of(lines) if lines else []
