"""Commands on a frozen plan: measure and decide. They need numpy only."""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from assay.cli.command import SANDBOX, Command, beside, beside_arguments, build_arguments
from assay.contract.errors import Status, UsageError
from assay.contract.frozen import Frozen, written
from assay.judgement.decision import decide
from assay.judgement.ledger import Attempt, Ledger
from assay.judgement.measurement import measure
from assay.machine import locks
from assay.report import terminal, verdict
from assay.report.terminal import Progress

_SLICE_S = 480.0


def _measure_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan.json, in its folder")
    parser.add_argument("--out", type=Path, required=True, metavar="RAW", help="folder; goes on with what is there")
    parser.add_argument("--seconds", type=float, default=_SLICE_S, help="at most, then run it again (%(default)s)")
    parser.add_argument("--no-sandbox", action="store_true", help=SANDBOX)
    build_arguments(parser)
    beside_arguments(parser)


def _measure(given: argparse.Namespace, progress: Progress) -> int:
    """SHOWN if every workload is decided or has failed, OPEN if it has to be run again."""
    if not given.seconds > 0:
        raise UsageError(f"--seconds: expected a positive number, got {given.seconds}")
    start, frozen = time.monotonic(), Frozen.read(given.plan)
    if frozen.content["outcome"]:
        raise UsageError(f"PLAN: expected a patch to measure, got one that is {frozen.content['outcome']}")

    def waiting(name: str) -> None:
        progress.told({"kind": "waiting", "name": name})

    with locks.held(frozen.content["sandbox"]["device"], alone=True, waiting=waiting) as environment:
        left = given.seconds - (time.monotonic() - start) if math.isfinite(given.seconds) else math.inf
        options: dict[str, Any] = {"sandboxed": not given.no_sandbox, "environment": environment}
        options |= {"conditions": beside(given), "told": progress.told, "build_jobs": given.build_jobs}
        done = measure(frozen, given.out, seconds=left, **options)
    progress.end()
    terminal.line(f"{'measured' if done else 'not finished, run it again'}: {given.out}")
    return Status.SHOWN if done else Status.OPEN


def _decide_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("raw", type=Path, metavar="RAW")
    parser.add_argument("--store", type=Path, help="ledger in which the attempt was prepared")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")


def _decide(given: argparse.Namespace, _: Progress) -> int:
    found = decide(given.raw)
    if given.store is not None:
        ledger = Ledger(given.store.resolve())
        try:
            one = found["attempt"]
            found["attempt"]["of_patch"] = ledger.attempts(found["task"]["digest"], found["patch"]["digest"])
            attempt = Attempt(one["id"], one["number"], ledger.store / "attempts" / one["id"])
            if not ledger.closed(attempt):
                ledger.close_attempt(attempt, found)
        finally:
            ledger.close()
    written(given.raw / "verdict.json", json.dumps(found, indent=1) + "\n")
    verdict.write(given.raw, found)
    return told(found, given.raw, given.json)


def told(found: dict[str, Any], folder: Path, as_json: bool) -> int:
    """Prints a verdict; its status."""
    if as_json:
        terminal.document(found)
    else:
        terminal.lines([*verdict.lines(found), f"reports: {folder}/report.html, .md, .xml, .csv"])
    return int(found["status"])


MEASURE = Command("measure", "measure a frozen plan; needs numpy only", _measure_arguments, _measure)
DECIDE = Command(
    "decide", "the verdict of a folder of RAW; writes it and reports into the folder", _decide_arguments, _decide
)
