"""A task that is being written: what is known of it, and its text as TOML, with what is not known as comments."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from assay.contract.frozen import written
from assay.contract.mined import Imported, Part

FILE, IMPORTED = "task.toml", "imported.json"
_WIDTH = 110


@dataclass
class Draft:
    """What a task will say. Files lie beside it."""

    name: str
    repository: str
    """Relative to the task's file."""
    base: str
    reference: str = ""
    about: list[str] = field(default_factory=list)
    """Lines of comment at the head."""
    scope: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    native: list[str] = field(default_factory=list)
    setup: list[list[str]] = field(default_factory=list)
    build: list[list[str]] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    workloads: list[dict[str, object]] = field(default_factory=list)
    """Fields of `workload`, those of `run` among them."""
    properties: list[dict[str, object]] = field(default_factory=list)
    device: str = ""
    seconds: float = 0.0
    files: dict[str, str] = field(default_factory=dict)
    """Texts of the task's own files, by name."""
    unknown: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The task's file."""
        lines = [*map(_comment, self.about), "schema = 1", f"name = {_value(self.name)}", "delta = 0.02"]
        lines += ['require = "faster"']
        lines += _table("repository", {"path": self.repository, "base": self.base, "reference": self.reference})
        lines += _table("scope", {"files": self.scope, "restored": ["**/*.md", "**/*.rst", "**/*.txt", "docs/**"]})
        lines += _table("commands", {"setup": self.setup, "build": self.build})
        lines += _table("tests", {"command": self.tests})
        lines += _table("api", {"packages": self.packages, "native": self.native})
        for one in self.workloads:
            lines += _table("[workload]", one)
        for one in self.properties:
            lines += _table("[property]", one)
        lines += _table("sandbox", {"device": self.device, "environment": self.environment})
        lines += _table("budget", {"seconds": self.seconds})
        if self.unknown:
            lines += ["", "# What could not be found out:"]
            lines += [_comment(f"- {words}") for words in self.unknown]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, source: str, file: str, parts: Iterable[Part]) -> Path:
        """Writes everything into a folder; the task's file, last. FileExistsError if a task lies there."""
        if (folder / FILE).exists():
            raise FileExistsError(f"{folder / FILE}: expected a folder without a task")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (folder / name).write_text(text)
        record = Imported(source=source, file=file, parts=list(parts), unknown=self.unknown)
        written(folder / IMPORTED, json.dumps(asdict(record), indent=1) + "\n")
        written(folder / FILE, self.text())
        return folder / FILE


def named(text: str) -> str:
    """A name that tasks may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:80] or "task"


def _table(name: str, values: Mapping[str, object]) -> list[str]:
    """A table with what is not empty; nothing if all of it is."""
    kept = {key: value for key, value in values.items() if value not in ("", [], {}, 0.0)}
    return ["", f"[{name}]", *(f"{key} = {_value(value)}" for key, value in kept.items())] if kept else []


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        flat = "[" + ", ".join(map(_value, value)) + "]"
        return flat if len(flat) < _WIDTH else "[\n" + "".join(f"    {_value(one)},\n" for one in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _comment(text: str) -> str:
    return ("# " + " ".join(text.split())).rstrip()
