"""Commands in the trees of a frozen plan's arms, in a sandbox or beside the judge, each with caches of its own."""

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from assay.arms import sandbox, turns
from assay.arms.process import PYTHON, Running
from assay.arms.sandbox import CACHE, Finished
from assay.arms.trees import Trees
from assay.contract import traces
from assay.contract.box import Box
from assay.contract.errors import ArmError
from assay.contract.frozen import Frozen

_LAST_WORDS, _LEAST_FREE = 1000, 1 << 20
_ERROR = re.compile(r"\berror(:|\[| #| [A-Z]+\d)", re.IGNORECASE)
_ERRORS, _LONGEST = 3, 300
"""Lines of compilers that are shown, and characters of one."""


def placed(frozen: Frozen, *, sandboxed: bool, isolation: str = "auto", more: Mapping[str, str] | None = None) -> Trees:
    """All arms as they run: in their sandboxes, or beside each other. ValueError as in Trees.

    An arm sees its tree at one path from its setup to its last timed call, since an environment that is set up in a
    tree holds that path. `more` is set in every arm beside the task's own environment.
    """
    folder = places(frozen)
    if not sandboxed:
        own = {**frozen.content["sandbox"]["environment"], **(more or {})}
        most = replace(frozen.box("base").limits, folders=())  # caches are the user's own
        return Trees.at({arm: frozen.tree(arm) for arm in frozen.arms}, folder, isolation, own, most)
    boxes = {arm: frozen.box(arm) for arm in frozen.arms}
    return Trees.boxed(
        {arm: replace(box, environment={**box.environment, **(more or {})}) for arm, box in boxes.items()}, folder
    )


def run(
    frozen: Frozen,
    arm: str,
    command: Sequence[str],
    *,
    sandboxed: bool,
    timeout_s: float,
    writable: bool = False,
    cache: Path | None = None,
    tree: Path | None = None,
) -> Finished:
    """A command in an arm's tree, or in `tree`, in its sandbox or, where that is not wanted, beside it."""
    options: dict[str, Any] = {"sandboxed": sandboxed, "timeout_s": timeout_s, "writable": writable}
    return turns.alone(steps(frozen, arm, command, **options, cache=cache, tree=tree))


def steps(
    frozen: Frozen,
    arm: str,
    command: Sequence[str],
    *,
    sandboxed: bool,
    timeout_s: float,
    writable: bool = False,
    cache: Path | None = None,
    tree: Path | None = None,
) -> turns.Steps[Finished]:
    """As `run`, beside others (turns.py)."""
    tree = tree or frozen.tree(arm)
    box = replace(frozen.box(arm, writable=writable, cache=cache), tree=tree)
    if sandboxed:
        return (yield from sandbox.steps(box, command, timeout_s=timeout_s))
    environment = dict(os.environ, **frozen.content["sandbox"]["environment"])
    environment |= {name: str(cache or frozen.cache(arm)) for name in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    environment["PATH"] = os.pathsep.join([str(Path(PYTHON).parent), environment.get("PATH", os.defpath)])
    trees = Trees.at({arm: box.tree}, places(frozen))
    return (yield from _in_place(trees, arm, box, command, environment, timeout_s))


def prepared(
    frozen: Frozen,
    arm: str,
    *,
    sandboxed: bool,
    most: Callable[[float], float],
    cache: Path | None = None,
    tree: Path | None = None,
) -> turns.Steps[str]:
    """Sets up and builds a tree as the task says, beside others: what failed, in words, or "".

    `most`: so many seconds, or what is left of a budget; it raises where nothing is left.
    """
    wanted = frozen.content["commands"]
    options: dict[str, Any] = {"sandboxed": sandboxed, "writable": True, "cache": cache, "tree": tree}
    for command in [*wanted["setup"], *wanted["build"]]:
        ended = yield from steps(frozen, arm, command, timeout_s=most(wanted["timeout_s"]), **options)
        most(1)  # else it was not late, but cut short
        if ended.status:
            return f"{' '.join(command)}: {words(ended)}"
    return ""


def beside(trees: Trees, arm: str, command: Sequence[str], timeout_s: float) -> str:
    """Runs a command once in an arm's tree, without a sandbox; how it ended, in words, "" if well."""
    box = Box(trees.trees[arm])
    ended = turns.alone(_in_place(trees, arm, box, command, trees.environment(arm, 0), timeout_s))
    return words(ended) if ended.status else ""


def places(frozen: Frozen) -> Path:
    """The folder in which arms without a sandbox are shown, made if it is not there."""
    found = frozen.folder / "places"
    found.mkdir(exist_ok=True)
    return found


def cache_inside(frozen: Frozen, arm: str, cache: Path | None, *, sandboxed: bool) -> Path:
    """Where a command finds the folder that `run` was given as its cache."""
    return CACHE if sandboxed else cache or frozen.cache(arm)


def disk_is_full(folder: Path) -> bool:
    """Whether next to nothing can be written there any more, so that what fails may fail for that."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize < _LEAST_FREE or (state.f_files > 0 and state.f_favail == 0)


def words(ended: Finished) -> str:
    """How a command ended, and its last words, a line per traceback.

    The first errors of compilers stand behind them: builders go on with other files, and end with what is not to blame.
    """
    how = ended.killed or f"ended with status {ended.status}"
    said = traces.brief(ended.output.decode(errors="replace")).strip()
    last = said[-_LAST_WORDS:]
    errors = [line.strip()[:_LONGEST] for line in said[:-_LAST_WORDS].splitlines() if _ERROR.search(line)][:_ERRORS]
    return "\n".join([f"{how}: {last}", *errors])


def _in_place(
    trees: Trees, arm: str, box: Box, command: Sequence[str], environment: dict[str, str], timeout_s: float
) -> turns.Steps[Finished]:
    with tempfile.TemporaryFile() as log:
        running = Running(
            arm,
            command,
            box.tree,
            trees.place(arm),
            environment,
            log=log.fileno(),
            namespaces=trees.namespaces,
            limits=box.limits,
        )
        start = time.perf_counter()
        try:
            running.release()
            ended = yield from running.ending(timeout_s)
            running.watch(now=True)
            status, left, killed = ended.status, ended.left, ""
        except ArmError as problem:
            status, left, killed = -9, 0, problem.words
        finally:
            seconds = time.perf_counter() - start
            running.end()
        log.seek(max(0, log.seek(0, os.SEEK_END) - sandbox.TAIL))
        return Finished(status, log.read(), seconds, left, killed)
