"""The lowest versions that both pyproject.toml promise, one requirement per line: `make test-lowest` installs them.

The bound of a package is stated once, in one extra, which others name. Linters and what builds the site are left out:
nothing runs on them.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECTS = (ROOT / "pyproject.toml", ROOT / "assay" / "pyproject.toml")
LEFT_OUT = frozenset({"mypy", "pre-commit", "ruff", "mkdocs-material", "mkdocstrings-python"})
_BOUND = re.compile(r"([a-z0-9-]+)\s*(>=|==)\s*([0-9][0-9.]*)")


def requirements(project: Path) -> Iterator[str]:
    """What a project and all its extras require, as its pyproject.toml writes it; not its own extras."""
    told = tomllib.loads(project.read_text())["project"]
    for listed in (told["dependencies"], *told.get("optional-dependencies", {}).values()):
        yield from (one for one in listed if not one.startswith(f"{told['name']}["))


def lowest(projects: tuple[Path, ...] = PROJECTS) -> dict[str, str]:
    """The lowest version of every package that the projects require; ValueError for one without a single bound."""
    found: dict[str, str] = {}
    for project in projects:
        for one in requirements(project):
            bound = _BOUND.fullmatch(one)
            if bound is None:
                raise ValueError(f"{project}: expected NAME>=VERSION or NAME==VERSION, got {one!r}")
            name, _, version = bound.groups()
            if found.setdefault(name, version) != version:
                raise ValueError(f"{project}: expected one bound of {name}, got {found[name]} and {version}")
    return {name: version for name, version in found.items() if name not in LEFT_OUT}


if __name__ == "__main__":
    sys.stdout.write("".join(f"{name}=={version}\n" for name, version in lowest().items()))
