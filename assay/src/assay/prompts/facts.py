"""What a prompt may say about a task: a variable per fact. Some come from the reference, and leak it."""

import keyword
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.contract.patterns import CHECKS, matches
from assay.repository import store

if TYPE_CHECKING:
    from assay.contract.task import Read, Timed

LEVELS = {"targets": 1, "first_targets": 1, "stems": 1, "diffstat": 2, "message": 3, "hints": 3, "example": 4}
"""Variable that comes from the reference -> the leak level of a prompt that says it."""
LEVEL_WORDS = {
    "L0": "nothing of the reference",
    "L1": "names of the files that the reference changes",
    "L2": "the reference's diffstat",
    "L3": "the reference's commit message, or names from its diff",
    "L4": "lines of the reference's diff",
}
_EXAMPLE_LINES, _HINTS, _FIRST = 30, 6, 3
_CALL = re.compile(r"([A-Za-z_][A-Za-z0-9_.]*)\s*\(")


def own(read: "Read", tree: str, measure: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """Variables that say what the task says, as the judge applies it.

    Args:
        read: the task.
        tree: where the agent finds the repository.
        measure: workload -> the command that measures it, for the workloads that the agent can measure.
        seconds: the agent's time.
    """
    task = read.task
    shows = task.prompt.shows
    return {
        "name": task.name,
        "goal": task.prompt.goal.strip(),
        "tree": tree,
        "workloads": [_workload(read, timed, shown="workload" in shows) for timed in task.workload],
        "files": list(task.scope.files),
        "checks": list(task.scope.checks),
        "restored": list(task.scope.restored),
        "left": list(task.scope.left),
        "most_files": task.scope.most_files,
        "most_bytes": task.scope.most_bytes,
        "packages": list(task.api.packages),
        "native": list(task.api.native),
        "allowed": list(task.api.allow),
        "tests": " ".join(task.tests.command) if "tests" in shows else "",
        "has_tests": bool(task.tests.command),
        "build": [" ".join(command) for command in (*task.commands.setup, *task.commands.build)],
        "properties": len(task.property),
        "delta": task.delta,
        "require": task.require,
        "measure": dict(measure),
        "minutes": round(seconds / 60),
    }


def of_reference(read: "Read") -> dict[str, Callable[[], Any]]:
    """Variables that say something of the reference; each is worked out when it is asked for.

    GitError if git cannot read the commits.
    """
    repository, base, reference = read.repository, read.base, read.reference

    def git(*arguments: str) -> str:
        return store.run(["-C", str(repository), *arguments]).decode(errors="replace")

    def changed() -> list[str]:
        named = git("diff-tree", "-r", "-z", "--name-only", "--no-renames", "--no-ext-diff", base, reference)
        return [path for path in named.split("\0") if path]

    def diff(context: int = 1) -> list[str]:
        given = (
            "diff-tree",
            "-r",
            "-p",
            f"-U{context}",
            "--no-renames",
            "--no-ext-diff",
            "--no-textconv",
            "--no-color",
        )
        return git(*given, base, reference).splitlines()

    return {
        "targets": changed,
        "first_targets": lambda: changed()[:_FIRST],
        "stems": lambda: ", ".join(Path(path).stem.replace("_", " ") for path in changed()[:_FIRST]),
        "diffstat": lambda: git("diff-tree", "-r", "--stat=80", "--no-ext-diff", base, reference).rstrip(),
        "message": lambda: git("log", "-1", "--format=%B", "--no-show-signature", reference).strip(),
        "hints": lambda: _hints(diff()),
        "example": lambda: _example(diff()),
    }


def _workload(read: "Read", timed: "Timed", *, shown: bool) -> dict[str, Any]:
    run = timed.run
    what = " ".join(run.command) if run.kind == "command" else run.target
    found = {"name": timed.name, "kind": run.kind, "what": what if shown else "", "figure": timed.primary or "wall"}
    return {**found, "script": _script(read, timed) if shown else ""}


def _script(read: "Read", timed: "Timed") -> str:
    """An example of the workload as a script: the task's own drivers and makers of inputs, then one timed call."""
    run = timed.run
    if run.kind == "command":
        return " ".join(run.command)
    parts = []
    for name in dict.fromkeys(filter(None, (run.target, run.inputs))):
        if (file := read.own(name)) is not None:
            parts.append(f"# {file.name}\n{file.read_text().rstrip()}")
    called = run.target.partition(":")[2]
    lines = ["import time"]
    if read.own(run.target) is None and run.kind == "call":
        lines.append(f"from {run.target.partition(':')[0]} import {called}")
    made = run.inputs.partition(":")[2]
    lines += [f"arguments = {made}(1)"] if made else ["arguments = ()"]
    lines += ["start = time.perf_counter()", f"{called}(*arguments)", 'print(f"{time.perf_counter() - start:.6f} s")']
    return "\n\n".join([*parts, "\n".join(lines)])


def _hints(diff: list[str]) -> dict[str, list[str]]:
    """Names that are called more often on removed lines than on added ones, and the other way round."""
    counts: dict[str, int] = {}
    for line in diff:
        sign = {"-": -1, "+": 1}.get(line[:1], 0)
        if sign and not line.startswith(("---", "+++")):
            for name in filter(lambda one: not keyword.iskeyword(one), _CALL.findall(line[1:])):
                counts[name] = counts.get(name, 0) + sign
    ordered = sorted(counts, key=lambda name: (-abs(counts[name]), name))
    return {
        "removed": [name for name in ordered if counts[name] < 0][:_HINTS],
        "added": [name for name in ordered if counts[name] > 0][:_HINTS],
    }


def _example(diff: list[str]) -> str:
    """The first lines of the diff without its headers, tests and benchmarks left out; `...` where it was cut."""
    found: list[str] = []
    skipped = False
    for line in diff:
        if line.startswith("diff "):
            skipped = matches(line.rpartition(" b/")[2], CHECKS)
        elif line.startswith("@@") and not skipped:
            found += ["..."] if found and found[-1] != "..." else []
        elif line[:1] in "+- " and not line.startswith(("---", "+++")) and not skipped:
            found.append(line)
        if len(found) >= _EXAMPLE_LINES:
            return "\n".join([*found, "..."])
    return "\n".join(found)
