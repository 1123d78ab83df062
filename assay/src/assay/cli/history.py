"""The command history: which commits of a range changed how long something takes."""

import argparse
from pathlib import Path

from assay.cli import what
from assay.cli.command import Command, beside
from assay.contract.errors import Status, UsageError
from assay.report import terminal, timeline
from assay.report.terminal import Progress
from assay.repository import checkout
from assay.timeline import bisection
from assay.timeline.running import FILE, Options, Running, commits_of

_PAGE = "index.html"
_DESCRIPTION = """Judges the ends of a range of commits. Where they differ by more than the margin it judges halves
until one commit is left. All levels are divided by the number of judgements that are allowed, fixed before the
first one. Changes that cancel each other between two judged commits are not seen: --points judges more of them.
Each commit is written out into copies, in which --setup can build. The same command goes on after an interruption."""
_USAGE = "assay history A..B [options] (-- COMMAND ... | --call M:F | --asv F:C.M | --pyperf F:NAME)"
_EPILOG = (
    "Exit status: 0 nothing got slower by more than the margin; 1 something did; 2 wrong usage; 3 infrastructure, or a "
    "pair is void as often as it was measured; 5 something could not be shown."
)
_STATUS = {"unchanged": Status.SHOWN, "improved": Status.SHOWN, "regressed": Status.REFUTED, "undecided": Status.OPEN}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("range", metavar="A..B", help="commits after A up to B, of the main line; B is HEAD if empty")
    what.arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="history.json, index.html, RAW")
    parser.add_argument("--points", type=int, default=1, help="parts of the range that are judged first (%(default)s)")
    parser.add_argument("--changes", type=int, default=3, help="changes that may be followed to commits (%(default)s)")


def _history(given: argparse.Namespace, progress: Progress) -> int:
    for name in ("points", "changes"):
        if getattr(given, name) < 1:
            raise UsageError(f"--{name}: expected at least 1, got {getattr(given, name)}")
    workload = what.given(given)
    if workload.compares:
        workload = what.uncompared(workload)
    repository = checkout.top(Path.cwd())
    if repository is None:
        raise UsageError(f"A..B: expected a repository here, got {Path.cwd()}")
    commits = commits_of(repository, given.range)
    most = bisection.bound(len(commits) - 1, min(given.points, len(commits) - 1), given.changes)
    plan = what.plan(given, workload, most)
    shown = " ".join(workload.command) if workload.kind == "command" else f"{workload.kind} {workload.target}"
    options = Options(plan, shown, what.shell(given.setup), given.points, most, conditions=beside(given))
    progress.begin()
    try:
        found = Running(repository, commits, given.out, options, progress.told).run()
    finally:
        progress.end()
    (given.out / _PAGE).write_text(timeline.html(found))
    terminal.line(f"{found['outcome']}: {len(commits) - 1} commits, {len(found['pairs'])} judgements of {most} allowed")
    terminal.lines(timeline.steps(found))
    terminal.line(f"page: {given.out / _PAGE}; {given.out / FILE}")
    return _STATUS[found["outcome"]]


HISTORY = Command(
    "history",
    "which commits of a range changed how long something takes",
    _arguments,
    _history,
    description=_DESCRIPTION,
    usage=_USAGE,
    epilog=_EPILOG,
    after=True,
)
