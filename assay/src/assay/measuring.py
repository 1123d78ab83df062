"""The middle command: a frozen plan in, RAW out. Standard library and numpy, to run where nothing can be installed.

RAW is a folder: the plan, and a file of JSON lines a workload (raw.schema.json), which grows block by block. Whatever
cuts it short, the next run goes on behind the last whole line.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from assay import building, sandbox
from assay.arms import ArmError
from assay.experiment import NotRepeatableError, measured, rows_of
from assay.frozen import FILE, Frozen
from assay.measure import TooShortError, Trees
from assay.plan import Plan

Told = Callable[[dict[str, Any]], None]


def measure(
    frozen: Frozen,
    raw: Path,
    *,
    sandboxed: bool,
    seconds: float = math.inf,
    environment: Mapping[str, str] | None = None,
    told: Told = lambda _: None,
) -> bool:
    """Measures what is not decided yet, for `seconds` at most; whether everything is. ValueError as in `run`.

    `environment` is set in every arm beside the task's own.
    A run that fails is a last row of RAW: the candidate's is `incorrect`, or `tampered` if it forged replies; another
    arm's is `infra.run`.
    """
    stop = time.monotonic() + seconds
    if sandboxed and sandbox.refusal():
        raise ValueError(f"{sandbox.refusal()}; --no-sandbox measures without, and the verdict says so")
    building.built(frozen, sandboxed=sandboxed)
    raw.mkdir(parents=True, exist_ok=True)
    copy = raw / FILE
    if copy.exists() and Frozen.read(copy).digest != frozen.digest:
        raise ValueError(f"--out: expected RAW of this plan, got that of another in {raw}")
    written(copy, json.dumps(frozen.content, indent=1))
    for name, plan in frozen.plans().items():
        with tempfile.TemporaryDirectory(prefix="places-", dir=frozen.folder) as folder:
            trees = _trees(frozen, plan, Path(folder), sandboxed, environment or {})
            if not _decided(frozen.content["budget_s"], name, plan, trees, raw, stop - time.monotonic(), told):
                return False
    return True


def _trees(frozen: Frozen, plan: Plan, folder: Path, sandboxed: bool, more: Mapping[str, str]) -> Trees:
    if not sandboxed:
        os.environ.update({**frozen.content["sandbox"]["environment"], **more})
        return Trees.at({arm: frozen.tree(arm) for arm in frozen.arms}, folder, plan.isolation)
    boxes = {arm: frozen.box(arm) for arm in frozen.arms}
    return Trees.boxed(
        {arm: replace(box, environment={**box.environment, **more}) for arm, box in boxes.items()}, folder
    )


def _decided(budget_s: float, name: str, plan: Plan, trees: Trees, raw: Path, seconds: float, told: Told) -> bool:
    file = raw / f"{name}.jsonl"
    earlier = whole_rows(file)
    if earlier and earlier[-1]["kind"] in ("verdict", "failed"):
        return True
    if earlier and earlier[0]["isolation"] != trees.isolation:
        raise ValueError(f"RAW: expected to go on as it began, {earlier[0]['isolation']}, got {trees.isolation}")
    left = budget_s - sum(row["elapsed_s"] for row in earlier if row["kind"] == "block")
    told({"kind": "workload", "name": name})
    with file.open("a") as out:
        try:
            seen = (
                measured(plan, trees, out, earlier=earlier, seconds=min(seconds, left), told=told) if left > 0 else None
            )
            if seen is None and left <= seconds:
                raise _OverBudgetError(f"expected to be decided within the task's {budget_s:g} s of measuring")
            return seen is not None
        except (ArmError, TooShortError, NotRepeatableError, _OverBudgetError) as problem:
            out.write(json.dumps(_failed(problem)) + "\n")
            return True


class _OverBudgetError(Exception):
    """The task's seconds did not suffice."""


def _failed(problem: Exception) -> dict[str, Any]:
    outcome = "task_invalid"
    if isinstance(problem, ArmError):
        own = problem.arm == "candidate" and not problem.infra
        outcome = "infra.run" if not own else "tampered" if problem.forged else "incorrect"
    elif isinstance(problem, _OverBudgetError):
        outcome = "infra.budget"
    return {"kind": "failed", "outcome": outcome, "words": str(problem)}


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


def written(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(file)
