"""Is a changed source on the workload's path at all? It is if nothing works once the source is an error.

Each compiled source that a patch changes is poisoned in a clean copy of the candidate, which is then built and run with
empty caches. The Python files that it changes are poisoned together, so that what is timed is the tree that is judged,
and no package of that name that is installed beside it. A workload that none of this breaks must need another file of
the tree than the one that is started: it must fail once all of them raise, or are gone. A copy that nothing was done to
must build and run, so that a failure means what it seems to. Digests of what was built would prove less: a comment
changes nothing in a library, and a library may be there already.
"""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from assay.arms import commands, sandbox
from assay.arms.trees import Trees
from assay.contract.errors import ArmError
from assay.contract.frozen import Frozen
from assay.contract.workload import Workload
from assay.experiment.once import once
from assay.gates.gate import Found, Gate, Given, Where
from assay.gates.poison import code, poison, some

_C = b'#error "assay: is this source used?"\n'
_POISON = {
    **dict.fromkeys((".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx", ".inl", ".m", ".mm"), _C),
    **dict.fromkeys((".cu", ".cuh", ".hip", ".cl", ".metal"), _C),
    **dict.fromkeys((".pyx", ".pxd", ".pxi"), b"assay: is this source used?\n"),
    **dict.fromkeys((".s", ".asm", ".ptx"), b"assay: is this source used?\n"),
    **dict.fromkeys((".f", ".f90", ".f95"), b"assay: is this source used?\n"),
    **dict.fromkeys((".go", ".zig"), b"assay: is this source used?\n"),
    ".rs": b'compile_error!("assay: is this source used?");\n',
}


@dataclass(frozen=True)
class Provenance:
    """What was found. `outcome`: "", "not_evaluated" or "infra.provenance"; `words` say why."""

    outcome: str
    words: str
    poisoned: tuple[str, ...] = ()
    """The sources that were looked at."""


def compiled(changed: Sequence[str]) -> list[str]:
    """Those of the changed files that a compiler reads, now or at run time."""
    return [path for path in changed if PurePosixPath(path).suffix.lower() in _POISON]


def looked_at(given: Given) -> Found:
    """`check` of what the plan's patch changes."""
    changed = given.frozen.content["patch"]["changed"]
    found = check(given.frozen, changed, given.write, sandboxed=given.sandboxed, most=given.most)
    return Found(found.outcome, found.words)


def check(
    frozen: Frozen,
    changed: Sequence[str],
    write: Callable[[Path], object],
    *,
    sandboxed: bool = True,
    most: Callable[[float], float] = lambda seconds: seconds,
) -> Provenance:
    """Poisons every changed source. ValueError if there is to be a sandbox and there can be none here.

    Args:
        frozen: says how the candidate is built and run.
        changed: paths of the patch.
        most: so many seconds, or what is left of a budget.
        write: puts the candidate's files, as they were handed in, into a folder that is not there yet.
    """
    refused = sandbox.refusal()
    if sandboxed and refused:
        raise ValueError(refused)
    candidate = frozen.tree("candidate")
    sources = [source for source in compiled(changed) if (candidate / source).is_file()]
    python = [path for path in code(changed) if (candidate / path).is_file()]
    with tempfile.TemporaryDirectory(prefix="poison-", dir=frozen.folder) as folder:

        def copy() -> _Copy:
            name = secrets.token_hex(4)
            tree, cache = Path(folder, f"tree-{name}"), Path(folder, f"cache-{name}")
            write(tree)
            cache.mkdir()
            return _Copy(frozen, tree, cache, sandboxed, most)

        looked: list[str] = []
        names = list(frozen.plans())
        proved: set[str] = set()
        """Workloads that fail where files of the tree do not work."""
        try:
            clean = copy()
            if failed := clean.built():
                return Provenance("infra.provenance", f"a second build of the candidate: {failed}")
            if failures := clean.failures(names):
                return Provenance("", f"nothing can be said: the candidate fails by itself, {_first(failures)}")
            for source in sources:
                looked.append(source)
                poisoned = copy()
                (poisoned.tree / source).write_bytes(_POISON[PurePosixPath(source).suffix.lower()])
                if poisoned.built():
                    continue  # the build needs it
                if not (failures := poisoned.failures(names)):
                    words = f"source not on the workload's path: {source} as an error changes nothing in build or run"
                    return Provenance("not_evaluated", words, tuple(looked))
                proved |= failures.keys()
            if python:
                looked += python
                failures = _raising(copy, python).failures(names)
                if not failures:
                    words = f"source not on the workload's path: what is timed runs though {some(python)} raise"
                    return Provenance("not_evaluated", f"{words} when they are imported", tuple(looked))
                proved |= failures.keys()
            if words := _unneeded([name for name in names if name not in proved], clean, copy, bool(python)):
                return Provenance("not_evaluated", words, tuple(looked))
        except _StoppedError as problem:
            return Provenance("infra.provenance", str(problem), tuple(looked))
    return Provenance("", f"nothing works without {some(looked) if looked else 'the tree'}", tuple(looked))


def _raising(copy: Callable[[], "_Copy"], files: Sequence[str]) -> "_Copy":
    """A built copy in which Python files raise: from the beginning, so that what is installed from it raises as well.

    Where nothing can be built so, they raise after the build.
    """
    poisoned = copy()
    poison(poisoned.tree, files)
    if poisoned.built():  # the build needs the files; does the workload?
        poisoned = copy()
        if failed := poisoned.built():
            raise _StoppedError(f"a third build of the candidate: {failed}")
        poison(poisoned.tree, files)
    return poisoned


def _unneeded(names: Sequence[str], clean: "_Copy", copy: Callable[[], "_Copy"], python: bool) -> str:
    """Which of the workloads that no changed file breaks run without the judged tree, in words; "" if none does.

    Beside the files that workloads start with nothing of the tree is left in `clean`; where Python was changed, all
    Python raises instead, so that a file that is only read proves nothing.
    """
    own = [path for plan in clean.frozen.plans().values() for path in started_with(plan.workload, clean.tree)]
    files = [path.relative_to(clean.tree).as_posix() for path in clean.tree.rglob("*.py") if path.is_file()]
    others = [path for path in code(files) if path not in own] if python else []
    if names and others:
        poison(clean.tree, others)
        if left := _well(clean, names):
            left = _well(_raising(copy, others), left)
        words = "what is timed runs though all Python files of the tree raise when they are imported"
        return f"{some(left)}: {words}" if left else ""
    for path in sorted(clean.tree.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it is not empty; an empty one can be imported
                path.rmdir()
        elif path.relative_to(clean.tree).as_posix() not in own:
            path.unlink()
    left = _well(clean, names)
    return f"{some(left)}: what is timed runs without the files of the tree" if left else ""


def _well(tree: "_Copy", names: Sequence[str]) -> list[str]:
    """Workloads that run all the same."""
    failures = tree.failures(names)
    return [name for name in names if name not in failures]


def started_with(run: Workload, tree: Path) -> list[str]:
    """Files of a tree that a workload names: those of its command, or the one in which its benchmark is."""
    words = run.command if run.kind == "command" else (run.target.partition(":")[0],) * (run.kind != "call")
    return [path for path in map(os.path.normpath, words) if (tree / path).is_file()]


def _first(failures: Mapping[str, str]) -> str:
    name, words = next(iter(failures.items()))
    return f"{name}: {words}"


class _StoppedError(RuntimeError):
    """Nothing can be said of a source: a sandbox or base failed."""


@dataclass(frozen=True)
class _Copy:
    """One copy of the candidate, with caches of its own."""

    frozen: Frozen
    tree: Path
    cache: Path
    sandboxed: bool
    most: Callable[[float], float]

    def built(self) -> str:
        """Builds the tree: what failed, in words, or ""."""
        wanted = self.frozen.content["commands"]
        for command in [*wanted["setup"], *wanted["build"]]:
            ended = commands.run(
                self.frozen,
                "candidate",
                command,
                sandboxed=self.sandboxed,
                writable=True,
                timeout_s=self.most(wanted["timeout_s"]),
                cache=self.cache,
                tree=self.tree,
            )
            self.most(1)
            if ended.status:
                return f"{' '.join(command)}: {commands.words(ended)}"
        return ""

    def failures(self, names: Sequence[str]) -> dict[str, str]:
        """Runs workloads once: what failed of each that does. Whether it is tampering is asked beside base."""
        found = {}
        for name in names:
            plan = self.frozen.plans()[name]
            try:
                alone = self.trees("candidate", self.tree, self.cache)
                base = self.trees("base", self.frozen.tree("base"), self.frozen.cache("base"))
                once(replace(plan, timeout_s=self.most(plan.timeout_s)), alone, base, "provenance")
            except ArmError as problem:
                if problem.infra or problem.arm != "candidate":
                    raise _StoppedError(str(problem)) from None
                self.most(1)  # else it was not late, but cut short
                found[name] = problem.words
        return found

    def trees(self, arm: str, tree: Path, cache: Path) -> Trees:
        """One arm as it runs."""
        place = commands.places(self.frozen)
        if self.sandboxed:
            return Trees.boxed({arm: replace(self.frozen.box(arm, cache=cache), tree=tree)}, place)
        own = {**self.frozen.content["sandbox"]["environment"], **sandbox.caches(cache)}
        return Trees.at({arm: tree}, place, more=own)


GATE = Gate(
    "provenance",
    looked_at,
    Where.MEASURED,
    asked=lambda _task, _changed: True,
)
