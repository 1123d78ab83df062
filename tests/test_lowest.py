"""The lowest versions that pyproject.toml promises are what `make test-lowest` installs, and what runs under it."""

import os
import runpy
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_SCRIPT = runpy.run_path(str(ROOT / ".ci" / "lowest.py"))
lowest, requirements, PROJECTS, LEFT_OUT = (
    _SCRIPT[name] for name in ("lowest", "requirements", "PROJECTS", "LEFT_OUT")
)


def test_every_requirement_has_one_bound() -> None:
    found = lowest()
    assert {"torch", "numba", "numpy", "typer", "triton", "cuda-bindings", "pydantic", "griffe"} <= found.keys()
    listed = {one for project in PROJECTS for one in requirements(project)}
    assert {one.replace(">=", "==") for one in listed} - {f"{name}=={bound}" for name, bound in found.items()} == {
        one.replace(">=", "==") for one in listed if one.split(">=")[0] in LEFT_OUT
    }
    assert f"torch alone ({found['torch']} or later)" in (ROOT / "CHANGELOG.md").read_text()


def test_make_installs_these_versions() -> None:
    """Nothing else says a version: neither a list of its own nor an option."""
    done = subprocess.run(["make", "-n", "-B", "test-lowest"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ".ci/lowest.py" in done.stdout and "==" not in done.stdout


@pytest.mark.skipif(os.environ.get("MOEYARD_LOWEST") != "1", reason="make test-lowest asks for it")
@pytest.mark.parametrize("name", lowest())
def test_the_lowest_version_is_installed(name: str) -> None:
    installed, promised = (tuple(map(int, text.split("+")[0].split("."))) for text in (version(name), lowest()[name]))
    width = max(len(installed), len(promised))
    padded = [[*numbers, *[0] * (width - len(numbers))] for numbers in (installed, promised)]
    assert padded[0] == padded[1], f"{name}: {version(name)} is installed"


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (["torch"], "expected NAME>=VERSION or NAME==VERSION, got 'torch'"),
        (["torch>=2.10", "torch>=2.11"], "expected one bound of torch, got 2.10 and 2.11"),
        (["torch<3"], "expected NAME>=VERSION"),
    ],
)
def test_what_promises_no_single_bound_is_an_error(listed: list[str], message: str, tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(f'[project]\nname = "one"\ndependencies = {listed}\n')
    with pytest.raises(ValueError, match=message):
        lowest((project,))
