"""Patches whose outcome is known beforehand: if the judge calls one of them otherwise, nothing else it says counts.

They are made from base: a comment, the reference, twice the time, and two cheats in Python functions that a workload
calls. What cannot be made for a task is said in words, and a campaign may bring its own.
"""

import ast
import posixpath
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from assay.campaign.rows import spoilt
from assay.contract.outcome import DECIDED
from assay.contract.patterns import CHECKS, matches
from assay.judgement.guards import CACHES
from assay.repository.store import Entry, Store

if TYPE_CHECKING:
    from assay.contract.task import Read

_COMMENTS = {".py": "# ", ".c": "// ", ".h": "// ", ".cc": "// ", ".cpp": "// ", ".cu": "// ", ".cuh": "// "}
_MOST_IMPORTS = 5
_HEAD = '''def _canary(function):
    """Of a campaign: its outcome is known."""
    import functools
    import threading

    state = threading.local()

    @functools.wraps(function)
    def other(*arguments, **named):
        if getattr(state, "inside", False):
            return function(*arguments, **named)
        state.inside = True
        try:
            return call(*arguments, **named)
        finally:
            state.inside = False

'''
_BODIES = {
    "sabotage": """    def call(*arguments, **named):
        import time

        start = time.perf_counter()
        found = function(*arguments, **named)
        stop = start + 2 * (time.perf_counter() - start)
        while time.perf_counter() < stop:
            pass
        return found
""",
    "zeros": """    def call(*arguments, **named):
        return nothing(function(*arguments, **named))

    def nothing(value):
        if isinstance(value, dict):
            return {name: nothing(one) for name, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(nothing, value))
        return value * 0 if not isinstance(value, (str, bytes)) else value[:0]
""",
    "cached": """    kept = []

    def call(*arguments, **named):
        if not kept:
            kept.append(function(*arguments, **named))
        return kept[0]
""",
}
_TAIL = """
    return other


@_canary
"""
EXPECTED = {"null": "nothing", "reference": "faster", "sabotage": "slower", "zeros": "rejected", "cached": "rejected"}
"""Canary -> what has to come of it."""


@dataclass(frozen=True)
class Canary:
    """A patch and what has to come of it."""

    name: str
    patch: bytes
    expect: str


def holds(expect: str, outcome: str) -> bool | None:
    """Whether an outcome is the expected one; None if infrastructure kept it from being seen."""
    if spoilt(outcome):
        return None
    if expect == "nothing":
        return outcome in ("equivalent", "undecided", "no_patch")
    if expect == "rejected":
        return outcome not in DECIDED and outcome != "task_invalid"
    return outcome == expect


def made(read: "Read", own: Collection[str]) -> tuple[list[Canary], list[str]]:
    """Canaries of a task, and those that cannot be made, in words. `own` are brought by the campaign."""
    with tempfile.TemporaryDirectory(prefix="assay-") as place:
        store = Store(Path(place) / "git", read.repository if read.base else None)
        base = store.tree_of(read.base) if read.base else store.take(read.repository, CACHES).tree
        found, words = [], []
        for name, expect in EXPECTED.items():
            if name in own:
                continue
            try:
                found.append(Canary(name, _patch(read, store, base, name), expect))
            except ValueError as problem:
                words.append(f"canary {name}: {problem}")
        return found, words


def _patch(read: "Read", store: Store, base: str, name: str) -> bytes:
    """ValueError says why there can be none."""
    if name == "reference":
        if not read.reference:
            raise ValueError("the task has no reference")
        return store.patch(base, store.tree_of(read.reference))
    entries = store.entries(base)
    if name == "null":
        path, text = _commented(read, store, entries)
    else:
        path, text = _wrapped(read, store, entries, _HEAD + _BODIES[name] + _TAIL)
    blob = store.git(["hash-object", "-w", "--stdin"], text).decode().strip()
    return store.patch(base, store.with_entries(base, [(path, Entry(entries[path].mode, blob))]))


def _commented(read: "Read", store: Store, entries: Mapping[str, Entry]) -> tuple[str, bytes]:
    """A file of the scope with one more comment."""
    try:
        path = _wrapped(read, store, entries, "")[0]
    except ValueError:
        path = next((one for one in sorted(entries) if _inside(read, one) and Path(one).suffix in _COMMENTS), "")
    if not path:
        raise ValueError("the scope holds no file in which a comment is known")
    (data,) = store.contents([entries[path].blob])
    mark = _COMMENTS[Path(path).suffix].encode()
    return path, data + (b"" if data.endswith(b"\n") or not data else b"\n") + mark + b"a comment more\n"


def _wrapped(read: "Read", store: Store, entries: Mapping[str, Entry], wrapper: str) -> tuple[str, bytes]:
    """The file that defines a function which a workload calls, with `wrapper` before it."""
    for timed in read.task.workload:
        run = timed.run
        if run.kind != "call" or read.own(run.target) is not None:
            continue
        module, _, function = run.target.partition(":")
        names = [posixpath.normpath(posixpath.join(path, module.replace(".", "/"))) for path in run.paths]
        found = next((one for name in names if (one := _module(name, entries))), "")
        place = _defined(store, entries, found, function, _MOST_IMPORTS) if found else None
        if place is not None and _inside(read, place[0]):
            path, line = place
            (data,) = store.contents([entries[path].blob])
            lines = data.decode().splitlines(keepends=True)
            return path, "".join([*lines[: line - 1], wrapper, *lines[line - 1 :]]).encode()
    raise ValueError("no workload calls a Python function that a file of the scope defines")


def _inside(read: "Read", path: str) -> bool:
    scope = read.task.scope
    checks = matches(path, CHECKS) and not matches(path, scope.checks)
    return matches(path, (*scope.files, *scope.checks)) and not checks


def _module(name: str, entries: Mapping[str, Entry]) -> str:
    return next((one for one in (f"{name}.py", f"{name}/__init__.py") if one in entries), "")


def _defined(store: Store, entries: Mapping[str, Entry], path: str, function: str, left: int) -> tuple[str, int] | None:
    """The file and the line of a function's definition, its decorators included; imports of its name are followed."""
    (data,) = store.contents([entries[path].blob])
    try:
        tree = ast.parse(data)
    except SyntaxError:
        return None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return path, min([node.lineno, *(one.lineno for one in node.decorator_list)])
        if isinstance(node, ast.ImportFrom) and left:
            for alias in node.names:
                if (alias.asname or alias.name) == function and (other := _imported(node, path, entries)):
                    return _defined(store, entries, other, alias.name, left - 1)
    return None


def _imported(node: ast.ImportFrom, path: str, entries: Mapping[str, Entry]) -> str:
    """The file of the module that an import in `path` names; "" if the tree has none."""
    name = (node.module or "").replace(".", "/")
    if not node.level:
        return next((one for root in ("src", "") if (one := _module(posixpath.join(root, name), entries))), "")
    folder = posixpath.dirname(path)
    for _ in range(node.level - 1):
        folder = posixpath.dirname(folder)
    return _module(posixpath.join(folder, name).rstrip("/"), entries)
