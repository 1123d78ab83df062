"""The command task: check, schema, and tasks from commits, records and prompts. Packages are imported late."""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from assay.arms.process import PYTHON
from assay.cli.command import Command
from assay.cli.shown import schema
from assay.contract.errors import TaskError, UsageError
from assay.contract.mined import Part
from assay.mining import find as finding
from assay.mining import importers, prompt, records
from assay.mining import new as making
from assay.mining.draft import Draft
from assay.report import terminal
from assay.report.terminal import Progress

_FIND = """Lists commits of the main line that claim to make something faster, newest first, with the evidence: words
of the subject, figures, benchmarks and tests that it touches, whether it says that it reverts another
commit or another says that it reverts this one. A merge counts as all that it brought in. A claim is where
a task begins, and no more: `assay task new` writes one, `assay admit` measures whether it is a task."""
_NEW = """Writes a task from a commit and its first parent: scope from the diff, tests that touch what changed,
package and paths, and a driver, inputs and strategies for the functions that the diff changes, from their
signatures. What could not be found out is said here and in the task. Fill in the files, check the task,
then `assay admit` it."""
_IMPORT = """Reads records of ISO-Bench, GSO, SWE-Perf or SWE-fficiency (JSON lines, an array or one object; recognised
by their fields) and writes a task for each into a folder of its own, with a line about every field: what it
became, or why it was dropped. The repositories themselves must be cloned."""
_PROMPT = """Reads a rendered prompt: test script, targets, constraints, statistics, hints, completion block, each with
its lines, and says what each becomes in a task or why it is dropped. With --repo, --commit and --out it
writes the task. `assay admit PROMPT` says what speaks against it as it stands."""
_REPOSITORY = "a git repository with its history; its code is not run"


def _arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("schema", help="print the JSON schema of a task")
    check = what.add_parser("check", help="read a task strictly; whether what it names is there")
    check.add_argument("task", type=Path, metavar="TASK")
    find = what.add_parser("find", help="list commits that claim to make something faster", description=_FIND)
    find.add_argument("--repo", type=Path, required=True, metavar="R", help=_REPOSITORY)
    find.add_argument("--since", default="", metavar="DATE", help="as git understands it: 2025-01-01, '3 months ago'")
    find.add_argument("--paths", nargs="+", default=[], metavar="PATH", help="only commits that change these")
    find.add_argument("--grep", default="", metavar="EXPR", help="instead of words that claim something: 'cach(e|ing)'")
    find.add_argument("--rev", default="HEAD", help="whose history (%(default)s)")
    find.add_argument("--json", action="store_true", help="a line of JSON per commit (assay schema mined)")
    new = what.add_parser("new", help="write a task from a commit", description=_NEW)
    new.add_argument("--repo", type=Path, required=True, metavar="R", help=_REPOSITORY)
    new.add_argument("--commit", required=True, metavar="C", help="the commit that is said to be faster")
    new.add_argument("--out", type=Path, metavar="DIR", help="folder of the task (REPO-COMMIT)")
    new.add_argument("--name", default="", help="of the task (REPO-COMMIT)")
    record = what.add_parser("import", help="write tasks from another benchmark's records", description=_IMPORT)
    record.add_argument("file", type=Path, metavar="FILE", help="records")
    record.add_argument(
        "--repos", type=Path, default=Path("repos"), help="where clones lie: owner+name.git (%(default)s)"
    )
    record.add_argument(
        "--out", type=Path, default=Path("imported"), metavar="DIR", help="folder of tasks (%(default)s)"
    )
    read = what.add_parser("import-prompt", help="read a rendered prompt", description=_PROMPT)
    read.add_argument("file", type=Path, metavar="FILE", help="a prompt, as an agent was given it")
    read.add_argument("--repo", type=Path, metavar="R", help=_REPOSITORY)
    read.add_argument("--commit", default="", metavar="C", help="its reference commit")
    read.add_argument("--out", type=Path, metavar="DIR", help="write a task into this folder")


def _check(given: argparse.Namespace) -> int:
    from assay.contract import task
    from assay.mining import mistakes

    found = task.read(given.task)
    if wrong := mistakes.mistakes(found, PYTHON):
        raise TaskError("\n".join(wrong))
    base = found.base or f"the directory {found.repository}"
    terminal.line(f"{found.task.name} {found.digest}: {len(found.task.workload)} workloads, from {base}")
    return 0


def _find(given: argparse.Namespace) -> int:
    search = finding.find(
        _repository(given.repo), since=given.since, paths=given.paths, grep=given.grep, revision=given.rev
    )
    for one in search.found:
        if given.json:
            terminal.line(json.dumps(asdict(one)))
            continue
        terminal.line(f"{one.commit[:12]} {one.date[:10]} +{one.added} -{one.removed} {one.subject}")
        terminal.lines(f"    {evidence.kind}: {evidence.words}" for evidence in one.evidence)
    if not given.json:
        left = f"{search.no_source} of them change no code"
        terminal.line(f"{search.read} commits read, {search.claimed} claim it, {left}; {len(search.found)} listed")
    return 0


def _new(given: argparse.Namespace) -> int:
    repository = _repository(given.repo)
    name = given.name or making.named_after(repository, given.commit)
    draft, file = making.new(repository, given.commit, given.out or Path(name), name=name)
    terminal.lines(making.summary(draft))
    return _checked([file])


def _import(given: argparse.Namespace) -> int:
    files = []
    for record in records.read(given.file):
        draft, file, parts = importers.task_of(record, given.file, given.repos, given.out)
        terminal.line(f"{file}: {record.format.name}, {given.file}:{record.line}")
        _told(given.file, draft, parts)
        files.append(file)
    return _checked(files)


def _import_prompt(given: argparse.Namespace) -> int:
    if given.out is None:
        _told(given.file, None, prompt.parts(prompt.read(given.file)))
        return 0
    if given.repo is None or not given.commit:
        raise UsageError("--out: expected --repo and --commit with it, which say from where a task is made")
    draft, file, parts = importers.of_prompt(given.file, _repository(given.repo), given.commit, given.out)
    _told(given.file, draft, parts)
    return _checked([file])


def _told(file: Path, draft: Draft | None, parts: Iterable[Part]) -> None:
    """A line per part: where it stands, what became of it."""
    for one in parts:
        lines = f"{one.first}" if one.first == one.last else f"{one.first}-{one.last}"
        terminal.line(f"  {file.name}:{lines}: {one.name} -> {one.became or 'dropped'}: {one.words}")
    terminal.lines(f"  not found out: {words}" for words in (draft.unknown if draft else ()))


def _checked(files: Iterable[Path]) -> int:
    """Reads what was written as `check` does; the worst status."""
    from assay.contract import task

    worst = 0
    for file in files:
        try:
            found = task.read(file)
        except TaskError as problem:
            terminal.line(f"{problem}")
            worst = max(worst, problem.status)
        else:
            terminal.line(f"written: {file}: {found.task.name} {found.digest}")
    return worst


def _repository(path: Path) -> Path:
    if not path.is_dir():
        raise UsageError(f"--repo: expected a directory, got {path}")
    return path


def _schema(_: argparse.Namespace) -> int:
    terminal.document(schema("task"))
    return 0


_WHAT: dict[str, Callable[[argparse.Namespace], int]] = {
    "schema": _schema,
    "check": _check,
    "find": _find,
    "new": _new,
    "import": _import,
    "import-prompt": _import_prompt,
}


def _task(given: argparse.Namespace, _: Progress) -> int:
    return _WHAT[given.what](given)


TASK = Command("task", "tasks: find, write, import and check them", _arguments, _task, installs=("pydantic",))
