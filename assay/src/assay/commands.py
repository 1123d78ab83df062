"""The command line of judging: task, prepare, measure, decide, judge, ledger. Imports come late: measure needs few."""

import argparse
import json
import math
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from assay import show
from assay.outcomes import OPTIONAL

_INSTALL = "judging needs more packages than measuring: pip install 'assay[judge]'"
_SANDBOX = "run the patch's code beside the judge, unprotected; ledger, report and verdict say so"
_SKIP = f"gates to leave out, of {', '.join(OPTIONAL)}; ledger, report and verdict say so"
_STORE = Path(".assay")
SCHEMAS = ("raw", "plan", "verdict", "task")
NAMES = ("task", "prepare", "measure", "decide", "judge", "ledger")
_SLICE_S = 480.0


class _UsageError(Exception):
    """What was asked for cannot be done."""


def arguments(commands: Any) -> None:
    """Adds the commands to a parser's subparsers."""
    task = commands.add_parser("task", help="check a task, or print the schema of tasks")
    what = task.add_subparsers(dest="what", required=True)
    what.add_parser("schema", help="print the JSON schema of a task")
    what.add_parser("check", help="read a task strictly").add_argument("task", type=Path, metavar="TASK")
    for name, words in (
        ("judge", "from a task and a patch to a typed outcome"),
        ("prepare", "guard and test a patch and freeze a plan, to be measured elsewhere"),
    ):
        one = commands.add_parser(name, help=words, description=words.capitalize() + ".", epilog=_EPILOG)
        one.add_argument("task", type=Path, metavar="TASK", help="a task's TOML file")
        given = one.add_mutually_exclusive_group(required=True)
        given.add_argument("--patch", type=Path, action="append", metavar="FILE", help=_PATCH)
        given.add_argument("--tree", metavar="DIR", help="a directory: base with changes; its .git is not looked into")
        given.add_argument("--commit", metavar="REV", help="a commit of the task's repository")
        one.add_argument("--base", default="", metavar="REV", help="start from another commit than the task's")
        one.add_argument("--store", type=Path, default=_STORE, help="ledger and attempts (%(default)s)")
        one.add_argument("--no-sandbox", action="store_true", help=_SANDBOX)
        one.add_argument("--skip", type=_gates, default=(), metavar="GATE,GATE", help=_SKIP)
        if name == "judge":
            one.add_argument("--jobs", type=int, default=1, metavar="N", help="judges beside each other (%(default)s)")
            one.add_argument("--json", action="store_true", help="print the verdict as JSON")
    measure = commands.add_parser("measure", help="measure a frozen plan; needs numpy only")
    measure.add_argument("plan", type=Path, metavar="PLAN", help="plan.json, in its folder")
    measure.add_argument("--out", type=Path, required=True, metavar="RAW", help="folder; goes on with what is there")
    measure.add_argument("--seconds", type=float, default=_SLICE_S, help="at most, then run it again (%(default)s)")
    measure.add_argument("--no-sandbox", action="store_true", help=_SANDBOX)
    decide = commands.add_parser("decide", help="the verdict of a folder of RAW; writes it and reports into the folder")
    decide.add_argument("raw", type=Path, metavar="RAW")
    decide.add_argument("--store", type=Path, help="ledger in which the attempt was prepared")
    decide.add_argument("--json", action="store_true", help="print the verdict as JSON")
    ledger = commands.add_parser("ledger", help="all attempts, a line each")
    ledger.add_argument("--store", type=Path, default=_STORE, help="(%(default)s)")


_PATCH = "a patch file, or a folder of *.diff and *.patch; repeatable"
_EPILOG = (
    "Exit status: 0 what the task requires was shown; 1 rejected, slower or refuted; 2 wrong usage; 3 infrastructure "
    "or void; 4 the task makes no sense; 5 undecided or not evaluated."
)


def _gates(text: str) -> tuple[str, ...]:
    """Names of gates, in one order whatever they are given in."""
    names = text.split(",")
    if wrong := [name for name in names if name not in OPTIONAL]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(OPTIONAL)}, got {', '.join(wrong)}")
    return tuple(name for name in OPTIONAL if name in names)


def main(given: argparse.Namespace) -> int:
    """Runs one of them. Exit status as in the epilog."""
    progress = show.Progress() if given.command in ("judge", "prepare", "measure") else None
    try:
        return int(globals()[f"_{given.command}"](given, progress))
    except ModuleNotFoundError as problem:
        if problem.name not in ("pydantic", "griffe", "hypothesis"):
            raise
        return _sorry(given.command, f"{problem.name}: {_INSTALL}", 2, progress)
    except _UsageError as problem:
        return _sorry(given.command, str(problem), 2, progress)
    except (OSError, ValueError) as problem:
        invalid = type(problem).__name__ == "TaskError"
        return _sorry(given.command, str(problem), 4 if invalid else 2, progress)
    except RuntimeError as problem:
        if type(problem).__name__ not in ("NoSandboxError", "ArmError", "BuildError"):
            raise
        return _sorry(given.command, str(problem), 3, progress)
    finally:
        if progress is not None:
            progress.end()


def schema(name: str) -> str:
    """One of the public JSON schemas, as text."""
    if name == "task":
        from assay import task

        return json.dumps(task.json_schema(), indent=1) + "\n"
    return files("assay").joinpath(f"{name}.schema.json").read_text()


def _sorry(command: str, words: str, status: int, progress: show.Progress | None) -> int:
    if progress is not None:
        progress.end()
    show.line(f"assay {command}: {words}", sys.stderr)
    return status


def _task(given: argparse.Namespace, _: Any) -> int:
    if given.what == "schema":
        show.line(schema("task").rstrip())
        return 0
    from assay import task

    found = task.read(given.task)
    base = found.base or f"the directory {found.repository}"
    show.line(f"{found.task.name} {found.digest}: {len(found.task.workload)} workloads, from {base}")
    return 0


def _sources(given: argparse.Namespace) -> list[Any]:
    from assay.guards import Source

    if given.tree or given.commit:
        return [Source("tree", given.tree) if given.tree else Source("commit", given.commit)]
    found: list[Path] = []
    for path in given.patch:
        inside = sorted(one for one in path.glob("*") if one.suffix in (".diff", ".patch")) if path.is_dir() else [path]
        if not inside:
            raise _UsageError(f"--patch: expected *.diff or *.patch in {path}, got none")
        found += inside
    return [Source("patch", str(path)) for path in found]


def _judge(given: argparse.Namespace, progress: show.Progress) -> int:
    from assay import task
    from assay.judge import judge

    read, sources = task.read(given.task, given.base), _sources(given)
    if len(sources) > 1:
        progress.end()
        return _many(given, sources)
    options = {"sandboxed": not given.no_sandbox, "skipped": given.skip, "told": progress.told}
    found, folder = judge(read, sources[0], given.store.resolve(), **options)
    progress.end()
    return _told(found, folder, given.json)


def _told(found: dict[str, Any], folder: Path, as_json: bool) -> int:
    from assay import verdict_report

    if as_json:
        show.line(json.dumps(found, indent=1))
    else:
        show.line("\n".join([*verdict_report.lines(found), f"reports: {folder}/report.html, .md, .xml, .csv"]))
    return int(found["status"])


def _many(given: argparse.Namespace, sources: list[Any]) -> int:
    """A judge a patch, some of them beside each other: each a process of its own, so that none harms another."""
    if given.jobs < 1:
        raise _UsageError(f"--jobs: expected at least 1, got {given.jobs}")
    options = [
        "--base",
        given.base,
        "--store",
        str(given.store),
        "--json",
        *(["--no-sandbox"] if given.no_sandbox else []),
        *(["--skip", ",".join(given.skip)] if given.skip else []),
    ]
    waiting, statuses = list(sources), []
    running: dict[str, subprocess.Popen[str]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < given.jobs:
                source = waiting.pop(0)
                command = [sys.executable, "-m", "assay", "judge", str(given.task), "--patch", source.value, *options]
                running[source.value] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            for name, child in list(running.items()):
                if len(running) < given.jobs and waiting:
                    break
                try:
                    text, _ = child.communicate(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
                del running[name]
                statuses.append(child.returncode)
                found = json.loads(text) if text.strip() else None
                if given.json and found:
                    show.line(json.dumps(found))
                else:
                    words = f"{found['outcome']}: {'; '.join(found['words'][:1])}" if found else "no verdict"
                    show.line(f"{name}: {words}")
    finally:
        for child in running.values():
            child.kill()
            child.wait()
    return max(statuses)


def _prepare(given: argparse.Namespace, progress: show.Progress) -> int:
    from assay import task
    from assay.frozen import FILE
    from assay.judge import prepared

    read, sources = task.read(given.task, given.base), _sources(given)
    if len(sources) > 1:
        raise _UsageError(f"--patch: expected one, got {len(sources)}")
    options = {"sandboxed": not given.no_sandbox, "skipped": given.skip, "told": progress.told}
    frozen, found = prepared(read, sources[0], given.store.resolve(), **options)
    progress.end()
    if found is not None:
        show.line(f"{found['outcome']}: {'; '.join(found['words'])}")
        return int(found["status"])
    show.line(f"prepared: {frozen.folder / FILE}")
    return 0


def _measure(given: argparse.Namespace, progress: show.Progress) -> int:
    """Exit status 0 if every workload is decided or has failed, 5 if it has to be run again."""
    from assay import devices
    from assay.frozen import Frozen
    from assay.measuring import measure

    start, frozen = time.monotonic(), Frozen.read(given.plan)
    if frozen.content["outcome"]:
        raise _UsageError(f"PLAN: expected a patch to measure, got one that is {frozen.content['outcome']}")

    def waiting(name: str) -> None:
        progress.told({"kind": "waiting", "name": name})

    with devices.held(frozen.content["sandbox"]["device"], alone=True, waiting=waiting) as environment:
        left = given.seconds - (time.monotonic() - start) if math.isfinite(given.seconds) else math.inf
        done = measure(
            frozen, given.out, sandboxed=not given.no_sandbox, seconds=left, environment=environment, told=progress.told
        )
    progress.end()
    show.line(f"{'measured' if done else 'not finished, run it again'}: {given.out}")
    return 0 if done else 5


def _decide(given: argparse.Namespace, _: Any) -> int:
    from assay import verdict_report
    from assay.decide import decide
    from assay.frozen import written
    from assay.ledger import Attempt, Ledger

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
    verdict_report.write(given.raw, found)
    return _told(found, given.raw, given.json)


def again(given: argparse.Namespace) -> int:
    """Decides again from an attempt's folder, or writes its page; nothing of the attempt is changed."""
    from assay import verdict_report
    from assay.decide import replayed

    try:
        found, raw = replayed(given.raw)
        if given.command == "replay":
            show.line("\n".join(verdict_report.lines(found)))
            return int(found["status"])
        out = given.out or given.raw / "report.html"
        out.write_text(verdict_report.html(found, raw))
        show.line(f"report: {out}")
        return 0
    except (OSError, ValueError) as problem:
        return _sorry(given.command, str(problem), 2, None)


def _ledger(given: argparse.Namespace, _: Any) -> int:
    from assay.ledger import Ledger

    if not (given.store / "ledger.sqlite").exists():
        raise _UsageError(f"--store: expected a folder with a ledger, got {given.store}")
    ledger = Ledger(given.store.resolve())
    for row in ledger.listing():
        outcome = row["outcome"] or "not finished"
        facts = json.loads(row["facts"])
        mark = "" if row["sandboxed"] else " unsandboxed"
        mark += f" without {', '.join(facts['skipped'])}" if facts.get("skipped") else ""
        show.line(f"{row['started']} {row['id']} {facts['task']} patch {row['patch']} #{row['number']} {outcome}{mark}")
    ledger.close()
    return 0
