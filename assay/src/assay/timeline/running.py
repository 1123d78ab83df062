"""A history in a folder: RAW of each pair of commits, and history.json. The same command goes on after a cut.

What is measured, and how many judgements are allowed, is fixed before the first one. A pair that was decided is not
measured again; one that was void is, with its earlier RAW kept, since what voids blocks says nothing of the candidate.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from assay import __version__
from assay.contract import seeds
from assay.contract.errors import ArmError, Status, StoppedError
from assay.contract.frozen import written
from assay.contract.outcome import NOTHING
from assay.contract.timeline import VERSION, Commit, History, Pair
from assay.contract.workload import Plan
from assay.experiment.raw import whole_rows
from assay.experiment.series import run
from assay.machine.conditions import Conditions
from assay.mining import history
from assay.repository import checkout, store
from assay.timeline.bisection import BrokenError, Search

FILE = "history.json"
_RAW = "raw"
Told = Callable[[dict[str, Any]], None]


class VoidError(StoppedError):
    """Blocks of a pair judge nothing, as often as they were measured."""

    status = Status.INFRASTRUCTURE


@dataclass(frozen=True)
class Options:
    """How commits are measured, and how far a search goes."""

    plan: Plan
    """Of one judgement; its seed is drawn anew for each pair."""
    subject: str
    setup: tuple[str, ...] = ()
    points: int = 1
    most: int = 1
    """Judgements that are allowed."""
    conditions: Conditions = field(default_factory=Conditions)
    """What is done against others on the machine."""
    voids: int = 2
    """How often a pair is measured that is void, in one run of the command."""

    @property
    def digest(self) -> str:
        """Identity of all that must not change while a history goes on."""
        fixed = replace(self.plan, seed=0, workloads=self.most).digest()
        return hashlib.sha256(json.dumps([fixed, self.setup, self.points, self.most]).encode()).hexdigest()[:16]


def commits_of(repository: Path, range_: str) -> list[Commit]:
    """The commits of `A..B`, A first, then the main line up to B, oldest first. ValueError for another range."""
    first, dots, last = range_.partition("..")
    if not dots or not first or last.startswith("."):
        raise ValueError(f"RANGE: expected A..B, got {range_}")
    start, end = store.resolved(repository, first), store.resolved(repository, last or "HEAD")
    line = history.commits(repository, (end, f"^{start}"))
    found = [history.commit(repository, start), *reversed(line)]
    if len(found) < 2:
        raise ValueError(f"RANGE: expected commits after {first}, got none in {range_}")
    return [Commit(one.name, one.date, one.subject) for one in found]


class Running:
    """A history that is being made."""

    def __init__(self, repository: Path, commits: Sequence[Commit], folder: Path, options: Options, told: Told) -> None:
        """ValueError if the folder holds another history."""
        self.repository, self.commits, self.folder, self.options, self.told = repository, commits, folder, options, told
        self.pairs: list[Pair] = []
        self.search = Search(len(commits) - 1, self._pair, math.log1p(options.plan.delta), options.most)
        earlier = read(folder) if (folder / FILE).exists() else None
        if earlier and (earlier["plan"], [one["name"] for one in earlier["commits"]]) != (
            options.digest,
            [one.name for one in commits],
        ):
            raise ValueError(f"--out: expected the history of these commits and options, got another one in {folder}")
        (folder / _RAW).mkdir(parents=True, exist_ok=True)
        self._write("unfinished")

    def run(self) -> dict[str, Any]:
        """Searches to its end; history.json's content. VoidError if a pair stays void, and the same command goes on."""
        self.search.run(self.options.points)
        kinds = {step.kind for step in self.search.steps}
        outcome = "regressed" if "slower" in kinds else "undecided" if self.search.open else ""
        return self._write(outcome or ("improved" if kinds else "unchanged"))

    def _write(self, outcome: str) -> dict[str, Any]:
        found = asdict(
            History(
                assay=__version__,
                outcome=outcome,  # type: ignore[arg-type]
                subject=self.options.subject,
                plan=self.options.digest,
                delta=self.options.plan.delta,
                most=self.options.most,
                commits=list(self.commits),
                pairs=self.pairs,
                steps=sorted(self.search.steps, key=lambda step: step.first),
                broken={str(index): words for index, words in self.search.broken.items()},
                open=self.search.open,
            )
        )
        written(self.folder / FILE, json.dumps(found, indent=1) + "\n")
        return found

    def _pair(self, before: int, after: int) -> Pair:
        """The judgement of a pair, from its RAW or by measuring."""
        names = [self.commits[i].name for i in (before, after)]
        file = self.folder / _RAW / f"{before:05d}-{after:05d}-{names[1][:12]}.jsonl"
        for _ in range(self.options.voids):
            self.told({"kind": "workload", "name": f"{names[0][:12]} to {names[1][:12]}"})
            rows = whole_rows(file)
            if not rows or rows[-1]["kind"] != "verdict":
                self._measured(before, after, file, rows)
                rows = whole_rows(file)
            voids = list(file.parent.glob(f"{file.stem}.void-*.jsonl"))
            last = rows[-1]
            if last["verdict"] not in NOTHING:
                facts = {name: last[name] for name in ("verdict", "estimate", "interval", "alpha", "blocks")}
                place = file.relative_to(self.folder).as_posix()
                self.pairs.append(Pair(before, after, **facts, voids=len(voids), raw=place))
                self._write("unfinished")
                return self.pairs[-1]
            file.rename(file.with_name(f"{file.stem}.void-{len(voids) + 1}.jsonl"))
        words = f"{names[0][:12]} to {names[1][:12]}: {last['verdict']}: {last['reason']}; the same command goes on"
        raise VoidError(words)

    def _measured(self, before: int, after: int, file: Path, rows: Sequence[dict[str, Any]]) -> None:
        seed = rows[0]["plan"]["seed"] if rows else seeds.secret()
        plan = replace(self.options.plan, seed=seed, workloads=self.options.most).checked()
        names = [self.commits[i].name for i in (before, after)]
        shown = {"base": names[0], "candidate": names[1], "control": names[0]}
        with tempfile.TemporaryDirectory(prefix="assay-") as place, file.open("a") as out:
            trees = [checkout.written(self.repository, name, Path(place)) for name in names]
            more: dict[str, Any] = {"setup": self.options.setup, "names": shown, "earlier": rows, "told": self.told}
            more["conditions"] = self.options.conditions
            try:
                run(trees[0], trees[1], plan, out, **more)
            except ArmError as problem:
                if problem.infra:
                    raise
                index = after if problem.arm == "candidate" else before
                raise BrokenError(index, f"{self.commits[index].name[:12]}: {problem.words}") from None


def read(folder: Path) -> dict[str, Any]:
    """history.json of a folder. ValueError if it is none of this version."""
    found = json.loads((folder / FILE).read_text())
    if not isinstance(found, dict) or (found.get("kind"), found.get("schema")) != ("history", VERSION):
        raise ValueError(f"--out: expected a history of schema {VERSION}, got {folder / FILE}")
    return found
