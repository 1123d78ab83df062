"""Is a changed source on the workload's path at all? It is if nothing works once the source is an error.

Each compiled source that a patch changes is poisoned in a clean copy of the candidate, which is then built and run with
empty caches. The Python files that it changes are poisoned together, so that what is timed is the tree that is judged,
and no package of that name that is installed beside it. A copy that nothing was done to must build and run, so that a
failure means what it seems to. Digests of what was built would prove less: a comment changes nothing in a library, and
a library may be there already.
"""

import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from assay.arms import commands, sandbox
from assay.arms.trees import Trees
from assay.contract.errors import ArmError
from assay.contract.frozen import Frozen
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
    if not sources and not python:
        return Provenance("", "no source was changed")
    with tempfile.TemporaryDirectory(prefix="poison-", dir=frozen.folder) as folder:

        def copy() -> _Copy:
            name = secrets.token_hex(4)
            tree, cache = Path(folder, f"tree-{name}"), Path(folder, f"cache-{name}")
            write(tree)
            cache.mkdir()
            return _Copy(frozen, tree, cache, sandboxed, most)

        looked: list[str] = []
        try:
            clean = copy()
            if failed := clean.built():
                return Provenance("infra.provenance", f"a second build of the candidate: {failed}")
            if failed := clean.ran():
                return Provenance("", f"nothing can be said: the candidate fails by itself, {failed}")
            for source in sources:
                looked.append(source)
                poisoned = copy()
                (poisoned.tree / source).write_bytes(_POISON[PurePosixPath(source).suffix.lower()])
                if not poisoned.built() and not poisoned.ran():
                    words = f"source not on the workload's path: {source} as an error changes nothing in build or run"
                    return Provenance("not_evaluated", words, tuple(looked))
            if python:
                looked += python
                poisoned = copy()
                poison(poisoned.tree, python)  # before it is set up, so that what is installed from it raises as well
                if poisoned.built():  # the build needs the files; does the workload?
                    poisoned = copy()
                    if failed := poisoned.built():
                        return Provenance("infra.provenance", f"a third build of the candidate: {failed}")
                    poison(poisoned.tree, python)
                if not poisoned.ran():
                    words = f"source not on the workload's path: what is timed runs though {some(python)} raise"
                    return Provenance("not_evaluated", f"{words} when they are imported", tuple(looked))
        except _StoppedError as problem:
            return Provenance("infra.provenance", str(problem), tuple(looked))
    return Provenance("", f"nothing works without {some(looked)}", tuple(looked))


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

    def ran(self) -> str:
        """Runs every workload once: what failed, in words, or "". Whether it is tampering is asked beside base."""
        for name, plan in self.frozen.plans().items():
            try:
                alone = self.trees("candidate", self.tree, self.cache)
                base = self.trees("base", self.frozen.tree("base"), self.frozen.cache("base"))
                once(replace(plan, timeout_s=self.most(plan.timeout_s)), alone, base, "provenance")
            except ArmError as problem:
                if problem.infra or problem.arm != "candidate":
                    raise _StoppedError(str(problem)) from None
                self.most(1)  # else it was not late, but cut short
                return f"{name}: {problem.words}"
        return ""

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
    asked=lambda _, changed: bool(compiled(changed) or code(changed)),
    otherwise="no source was changed",
)
