"""The arms of an experiment and where each of them sees its tree."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from assay.arms import sandbox
from assay.arms.process import Wrap, namespaces_work
from assay.contract.box import UNDECLARED, Box, Limits

_NUMBERS = {"base": 0, "candidate": 1, "control": 2, "reference": 3}
"""Of links: an arm has its own, whichever others stand beside it."""


@dataclass
class Trees:
    """The arms' trees and where they are shown: one place in a sandbox or namespaces, else links of equal length."""

    trees: Mapping[str, Path]
    folder: Path
    namespaces: bool
    boxes: Mapping[str, Box] | None = None
    """With them every process of an arm runs in its sandbox, and nowhere else."""
    more: Mapping[str, str] = field(default_factory=dict)
    """What is set in the environment of arms that have no sandbox, beside the judge's own."""
    most: Limits = UNDECLARED
    """What each arm may use that has no sandbox."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What people call the trees, where that is not their path."""

    @classmethod
    def at(
        cls,
        trees: Mapping[str, Path],
        folder: Path,
        isolation: str = "auto",
        more: Mapping[str, str] | None = None,
        most: Limits = UNDECLARED,
        names: Mapping[str, str] | None = None,
    ) -> "Trees":
        """Makes the place. ValueError if namespaces are asked for and not to be had."""
        if isolation not in ("auto", "namespaces", "links"):
            raise ValueError(f"--isolation: expected auto, namespaces or links, got {isolation}")
        able = isolation != "links" and namespaces_work()
        if isolation == "namespaces" and not able:
            raise ValueError(
                "--isolation: expected a machine that lets this user make namespaces, got one that does not"
            )
        if able:
            (folder / "tree").mkdir(exist_ok=True)
        return cls(trees, folder, able, more=more or {}, most=most, names=names or {})

    @classmethod
    def boxed(cls, boxes: Mapping[str, Box], folder: Path) -> "Trees":
        """Arms in sandboxes. ValueError says why there can be none here."""
        refused = sandbox.refusal()
        if refused:
            raise ValueError(refused)
        return cls({arm: box.tree for arm, box in boxes.items()}, folder, False, boxes)

    def reading(self, arm: str, *files: Path) -> "Trees":
        """These trees, with more files that one arm's sandbox shows."""
        if not self.boxes:
            return self
        box = self.boxes[arm]
        return replace(self, boxes={**self.boxes, arm: replace(box, readable=(*box.readable, *files))})

    @property
    def isolation(self) -> Literal["sandbox", "namespaces", "links"]:
        """In a word, for RAW."""
        return "sandbox" if self.boxes else "namespaces" if self.namespaces else "links"

    def wrap(self, arm: str) -> Wrap | None:
        """How the arm's sandbox is entered, if there is one."""
        return sandbox.Entry(self.boxes[arm]) if self.boxes else None

    def limits(self, arm: str) -> Limits:
        """On what the arm may use."""
        return self.boxes[arm].limits if self.boxes else self.most

    def place(self, arm: str) -> Path:
        """What the arm sees as its tree."""
        if self.boxes:
            return sandbox.PLACE
        if self.namespaces:
            return self.folder / "tree"
        number = _NUMBERS.get(arm, len(_NUMBERS) + list(self.trees).index(arm))
        return self.folder / f"tre{number:x}"

    def environment(self, arm: str, hash_seed: int) -> dict[str, str]:
        """The sandbox's or the judge's own, with what must be equal in the arms of a block."""
        if self.boxes:
            return sandbox.environment(self.boxes[arm], {"PYTHONHASHSEED": str(hash_seed)})
        return {**os.environ, **self.more, "PYTHONHASHSEED": str(hash_seed), "PWD": str(self.place(arm))}
