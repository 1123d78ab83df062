"""The command run: a whole campaign, or what is left of it, and its reports."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from assay.cli.command import STORE, Command
from assay.contract import foreign
from assay.contract.errors import Status
from assay.report import terminal
from assay.report.terminal import Progress

_MOST = 160
"""Letters of a reason that a line shows."""
_DESCRIPTION = (
    "Runs tasks by agents by attempts. Canaries are judged first: a comment, the reference, twice the time and two "
    "cheats. If one of them comes out otherwise, the campaign is void and no agent is run. Interrupt it whenever you "
    "like: the same command goes on, and what is finished is not done again."
)
_RAY = "do cells on the nodes of a Ray cluster that see DIR at one path and offer assay_slot (auto: this machine's)"
_EPILOG = (
    "Exit status: 0 every cell has its verdict; 2 wrong usage; 3 the campaign is void, or infrastructure spoilt a cell."
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("campaign", type=Path, metavar="CAMPAIGN", help="a campaign's TOML file")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder of the campaign ({STORE}/campaigns/NAME)")
    parser.add_argument("--again", action="store_true", help="do cells again that infrastructure spoilt")
    parser.add_argument("--ray", default="", metavar="ADDRESS", help=_RAY)
    parser.add_argument("--dry-run", action="store_true", help="list the cells and what is left of them; run nothing")


def _run(given: argparse.Namespace, _: Progress) -> int:
    from assay.campaign import distributed, plan, rows
    from assay.campaign.running import Course, Local
    from assay.report import campaign as report
    from assay.report import scores
    from assay.report.whole import Whole
    from assay.report.whole import lines as whole_lines

    read = plan.read(given.campaign)
    folder: Path = (given.out or STORE / "campaigns" / read.campaign.name).resolve()
    for words in read.left_out:
        terminal.line(f"left out: {words}")
    if given.dry_run:
        found = rows.read(folder)
        for one in read.cells:
            terminal.line(f"{one.key} {one.words}: {found[one.key]['outcome'] if one.key in found else 'to be done'}")
        return Status.SHOWN
    shown, worker = _Shown(), distributed.Cluster(given.ray) if given.ray else Local()
    try:
        found_rows, void = Course(read, folder, shown.told, shown.done, worker, given.again).run()
    finally:
        shown.end()
    lines = scores.leaderboard(found_rows, read.campaign.pass_at, read.campaign.level)
    kept = scores.kept(found_rows, read.campaign.level)
    whole = Whole(read.campaign.name, found_rows, void, read.left_out, lines, read.campaign.level, kept)
    report.write(folder, whole)
    terminal.lines([*(f"void: {words}" for words in void), *whole_lines(whole)])
    terminal.line(f"reports: {folder}/report.html, .md, .xml, .csv, predictions.jsonl")
    spoilt = [row for row in found_rows if row["status"] == Status.INFRASTRUCTURE]
    return Status.INFRASTRUCTURE if void or spoilt else Status.SHOWN


class _Shown:
    """Live progress: a line per finished cell, and one that changes where stderr is a terminal."""

    def __init__(self) -> None:
        self.begun, self.live = time.monotonic(), sys.stderr.isatty()
        self.progress = Progress()

    def told(self, words: str) -> None:
        """Replaces the line."""
        if self.live:
            self.progress.shows = True
            self.progress.say(f"{words}, {time.monotonic() - self.begun:.0f} s")

    def done(self, row: dict[str, Any]) -> None:
        """Prints a finished cell."""
        self.progress.end()
        cost = row["cost"]
        known = [f"{cost['agent_s'] + cost['judge_s']:.0f} s"]
        known += [f"{cost[name]:g} {name}" for name in ("tokens", "money") if cost[name] is not None]
        words = f": {foreign.on_one_line(row['words'][0])[:_MOST]}" if row["words"] else ""
        name = f"{row['who']['name']} on {row['task']['name']} #{row['number']}"
        terminal.line(f"{name}: {row['outcome']} ({', '.join(known)}){words}")

    def end(self) -> None:
        """Leaves the terminal clean."""
        self.progress.end()


RUN = Command(
    "run",
    "a campaign: tasks by agents by attempts, with canaries and a leaderboard",
    _arguments,
    _run,
    description=_DESCRIPTION,
    epilog=_EPILOG,
    installs=("pydantic", "griffe", "hypothesis", "jinja2"),
    extra="agents",
)
