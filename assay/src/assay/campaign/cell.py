"""One cell: an agent's run, then the judgement of its patch, each in a process of its own that can be killed.

A cell's folder holds its own ledger, so that whatever ends a process, the same cell goes on where it was: a finished
run is not run again, an interrupted judgement goes on, and a finished one is read.
"""

import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.agents import running, template
from assay.agents.record import PATCH
from assay.campaign.plan import Cell
from assay.campaign.rows import spoilt
from assay.contract import cells
from assay.contract import task as tasks
from assay.contract.errors import Status, StoppedError
from assay.contract.frozen import written
from assay.contract.outcome import INFRA
from assay.judgement.attempt import judge
from assay.judgement.guards import Source
from assay.judgement.ledger import Ledger
from assay.prompts.render import Prompt

ORDER, ERROR, VERDICT, LOCK = "order.json", "error.json", "verdict.json", "lock"
_PDEATHSIG = 1


def prepared(cell: Cell, folder: Path) -> Path:
    """The cell's folder, with all that its processes are told."""
    place = folder / "cells" / cell.key
    place.mkdir(parents=True, exist_ok=True)
    order: dict[str, Any] = {"task": str(cell.task.file), "digest": cell.task.digest, "number": cell.number}
    if cell.agent is not None and cell.prompt is not None:
        prompt = cell.prompt
        order |= {"agent": str(cell.agent.file), "agent_digest": cell.agent.digest}
        order |= {"variables": dict(cell.agent.given), "seconds": cell.agent.agent.budget.seconds}
        order |= {"prompt": [prompt.text, prompt.template, list(prompt.tells), prompt.level]}
    else:
        (place / PATCH).write_bytes(cell.patch)
    written(place / ORDER, json.dumps(order))
    return place


def run_agent(place: Path, tried: int) -> None:
    """Runs the cell's agent, once more than it was tried before."""
    order = json.loads((place / ORDER).read_text())
    read = tasks.read(Path(order["task"]))
    agent = running.limited(template.read(order["agent"], order["variables"]), order["seconds"])
    _unchanged(order, read.digest, agent.digest)
    text, name, tells, level = order["prompt"]
    prompt = Prompt(text, name, tuple(tells), level)
    secrets = running.secrets_of(agent.agent, os.environ)
    running.run(running.Order(read, agent, prompt, secrets, order["number"]), place / f"run-{tried + 1}")


def run_judge(place: Path) -> None:
    """Judges the cell's patch; verdict.json names the attempt's folder, too."""
    order = json.loads((place / ORDER).read_text())
    read = tasks.read(Path(order["task"]))
    _unchanged(order, read.digest, order.get("agent_digest", ""))
    begun, store = time.monotonic(), place / "store"
    found = _judged(store)
    if found is None:
        found = judge(read, Source("patch", str(_patch_of(place))), store)[0]
    seconds = _spent(place) + time.monotonic() - begun
    written(place / VERDICT, json.dumps({"seconds": round(seconds, 3), "verdict": found}))


def _judged(store: Path) -> dict[str, Any] | None:
    """The verdict of an attempt that has its last row, if the process ended before it could tell of it."""
    if not (store / "ledger.sqlite").exists():
        return None
    ledger = Ledger(store)
    try:
        ends = [row["id"] for row in ledger.listing() if row["outcome"]]
    finally:
        ledger.close()
    found: dict[str, Any] | None = None
    if ends:
        found = json.loads((store / "attempts" / ends[-1] / VERDICT).read_text())
    return found if found is None or not spoilt(found["outcome"]) else None


def _spent(place: Path) -> float:
    """Seconds of earlier judgements of this cell."""
    file = place / VERDICT
    return float(json.loads(file.read_text())["seconds"]) if file.exists() else 0.0


def _unchanged(order: Mapping[str, Any], task: str, agent: str) -> None:
    """StoppedError if the task or the agent is not what the campaign was read with."""
    if order["digest"] != task or order.get("agent_digest", agent) != agent:
        raise StoppedError(f"{order['task']}: expected task and agent to stay as they were when the campaign was read")


def _patch_of(place: Path) -> Path:
    found = runs(place)
    return found[-1] / PATCH if found else place / PATCH


def runs(place: Path) -> list[Path]:
    """Folders of finished runs, oldest first."""
    found = [path for path in place.glob("run-*") if running.done(path) is not None]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


@dataclass(frozen=True)
class State:
    """How far a cell is."""

    runs: list[dict[str, Any]]
    verdict: dict[str, Any] | None
    judge_s: float
    error: dict[str, Any] | None

    @property
    def run_spoilt(self) -> bool:
        """Whether the last run counts for nobody."""
        return bool(self.runs) and self.runs[-1]["outcome"].startswith(INFRA)

    @property
    def verdict_spoilt(self) -> bool:
        """Whether the last judgement says nothing."""
        return self.verdict is not None and spoilt(self.verdict["outcome"])


def state(place: Path) -> State:
    """What the cell's folder says."""
    found = [one for path in runs(place) if (one := running.done(path)) is not None]
    file, error = place / VERDICT, place / ERROR
    told: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"verdict": None, "seconds": 0.0}
    return State(found, told["verdict"], told["seconds"], json.loads(error.read_text()) if error.exists() else None)


def row(cell: Cell, place: Path, folder: Path) -> cells.Row:
    """The cell's line of the journal, once nothing more is to be done."""
    seen = state(place)
    run, verdict = seen.runs[-1] if seen.runs else None, seen.verdict
    if seen.error is not None:
        outcome, words, status = "infra.host", [str(seen.error["words"])], int(Status.INFRASTRUCTURE)
    elif verdict is not None:
        outcome, words, status = verdict["outcome"], verdict["words"], verdict["status"]
    else:
        assert run is not None
        outcome, words, status = run["outcome"], [run["words"]], int(Status.INFRASTRUCTURE)
    attempt = place / "store" / "attempts" / verdict["attempt"]["id"] if verdict else None
    used = [one["used"] for one in seen.runs]
    return cells.Row(
        key=cell.key,
        task=cells.Task(cell.task.task.name, cell.task.digest, cell.task.task.delta),
        who=cells.Who(cell.kind, cell.who, cell.digest),  # type: ignore[arg-type]
        number=cell.number,
        tries=max(1, len(seen.runs)),
        run=run["outcome"] if run else "",
        outcome=outcome,
        words=words,
        status=status,
        level=cell.prompt.level if cell.prompt else "",
        template=cell.prompt.template if cell.prompt else "",
        expect=cell.expect,
        workloads=[
            cells.Workload(one["name"], one["verdict"], one["estimate"], *_ends(one), blocks=one["blocks"], p=one["p"])
            for one in (verdict["workloads"] if verdict else [])
        ],
        cost=cells.Cost(
            round(sum(one["seconds"] for one in used), 3),
            seen.judge_s,
            _sum([one["tokens"] for one in used]),
            _sum([one["money"] for one in used]),
        ),
        patch=verdict["patch"]["digest"] if verdict else "",
        attempt=str(attempt.relative_to(folder)) if attempt else "",
        folder=str(place.relative_to(folder)),
    )


def _ends(one: Mapping[str, Any]) -> tuple[float | None, float | None]:
    low, high = one["interval"]
    return low, high


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def main(arguments: Sequence[str]) -> int:
    """A cell's process: FOLDER agent|judge TRIES PARENT. Dies with its parent; an error is left in the folder."""
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    place, part, tried, parent = Path(arguments[0]), arguments[1], int(arguments[2]), int(arguments[3])
    if os.getppid() != parent:
        return Status.INFRASTRUCTURE
    try:
        with (place / LOCK).open("w") as lock:  # of a cell that was given to two machines one waits for the other
            fcntl.flock(lock, fcntl.LOCK_EX)
            run_agent(place, tried) if part == "agent" else run_judge(place)
    except (StoppedError, OSError, ValueError) as problem:
        written(place / ERROR, json.dumps({"part": part, "words": f"{type(problem).__name__}: {problem}"}))
        return Status.INFRASTRUCTURE
    return Status.SHOWN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
