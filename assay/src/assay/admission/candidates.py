"""Candidates that must fail: one that changes nothing, one that returns zeros, one that returns its first answer again.

They are made from base: a comment, or a wrapper around the functions that the workload calls or the reference changes.
Zeros and cached answers take no time, so a task whose outputs are not looked at calls them faster.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from assay.contract.patterns import matches
from assay.contract.task import Read
from assay.contract.workload import Workload
from assay.mining import functions
from assay.repository.lines import Lines
from assay.repository.store import Store

_ENDS = (".py", "/__init__.py")
NULL, ZEROS, CACHED = "null", "zeros", "cached"
_COMMENTS = {
    ".py": "#", ".pyx": "#", ".pxd": "#",
    **dict.fromkeys((".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".rs", ".go", ".js", ".ts"), "//"),
    **dict.fromkeys((".f90", ".f95"), "!"),
}  # fmt: skip
_WRAPPED = """

def _assay_zero(value):
    if isinstance(value, (bool, int, float, complex, str, bytes)):
        return type(value)()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_assay_zero, value))
    if isinstance(value, dict):
        return {key: _assay_zero(one) for key, one in value.items()}
    return value * 0 if hasattr(value, "shape") else None


def _assay_kept(function, kind, made):
    first = []

    def wrapper(*given, **named):
        if made and first:
            if kind == "cached":
                for name, value in first[0]:
                    object.__setattr__(given[0], name, value)
            return None
        if not first:
            found = function(*given, **named)
            if made:
                names = [*getattr(given[0], "__dict__", ())]
                for each in type(given[0]).__mro__:
                    slots = each.__dict__.get("__slots__", ())
                    names += [slots] if isinstance(slots, str) else slots
                first.append([(name, getattr(given[0], name)) for name in names if hasattr(given[0], name)])
                return found
            first.append(found if kind == "cached" else _assay_zero(found))
        return first[0]

    return wrapper


def _assay_put(owner, name, kind):
    found = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    for outer in (staticmethod, classmethod):
        if isinstance(found, outer):
            return setattr(owner, name, outer(_assay_kept(found.__func__, kind, False)))
    if isinstance(found, property):
        return setattr(owner, name, property(_assay_kept(found.fget, kind, False), found.fset, found.fdel))
    return setattr(owner, name, _assay_kept(found, kind, name == "__init__"))


"""


@dataclass(frozen=True)
class Place:
    """A function of base that a candidate takes the place of."""

    path: str
    name: str
    """Qualified."""


def null(store: Store, base: str, changed: Sequence[str], folder: Path) -> str:
    """Writes base with one more comment into a folder; which file has it, or "" if none can."""
    store.write(base, folder)
    for path in changed:
        sign, file = _COMMENTS.get(PurePosixPath(path).suffix.lower()), folder / path
        if sign and file.is_file() and not file.is_symlink():
            text = file.read_text(errors="surrogateescape")
            file.write_text(f"{text.rstrip()}\n{sign} nothing else\n", errors="surrogateescape")
            return path
    return ""


def wrapped(store: Store, base: str, kind: str, places: Sequence[Place], folder: Path) -> None:
    """Writes base with functions that keep their first answer, or zeros of its shape, into a folder."""
    store.write(base, folder)
    for path in dict.fromkeys(place.path for place in places):
        lines = [_put(place.name, kind) for place in places if place.path == path]
        file = folder / path
        file.write_text(f"{file.read_text().rstrip()}\n{_WRAPPED}{''.join(lines)}")


def _put(name: str, kind: str) -> str:
    owner, _, last = name.rpartition(".")
    module = "__import__('sys').modules[__name__]"
    return f"_assay_put({owner or module}, {last!r}, {kind!r})\n"


def places(read: Read, store: Store, base: str, reference: str, changed: Mapping[str, Lines]) -> list[Place]:
    """Functions to be replaced: those of the tree that workloads name, else those that the reference changes."""
    before, after = store.entries(base), store.entries(reference)
    found = [place for timed in read.task.workload if (place := _target(timed.run, frozenset(before), read))]
    for path, lines in changed.items() if not found else ():
        if path.endswith(".py") and path in before and path in after:
            old, new = (data.decode(errors="replace") for data in store.contents([before[path].blob, after[path].blob]))
            there = {one.name for one, _, _ in functions.functions(old)}
            names = [one.name for one in functions.touched(old, (number for number, _ in lines.removed))]
            names += [one.name for one in functions.touched(new, (number for number, _ in lines.added))]
            found += [Place(path, name) for name in names if name in there and _replaceable(name)]
    return list(dict.fromkeys(found))


def _replaceable(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "__init__" or not last.startswith("__")


def _target(run: Workload, entries: frozenset[str], read: Read) -> Place | None:
    """The file and function that a workload names in the tree."""
    module, _, name = run.target.partition(":")
    if run.kind != "call" or not name or read.own(run.target) is not None:
        return None
    parts = [module] if module.endswith(".py") else [f"{module.replace('.', '/')}{end}" for end in _ENDS]
    ways = [str(PurePosixPath(folder) / part) for folder in run.paths for part in parts]
    file = next((way for way in ways if way in entries), "")
    return Place(file, name) if file and matches(file, read.task.scope.files) else None
