"""From what somebody hands in to the patch that is judged: one tree in our own store, guarded change by change.

Files that test, measure or build (tests, benchmarks, conftest, build files) are put back as in base wherever they lie,
since an agent may well have touched them; a task names those that may change. Any other change outside the scope is
rejected. What is checked here, built, tested and timed is one tree.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from assay.contract.patterns import CHECKS, UNASKED, matches
from assay.contract.task import Scope
from assay.repository.store import ABSENT, SUBMODULE, SYMLINK, Change, GitError, Store, resolved

CACHES = frozenset({"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".assay"})
"""Folders that interpreters and tools write, assay's store among them; they are never taken into a tree."""
_UNFIT = b"does not fit\n"
"""Before the bytes of a patch file, so that an empty one is not the tree in which nothing was changed."""
_LOOKED_AT = 8000
"""Bytes in which a NUL makes a file binary, as in git."""


@dataclass(frozen=True)
class Source:
    """What is handed in: a patch file, a directory, or a commit of the task's repository."""

    kind: Literal["patch", "tree", "commit"]
    value: str


@dataclass(frozen=True)
class Judged:
    """The guarded patch, or why there is none to judge."""

    tree: str
    """Name in the store; base's own if there is nothing to judge."""
    patch: bytes = b""
    changed: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    outcome: str = ""
    """"", `no_patch` or `out_of_scope`."""
    words: tuple[str, ...] = ()
    unread: bytes = b""
    """What was handed in and is no patch of base: the ledger tells one from another."""

    @property
    def digest(self) -> str:
        """Identity of the patch; of what is none, that of its bytes, which no patch has."""
        return hashlib.sha256(self.patch or b"no patch of base\n" + self.unread).hexdigest()[:16]


def judged(
    store: Store,
    base: str,
    folder: Path,
    scope: Scope,
    source: Source,
    repository: Path,
    ours: Path | None = None,
) -> Judged:
    """The patch to judge. `base` is a tree in the store and `folder` holds its files.

    `ours`: assay's own folder, which is no part of a tree that it lies in.

    GitError for a commit that is not there, ValueError for a source that is no file or no directory.
    """
    given, refused, left = _given(store, base, folder, source, repository, ours)
    if not given:
        return Judged(base, outcome="no_patch", words=refused, unread=_UNFIT + Path(source.value).read_bytes())
    changes = store.changes(base, given)
    sorted_ = _Sorted(left=list(left))
    ignored = store.ignored(folder, [change.path for change in changes if change.after.mode != ABSENT])
    inside = [change for change in changes if not sorted_.put_aside(change, scope)]
    for change, data in zip(inside, _heads(store, inside), strict=True):
        sorted_.guard(change, scope, data, change.path in ignored)
    back = [(change.path, change.before) for change in sorted_.back]
    tree = store.with_entries(given, back) if back else given
    patch = store.patch(base, tree)
    changed = tuple(change.path for change in store.changes(base, tree))
    words = [*refused, *sorted_.wrong]
    if len(changed) > scope.most_files:
        words.append(f"expected at most {scope.most_files} changed files, got {len(changed)}")
    if len(patch) > scope.most_bytes:
        words.append(f"expected a patch of at most {scope.most_bytes} bytes, got {len(patch)}")
    outcome = "out_of_scope" if words else "" if changed else "no_patch"
    if outcome == "no_patch":
        words = ["nothing that the task's scope holds was changed"]
    return Judged(tree, patch, changed, tuple(sorted_.restored), tuple(sorted_.left), outcome, tuple(words))


def _given(
    store: Store, base: str, folder: Path, source: Source, repository: Path, ours: Path | None
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The tree that was handed in, what could not be taken, and what was left; no tree and why, if a patch is none.

    Of a directory, new folders that base's ignore rules leave out whole are left: environments, what was built.
    """
    place = Path(source.value)
    if source.kind == "tree":
        if not place.is_dir():
            raise ValueError(f"--tree: expected a directory, got {source.value}")
        entries = store.entries(base)
        left = store.ignored_folders(place, folder, entries, {*CACHES, ".git"})
        own = [ours.relative_to(place.resolve()).as_posix()] if ours and ours.is_relative_to(place.resolve()) else []
        content = store.take(place, CACHES, without={*left, *own}, base=entries)
        return content.tree, content.refused, tuple(f"{path}/" for path in left)
    if source.kind == "commit":
        return store.tree_of(resolved(repository, source.value)), (), ()
    if not place.is_file():
        raise ValueError(f"--patch: expected a file, got {source.value}")
    patch = place.read_bytes()
    if not patch.strip():
        return "", ("the patch is empty",), ()
    try:
        return store.applied(base, patch), (), ()
    except GitError as problem:
        return "", (f"the patch does not apply to base: {problem}",), ()


def _heads(store: Store, changes: list[Change]) -> list[bytes]:
    """The beginning of every changed file, where there is one."""
    blobs = [c.after.blob for c in changes if c.after.mode not in (ABSENT, SUBMODULE)]
    found = dict(zip(blobs, (data[:_LOOKED_AT] for data in store.contents(blobs)), strict=True))
    return [found.get(change.after.blob, b"") for change in changes]


@dataclass
class _Sorted:
    """What becomes of the changes."""

    back: list[Change] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def put_aside(self, change: Change, scope: Scope) -> bool:
        """Whether the change is not judged: left behind, put back as in base, or rejected for where it is."""
        path = change.path
        cache = bool(CACHES.intersection(path.split("/")))
        checks = matches(path, CHECKS) and not matches(path, scope.checks)
        if matches(path, (*scope.files, *scope.checks)) and not cache and not checks:
            return False
        if change.before.mode == ABSENT and (cache or matches(path, scope.left)):
            self.left.append(path)
        elif cache or checks or matches(path, scope.restored):
            self.restored.append(path)
        else:
            self.wrong.append(f"{path}: outside the task's scope")
            return True
        self.back.append(change)
        return True

    def guard(self, change: Change, scope: Scope, data: bytes, ignored: bool) -> None:
        """Rejects what may not be inside the scope either."""
        path, modes = change.path, (change.before.mode, change.after.mode)
        if not path.isprintable():  # control characters, and bytes that are no UTF-8
            self.wrong.append(f"{path!r}: a name that cannot be printed")
        elif matches(path, UNASKED) and not matches(path, scope.checks):
            self.wrong.append(f"{path}: a module that Python imports by itself")
        elif SUBMODULE in modes:
            self.wrong.append(f"{path}: a submodule")
        elif SYMLINK in modes:
            self.wrong.append(f"{path}: a symbolic link")
        elif modes[1] != ABSENT and not scope.modes and modes[1] != (modes[0] if modes[0] != ABSENT else "100644"):
            self.wrong.append(f"{path}: its mode became {modes[1]}")
        elif b"\0" in data and not matches(path, scope.binary):
            self.wrong.append(f"{path}: a binary file")
        elif ignored and not matches(path, scope.binary):
            self.wrong.append(f"{path}: a file that base's ignore rules leave out")
