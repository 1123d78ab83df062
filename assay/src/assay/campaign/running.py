"""A campaign's course: canaries first, then cells in waves; in a wave agents run beside each other, then all is judged.

No agent runs while something is measured, and every judgement takes the machine's locks, so that measuring is alone.
Whatever is killed, the same command goes on: a cell with a row in the journal is done, another goes on from its folder.
"""

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from assay.agents.running import secrets_of
from assay.campaign import canaries, cell, rows
from assay.campaign.plan import Cell, Read
from assay.contract.cells import Row
from assay.contract.errors import UsageError
from assay.contract.frozen import written

_LOOK_S = 0.1
_KILLED = -9


class Worker(Protocol):
    """Where cells' processes run: this machine, or others."""

    def run(self, parts: Sequence["Part"], most: int, told: Callable[[list["Part"]], None]) -> None:
        """Runs all parts to their ends, at most `most` beside each other. `told` hears which are running."""


@dataclass(frozen=True, eq=False)
class Part:
    """A cell's next step."""

    cell: Cell
    place: Path
    what: str
    """`agent` or `judge`."""
    tried: int = 0

    @property
    def command(self) -> list[str]:
        """Of the process that does it, without its parent's number."""
        return [sys.executable, "-m", "assay.campaign.cell", str(self.place), self.what, str(self.tried)]


@dataclass
class Local:
    """Processes of this machine."""

    running: dict[Part, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, parts: Sequence[Part], most: int, told: Callable[[list[Part]], None]) -> None:
        """As Worker says."""
        waiting = list(parts)
        try:
            while waiting or self.running:
                while waiting and len(self.running) < most:
                    part = waiting.pop(0)
                    self.running[part] = subprocess.Popen([*part.command, str(os.getpid())], stdin=subprocess.DEVNULL)
                told(list(self.running))
                time.sleep(_LOOK_S)
                for part in [part for part, process in self.running.items() if process.poll() is not None]:
                    del self.running[part]
        finally:
            for process in self.running.values():
                process.kill()
                process.wait()
            self.running.clear()


@dataclass
class Course:
    """A campaign under way."""

    read: Read
    folder: Path
    told: Callable[[str], None]
    """Hears how far it is, a line at a time."""
    done: Callable[[dict[str, Any]], None]
    """Hears each cell's row when it is finished."""
    worker: Worker = field(default_factory=Local)
    again: bool = False
    """Whether cells that infrastructure spoilt are done again."""
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    """Runs of a cell that is done again, which no longer count as tries."""

    def run(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Rows of all cells of the campaign, and why it is void, a line per canary that failed; [] if it is not.

        UsageError if an agent's key is not set, before anything runs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for one in self.read.cells:
            if one.agent is not None:
                secrets_of(one.agent.agent, os.environ)
        with self._alone():
            self.found = rows.read(self.folder)
            watched = [one for one in self.read.cells if one.kind == "canary"]
            self.finish(watched)
            void = [words for one in watched if (words := self.failed(one))]
            if not void:
                self.finish([one for one in self.read.cells if one.kind != "canary"])
            keys = {one.key for one in self.read.cells}
            return [row for key, row in self.found.items() if key in keys], void

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the campaign's folder. UsageError if another process does."""
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"--out: expected a folder that no other campaign works in, got {self.folder}"
                ) from None
            yield

    def failed(self, one: Cell) -> str:
        """Why a canary speaks against the whole campaign; "" if it does not."""
        row = self.found[one.key]
        held = canaries.holds(one.expect, row["outcome"])
        if held:
            return ""
        seen = "could not be seen" if held is None else "came out otherwise"
        return f"{one.task.task.name}: canary {one.who}, expected {one.expect}, {seen}: {row['outcome']}"

    def finish(self, cells: Sequence[Cell]) -> None:
        """Every cell gets its row, wave by wave."""
        left = [one for one in cells if one.key not in self.found or self.repeated(one)]
        jobs = self.read.campaign.jobs
        for start in range(0, len(left), jobs):
            wave = [(one, cell.prepared(one, self.folder)) for one in left[start : start + jobs]]
            for one, place in wave:
                (place / cell.ERROR).unlink(missing_ok=True)
                self.before[one.key] = len(cell.runs(place)) if self.repeated(one) else 0
            for what in ("agent", "judge"):
                for _ in range(self.read.campaign.retries + 1):
                    parts = [part for one, place in wave if (part := self.next(one, place, what))]
                    if parts:
                        self.worker.run(parts, jobs, self.progress)
            for one, place in wave:
                row = rows.add(self.folder, self.row(one, place))
                self.found[one.key] = row
                self.done(row)

    def repeated(self, one: Cell) -> bool:
        """Whether a cell with a row is done again."""
        return self.again and one.key in self.found and rows.spoilt(self.found[one.key]["outcome"])

    def next(self, one: Cell, place: Path, what: str) -> Part | None:
        """What is still to be done of a step; None if nothing is, or no more is allowed."""
        seen, most = cell.state(place), self.before[one.key] + self.read.campaign.retries + 1
        if seen.error is not None:
            return None
        if what == "agent":
            wanted = one.agent is not None and (not seen.runs or seen.run_spoilt) and len(seen.runs) < most
        else:
            wanted = (seen.verdict is None or seen.verdict_spoilt) and not seen.run_spoilt
            wanted = wanted and (one.agent is None or bool(seen.runs))
        return Part(one, place, what, len(seen.runs)) if wanted else None

    def row(self, one: Cell, place: Path) -> Row:
        """The cell's row. A process that ended without a word leaves an error of the host."""
        seen = cell.state(place)
        if seen.error is None and seen.verdict is None and not seen.run_spoilt:
            written(place / cell.ERROR, '{"part": "", "words": "a process of the cell ended without a word"}')
        return cell.row(one, place, self.folder)

    def progress(self, parts: list[Part]) -> None:
        """Says how far the campaign is."""
        names = ", ".join(f"{part.cell.words} ({part.what})" for part in parts)
        self.told(f"{len(self.found)} of {len(self.read.cells)} cells; {names}")
