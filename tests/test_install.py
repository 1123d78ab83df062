"""What is built and installed: metadata, sdist, wheel; and what the command imports before it is asked for anything."""

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import moeyard
from moeyard.dispatch.refusals import installed
from moeyard.testing import SOURCE, python

ROOT = Path(__file__).parents[1]
needs_hatchling = pytest.mark.skipif(not installed("hatchling"), reason="hatchling is not installed (moeyard[dev])")


@pytest.fixture(scope="module")
def metadata() -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "metadata"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@needs_hatchling
def test_an_index_page_can_follow_all_links(metadata: dict[str, object]) -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert metadata["urls"] == urls and set(urls) >= {"Repository", "Documentation", "Changelog", "Issues"}
    assert len(metadata["keywords"]) >= 5 and metadata["version"] == moeyard.__version__  # type: ignore[arg-type]
    readme = metadata["readme"]
    assert isinstance(readme, dict) and readme["content-type"] == "text/markdown"
    text, source = readme["text"], (ROOT / "README.md").read_text()
    found, written = (re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", page) for page in (text, source))
    assert len(found) == len(written) > 15
    for (picture, link), (_, path) in zip(found, written, strict=True):
        kind = "raw" if picture else "blob"
        assert link == (path if "://" in path else f"{urls['Repository']}/{kind}/main/{path}")
        assert "://" in path or (ROOT / path).exists(), path
    blocks = re.findall(r"```.*?```", source, flags=re.DOTALL)
    assert blocks == re.findall(r"```.*?```", text, flags=re.DOTALL), "code is left alone"


@needs_hatchling
def test_the_sdist_holds_moeyard_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in names if "assay" in name]
    for name in ("src/moeyard/__init__.py", "src/moeyard_command/app.py", "hatch_build.py", "README.md", "LICENSE"):
        assert name in names
    assert {"src/moeyard/cuda/align/align.cu", "tests/test_install.py", "docs/notes/README.md"} <= names


@pytest.mark.full
def test_a_wheel_of_the_sdist_is_that_of_the_tree(tmp_path: Path) -> None:
    """Built by pip, which fetches what builds it; its entry points and links are there."""
    wheel = python("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    assert wheel.returncode == 0, wheel.stderr
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        read = {name.rpartition("/")[2]: archive.read(name).decode() for name in names if ".dist-info/" in name}
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"moeyard", "moeyard_command"}
    assert "moeyard = moeyard_command:main" in read["entry_points.txt"]
    assert "Project-URL: Repository, https://" in read["METADATA"] and "](docs/" not in read["METADATA"]


HELP = """
import sys
from moeyard_command import main
sys.argv = ["moeyard", *{arguments}]
try:
    main()
finally:
    heavy = {{name.partition(".")[0] for name in sys.modules}} & {{"torch", "numpy", "moeyard", "numba", "matplotlib"}}
    print("imported:", sorted(heavy))
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["bench", "--help"], ["bench", "experts", "--help"], ["explain", "--help"], ["doctor", "--help"]],
)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    done = python("-c", HELP.format(arguments=arguments))
    assert done.stdout.splitlines()[-1] == "imported: []", done.stderr
    assert "Usage: moeyard" in done.stdout + done.stderr


def test_commands_say_what_they_share_with_the_package() -> None:
    """The launcher is a package beside moeyard, and both are in the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"moeyard": "moeyard_command:main"}
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {path.name for path in (ROOT / "src").iterdir() if (path / "__init__.py").exists()} == {
        Path(package).name for package in packages
    }
    assert SOURCE == ROOT / "src"
