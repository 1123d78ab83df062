"""Does the workload run the code that the reference changes? Measured: its lines are noted as they run.

Every workload is run once more in the built trees of base and reference, with a few inputs, by Python's own monitoring
(before Python 3.12 by tracing). Nothing is timed. Lines inside functions count; lines that define something run when a
module is imported, and count only where a change has no others. Compiled sources are the provenance gate's.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from assay.arms import commands, sandbox
from assay.arms.inside import reach as inside
from assay.arms.sandbox import CACHE
from assay.arms.trees import Trees
from assay.contract.admission import Reason
from assay.contract.errors import ArmError
from assay.contract.frozen import Frozen
from assay.experiment.once import once
from assay.gates.provenance import compiled
from assay.mining import functions
from assay.repository.lines import parsed
from assay.repository.store import Store

_INPUTS = 3
_OUT = "reach.txt"
_FOLDER = Path(inside.__file__).parent
NAME = "reach"
_TREES = {"base": "base", "candidate": "the reference"}


@dataclass(frozen=True)
class Seen:
    """What ran in one arm."""

    way: str
    """sys.monitoring or sys.settrace; "" if nothing was noted at all."""
    lines: Mapping[str, frozenset[int]]
    """By path in the tree."""


@dataclass(frozen=True)
class Changed:
    """A file's changed lines, by arm."""

    path: str
    wanted: Mapping[str, frozenset[int]]
    called: bool
    """Whether they lie inside functions."""


def found(frozen: Frozen, gates: Sequence[Mapping[str, str]], *, sandboxed: bool, source: str) -> list[Reason]:
    """What of the reference's change runs, file by file; from the attempt that judged it, whose trees are built."""
    store = Store(frozen.folder / "git")
    trees = frozen.content["commits"]
    changed = parsed(store.patch(trees["base"], trees["candidate"]).decode(errors="replace"))
    python = [path for path in changed if path.endswith(".py")]
    reasons = [*_poisoned(frozen, gates, source)]
    if python:
        files = [_changed(frozen, path, [*changed[path].removed], [*changed[path].added]) for path in python]
        reasons += _python(frozen, [one for one in files if any(one.wanted.values())], sandboxed, source)
    if not reasons:
        reasons = [Reason(NAME, "measured", "open", f"neither Python nor compiled: {', '.join(changed)}", source)]
    return _together(reasons)


def _together(reasons: list[Reason]) -> list[Reason]:
    """One file of the change that runs will do; those that do not are noted."""
    if any(one.finding == "for" for one in reasons):
        return [one if one.finding == "for" else replace(one, finding="noted") for one in reasons]
    return reasons


def _poisoned(frozen: Frozen, gates: Sequence[Mapping[str, str]], source: str) -> list[Reason]:
    """What the provenance gate has found of compiled sources."""
    sources = compiled(frozen.content["patch"]["changed"])
    gate = next((one for one in gates if one["name"] == "provenance"), None)
    if not sources:
        return []
    if gate is None or gate["outcome"] not in ("", "not_evaluated"):
        words = gate["words"] if gate else "the provenance gate was not tried"
        return [Reason(NAME, "measured", "open", f"{', '.join(sources)}: {words}", source)]
    return [Reason(NAME, "measured", "against" if gate["outcome"] else "for", gate["words"], source)]


def _changed(frozen: Frozen, path: str, removed: list[tuple[int, str]], added: list[tuple[int, str]]) -> Changed:
    wanted = {"base": removed, "candidate": added}
    lines = {arm: frozenset(number for number, text in each if _runs(text)) for arm, each in wanted.items()}
    bodies = {}
    for arm, numbers in lines.items():
        file = frozen.tree(arm) / path
        bodies[arm] = numbers & functions.bodies(file.read_text(errors="replace") if file.is_file() else "")
    called = any(bodies.values())
    return Changed(path, bodies if called else lines, called)


def _runs(text: str) -> bool:
    """Whether a line may hold something that runs."""
    return bool(text.strip()) and not text.lstrip().startswith("#")


def _python(frozen: Frozen, files: Sequence[Changed], sandboxed: bool, source: str) -> list[Reason]:
    if not files:
        return [Reason(NAME, "measured", "against", "no line of Python that could run is changed", source)]
    try:
        seen = {arm: traced(frozen, arm, sandboxed=sandboxed) for arm in _TREES}
    except ArmError as problem:
        return [Reason(NAME, "measured", "open", f"the workload cannot be run once more: {problem}", source)]
    if not all(one.way for one in seen.values()):
        words = "no process of the workload could be looked into: it is no Python, or was started without `site`"
        return [Reason(NAME, "measured", "open", words, source)]
    reasons = []
    for one in files:
        hit = {arm: len(seen[arm].lines.get(one.path, frozenset()) & one.wanted[arm]) for arm in seen}
        counts = ", ".join(f"{hit[arm]} of {len(one.wanted[arm])} in {_TREES[arm]}" for arm in seen if one.wanted[arm])
        kind = "changed lines inside functions" if one.called else "changed lines, which run when it is imported"
        words = f"{one.path}: {counts} ran, of its {kind} ({seen['base'].way})"
        reasons.append(Reason(NAME, "measured", "for" if any(hit.values()) else "against", words, source))
    return reasons


def traced(frozen: Frozen, arm: str, *, sandboxed: bool) -> Seen:
    """The lines that run in a built arm, in all workloads together. ArmError if one fails."""
    with tempfile.TemporaryDirectory(prefix="reach-", dir=frozen.folder) as folder:
        cache = Path(folder)
        out = CACHE / _OUT if sandboxed else cache / _OUT
        given = frozen.content["sandbox"]["environment"].get("PYTHONPATH", "")
        paths = ":".join(filter(None, [str(_FOLDER), given]))
        more = {"PYTHONPATH": paths, "ASSAY_REACH_OUT": str(out), "PYTHONDONTWRITEBYTECODE": "1"}
        place = commands.places(frozen)
        for plan in frozen.plans().values():
            alone = _alone(frozen, arm, place, cache, more, sandboxed)
            once(plan, alone, _base(frozen, place, sandboxed), NAME, _INPUTS)
        return _read(cache / _OUT, frozen.tree(arm))


def _alone(frozen: Frozen, arm: str, place: Path, cache: Path, more: dict[str, str], sandboxed: bool) -> Trees:
    """One arm, whose processes note what they run."""
    if not sandboxed:
        own = {**frozen.content["sandbox"]["environment"], **sandbox.caches(cache), **more}
        return Trees.at({arm: frozen.tree(arm)}, place, more=own)
    box = frozen.box(arm, cache=cache)
    box = replace(box, readable=(*box.readable, _FOLDER), environment={**box.environment, **more})
    return Trees.boxed({arm: box}, place)


def _base(frozen: Frozen, place: Path, sandboxed: bool) -> Trees:
    if sandboxed:
        return Trees.boxed({"base": frozen.box("base")}, place)
    return Trees.at({"base": frozen.tree("base")}, place, more=frozen.content["sandbox"]["environment"])


def _read(file: Path, tree: Path) -> Seen:
    if not file.is_file():
        return Seen("", {})
    way, lines = "", dict[str, set[int]]()
    for line in file.read_text(errors="replace").splitlines():
        path, _, rest = line.rpartition("\t")
        if path == "#":
            way = rest
        elif rest.isdigit():
            lines.setdefault(_source(path, tree), set()).add(int(rest))
    return Seen(way, {path: frozenset(numbers) for path, numbers in lines.items()})


def _source(path: str, tree: Path) -> str:
    """The file of the tree that an installed copy was made from; the path itself where it is no copy."""
    parts = PurePosixPath(path).parts
    if "site-packages" not in parts:
        return path
    inside_ = "/".join(parts[parts.index("site-packages") + 1 :])
    return next((f"{root}{inside_}" for root in ("", "src/", "lib/") if (tree / f"{root}{inside_}").is_file()), path)
