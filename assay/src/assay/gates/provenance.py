"""Is a changed source on the workload's path at all? It is if nothing works once the source is an error.

Each compiled source that a patch changes is poisoned in a clean copy of the candidate, which is then built and run with
empty caches. The Python files that it changes are poisoned together, so that what is timed is the tree that is judged,
and no package of that name that is installed beside it. A workload that none of this breaks must need another file of
the tree than the one that it starts with. A copy that nothing was done to must build and run, so that a failure means
what it seems to. Digests of what was built would prove less: a comment changes nothing in a library, and a library may
be there already. Copies are built beside each other, then run one after another.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from assay.arms import commands, sandbox, turns
from assay.arms.process import namespaces_work
from assay.arms.trees import Trees
from assay.contract.errors import ArmError
from assay.contract.frozen import of_folder, written
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


AHEAD = "copies"
"""Beside the plan: copies that were built where it was prepared."""
_CLEAN, _PYTHON, _LATE, _NOTE = "clean", "python", "late", "copies.json"


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
    found = check(given, given.frozen.content["patch"]["changed"])
    return Found(found.outcome, found.words)


def check(given: Given, changed: Sequence[str]) -> Provenance:
    """Poisons every changed source. ValueError if there is to be a sandbox and there can be none here.

    Copies that were built ahead are not built again; ValueError if one is not what was built.
    """
    refused = sandbox.refusal()
    if given.sandboxed and refused:
        raise ValueError(refused)
    frozen = given.frozen
    with tempfile.TemporaryDirectory(prefix="poison-", dir=frozen.folder) as folder:
        copies = _Copies.of(given, changed, Path(folder))
        try:
            ahead = frozen.folder / AHEAD
            return _judged(copies, copies.taken(ahead) if ahead.is_dir() else copies.built())
        except _StoppedError as problem:
            return Provenance("infra.provenance", str(problem))


def build_ahead(given: Given) -> Found:
    """Builds all copies beside the plan, to be run where it is measured."""
    folder = given.frozen.folder / AHEAD
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copies = _Copies.of(given, given.frozen.content["patch"]["changed"], folder)
    failed = copies.built()
    digests = {name: of_folder(folder / name) for name, words in failed.items() if not words}
    written(folder / _NOTE, json.dumps({"failed": failed, "digests": digests}, indent=1) + "\n")
    return Found("", f"{len(digests)} of {len(failed)} copies were built")


def _judged(copies: "_Copies", failed: Mapping[str, str]) -> Provenance:
    """What follows from copies; `failed`: by name, why a copy could not be built, in words, or ""."""
    if words := failed[_CLEAN]:
        return Provenance("infra.provenance", f"a second build of the candidate: {words}")
    if failures := copies.failures(_CLEAN):
        name, words = next(iter(failures.items()))
        return Provenance("", f"nothing can be said: the candidate fails by itself, {name}: {words}")
    looked: list[str] = []
    proved: set[str] = set()
    """Workloads that fail where files of the tree do not work."""
    for name, source in copies.sources.items():
        looked.append(source)
        if failed[name]:
            continue  # the build needs it
        if not (failures := copies.failures(name)):
            words = f"source not on the workload's path: {source} as an error changes nothing in build or run"
            return Provenance("not_evaluated", words, tuple(looked))
        proved |= failures.keys()
    if copies.python:
        looked += copies.python
        name = _LATE if failed[_PYTHON] else _PYTHON
        if words := failed[name]:
            return Provenance("infra.provenance", f"a third build of the candidate: {words}", tuple(looked))
        if not (failures := copies.failures(name)):
            words = f"source not on the workload's path: what is timed runs though {some(copies.python)} raise"
            return Provenance("not_evaluated", f"{words} when they are imported", tuple(looked))
        proved |= failures.keys()
    if words := _unneeded(copies, [name for name in copies.given.frozen.plans() if name not in proved]):
        return Provenance("not_evaluated", words, tuple(looked))
    return Provenance("", f"nothing works without {some(looked) if looked else 'the tree'}", tuple(looked))


def _unneeded(copies: "_Copies", names: Sequence[str]) -> str:
    """Which of the workloads that no changed file breaks run without the judged tree, in words; "" if none does.

    Where Python was changed, all Python raises and what the build made is gone, so that a file that is only read proves
    nothing; else all files are gone. The files that workloads start with stay as they are.
    """
    tree = copies.tree(_CLEAN)
    own = [path for plan in copies.given.frozen.plans().values() for path in started_with(plan.workload, tree)]
    others = [path for path in code(_files(tree)) if path not in own] if copies.python else []
    if names and others:
        poison(tree, others)
        names = copies.well(_CLEAN, names)
    if names:
        copies.given.write(tree.with_name("handed in"))
        _without(tree, {*own, *(_files(tree.with_name("handed in")) if others else [])})
        names = copies.well(_CLEAN, names)
    words = "all Python files of the tree raise when they are imported" if others else "the files of the tree are gone"
    return f"{some(names)}: what is timed runs though {words}" if names else ""


def started_with(run: Workload, tree: Path) -> list[str]:
    """Files of a tree that a workload names: those of its command, or the one in which its benchmark is."""
    words = run.command if run.kind == "command" else (run.target.partition(":")[0],) * (run.kind != "call")
    return [path for path in map(os.path.normpath, words) if (tree / path).is_file()]


def _files(tree: Path) -> list[str]:
    """Paths of all files of a tree, and of links."""
    found = [path for path in tree.rglob("*") if path.is_symlink() or path.is_file()]
    return [path.relative_to(tree).as_posix() for path in found]


def _without(tree: Path, kept: Collection[str]) -> None:
    """Takes files away that are not kept, and folders without any: an empty one can be imported."""
    for path in _files(tree):
        if path not in kept:
            (tree / path).unlink()
    for folder in sorted((path for path in tree.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


class _StoppedError(RuntimeError):
    """Nothing can be said of a source: a sandbox or base failed."""


@dataclass(frozen=True)
class _Copies:
    """Copies of the candidate, each with caches of its own: a clean one, one per compiled source, one for Python."""

    given: Given
    folder: Path
    sources: dict[str, str]
    """By name of the copy in which it is an error."""
    python: list[str]

    @classmethod
    def of(cls, given: Given, changed: Sequence[str], folder: Path) -> "_Copies":
        """Those that the changed paths need, as far as the candidate has them; not made yet."""
        tree = given.frozen.tree("candidate")
        sources = [path for path in compiled(changed) if (tree / path).is_file()]
        python = [path for path in code(changed) if (tree / path).is_file()]
        return cls(given, folder, {f"source{number}": path for number, path in enumerate(sources)}, python)

    def built(self) -> dict[str, str]:
        """Makes and builds the copies: by name, what failed, in words, or "". Nothing else if the clean one failed."""
        spoils: dict[str, Callable[[Path], object]] = {_CLEAN: lambda _: None}
        spoils |= {name: partial(_error, source) for name, source in self.sources.items()}
        if self.python:  # before it is set up, so that what is installed from it raises as well
            spoils[_PYTHON] = partial(poison, files=self.python)
        failed = self._built(spoils)
        if failed.get(_PYTHON) and not failed[_CLEAN]:  # the build needs the files; does the workload?
            failed |= self._built({_LATE: lambda _: None})
            if not failed[_LATE]:
                poison(self.tree(_LATE), self.python)
        return failed

    def _built(self, spoils: Mapping[str, Callable[[Path], object]]) -> dict[str, str]:
        # Without namespaces they would be shown at one place.
        jobs = self.given.jobs(len(spoils)) if self.given.sandboxed or namespaces_work() else 1
        failed: dict[str, str] = {}
        with contextlib.closing(
            turns.beside({name: self._build(name, spoil) for name, spoil in spoils.items()}, jobs)
        ) as ended:
            for name, words in ended:
                failed[name] = words
                if name == _CLEAN and words:
                    break
        return failed

    def _build(self, name: str, spoil: Callable[[Path], object]) -> turns.Steps[str]:
        tree = self.tree(name)
        self._cache(name).mkdir(parents=True)
        self.given.write(tree)
        spoil(tree)
        words = yield from commands.prepared(
            self.given.frozen,
            "candidate",
            sandboxed=self.given.sandboxed,
            most=self.given.most,
            cache=self._cache(name),
            tree=tree,
        )
        if words:
            shutil.rmtree(self.folder / name)
        return words

    def taken(self, ahead: Path) -> dict[str, str]:
        """Takes copies that were built ahead. ValueError if one of them is not what was built."""
        noted = json.loads((ahead / _NOTE).read_text())
        for name, digest in noted["digests"].items():
            if (found := of_folder(ahead / name)) != digest:
                raise ValueError(f"PLAN: expected the copy {name} to be what was built, {digest}, got {found}")
            shutil.copytree(ahead / name, self.folder / name, symlinks=True)
        failed: dict[str, str] = noted["failed"]
        return failed

    def failures(self, name: str, workloads: Collection[str] | None = None) -> dict[str, str]:
        """Runs workloads, or every one, once: why those fail that do. Whether it is tampering is asked beside base."""
        frozen = self.given.frozen
        found = {}
        for workload, plan in frozen.plans().items():
            if workloads is not None and workload not in workloads:
                continue
            try:
                alone = self._trees("candidate", self.tree(name), self._cache(name))
                base = self._trees("base", frozen.tree("base"), frozen.cache("base"))
                once(replace(plan, timeout_s=self.given.most(plan.timeout_s)), alone, base, "provenance")
            except ArmError as problem:
                if problem.infra or problem.arm != "candidate":
                    raise _StoppedError(str(problem)) from None
                self.given.most(1)  # else it was not late, but cut short
                found[workload] = problem.words
        return found

    def well(self, name: str, workloads: Sequence[str]) -> list[str]:
        """Those of the workloads that run in a copy."""
        failures = self.failures(name, workloads)
        return [workload for workload in workloads if workload not in failures]

    def _trees(self, arm: str, tree: Path, cache: Path) -> Trees:
        """One arm as it runs."""
        frozen = self.given.frozen
        place = commands.places(frozen)
        if self.given.sandboxed:
            box = replace(frozen.box(arm, cache=cache), tree=tree)
            return Trees.boxed({arm: replace(box, environment={**box.environment, **self.given.environment})}, place)
        own = {**frozen.content["sandbox"]["environment"], **self.given.environment, **sandbox.caches(cache)}
        return Trees.at({arm: tree}, place, more=own)

    def tree(self, name: str) -> Path:
        """The folder of a copy's files."""
        return self.folder / name / "tree"

    def _cache(self, name: str) -> Path:
        return self.folder / name / "cache"


def _error(source: str, tree: Path) -> None:
    (tree / source).write_bytes(_POISON[PurePosixPath(source).suffix.lower()])


GATE = Gate(
    "provenance",
    looked_at,
    Where.MEASURED,
    ahead=build_ahead,
    asked=lambda _task, _changed: True,
)
