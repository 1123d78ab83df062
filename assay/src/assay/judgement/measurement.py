"""The middle command: a frozen plan in, RAW out. Standard library and numpy, to run where nothing can be installed.

RAW is a folder: the plan, what its gates found, and a file of JSON lines a workload (contract/rows.py), which grows
block by block. Whatever cuts it short, the next run goes on behind the last whole line.
"""

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from assay.arms import commands, sandbox
from assay.arms.trees import Trees
from assay.contract.errors import ArmError, MeasurementError, NoSandboxError, OverBudgetError
from assay.contract.frozen import FILE, Frozen, written
from assay.contract.outcome import INFRA, Outcome
from assay.contract.rows import Failed
from assay.contract.workload import Plan
from assay.experiment.raw import whole_rows
from assay.experiment.series import measured
from assay.gates import notes, provenance, table
from assay.gates.gate import Given, Where
from assay.machine.conditions import Conditions
from assay.report.verdict import PATCH

Told = Callable[[dict[str, Any]], None]


def measure(
    frozen: Frozen,
    raw: Path,
    *,
    sandboxed: bool,
    seconds: float = math.inf,
    build_jobs: int = 0,
    environment: Mapping[str, str] | None = None,
    conditions: Conditions | None = None,
    told: Told = lambda _: None,
) -> bool:
    """Measures what is not decided yet, for `seconds` at most; whether everything is. ValueError as in `run`.

    Before, every arm is built and the candidate's changed sources are looked at, unless that was done; what a gate has
    rejected is not measured. ArmError if that fails and it is not the candidate's doing. `build_jobs`: as in `judge`.
    `environment` is set in every arm beside the task's own, `conditions` hold while times are measured.
    A run that fails is a last row of RAW: the candidate's is `incorrect` or `tampered`, another arm's `infra.run`.
    """
    stop = time.monotonic() + seconds
    if sandboxed and sandbox.refusal():
        raise NoSandboxError(f"{sandbox.refusal()}; --no-sandbox measures without, and the verdict says so")
    copy = raw / FILE
    if copy.exists() and Frozen.read(copy).digest != frozen.digest:
        raise ValueError(f"--out: expected RAW of this plan, got that of another in {raw}")
    stopped = not _gated(frozen, sandboxed, build_jobs, environment or {})
    raw.mkdir(parents=True, exist_ok=True)
    written(copy, json.dumps(frozen.content, indent=1))
    written(raw / notes.FILE, (frozen.folder / notes.FILE).read_text())
    if (patch := frozen.folder / PATCH).is_file():
        shutil.copyfile(patch, raw / PATCH)
    if stopped:
        return True
    conditions = conditions or Conditions()
    with conditions.kept():
        for name, plan in frozen.plans().items():
            trees = commands.placed(frozen, sandboxed=sandboxed, isolation=plan.isolation, more=environment)
            left = frozen.content["budget_s"] - _spent(frozen, raw)
            seconds = stop - time.monotonic()
            if not _decided(left, name, plan, trees, raw, seconds, conditions.patience_s, told):
                return False
    return True


def _gated(frozen: Frozen, sandboxed: bool, build_jobs: int, environment: Mapping[str, str]) -> bool:
    """Tries the gates that belong to the machine that measures; whether all are passed that were tried anywhere."""
    found = notes.noted(frozen, frozen.folder)
    if not all(one.passed for one in found.values()):
        return False
    mine = [gate for gate in table.GATES if gate.where is Where.MEASURED and gate.name in notes.wanted(frozen)]
    clean, tree = frozen.folder / "clean", frozen.tree("candidate")
    if not (frozen.ahead or clean.exists()) and any(
        gate.name not in found for gate in mine
    ):  # what a build leaves could hide a source
        frozen.check()
        shutil.rmtree(part := frozen.folder / "clean.part", ignore_errors=True)
        shutil.copytree(tree, part, symlinks=True).rename(clean)
    options: dict[str, Any] = {"build_jobs": build_jobs, "environment": environment}
    given = Given(frozen, sandboxed, lambda folder: shutil.copytree(clean, folder, symlinks=True), **options)
    passed = True
    for gate in [*(one for one in table.GATES if one.where is Where.BOTH), *mine]:
        if passed and (gate.where is Where.BOTH or gate.name not in found):
            seen = gate.tried(given)
            if seen.outcome.startswith(INFRA) or seen.outcome == Outcome.TASK_INVALID:
                raise ArmError(gate.name, seen.words, infra=True)  # this machine may be mended
            passed = notes.note(frozen, gate.name, seen).passed
    for copies in (clean, frozen.folder / provenance.AHEAD):
        shutil.rmtree(copies, ignore_errors=True)
    return passed


def _spent(frozen: Frozen, raw: Path) -> float:
    """Seconds that all blocks of all workloads have taken."""
    rows = [row for name in frozen.plans() for row in whole_rows(raw / f"{name}.jsonl")]
    return float(sum(row["elapsed_s"] for row in rows if row["kind"] == "block"))


def _decided(
    left: float, name: str, plan: Plan, trees: Trees, raw: Path, seconds: float, patience_s: float, told: Told
) -> bool:
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
            options: dict[str, Any] = {"seconds": min(seconds, left), "patience_s": patience_s, "told": told}
            seen = measured(plan, trees, out, earlier=earlier, **options) if left > 0 else None
            if seen is None and left <= seconds:
                raise OverBudgetError("the task's seconds of measuring are spent, and this is not decided")
            return seen is not None
        except MeasurementError as problem:
            if commands.disk_is_full(raw):
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}; {problem}") from None
            out.write(json.dumps(asdict(Failed(outcome=problem.outcome, words=str(problem)))) + "\n")
            return True
