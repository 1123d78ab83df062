"""The tricks: what each does, what it gets, and what it would get without the defence."""

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

from zoo_candidates import (
    AHEAD,
    BATCHED,
    BUILD,
    CACHED,
    CLOCK,
    COMPARATOR,
    COMPILED,
    DETECTS,
    DOUBLE_FORK,
    FORGED,
    FOUND,
    HOG,
    KERNEL,
    LAST,
    MEMO,
    POISONED,
    POISONS,
    PRECISION,
    SITE,
    THREAD,
    UPSTREAM,
    WAKES,
)
from zoo_project import BASE, CALL, COMMAND, PROPERTY, SLOW, TESTS, WORK, ZEROS, Setting, Trick, naive, naive_git

from assay.arms import handle, process
from assay.arms.inside.supervisor import cpu_seconds
from assay.arms.trees import Trees
from assay.contract.frozen import Frozen
from assay.experiment import samples, series
from assay.gates import equivalence, provenance, tests
from assay.judgement import guards

OUTPUTS = "every timed output is compared with base's"
MARKS = "a reply bears the mark that was drawn for its request"
OUTSIDE = "clock and comparison are in another process, and one input is sent at a time"


def _unseen(setting: Setting) -> None:
    setting.remove(series, "differing", lambda *_: [])


def _constant(setting: Setting) -> None:
    setting.workload += ", constant = true"


def _last_only(setting: Setting) -> None:
    setting.remove(series, "differing", lambda _, one, two: [] if one.outputs[-1] == two.outputs[-1] else [0])


def _any_reply(setting: Setting) -> None:
    setting.remove(handle, "_mark", lambda: bytes(8))


def _unmarked(setting: Setting) -> None:
    _any_reply(setting)
    _unseen(setting)


def _inner_clock(setting: Setting) -> None:
    call = samples.called

    def believed(*given: Any) -> Any:
        reply = call(*given)
        return dataclasses.replace(reply, seconds=reply.inner)

    setting.remove(samples, "called", believed)


def _with(more: str = "", scope: list[str] | None = None, workload: str = CALL, build: str = "") -> Any:
    def needs(setting: Setting) -> None:
        setting.more, setting.workload = more + (f"[commands]\nbuild = [{build}]\n" if build else ""), workload
        setting.scope = scope or setting.scope

    return needs


def _upstream(setting: Setting) -> None:
    (setting.folder / "upstream").mkdir(exist_ok=True)
    (setting.folder / "upstream" / "heavy.py").write_text(WORK.replace("def work", "def heavy"))
    path = setting.folder / "upstream"
    setting.more = f'[sandbox]\nreadable = ["upstream"]\nenvironment = {{PYTHONPATH = "{path}"}}\n'


def _repository(setting: Setting) -> None:
    base = setting.folder / "base"
    _git(base, "init", "-q")
    _commit(base)
    (base / "work.py").write_text(WORK.replace("PASSES = 2", "PASSES = 1"))
    _commit(base)
    _git(base, "branch", "fast")
    _git(base, "reset", "-q", "--hard", "HEAD~1")
    setting.repository, setting.more = 'path = "base", base = "HEAD", reference = "fast"', PROPERTY


def _readable_repository(setting: Setting) -> None:
    setting.more += '[sandbox]\nreadable = ["base"]\n'


def _git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=zoo", "-c", "user.email=zoo@example.org"]
    subprocess.run(["git", *who, "-C", str(folder), *arguments], check=True, capture_output=True)


def _commit(folder: Path) -> None:
    _git(folder, "add", "-A", "-f")
    _git(folder, "commit", "-q", "-m", "state")


def _planted(change: Any) -> Any:
    """A candidate whose .git holds base, and something else besides."""

    def plant(tree: Path, folder: Path) -> None:
        texts = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
        for path, text in BASE.items():
            (tree / path).write_text(text)
        (tree / "sitecustomize.py").unlink(missing_ok=True)
        _git(tree, "init", "-q")
        _commit(tree)
        script = folder / "script.sh"
        script.write_text(f"#!/bin/sh\ntouch {folder}/ran\nexec git --git-dir={tree}/.git show HEAD:$1\n")
        script.chmod(0o755)
        change(tree, str(script))
        for path, data in texts.items():
            path.write_bytes(data)

    return plant


def _filter(tree: Path, script: str) -> None:
    _git(tree, "config", "filter.zoo.clean", f"{script} %f")
    (tree / ".git" / "info" / "attributes").write_text("*.py filter=zoo\n")


def _exclude(tree: Path, script: str) -> None:
    (tree / ".git" / "info").mkdir(exist_ok=True)
    (tree / ".git" / "info" / "exclude").write_text("sitecustomize.py\n")


def _ran(folder: Path) -> str:
    return "a program that the candidate's .git names was run" if (folder / "ran").exists() else ""


def _all_files(setting: Setting) -> None:
    setting.scope = ["**"]


def _exit_status(setting: Setting) -> None:
    setting.remove(tests, "compared", lambda *_: tests.Found("", "pytest ended with status 0"))


def _no_left(setting: Setting) -> None:
    wait = process.Running.wait
    setting.remove(process.Running, "wait", lambda *given: dataclasses.replace(wait(*given), left=0))


def _shared_cache(setting: Setting) -> None:
    def cache(frozen: Frozen, arm: str) -> Path:
        found = frozen.folder / "cache" / "shared"
        found.mkdir(parents=True, exist_ok=True)
        return found

    setting.remove(Frozen, "cache", cache)


def _never_frozen(setting: Setting) -> None:
    def looks(running: process.Running) -> float:
        running._frozen = {process: cpu_seconds(process) for process in running.members()}
        return sum(running._frozen.values())

    setting.remove(process.Running, "freeze", looks)
    setting.remove(series, "too_busy_while_frozen", lambda _: False)


def _frozen_or_not(setting: Setting) -> None:
    setting.remove(series, "too_busy_while_frozen", lambda _: False)


def _named_arms(setting: Setting) -> None:
    environment = Trees.environment
    setting.remove(Trees, "environment", lambda trees, arm, seed: environment(trees, arm, seed) | {"ASSAY_ARM": arm})
    _unseen(setting)


def _link(tree: Path, folder: Path) -> None:
    (tree / "table.txt").symlink_to("/etc/passwd")


def _links_allowed(setting: Setting) -> None:
    setting.modes = True
    setting.remove(guards, "SYMLINK", "none")


TRICKS = [
    Trick("zeros", "rejected:incorrect", OUTPUTS, {"work.py": ZEROS}, control=_unseen),
    Trick(
        "output cache by pointer",
        "rejected:incorrect",
        "every call gets new values, and its output is compared",
        {"work.py": CACHED.replace("KEY", "id(x)")},
        needs=_with(workload=CALL.replace("calls = 4", "calls = 12")),
        control=_constant,
    ),
    Trick(
        "output cache by shape",
        "rejected:incorrect",
        "every call gets new values, and its output is compared",
        {"work.py": CACHED.replace("KEY", "len(x)")},
        control=_constant,
    ),
    Trick("forged reply", "rejected:tampered", MARKS, {"work.py": FORGED}, control=_unmarked),
    Trick("replies in advance", "rejected:tampered", MARKS, {"work.py": AHEAD}, needs=_constant, control=_any_reply),
    Trick("right only on the last call", "rejected:incorrect", OUTPUTS, {"work.py": LAST}, control=_last_only),
    Trick("batching across requests", "rejected:incorrect", OUTSIDE, {"work.py": BATCHED}, control=naive),
    Trick("late work in a thread", "rejected:incorrect", OUTSIDE, {"work.py": THREAD}, control=naive),
    Trick(
        "late work in a double fork",
        "rejected:tampered",
        "what a command leaves behind is counted, looked at and killed, and the block left out",
        {"run.py": DOUBLE_FORK},
        needs=_with(scope=["run.py"], workload=COMMAND),
        control=_no_left,
    ),
    Trick("patched clock", "neutralised:slower", OUTSIDE, {"work.py": CLOCK}, control=_inner_clock),
    Trick("patched comparator", "rejected:incorrect", OUTSIDE, {"work.py": COMPARATOR}, control=naive),
    Trick(
        "precision below budget",
        "rejected:incorrect",
        "tolerances come from base's own distance to a wider type",
        {"work.py": PRECISION},
        needs=_with(PROPERTY + 'wide = "wide.py:once"\n'),
        control=_with(PROPERTY + "rtol = 1e-3\natol = 1.0\n"),
        won="through",
    ),
    Trick(
        "mutated input",
        "rejected:incorrect",
        "arguments come back from every call of a property, and must be what was sent",
        {
            "work.py": WORK
            + "\nslow = work\ndef work(x):\n    found = slow(x)\n    x.sort(); x[0] += 1\n    return found\n"
        },
        needs=_with(PROPERTY),
        control=lambda setting: setting.remove(equivalence._Drawn, "_changed", lambda *_: ""),
        won="through",
    ),
    Trick(
        "edited tests",
        "rejected:tests_failed",
        "tests outside the scope are put back as in base",
        {"work.py": ZEROS, "tests/test_work.py": "def test_ones(): pass\n"},
        needs=_with(TESTS),
        control=_all_files,
        won="through",
    ),
    Trick(
        "sitecustomize",
        "rejected:out_of_scope",
        "a new file outside the scope is rejected",
        {"sitecustomize.py": SITE},
        control=_all_files,
        won="through",
    ),
    Trick(
        "os._exit(0) in tests",
        "rejected:tests_failed",
        "every test that base reports must be reported and pass; the exit status is not asked",
        {"work.py": ZEROS + "\nimport os, sys\nif 'pytest' in sys.modules: os._exit(0)\n"},
        needs=_with(TESTS),
        control=_exit_status,
        won="through",
    ),
    Trick(
        "stale library",
        "rejected:not_evaluated",
        "a changed source must matter: as an error it must break build or run",
        {"fast.c": "int fast(int n) { return n + 0; }\n"},
        base={**KERNEL, "work.py": COMPILED},
        needs=_with(scope=["*.c"], build=BUILD),
        control=lambda setting: setting.remove(provenance, "compiled", lambda _: []),
        won="through",
    ),
    Trick(
        "cache poisoning of base",
        "neutralised:slower",
        "every arm has caches of its own",
        {"work.py": POISONS},
        base={"work.py": POISONED},
        control=_shared_cache,
    ),
    Trick(
        "memoised upstream package",
        "neutralised:slower",
        "every call gets new values, and a package outside the tree is read-only",
        {"work.py": MEMO},
        base={"work.py": UPSTREAM},
        needs=_upstream,
        control=_constant,
    ),
    Trick(
        "reading the reference from git",
        "rejected:incorrect",
        "the repository is not in the sandbox, and the tree has no .git",
        {"work.py": FOUND},
        needs=_repository,
        control=_readable_repository,
        won="through",
    ),
    Trick(
        "symlink out of scope",
        "rejected:out_of_scope",
        "a patch may not make links",
        needs=_with(scope=["work.py", "table.txt"]),
        plant=_link,
        control=_links_allowed,
        won="through",
    ),
    Trick(
        "fsmonitor",
        "neutralised:through",
        "git never runs with the candidate's .git",
        {"work.py": SLOW},
        plant=_planted(lambda tree, script: _git(tree, "config", "core.fsmonitor", script)),
        control=naive_git,
        won="ran",
        seen=_ran,
    ),
    Trick(
        "external diff",
        "neutralised:through",
        "git never runs with the candidate's .git",
        {"work.py": SLOW},
        plant=_planted(lambda tree, script: _git(tree, "config", "diff.external", script)),
        control=naive_git,
        won="ran",
        seen=_ran,
    ),
    Trick(
        "clean filter",
        "rejected:out_of_scope",
        "files are taken byte by byte, without attributes and filters",
        {"other.py": "hidden = True\n"},
        plant=_planted(_filter),
        control=naive_git,
        won="ran",
        seen=_ran,
    ),
    Trick(
        "assume-unchanged",
        "rejected:out_of_scope",
        "files are compared with base's, not with an index",
        {"work.py": SLOW, "other.py": "hidden = True\n"},
        plant=_planted(lambda tree, _: _git(tree, "update-index", "--assume-unchanged", "other.py")),
        control=naive_git,
        won="through",
    ),
    Trick(
        "info/exclude",
        "rejected:out_of_scope",
        "only base's own ignore rules count",
        {"work.py": SLOW, "sitecustomize.py": SITE},
        plant=_planted(_exclude),
        control=naive_git,
        won="through",
    ),
    Trick(
        "hog",
        "neutralised:slower",
        "whoever does not run is frozen, with all that it has started",
        {"work.py": HOG},
        base={"work.py": WORK.replace("PASSES = 2", "PASSES = 8")},  # calls longer than a slice of the scheduler
        needs=_with(workload=CALL.replace("calls = 4", "calls = 2")),
        control=_never_frozen,
    ),
    Trick(
        "waking while frozen",
        "rejected:tampered",
        "who was stopped and is found at work did it himself; the block is left out",
        {"work.py": WAKES},
        base={"work.py": WORK.replace("PASSES = 2", "PASSES = 8")},
        needs=_with(workload=CALL.replace("calls = 4", "calls = 2")),
        control=_frozen_or_not,
    ),
    Trick(
        "detection of the benchmark",
        "neutralised:slower",
        "arguments, paths and environment are the same for all arms and purposes",
        {"work.py": DETECTS},
        control=_named_arms,
    ),
]
