"""Where an agent works: base's files under one commit that knows no other, and the judge's view of what it changed."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from assay.agents.redaction import Redactor
from assay.contract.errors import TaskError
from assay.contract.patterns import matches
from assay.judgement.guards import CACHES
from assay.repository import store
from assay.repository.store import ABSENT, SUBMODULE, Entry, Store

if TYPE_CHECKING:
    from assay.contract.task import Read

_NOBODY = {"name": "assay", "email": "assay@localhost"}
_MOMENT = "2000-01-01T00:00:00Z"


@dataclass(frozen=True)
class Changed:
    """What an agent left, as a patch that the judge made. Nothing that the agent wrote about it is read."""

    patch: bytes
    files: tuple[str, ...]
    left: tuple[str, ...]
    """New files that were left behind unseen."""
    refused: tuple[str, ...]
    """What could not be taken, in words."""
    redacted: int
    """Places in the patch in which a secret stood."""


class Workspace:
    """A scrubbed copy of base: no history, no remote, no reflog, no object of another commit."""

    def __init__(self, read: "Read", folder: Path) -> None:
        """Makes it in a missing folder: `tree` to work in, and `base` beside it. TaskError for a base that is none."""
        self.tree, self.base = folder / "tree", folder / "base"
        folder.mkdir(parents=True)
        self._store = Store(folder / "git", read.repository if read.base else None)
        if read.base:
            self._base = self._store.tree_of(read.base)
        else:
            content = self._store.take(read.repository, CACHES)
            if content.refused:
                raise TaskError(f"{read.file}: repository.path: {content.refused[0]}")
            self._base = content.tree
        for place in (self.tree, self.base):
            self._store.write(self._base, place)
        shutil.rmtree(self.tree / ".git", ignore_errors=True)
        _commit(self.tree)

    def changed(self, left: Sequence[str], redactor: Redactor) -> Changed:
        """What differs from base now. To be called when no process of the agent is left."""
        store_ = self._store
        content = store_.take(self.tree, CACHES)
        entries: list[tuple[str, Entry]] = []
        behind, redacted, secret = [], 0, 0
        for change in store_.changes(self._base, content.tree):
            if change.before.mode == ABSENT and matches(change.path, left):
                behind.append(change.path)
                entries.append((change.path, change.before))
            elif redactor.clean(os.fsencode(change.path))[1]:
                secret += 1
                entries.append((change.path, change.before))
            elif change.after.mode not in (ABSENT, SUBMODULE):
                (data,) = store_.contents([change.after.blob])
                cleaned, count = redactor.clean(data)
                if count:
                    redacted += count
                    blob = store_.git(["hash-object", "-w", "--stdin"], cleaned).decode().strip()
                    entries.append((change.path, Entry(change.after.mode, blob)))
        tree = store_.with_entries(content.tree, entries) if entries else content.tree
        files = tuple(change.path for change in store_.changes(self._base, tree))
        refused = content.refused + ("a file name held a key",) * bool(secret)
        return Changed(store_.patch(self._base, tree), files, tuple(behind), refused, redacted + secret)


def _commit(tree: Path) -> None:
    """One commit of all files, by nobody, at no particular time."""
    at = ["-C", str(tree)]
    store.run(["init", "--quiet", "--template=", "--initial-branch=main", str(tree)])
    store.run([*at, "add", "--all", "--force"])
    for what, value in _NOBODY.items():
        store.run([*at, "config", f"user.{what}", value])
    quiet = ["-c", "core.logAllRefUpdates=false", "-c", "commit.gpgSign=false"]
    given = [*at, *quiet, "commit", "--quiet", "--allow-empty", "--no-verify", "-m", "base"]
    store.run(given, GIT_AUTHOR_DATE=_MOMENT, GIT_COMMITTER_DATE=_MOMENT)
