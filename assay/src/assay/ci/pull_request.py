"""A pull request judged by a task of its base, and the comment that says what came out.

The task, its files and base come from the base branch, so that a pull request cannot change how it is judged. Judging
and commenting are two steps: the first runs code of the pull request and knows no secret, the second knows a token and
runs nothing of the pull request.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.contract import foreign
from assay.contract.errors import Status, UsageError
from assay.judgement.decision import read as read_verdict
from assay.repository import checkout, store

COMMENT, VERDICT = "comment.md", "verdict.json"
MARK = "<!-- assay: {} -->"
"""In the comment's first line, so that the next run finds it."""
_SHA = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_KEPT = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH")
"""All that the process which judges is told of the job's environment. Its arms are told less, in a sandbox."""
_MOST = 60_000
"""Letters of a comment; a host takes 65 536."""
_WORDS = {
    Status.SHOWN: "what the task requires was shown",
    Status.REFUTED: "rejected, slower, or what the task requires was refuted",
    Status.INFRASTRUCTURE: "nothing was shown: infrastructure failed, or the blocks are void",
    Status.INVALID: "the task makes no sense",
    Status.OPEN: "not decided",
}


@dataclass(frozen=True)
class Event:
    """What an event file says of a pull request."""

    number: int
    base: str
    head: str
    repository: str
    """`owner/name`."""


def event(file: Path) -> Event:
    """From the file of a `pull_request` event. UsageError for one that is none; nothing in it is trusted."""
    try:
        content = json.loads(file.read_text())
        pull = content["pull_request"]
        number, base, head = pull["number"], pull["base"]["sha"], pull["head"]["sha"]
        repository = content["repository"]["full_name"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        words = f"{type(problem).__name__}: {problem}"
        raise UsageError(f"event: expected that of a pull request in {file}, got {words}") from None
    if not isinstance(number, int) or not all(isinstance(one, str) and _SHA.fullmatch(one) for one in (base, head)):
        raise UsageError(f"event: expected a number and two commits, got {number!r}, {base!r}, {head!r}")
    if not isinstance(repository, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"event: expected owner/name of a repository, got {repository!r}")
    return Event(number, base, head, repository)


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the process that judges: by names, since nobody knows what a secret is called."""
    return {name: environment[name] for name in _KEPT if name in environment}


def judge(found: Event, task: str, workspace: Path, out: Path, *, sandboxed: bool = True) -> int:
    """Judges a pull request; writes comment.md and verdict.json into `out`. The judgement's exit status.

    Args:
        found: which pull request.
        task: path of the task in the repository; its content is that of base.
        workspace: the repository, with the commits of both sides.
        out: a folder for results.
        sandboxed: whether code of the pull request runs in a sandbox.

    Raises UsageError if the commits have no common ancestor here, or base has no such task.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        given = ["-C", str(workspace), "merge-base", store.resolved(workspace, found.base), found.head]
        ancestor = store.run(given).decode().strip()
    except store.GitError as problem:
        words = "expected the commits of the pull request and of its base here (fetch-depth: 0)"
        raise UsageError(f"workspace: {words}, got {problem}") from None
    shutil.rmtree(out / "base", ignore_errors=True)
    place = checkout.clone(workspace, ancestor, out / "base")
    file = (place / task).resolve()
    if not file.is_relative_to(place.resolve()) or not file.is_file():
        raise UsageError(f"task: expected a file of the base commit {ancestor[:12]}, got {task}")
    command = [sys.executable, "-m", "assay", "judge", str(file), "--base", ancestor, "--commit", found.head]
    command += ["--store", str(out / "store"), "--json", *([] if sandboxed else ["--no-sandbox"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=without_secrets(os.environ))
    verdict = json.loads(done.stdout) if done.stdout.strip() else None
    (out / VERDICT).write_text(json.dumps(verdict, indent=1) + "\n")
    (out / COMMENT).write_text(comment(found, task, ancestor, verdict, out / "store", done.stderr, done.returncode))
    return done.returncode


def comment(
    found: Event, task: str, base: str, verdict: Mapping[str, Any] | None, store_: Path, errors: str, status: int
) -> str:
    """The comment. All that may be anybody's words is escaped where the report is made, or here."""
    head = f"{MARK.format(_plain(task))}\n"
    against = f"\n`{found.head[:12]}` against `{base[:12]}`, "
    if verdict is None:
        words = _plain(errors.strip()[-1000:]) or f"status {status}"
        return f"{head}## {_plain(task)}: not judged\n\n- {words}\n{against}exit status {status}\n"
    report = (store_ / "attempts" / verdict["attempt"]["id"] / "report.md").read_text()
    if len(report) > _MOST:
        report = f"{report[:_MOST]}\n\n- the rest of the report is left out\n"
    return f"{head}{report}{against}exit status {status}: {_WORDS[Status(status)]}\n"


def verdict_of(out: Path) -> Mapping[str, Any] | None:
    """What `judge` wrote; None if there was no verdict."""
    return None if json.loads((out / VERDICT).read_text()) is None else read_verdict(out / VERDICT)


def _plain(words: str) -> str:
    """Words that are no Markdown and no HTML."""
    text = foreign.on_one_line(words)
    return re.sub(r"([\\|`*_\[\]<>#!~@-])", r"\\\1", text)
