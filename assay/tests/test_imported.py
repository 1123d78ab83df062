"""Tests must import the tree that is judged, whatever the layout, and however packages are found."""

from pathlib import Path

import pytest

from small_project import BASE, FASTER, assay, candidate, files, git, project

RAISES = "raise RuntimeError('nobody should get this far')\n"
VENV = '["python", "-m", "venv", "--without-pip", "--system-site-packages", ".venv"]'
EDITABLE = (
    '[".venv/bin/python", "-c", "import pathlib, sysconfig; '
    "pathlib.Path(sysconfig.get_path('purelib'), 'pkg.pth').write_text(str(pathlib.Path('src').absolute()))\"]"
)
COPIED = (
    '[".venv/bin/python", "-c", "import shutil, sysconfig; '
    "shutil.copytree('src/pkg', sysconfig.get_path('purelib') + '/pkg')\"]"
)
IN_VENV = '[".venv/bin/python", "-m", "pytest", "-q", "tests"]'


def layout(folder: Path, commands: str = "", sandbox: str = "", command: str = "") -> Path:
    """The small project in a src layout, with a package of the same name installed beside it."""
    task = project(folder)
    files(folder / "repo", {"src/pkg/__init__.py": BASE, "pyproject.toml": '[tool.pytest.ini_options]\naddopts = ""\n'})
    (folder / "repo/pkg/__init__.py").unlink()
    git(folder / "repo", "add", "--all")
    git(folder / "repo", "commit", "--quiet", "-m", "src layout")
    files(folder / "installed", {"pkg/__init__.py": BASE})
    text = task.read_text().replace('files = ["pkg/**", "lib/**"]', 'files = ["src/**"]')
    text = text.replace(
        '["python", "-m", "pytest", "-q", "tests"]', command or '["python", "-m", "pytest", "-q", "tests"]'
    )
    installed = f'PYTHONPATH = "{folder}/installed"'
    text += f"\n[commands]\n{commands}\n[sandbox]\nenvironment = {{{sandbox or installed}}}\n"
    task.write_text(text.partition("[[property]]")[0] + text[text.index("[budget]") :])
    return task


def prepared(task: Path, text: str) -> str:
    """The first line that `assay prepare` says of a candidate, and what its tests gate found."""
    tree = candidate(task, f"c{abs(hash(text))}", {"src/pkg/__init__.py": text})
    return assay("prepare", task, "--tree", tree, "--store", task.parent / "store", "--no-sandbox").stdout


def test_an_installed_package_hides_the_tree(tmp_path: Path) -> None:
    task = layout(tmp_path)
    for text in (f"{BASE}\n{RAISES}", FASTER):
        said = prepared(task, text)
        assert said.startswith("not_evaluated: the tests pass though src/pkg/__init__.py raise when"), said


@pytest.mark.parametrize(
    ("commands", "sandbox", "command"),
    [
        ("", 'PYTHONPATH = "src"', ""),
        (f"setup = [{VENV}, {EDITABLE}]", 'A = "b"', IN_VENV),
        pytest.param(f"setup = [{VENV}, {COPIED}]", 'A = "b"', IN_VENV, marks=pytest.mark.full),
        pytest.param(f"setup = [{VENV}]\nbuild = [{COPIED}]", 'A = "b"', IN_VENV, marks=pytest.mark.full),
    ],
    ids=["path", "editable", "installed in setup", "installed by the build"],
)
def test_environments_of_a_tree(commands: str, sandbox: str, command: str, tmp_path: Path) -> None:
    task = layout(tmp_path, commands, sandbox, command)
    assert prepared(task, FASTER).startswith("prepared: ")
    (notes,) = tmp_path.glob("store/attempts/*/gates.json")
    assert "they import the tree that is judged" in notes.read_text()
    assert prepared(task, f"{BASE}\n{RAISES}").startswith("tests_failed: ")


def test_a_build_that_needs_what_is_changed(tmp_path: Path) -> None:
    """With the files raising from the beginning nothing can be built: they raise after the build instead."""
    check = '["python", "-c", "import sys; sys.path.insert(0, \'src\'); import pkg"]'
    assert prepared(layout(tmp_path, f"build = [{check}]", 'PYTHONPATH = "src"'), FASTER).startswith("prepared: ")


def test_where_no_python_was_changed(tmp_path: Path) -> None:
    """Then all modules of the tree raise, but for those that test, measure or build."""
    task = layout(tmp_path / "1")
    files(tmp_path / "1", {"c/src/pkg/table.txt": "1\n"})
    for folder, sandbox, says in (("2", "", "not_evaluated: "), ("3", 'PYTHONPATH = "src"', "prepared: ")):
        task = layout(tmp_path / folder, "", sandbox)
        tree = candidate(task, "c", {"src/pkg/table.txt": "1\n"})
        done = assay("prepare", task, "--tree", tree, "--store", tmp_path / "store", "--no-sandbox")
        assert done.stdout.startswith(says), done.stdout + done.stderr
