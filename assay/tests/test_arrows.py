"""Which folder may import which, and what may be installed.

assay measures from the tree where nothing can be installed: the standard library, numpy and itself. Only judging needs
more, and only the modules that say so; measuring and deciding load none of them.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import assay

SOURCE = Path(assay.__file__).parent
ALLOWED = {*sys.stdlib_module_names, "numpy", "assay"}
JUDGES = {"contract/task.py": {"pydantic"}, "judgement/api.py": {"griffe"}, "gates/equivalence.py": {"hypothesis"}}
MORE = {
    "report/terminal.py": {"rich"},
    "report/campaign.py": {"pyarrow"},
    "prompts/render.py": {"jinja2"},
    "agents/template.py": {"pydantic"},
    "campaign/plan.py": {"pydantic"},
    "campaign/distributed.py": {"ray"},
    "arms/inside/worker.py": {"torch"},
    "arms/inside/benchmarks.py": {"pyperf", "pytest", "pytest_benchmark"},
    "ci/plugin.py": {"pytest"},
    "arms/inside/wire.py": {"torch"},
    **JUDGES,
}
"""Optional, or the workload's own: a bar in a terminal; what the worker loads when it is asked to."""
ARROWS = {
    "statistics": set(),
    "repository": set(),
    "contract": {"statistics", "repository"},
    "mining": {"contract", "repository"},
    "prompts": {"repository", "contract"},
    "arms": {"contract"},
    "machine": {"contract", "arms"},
    "experiment": {"statistics", "contract", "arms", "machine"},
    "gates": {"contract", "arms", "experiment"},
    "report": {"statistics", "contract", "machine", "experiment", "gates"},
    "judgement": {"statistics", "repository", "contract", "arms", "machine", "experiment", "gates", "report"},
    "admission": {
        *("statistics", "repository", "contract", "mining", "arms", "machine", "experiment", "gates", "judgement"),
    },
    "agents": {"repository", "contract", "prompts", "arms", "machine", "judgement"},
    "campaign": {"repository", "contract", "prompts", "arms", "judgement", "agents"},
    "timeline": {"repository", "contract", "mining", "machine", "experiment"},
    "ci": {"repository", "contract", "experiment", "report", "judgement"},
    "proof": {"statistics", "contract", "arms", "machine", "experiment"},
    "cli": {
        *("statistics", "repository", "contract", "mining", "prompts", "arms", "machine", "experiment", "gates"),
        *("report", "judgement", "admission", "agents", "campaign", "timeline", "proof"),
    },
}
"""Folder -> the folders that it imports. The module `assay` itself holds the public names and the version."""
DESIGN = Path(__file__).parents[1] / "DESIGN.md"


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=name_of)
def test_what_has_to_be_installed(path: Path) -> None:
    assert {name.partition(".")[0] for name in imports(path)} <= ALLOWED | MORE.get(name_of(path), set())


def test_arrows_between_folders() -> None:
    """Each folder imports those that are named, all of them, and they are named before it."""
    names = list(ARROWS)
    assert set(names) == {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    for folder, allowed in ARROWS.items():
        found = {
            name.split(".")[1]
            for path in (SOURCE / folder).rglob("*.py")
            for name in imports(path)
            if name.startswith("assay.") and name.split(".")[1] in names
        }
        assert found - {folder} == allowed, folder
        assert all(names.index(one) < names.index(folder) for one in allowed), folder


def test_no_circle_of_modules() -> None:
    """Inside a folder, too, one module comes before the other."""
    modules = {name_of(path).removesuffix(".py").replace("/", "."): path for path in SOURCE.rglob("*.py")}
    after = {
        name: {
            one
            for full in imports(path)
            for one in (full.removeprefix("assay."), full.removeprefix("assay.").rpartition(".")[0])
            if one in modules and one != name
        }
        for name, path in modules.items()
    }
    while first := [name for name, more in after.items() if not more]:
        after = {name: more.difference(first) for name, more in after.items() if name not in first}
    assert not after


def test_design_names_every_folder_and_its_arrows() -> None:
    rows = dict(re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", DESIGN.read_text(), flags=re.MULTILINE))
    assert {name: set(re.findall(r"\w+", words)) - {"nothing"} for name, words in rows.items()} == ARROWS


def test_files_stay_short() -> None:
    for path in [*SOURCE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_measuring_and_deciding_load_nothing_that_has_to_be_installed() -> None:
    code = "import sys, assay.__main__; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    loaded = set(ast.literal_eval(done.stdout))
    assert "numpy" in loaded and not loaded & {
        "torch",
        "moeyard",
        "rich",
        "pytest",
        *set().union(*JUDGES.values(), {"jinja2", "asyncio"}),
    }


def test_what_starts_by_path_needs_no_package() -> None:
    """In a sandbox a few files lie alone in one folder, and nothing of assay can be imported."""
    for path in (SOURCE / "arms/inside").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("assay")], path
