"""Commands that show what is there: replay, report, schema, ledger."""

import argparse
import json
from pathlib import Path
from typing import Any

from assay.cli.command import STORE, Command
from assay.contract import admission, cells, mined, plan, rows, timeline, verdict
from assay.contract.errors import Status, UsageError
from assay.contract.outcome import NOTHING
from assay.experiment.raw import replay, rows_of
from assay.gates import table
from assay.gates.gate import NOT_ASKED, SKIPPED
from assay.judgement.decision import replayed
from assay.judgement.ledger import Ledger
from assay.report import instructions, page, terminal
from assay.report import verdict as pages
from assay.report.advice import advice
from assay.report.terminal import Progress
from assay.statistics.looks import Judgement

STATUS = {
    "faster": Status.SHOWN,
    **dict.fromkeys(("slower", "equivalent", "incorrect", "tampered"), Status.REFUTED),
    "undecided": Status.OPEN,
    **dict.fromkeys(NOTHING, Status.INFRASTRUCTURE),
}
"""Of a judgement without a task, which requires nothing but `faster`."""


def _raw_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("raw", type=Path, metavar="RAW", help="a file of RAW, or the folder of an attempt")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _raw_arguments(parser)
    parser.add_argument("--out", type=Path, help="RAW with .html unless given")


def _replay(given: argparse.Namespace, _: Progress) -> int:
    if given.raw.is_dir():  # nothing of the attempt is changed
        found = replayed(given.raw)[0]
        terminal.lines(pages.lines(found))
        return int(found["status"])
    lines = given.raw.read_text().splitlines()
    seen, header = replay(lines)
    terminal.line(f"started {header['started']}")
    return judged(seen, [json.loads(line) for line in lines])


def judged(seen: Judgement, found: list[dict[str, Any]], *more: str) -> int:
    """Prints a judgement and how it was measured; its status."""
    hints = [f"advice: {words}" for words in advice(seen.verdict, found)]
    lines = [
        *terminal.outcome(seen, found[0]["plan"]["delta"]),
        *terminal.got_worse(found),
        *instructions.lines(found),
        *hints,
        *terminal.figures(found),
        *terminal.conditions(found),
    ]
    terminal.lines([*lines, *more])
    return STATUS[seen.verdict]


def _report(given: argparse.Namespace, _: Progress) -> int:
    if given.raw.is_dir():
        found, raw = replayed(given.raw)
        out, text = given.out or given.raw / "report.html", pages.html(found, raw)
    else:
        out = given.out or given.raw.with_suffix(".html")
        text = page.page(rows_of(given.raw.read_text().splitlines()))
    out.write_text(text)
    terminal.line(f"report: {out}")
    return 0


def _task_schema() -> dict[str, object]:
    from assay.contract import task

    return task.json_schema()


def _agent_schema() -> dict[str, object]:
    from assay.agents import template

    return template.json_schema()


def _run_schema() -> dict[str, object]:
    from assay.agents import record

    return record.schema()


def _campaign_schema() -> dict[str, object]:
    from assay.campaign import plan as campaigns

    return campaigns.json_schema()


_SCHEMAS = {
    "raw": rows.schema,
    "plan": lambda: plan.schema(table.OPTIONAL),
    "verdict": lambda: verdict.schema(table.NAMES, table.REJECTIONS, (SKIPPED, NOT_ASKED)),
    "task": _task_schema,
    "mined": mined.schema,
    "admission": admission.schema,
    "agent": _agent_schema,
    "agent-run": _run_schema,
    "campaign": _campaign_schema,
    "cell": cells.schema,
    "history": timeline.schema,
}


def schema(name: str) -> dict[str, object]:
    """One of the public JSON schemas."""
    return _SCHEMAS[name]()


def _schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("of", nargs="?", choices=tuple(_SCHEMAS), default="raw", help="(%(default)s: a line of RAW)")


def _schema(given: argparse.Namespace, _: Progress) -> int:
    terminal.document(schema(given.of))
    return 0


def _ledger_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, default=STORE, help="(%(default)s)")


def _ledger(given: argparse.Namespace, _: Progress) -> int:
    if not (given.store / "ledger.sqlite").exists():
        raise UsageError(f"--store: expected a folder with a ledger, got {given.store}")
    ledger = Ledger(given.store.resolve())
    for row in ledger.listing():
        outcome = row["outcome"] or "not finished"
        facts = json.loads(row["facts"])
        mark = "" if row["sandboxed"] else " unsandboxed"
        mark += f" without {', '.join(facts['skipped'])}" if facts.get("skipped") else ""
        terminal.line(
            f"{row['started']} {row['id']} {facts['task']} patch {row['patch']} #{row['number']} {outcome}{mark}"
        )
    ledger.close()
    return 0


REPLAY = Command("replay", "decide again from a RAW file", _raw_arguments, _replay)
REPORT = Command("report", "an HTML page of a RAW file", _report_arguments, _report)
SCHEMA = Command("schema", "print one of the public JSON schemas", _schema_arguments, _schema)
LEDGER = Command("ledger", "all attempts, a line each", _ledger_arguments, _ledger)
