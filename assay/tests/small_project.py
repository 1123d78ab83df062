"""A small repository and a task about it, for the tests that judge something from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ANY_LOAD = 1e9
BASE = """def work(n, base=2):
    total = 0
    for i in range(n):
        total = total + i**base
    return total
"""
FASTER = """def work(n, base=2):
    total = 0
    for i in range(n // 6):
        total = total + i**base
    return (n - 1) * n * (2 * n - 1) // 6 if base == 2 else sum(i**base for i in range(n))
"""
TESTS = """import pytest
from pkg import work


@pytest.mark.parametrize("n", [1, 2, 10])
def test_work(n):
    assert work(n) == sum(i * i for i in range(n))


def test_another_base():
    assert work(4, 3) == 36
"""
TASK = """schema = 1
name = "sums"
delta = 0.02
require = "faster"

[repository]
path = "repo"
base = "HEAD"

[scope]
files = ["pkg/**", "lib/**"]

[api]
packages = ["pkg"]

[tests]
command = ["python", "-m", "pytest", "-q", "tests"]

[[workload]]
name = "squares"
run = {kind = "call", target = "pkg:work", inputs = "inputs.py:squares", rounds = 2, calls = 2}

[[property]]
name = "sums"
target = "pkg:work"
strategy = "strategies.py:arguments"
examples = 10

[budget]
most_foreign = 1e9
"""
INPUTS = "def squares(seed):\n    return (60000 + seed % 100,)\n"
STRATEGIES = """from hypothesis import strategies


def arguments():
    return strategies.tuples(strategies.integers(0, 200), strategies.integers(1, 3))
"""


def git(folder: Path, *arguments: str) -> str:
    named = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *named, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def files(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def project(folder: Path) -> Path:
    """Makes the repository, the task and its files."""
    files(folder / "repo", {"pkg/__init__.py": BASE, "tests/test_work.py": TESTS, "README.md": "sums\n"})
    git(folder / "repo", "init", "--quiet")
    git(folder / "repo", "add", "--all")
    git(folder / "repo", "commit", "--quiet", "-m", "base")
    files(folder, {"inputs.py": INPUTS, "strategies.py": STRATEGIES, "task.toml": TASK})
    return folder / "task.toml"


def edited(task: Path, old: str, new: str) -> Path:
    text = task.read_text()
    assert old in text
    task.write_text(text.replace(old, new))
    return task


def candidate(task: Path, name: str, contents: dict[str, str]) -> Path:
    """A copy of the repository, history and all, with some files changed."""
    folder = task.parent / name
    subprocess.run(["cp", "-r", str(task.parent / "repo"), str(folder)], check=True)
    files(folder, contents)
    return folder


def environment(**more: str) -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), **more)


def assay(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "assay", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), **options)


def verdict(*arguments: str | Path) -> dict[str, Any]:
    """What `assay judge --json` says, with its exit status checked."""
    done = assay("judge", *arguments, "--json")
    assert done.stdout.strip(), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["status"] == done.returncode
    return found


def with_reference(folder: Path, text: str = FASTER, message: str = "Speed up work, 3x") -> Path:
    """The small project, with a reference."""
    made = project(folder)
    files(folder / "repo", {"pkg/__init__.py": text})
    git(folder / "repo", "commit", "--quiet", "--all", "-m", message)
    return edited(made, 'base = "HEAD"', 'base = "HEAD~1"\nreference = "HEAD"')
