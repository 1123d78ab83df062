"""The trees of an experiment as its arms get them: every one a fresh copy, made in the same way."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from assay.arms.commands import beside
from assay.arms.trees import Trees
from assay.contract.errors import ArmError

LEFT = (".assay",)
"""Folders of no tree: the judge's own."""


@contextmanager
def copied(
    trees: Mapping[str, Path], folder: Path, isolation: str, setup: Sequence[str] = (), timeout_s: float = 600.0
) -> Iterator[Trees]:
    """Copies of the trees by arm, in which `setup` was run once at the place where arms see them.

    A tree that was used before differs from a copy in times, caches and where it lies on disk. So base, candidate and
    A' are all copies. ArmError if `setup` does not end with status 0.
    """
    copies = {}
    for arm, tree in trees.items():
        copies[arm] = folder / "copies" / arm
        shutil.copytree(tree, copies[arm], symlinks=True, ignore=shutil.ignore_patterns(*LEFT))
    made = Trees.at(copies, folder, isolation, names={arm: str(tree) for arm, tree in trees.items()})
    for arm in copies if setup else ():
        ended = beside(made, arm, setup, timeout_s)
        if ended:
            raise ArmError(arm, f"--setup: {ended}")
    yield made
