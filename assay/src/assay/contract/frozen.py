"""A frozen plan: plan.json in an attempt's folder, with digests of all that is measured. It says what, where and how.

It lies beside the trees and names them relative to itself, so that the whole folder can be carried to another machine.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.contract.box import Box
from assay.contract.plan import VERSION
from assay.contract.workload import NAMED, Plan

FILE = "plan.json"
OWN = ("drivers", "private")
"""Folders of the task's own files."""


@dataclass(frozen=True)
class Frozen:
    """The content of plan.json (contract/plan.py), and where it lies."""

    folder: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> "Frozen":
        """From a file. ValueError if it is not a plan of this version."""
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError) as problem:
            raise ValueError(f"PLAN: expected a plan, got {problem}") from None
        if not isinstance(content, dict) or (content.get("kind"), content.get("schema")) != ("plan", VERSION):
            raise ValueError(f"PLAN: expected a plan of schema {VERSION}, got {file}")
        return cls(file.resolve().parent, content)

    @property
    def digest(self) -> str:
        """Identity of all that was frozen."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def arms(self) -> list[str]:
        """Base, candidate, control, and reference if the task has one."""
        return list(self.content["trees"])

    def tree(self, arm: str) -> Path:
        """The folder of an arm's files."""
        return self.folder / "trees" / arm

    def cache(self, arm: str) -> Path:
        """The folder of an arm's own caches, made if it is not there."""
        found = self.folder / "cache" / arm
        found.mkdir(parents=True, exist_ok=True)
        return found

    def plans(self) -> dict[str, Plan]:
        """How every workload is measured, with the task's own files at their places."""
        return {name: Plan.from_json(self._placed(plan)) for name, plan in self.content["workloads"].items()}

    def _placed(self, plan: dict[str, Any]) -> dict[str, Any]:
        run = dict(plan["workload"])
        for field in NAMED:
            if run.get(field, "").startswith(tuple(f"{name}/" for name in OWN)):
                run[field] = str(self.folder / run[field])
        return {**plan, "workload": run}

    def box(self, arm: str, *, writable: bool = False, cache: Path | None = None) -> Box:
        """The arm's sandbox; for building its tree may be written."""
        wanted = self.content["sandbox"]
        drivers = self.folder / "drivers"
        own = (drivers,) if drivers.is_dir() else ()
        return Box(
            self.tree(arm),
            writable=writable,
            readable=(*own, *map(Path, wanted["readable"])),
            devices=tuple(map(Path, wanted["devices"])),
            cache=cache or self.cache(arm),
            environment=wanted["environment"],
            memory_bytes=wanted["memory_bytes"],
            most_processes=wanted["processes"],
            disk_bytes=wanted.get("disk_bytes"),
        )

    @property
    def ahead(self) -> bool:
        """Whether trees are built where the plan is prepared."""
        return bool(self.content["commands"].get("where") == "prepared")

    def check(self, built: Mapping[str, str] | None = None) -> None:
        """ValueError if a tree or a file of the task is not what was frozen. Only before anything was built.

        `built`: digests of arms that were built, as `digest_of` gave them; these are what is expected then.
        """
        found = {arm: self.digest_of(arm) if built else of_folder(self.tree(arm)) for arm in self.arms}
        found |= {name: of_folder(self.folder / name) for name in OWN}
        for name, digest in found.items():
            wanted = self.content[name] if name in OWN else (built or self.content["trees"]).get(name)
            if digest != wanted:
                how = "built" if built and name not in OWN else "frozen"
                raise ValueError(f"PLAN: expected {name} to be what was {how}, {wanted}, got {digest}")

    def digest_of(self, arm: str) -> str:
        """Of an arm that was built: its tree, and what building has left in its caches."""
        parts = (of_folder(self.tree(arm)), of_folder(self.cache(arm)))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def written(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text)
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(file)


def of_folder(folder: Path) -> str:
    """Digest of a folder's files: paths, whether they are executable, contents; of links, where they lead."""
    digest = hashlib.sha256()
    paths = [Path(place, name) for place, folders, names in os.walk(folder) for name in [*folders, *names]]
    for path in sorted(paths):
        state = path.lstat()
        if stat.S_ISDIR(state.st_mode):
            continue
        data = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes()
        mode = "link" if path.is_symlink() else "x" if state.st_mode & 0o100 else "-"
        name = os.fsencode(path.relative_to(folder))
        digest.update(b"%s %d %s %d\n" % (mode.encode(), len(name), name, len(data)) + data)
    return digest.hexdigest()[:16]
