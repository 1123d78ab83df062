"""The command ab: two trees or more against each other, without a task."""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.cli import what
from assay.cli.command import Command, beside
from assay.cli.shown import STATUS, judged
from assay.contract.errors import ArmError, Status, UsageError
from assay.contract.workload import Plan, Workload
from assay.experiment.cases import cases
from assay.experiment.series import run
from assay.report import page, terminal
from assay.report.terminal import Progress
from assay.repository import checkout
from assay.statistics.looks import Judgement

_DESCRIPTION = """Runs A, B and A' in blocks, at most 40 of them, in fresh processes, until a look decides. A and B are
directories, or commits of the repository here. All arms are copies, made in the same way. Several candidates, and all
cases of an asv benchmark, are comparisons of their own, whose levels are divided by their number."""
_USAGE = "assay ab A B [B ...] [options] (-- COMMAND ... | --call M:F | --asv F:C.M | --pyperf F:NAME)"
_WORST = (Status.INFRASTRUCTURE, Status.REFUTED, Status.OPEN, Status.SHOWN)
"""Of several comparisons, the first of these that one of them has."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="base: a directory, or a commit of the repository here")
    parser.add_argument("b", metavar="B", nargs="+", help="candidates, likewise")
    what.arguments(parser)
    parser.add_argument("--prime", metavar="A'", help="a second build of base; a copy of A unless given")
    parser.add_argument("--out", type=Path, help="RAW file, of several comparisons a folder; temporary unless given")
    parser.add_argument("--html", type=Path, help="write a report, too; of several comparisons into a folder")


@dataclass(frozen=True)
class _Comparison:
    """One candidate and one case."""

    candidate: str
    tree: Path
    case: str
    workload: Workload

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.candidate} ({self.case})" if self.case else self.candidate


def _ab(given: argparse.Namespace, progress: Progress) -> int:
    workload = what.given(given)
    what.plan(given, workload, 1)  # what makes no sense is said before anything is written out
    with tempfile.TemporaryDirectory(prefix="assay-") as place:
        folder, here = Path(place), Path.cwd()
        base = checkout.tree("A", given.a, folder, here)
        control = checkout.tree("--prime", given.prime, folder, here) if given.prime else None
        trees = {name: checkout.tree("B", name, folder, here) for name in given.b}
        if len(trees) != len(given.b):
            raise UsageError(f"B: expected different candidates, got {' '.join(given.b)}")
        of = _cases(given, workload, base)
        comparisons = [_Comparison(name, tree, *case) for name, tree in trees.items() for case in of]
        out = _Out(given, comparisons)
        found = []
        for one in comparisons:
            plan = what.plan(given, one.workload, len(comparisons))
            found.append(_compared(given, one, plan, (base, control), out, progress))
        if len(found) > 1:
            pairs = zip(comparisons, found, strict=True)
            terminal.lines(["", *(f"{one.name}: {_short(seen, given.delta)}" for one, seen in pairs)])
        return next(status for status in _WORST if status in [STATUS[seen.verdict] for seen in found])


def _short(seen: Judgement, delta: float) -> str:
    """A judgement on one line."""
    first, *more = terminal.outcome(seen, delta)
    return f"{seen.verdict}: {more[0]}" if more else first


def _cases(given: argparse.Namespace, workload: Workload, base: Path) -> list[tuple[str, Workload]]:
    """The cases that are compared, each with its text."""
    if workload.kind != "asv":
        return [("", workload)]
    try:
        texts = cases(workload, base, given.isolation, given.timeout)
    except ArmError as problem:
        raise ArmError("a run failed", str(problem)) from None
    if given.case != what.ALL:
        return [(texts[given.case], workload)]
    return [(text, what.of_case(workload, number)) for number, text in enumerate(texts)]


class _Out:
    """Where RAW and reports of each comparison go."""

    def __init__(self, given: argparse.Namespace, comparisons: Sequence[_Comparison]) -> None:
        self.raw, self.html, self.many = given.out, given.html, len(comparisons) > 1
        if self.raw is None:
            self.raw = Path(tempfile.mkdtemp(prefix="assay-")) / f"{time.strftime('%Y%m%d-%H%M%S')}"
            self.raw = self.raw if self.many else self.raw.with_suffix(".jsonl")
        if self.raw.exists():
            raise UsageError(f"--out: expected a file or folder that is not there yet, got {self.raw}")
        if self.many:
            self.raw.mkdir(parents=True)
        if self.many and self.html:
            self.html.mkdir(parents=True, exist_ok=True)
        self.names: dict[str, str] = {}
        for one in comparisons:
            name = what.file_name(one.candidate, str(one.workload.case) if one.case else "")
            taken = sum(other == name or other.startswith(f"{name}.") for other in self.names.values())
            self.names[one.name] = f"{name}.{taken}" if taken else name

    def of(self, one: _Comparison) -> tuple[Path, Path | None]:
        """RAW and report."""
        if not self.many:
            return self.raw, self.html
        name = self.names[one.name]
        return self.raw / f"{name}.jsonl", self.html / f"{name}.html" if self.html else None


def _compared(
    given: argparse.Namespace,
    one: _Comparison,
    plan: Plan,
    bases: tuple[Path, Path | None],
    places: _Out,
    progress: Progress,
) -> Judgement:
    base, control = bases
    raw, html = places.of(one)
    names = {"base": given.a, "candidate": one.candidate, "control": given.prime or given.a}
    progress.begin()
    if places.many:
        progress.told({"kind": "workload", "name": one.name})
    try:
        with raw.open("x") as out:
            more: dict[str, Any] = {"setup": what.shell(given.setup), "names": names, "conditions": beside(given)}
            more["told"] = progress.told
            seen = run(base, one.tree, plan, out, control=control, **more)
            assert seen is not None
    except ArmError as problem:
        raise ArmError("a run failed", str(problem)) from None
    finally:
        if not raw.stat().st_size:
            raw.unlink()
    progress.end()
    if places.many:
        terminal.lines(["", f"{one.name}:"])
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    judged(seen, rows, f"RAW: {raw}")
    if html:
        html.write_text(page.page(rows))
        terminal.line(f"report: {html}")
    return seen


AB = Command(
    "ab", "measure trees against each other", _arguments, _ab, description=_DESCRIPTION, usage=_USAGE, after=True
)
