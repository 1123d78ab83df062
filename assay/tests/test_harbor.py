"""A task exported for Harbor: its own loader takes it, its verifier judges, and an agent's image holds no secret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from assay.__main__ import main
from assay.contract import task
from small_project import FASTER, edited, environment, files, git, project

HARBOR = Path(os.environ.get("ASSAY_AGENTS", "~/.cache/assay/agents")).expanduser() / "harbor/bin/python"


def exported(folder: Path) -> Path:
    """A task with a reference, as a Harbor directory."""
    file = project(folder)
    files(folder / "repo", {"pkg/__init__.py": FASTER})
    git(folder / "repo", "commit", "--quiet", "-am", "faster")
    edited(file, 'base = "HEAD"', 'base = "HEAD~1"\nreference = "HEAD"')
    assert main(["export", "harbor", str(file), "--out", str(folder / "out")]) == 0
    return folder / "out"


def verified(folder: Path, out: Path) -> tuple[int, str]:
    """What its verifier says of a tree: the exit status and the reward."""
    places = {"ASSAY_TESTS": out / "tests", "ASSAY_LOGS": folder / "logs", "ASSAY_TREE": folder / "tree"}
    given = environment(**{name: str(place) for name, place in places.items()})
    files(folder, {"bin/python3": f'#!/bin/sh\nexec {sys.executable} "$@"\n'})
    (folder / "bin/python3").chmod(0o755)
    given["PATH"] = f"{folder / 'bin'}:{given['PATH']}"
    done = subprocess.run([out / "tests/test.sh"], capture_output=True, text=True, env=given, check=False)
    reward = folder / "logs/reward.txt"
    return done.returncode, reward.read_text().strip() if reward.exists() else ""


def test_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = exported(tmp_path)
    assert "not carried over: repository.reference" in capsys.readouterr().out
    read = task.read(out / "tests/task/task.toml")
    assert not read.base and not read.reference and (read.repository / "pkg/__init__.py").exists()
    seen = [path for path in (out / "environment").rglob("*") if path.is_file()]
    assert sorted(path.name for path in seen) == ["Dockerfile", "README.md", "__init__.py", "test_work.py"]
    assert not [path for path in seen if "strategies" in path.read_text() or FASTER in path.read_text()]
    assert "`pkg/**`" in (out / "instruction.md").read_text() and "/workspace" in (out / "instruction.md").read_text()
    assert main(["export", "harbor", str(tmp_path / "task.toml"), "--out", str(out)]) == 2
    git(tmp_path / "repo", "checkout", "-q", "HEAD~1")
    git(tmp_path / "repo", "apply", str(out / "solution/reference.diff"))
    assert (tmp_path / "repo/pkg/__init__.py").read_text() == FASTER


def test_the_verifier_rewards_nothing_that_was_not_shown(tmp_path: Path) -> None:
    out = exported(tmp_path)
    subprocess.run(["cp", "-r", str(out / "environment/repository"), str(tmp_path / "tree")], check=True)
    files(tmp_path / "tree", {"elsewhere.py": "x = 1\n"})
    assert verified(tmp_path, out) == (0, "0")
    assert '"out_of_scope"' in (tmp_path / "logs/verdict.json").read_text()


def test_infrastructure_gets_no_reward_at_all(tmp_path: Path) -> None:
    out = exported(tmp_path)
    (out / "tests/task/task.toml").write_text("schema = 1\n")
    assert verified(tmp_path, out) == (4, "")


@pytest.mark.full
def test_the_verifier_rewards_the_reference(tmp_path: Path) -> None:
    out = exported(tmp_path)
    subprocess.run(["cp", "-r", str(out / "environment/repository"), str(tmp_path / "tree")], check=True)
    files(tmp_path / "tree", {"pkg/__init__.py": FASTER})
    assert verified(tmp_path, out) == (0, "1")


@pytest.mark.full
def test_harbors_own_loader(tmp_path: Path) -> None:
    if not HARBOR.exists():
        pytest.skip(f"Harbor is not installed at {HARBOR}")
    code = "import sys; from harbor.models.task.task import Task\n"
    code += "print(Task(sys.argv[1]).name, Task.is_valid_dir(sys.argv[1]))"
    done = subprocess.run([HARBOR, "-c", code, exported(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["assay/sums", "True"], done.stderr
