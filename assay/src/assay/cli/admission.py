"""The command admit: is a task one, on this machine? What needs packages is imported late."""

import argparse
import datetime
from pathlib import Path
from typing import Any

from assay.cli.command import SANDBOX, STORE, Command
from assay.contract.admission import LEVELS
from assay.contract.errors import Status, UsageError
from assay.gates.table import INSTALLS
from assay.report import terminal
from assay.report.terminal import Progress

_DESCRIPTION = """Asks whether a task is one. Static reasons come first: is the reference a revert, by its words
or as the inverse of an earlier patch; does it take code away with its tests; how much of it does the prompt give
away. Then it measures: base and reference are built and run, the workload runs the changed code, the
reference is faster in two measurements, a comment is not, this machine can show half the margin, and
candidates that return zeros or their first answer again are rejected. A task is admitted only if all of
this was measured; that holds for the task, the reference and the machine, until it expires. Run it
again after an interruption: checks that are done are not done again. A rendered prompt (no .toml) gets
static reasons alone, with --repo and --commit from the repository's history, too."""
_EPILOG = (
    "Exit status: 0 admitted; 1 rejected; 2 wrong usage; 3 infrastructure; 4 the task makes no sense; 5 undecided, or "
    "with --check not valid."
)
_STATUS = {"admitted": Status.SHOWN, "rejected": Status.REFUTED, "undecided": Status.OPEN}
_MARKS = {"for": "+", "against": "-", "open": "?", "noted": " "}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="TASK", help="a task's TOML file, or a rendered prompt")
    parser.add_argument("--store", type=Path, default=STORE, help="ledger, attempts, admissions (%(default)s)")
    parser.add_argument("--patch", type=Path, metavar="FILE", help="the reference, where the task names no commit")
    parser.add_argument("--prompt", type=Path, metavar="FILE", help="what an agent will be told; audited")
    parser.add_argument(
        "--most-leak", choices=LEVELS, default="L3", help="level of the prompt above which it is rejected (%(default)s)"
    )
    parser.add_argument("--days", type=int, default=90, help="for which it is admitted (%(default)s)")
    parser.add_argument("--static", action="store_true", help="run nothing; the end is rejected or undecided")
    parser.add_argument("--check", action="store_true", help="is the task admitted here and now? runs nothing")
    parser.add_argument("--no-sandbox", action="store_true", help=SANDBOX)
    parser.add_argument("--json", action="store_true", help="print the record (assay schema admission)")
    prompt = parser.add_argument_group("a rendered prompt")
    prompt.add_argument("--repo", type=Path, metavar="R", help="the repository that it is about")
    prompt.add_argument("--commit", default="", metavar="C", help="its reference commit")


def _admit(given: argparse.Namespace, progress: Progress) -> int:
    if given.days < 1:
        raise UsageError(f"--days: expected at least 1, got {given.days}")
    if given.file.suffix != ".toml":
        return _prompt(given)
    if given.repo or given.commit:
        raise UsageError("--repo, --commit: expected a rendered prompt with them; a task names its own")
    from assay.admission import admit
    from assay.contract import task

    read, store = task.read(given.file), given.store.resolve()
    if given.check:
        return _check(admit.key_of(read, admit.source_of(read, given.patch)), store, given.json)
    options = admit.Options(
        sandboxed=not given.no_sandbox,
        patch=given.patch,
        prompt=given.prompt,
        most_leak=given.most_leak,
        days=given.days,
        measures=not given.static,
    )
    found, file = admit.admit(read, store, options, progress.told)
    progress.end()
    return _told(found, given.json, f"record: {file}")


def _prompt(given: argparse.Namespace) -> int:
    from assay.admission import admit
    from assay.mining import prompt

    if bool(given.repo) != bool(given.commit):
        raise UsageError("--repo: expected --commit with it, and the other way round")
    if given.repo is not None and not given.repo.is_dir():
        raise UsageError(f"--repo: expected a directory, got {given.repo}")
    if given.check or given.prompt or given.patch:
        raise UsageError("--check, --prompt, --patch: expected a task with them, got a rendered prompt")
    found = admit.of_prompt(prompt.read(given.file), given.repo, given.commit)
    return _told(found, given.json, "a prompt as it stands: nothing was run, so it cannot be admitted")


def _check(key: Any, store: Path, as_json: bool) -> int:
    from assay.admission import record

    file = store / "admissions" / key.name / record.FILE
    if not file.exists():
        terminal.line("not admitted: there is no admission of this task and reference on this machine")
        return Status.OPEN
    found = record.read(file)
    refused = record.refusal(found, key, datetime.datetime.now(datetime.UTC))
    if as_json:
        terminal.document(found)
    else:
        terminal.line(f"not admitted: {refused}" if refused else f"admitted until {found['expires'][:10]}: {file}")
    return Status.OPEN if refused else Status.SHOWN


def _told(found: dict[str, Any], as_json: bool, last: str) -> int:
    if as_json:
        terminal.document(found)
        return _STATUS[found["outcome"]]
    until = f" until {found['expires'][:10]}" if found["expires"] else ""
    sandboxed = "" if found["sandboxed"] else ", unsandboxed"
    terminal.line(f"{found['outcome']}{until}{sandboxed}: {found['task']['name']}")
    for one in found["reasons"]:
        line = f"  {_MARKS[one['finding']]} {one['name']} ({one['kind']}): {one['words']} [{one['source']}]"
        terminal.line(line)
    terminal.line("  + for, - against, ? could not be shown")
    terminal.line(last)
    return _STATUS[found["outcome"]]


ADMIT = Command(
    "admit",
    "is a task one, on this machine?",
    _arguments,
    _admit,
    description=_DESCRIPTION,
    epilog=_EPILOG,
    installs=("pydantic", "griffe", *INSTALLS),
)
