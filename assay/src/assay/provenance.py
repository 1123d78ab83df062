"""Is a changed source on the workload's path at all? It is if nothing works once the source is an error.

Each compiled source that a patch changes is poisoned in a clean copy of the candidate, which is then built and run with
empty caches. A copy that nothing was done to must build and run, so that a failure means what it seems to. Digests of
what was built would prove less: a comment changes nothing in a library, and a library may be there already.
"""

import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from assay import building, sandbox
from assay.arms import ArmError
from assay.frozen import Frozen
from assay.measure import Inputs, Trees, command_sample, worker_samples
from assay.plan import Plan
from assay.sandbox import Box

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


def check(frozen: Frozen, changed: Sequence[str], write: Callable[[Path], None]) -> Provenance:
    """Poisons every changed source. ValueError if there can be no sandbox here.

    Args:
        frozen: says how the candidate is built and run.
        changed: paths of the patch.
        write: puts the candidate's files, as they were handed in, into a folder that is not there yet.
    """
    refused = sandbox.refusal()
    if refused:
        raise ValueError(refused)
    sources = compiled(changed)
    if not sources:
        return Provenance("", "no compiled source was changed")
    with tempfile.TemporaryDirectory(prefix="poison-", dir=frozen.folder) as folder:
        looked = []
        for number, source in enumerate(["", *sources]):
            tree, cache = Path(folder, f"tree{number}"), Path(folder, f"cache{number}")
            write(tree)
            cache.mkdir()
            if source and not (tree / source).is_file():
                continue  # it was deleted
            if source:
                (tree / source).write_bytes(_POISON[PurePosixPath(source).suffix.lower()])
                looked.append(source)
            box = replace(frozen.box("candidate"), tree=tree, cache=cache)
            try:
                failed = _tried(frozen, box, Path(folder))
            except _NobodysFaultError as problem:
                return Provenance("infra.provenance", str(problem), tuple(looked))
            if not source and failed:
                return Provenance("infra.provenance", f"a second build of the candidate: {failed}")
            if source and not failed:
                words = f"source not on the workload's path: {source} as an error changes nothing in build or run"
                return Provenance("not_evaluated", words, tuple(looked))
            shutil.rmtree(tree)
    return Provenance(
        "", f"nothing works without {', '.join(looked)}" if looked else "sources were deleted only", tuple(looked)
    )


class _NobodysFaultError(RuntimeError):
    """A sandbox or base failed."""


def _tried(frozen: Frozen, box: Box, folder: Path) -> str:
    """Builds the tree and runs every workload once: what failed, in words, or ""."""
    commands = frozen.content["commands"]
    for command in [*commands["setup"], *commands["build"]]:
        ended = sandbox.run(replace(box, writable=True), command, timeout_s=commands["timeout_s"])
        if ended.status:
            return f"{' '.join(command)}: {building.words(ended)}"
    for name, plan in frozen.plans().items():
        try:
            _once(plan, frozen.box("base"), box, folder)
        except ArmError as problem:
            if problem.infra or problem.arm != "candidate":
                raise _NobodysFaultError(str(problem)) from None
            return f"{name}: {problem.words}"
    return ""


def _once(plan: Plan, base: Box, box: Box, folder: Path) -> None:
    """One run, or a first call, of a workload in the box. ArmError if it fails."""
    alone = Trees.boxed({"candidate": box}, folder)
    if not plan.workload.worker:
        command_sample("candidate", plan, alone, 0)
        return
    inputs = Inputs(plan, Trees.boxed({"base": base}, folder))
    try:
        made = inputs.make([plan.seed])
    finally:
        inputs.end()
    short = replace(plan, workload=replace(plan.workload, rounds=1, warmups=1))
    worker_samples(short, alone, random.Random(0), made * 2, 0)
