"""Commands that judge a patch: judge, prepare. What needs packages is imported late: other commands have none."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.cli.command import EPILOG, SANDBOX, STORE, Command, beside, beside_arguments, build_arguments
from assay.cli.plans import told
from assay.contract.errors import UsageError
from assay.contract.frozen import FILE
from assay.gates.table import INSTALLS, OPTIONAL
from assay.report import terminal
from assay.report.terminal import Progress

if TYPE_CHECKING:
    from assay.judgement.guards import Source

_SKIP = f"gates to leave out, of {', '.join(OPTIONAL)}; ledger, report and verdict say so"
_PATCH = "a patch file, or a folder of *.diff and *.patch; repeatable"


def _patch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", type=Path, metavar="TASK", help="a task's TOML file")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--patch", type=Path, action="append", metavar="FILE", help=_PATCH)
    given.add_argument("--tree", metavar="DIR", help="a directory: base with changes; its .git is not looked into")
    given.add_argument("--commit", metavar="REV", help="a commit of the task's repository")
    parser.add_argument("--base", default="", metavar="REV", help="start from another commit than the task's")
    parser.add_argument("--store", type=Path, default=STORE, help="ledger and attempts (%(default)s)")
    parser.add_argument("--no-sandbox", action="store_true", help=SANDBOX)
    parser.add_argument("--skip", type=_gates, default=(), metavar="GATE,GATE", help=_SKIP)
    build_arguments(parser)


def _judge_arguments(parser: argparse.ArgumentParser) -> None:
    _patch_arguments(parser)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="judges beside each other (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    beside_arguments(parser)


def _gates(text: str) -> tuple[str, ...]:
    """Names of gates, in one order whatever they are given in."""
    names = text.split(",")
    if wrong := [name for name in names if name not in OPTIONAL]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(OPTIONAL)}, got {', '.join(wrong)}")
    return tuple(name for name in OPTIONAL if name in names)


def _sources(given: argparse.Namespace) -> "list[Source]":
    from assay.judgement.guards import Source

    if given.tree or given.commit:
        return [Source("tree", given.tree) if given.tree else Source("commit", given.commit)]
    found: list[Path] = []
    for path in given.patch:
        inside = sorted(one for one in path.glob("*") if one.suffix in (".diff", ".patch")) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"--patch: expected *.diff or *.patch in {path}, got none")
        found += inside
    return [Source("patch", str(path)) for path in found]


def _options(given: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """What `judge` and `prepared` are told alike."""
    options: dict[str, Any] = {"sandboxed": not given.no_sandbox, "skipped": given.skip, "told": progress.told}
    return options | {"build_jobs": given.build_jobs}


def _judge(given: argparse.Namespace, progress: Progress) -> int:
    from assay.contract import task
    from assay.judgement.attempt import judge

    read, sources = task.read(given.task, given.base), _sources(given)
    if len(sources) > 1:
        progress.end()
        return _many(given, sources)
    options = _options(given, progress)
    found, folder = judge(read, sources[0], given.store.resolve(), conditions=beside(given), **options)
    progress.end()
    return told(found, folder, given.json)


def _many(given: argparse.Namespace, sources: "list[Source]") -> int:
    """A judge per patch, some of them beside each other: each a process of its own, so that none harms another."""
    if given.jobs < 1:
        raise UsageError(f"--jobs: expected at least 1, got {given.jobs}")
    options = [
        "--base",
        given.base,
        "--store",
        str(given.store),
        "--json",
        *(["--no-sandbox"] if given.no_sandbox else []),
        *(["--skip", ",".join(given.skip)] if given.skip else []),
        *(["--build-jobs", str(given.build_jobs)] if given.build_jobs else []),
        f"--patient={given.patient}",
        *(["--pin"] if given.pin else []),
        *(["--isolate"] if given.isolate else []),
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
                    terminal.line(json.dumps(found))
                else:
                    words = f"{found['outcome']}: {'; '.join(found['words'][:1])}" if found else "no verdict"
                    terminal.line(f"{name}: {words}")
    finally:
        for child in running.values():
            child.kill()
            child.wait()
    return max(statuses)


def _prepare(given: argparse.Namespace, progress: Progress) -> int:
    from assay.contract import task
    from assay.judgement.attempt import prepared

    read, sources = task.read(given.task, given.base), _sources(given)
    if len(sources) > 1:
        raise UsageError(f"--patch: expected one, got {len(sources)}")
    options = _options(given, progress)
    frozen, found = prepared(read, sources[0], given.store.resolve(), **options)
    progress.end()
    if found is not None:
        terminal.line(f"{found['outcome']}: {'; '.join(found['words'])}")
        return int(found["status"])
    terminal.line(f"prepared: {frozen.folder / FILE}")
    return 0


_JUDGING = ("pydantic", "griffe", *INSTALLS)
_JUDGE_HELP, _PREPARE_HELP = "from a task and a patch to a typed outcome", "guard and test a patch and freeze a plan"
JUDGE = Command(
    "judge",
    _JUDGE_HELP,
    _judge_arguments,
    _judge,
    description=f"{_JUDGE_HELP.capitalize()}.",
    epilog=EPILOG,
    installs=_JUDGING,
)
PREPARE = Command(
    "prepare",
    f"{_PREPARE_HELP}, to be measured elsewhere",
    _patch_arguments,
    _prepare,
    description=f"{_PREPARE_HELP.capitalize()}, to be measured elsewhere.",
    epilog=EPILOG,
    installs=_JUDGING,
)
