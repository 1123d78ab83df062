"""The site builds with strict links, and every public name is on its page of the API."""

import importlib
import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import moeyard
import moeyard.parallel

ROOT = Path(__file__).parents[1]
MKDOCS = shutil.which("mkdocs") or shutil.which("mkdocs", path=str(ROOT / ".venv-site" / "bin"))


def test_api_and_operators_list_every_public_name() -> None:
    named = re.findall(r"^::: (moeyard\.\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    apart = [path for path in named if path.startswith("moeyard.parallel.")]
    for package, paths in ((moeyard.parallel, apart), (moeyard, [path for path in named if path not in apart])):
        assert sorted(path.rpartition(".")[2] for path in paths) == sorted(package.__all__)
    told = (ROOT / "docs" / "operators.md").read_text()
    for path in sorted(set(named) - set(apart)):
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name) is getattr(moeyard, name), path
        found = getattr(moeyard, name)
        assert not inspect.isfunction(found) or name in ("empty_layout", "explain", "warmup") or f"`{name}`" in told, (
            name
        )


@pytest.mark.full
@pytest.mark.skipif(MKDOCS is None, reason="mkdocs is not installed (make site)")
def test_the_site_builds_and_has_every_public_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(MKDOCS), "build", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path / "site")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    named = re.findall(r"^::: (moeyard\.\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    for path in named:
        assert f'id="{path}"' in api, path
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        folder = name.parent if name.name in ("README", "index") else name
        built = (tmp_path / "site" / folder / "index.html").read_text()
        assert "<h1" in built and not re.search(r'href="(?!https?:)[^"]*\.md["#]', built), page
