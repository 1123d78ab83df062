"""Commands in the trees of a frozen plan's arms, in a sandbox or beside the judge, each with caches of its own."""

import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from assay.arms import sandbox
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
    tree = tree or frozen.tree(arm)
    box = replace(frozen.box(arm, writable=writable, cache=cache), tree=tree)
    if sandboxed:
        return sandbox.run(box, command, timeout_s=timeout_s)
    environment = dict(os.environ, **frozen.content["sandbox"]["environment"])
    environment |= {name: str(cache or frozen.cache(arm)) for name in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    environment["PATH"] = os.pathsep.join([str(Path(PYTHON).parent), environment.get("PATH", os.defpath)])
    return _beside(places(frozen), arm, box, command, environment, timeout_s)


def beside(trees: Trees, arm: str, command: Sequence[str], timeout_s: float) -> str:
    """Runs a command once in an arm's tree, without a sandbox; how it ended, in words, "" if well."""
    box = Box(trees.trees[arm])
    ended = _in_place(trees, arm, box, command, trees.environment(arm, 0), timeout_s)
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


def _beside(
    folder: Path, arm: str, box: Box, command: Sequence[str], environment: dict[str, str], timeout_s: float
) -> Finished:
    return _in_place(Trees.at({arm: box.tree}, folder), arm, box, command, environment, timeout_s)


def _in_place(
    trees: Trees, arm: str, box: Box, command: Sequence[str], environment: dict[str, str], timeout_s: float
) -> Finished:
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
            ended = running.wait(timeout_s)
            running.watch(now=True)
            status, left, killed = ended.status, ended.left, ""
        except ArmError as problem:
            status, left, killed = -9, 0, problem.words
        finally:
            seconds = time.perf_counter() - start
            running.end()
        log.seek(max(0, log.seek(0, os.SEEK_END) - sandbox.TAIL))
        return Finished(status, log.read(), seconds, left, killed)
