"""The middle command: a frozen plan in, RAW out. Standard library and numpy, to run where nothing can be installed.

RAW is a folder: the plan, what its gates found, and a file of JSON lines a workload (raw.schema.json), which grows
block by block. Whatever cuts it short, the next run goes on behind the last whole line.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from assay import building, outcomes, provenance, sandbox
from assay.arms import ArmError
from assay.experiment import NotRepeatableError, measured, rows_of
from assay.frozen import FILE, Frozen, written
from assay.measure import TooShortError, Trees
from assay.outcomes import Gate
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

    Before, every arm is built and the candidate's changed sources are looked at, unless that was done; what a gate has
    rejected is not measured. ArmError and BuildError if that fails and it is not the candidate's doing.
    `environment` is set in every arm beside the task's own.
    A run that fails is a last row of RAW: the candidate's is `incorrect` or `tampered`, another arm's `infra.run`.
    """
    stop = time.monotonic() + seconds
    if sandboxed and sandbox.refusal():
        raise ValueError(f"{sandbox.refusal()}; --no-sandbox measures without, and the verdict says so")
    copy = raw / FILE
    if copy.exists() and Frozen.read(copy).digest != frozen.digest:
        raise ValueError(f"--out: expected RAW of this plan, got that of another in {raw}")
    stopped = not _gated(frozen, sandboxed)
    raw.mkdir(parents=True, exist_ok=True)
    written(copy, json.dumps(frozen.content, indent=1))
    written(raw / outcomes.FILE, (frozen.folder / outcomes.FILE).read_text())
    if stopped:
        return True
    for name, plan in frozen.plans().items():
        with tempfile.TemporaryDirectory(prefix="places-", dir=frozen.folder) as folder:
            place, more = Path(folder), environment or {}
            trees = building.placed(frozen, place, sandboxed=sandboxed, isolation=plan.isolation, more=more)
            left = frozen.content["budget_s"] - _spent(frozen, raw)
            if not _decided(left, name, plan, trees, raw, stop - time.monotonic(), told):
                return False
    return True


def _gated(frozen: Frozen, sandboxed: bool) -> bool:
    """Tries the gates that belong to the machine that measures; whether all are passed that were tried anywhere."""
    found = outcomes.noted(frozen, frozen.folder)
    if not all(outcomes.passed(one) for one in found.values()):
        return False
    clean, tree = frozen.folder / "clean", frozen.tree("candidate")
    wanted = "provenance" in outcomes.wanted(frozen) and "provenance" not in found
    if wanted and not clean.exists():  # what a build leaves in a tree could hide that a source is not used
        frozen.check()
        shutil.rmtree(part := frozen.folder / "clean.part", ignore_errors=True)
        shutil.copytree(tree, part, symlinks=True).rename(clean)
    try:
        building.built(frozen, sandboxed=sandboxed)
        gate = Gate("", f"{len(frozen.arms)} arms")
    except building.BuildError as problem:
        if problem.arm != "candidate":
            raise
        gate = Gate("build_failed", str(problem))
    outcomes.note(frozen, "build", gate)
    if wanted and outcomes.passed(gate):
        gate = provenance.gate(
            frozen, lambda folder: shutil.copytree(clean, folder, symlinks=True), sandboxed=sandboxed
        )
        if gate.outcome.startswith("infra."):
            raise ArmError("provenance", gate.words, infra=True)
        outcomes.note(frozen, "provenance", gate)
    shutil.rmtree(clean, ignore_errors=True)
    return outcomes.passed(gate)


def _spent(frozen: Frozen, raw: Path) -> float:
    """Seconds that all blocks of all workloads have taken."""
    rows = [row for name in frozen.plans() for row in whole_rows(raw / f"{name}.jsonl")]
    return float(sum(row["elapsed_s"] for row in rows if row["kind"] == "block"))


def _decided(left: float, name: str, plan: Plan, trees: Trees, raw: Path, seconds: float, told: Told) -> bool:
    """One workload, within what is `left` of the budget and the `seconds` of this call; whether it is decided."""
    file = raw / f"{name}.jsonl"
    earlier = whole_rows(file)
    if earlier and earlier[-1]["kind"] in ("verdict", "failed"):
        return True
    if earlier and earlier[0]["isolation"] != trees.isolation:
        raise ValueError(f"RAW: expected to go on as it began, {earlier[0]['isolation']}, got {trees.isolation}")
    told({"kind": "workload", "name": name})
    with file.open("a") as out:
        try:
            seen = (
                measured(plan, trees, out, earlier=earlier, seconds=min(seconds, left), told=told) if left > 0 else None
            )
            if seen is None and left <= seconds:
                raise _OverBudgetError("the task's seconds of measuring are spent, and this is not decided")
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
        outcome = "infra.run" if not own else "tampered" if problem.tampered else "incorrect"
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
