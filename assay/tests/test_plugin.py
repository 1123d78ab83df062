"""pytest --assay-base REV: benchmarks of pytest-benchmark are judged against a commit; other tests run as always."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from assay.arms.handle import Worker, started
from assay.arms.trees import Trees
from assay.contract.errors import ArmError
from assay.contract.workload import Workload
from assay.repository import checkout
from small_project import files, git

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
WORK = "import time\n\n\ndef one():\n    time.sleep({one})\n\n\ndef two():\n    time.sleep({two})\n"
BENCH = """import pytest
from work import one, two


def test_one(benchmark):
    benchmark(one)


@pytest.mark.benchmark(group="pedantic")
@pytest.mark.parametrize("times", [1])
def test_two(benchmark, times, tmp_path, name):
    (tmp_path / name).write_text("fixtures stand while it is measured")
    benchmark.pedantic(two, rounds=3)


def test_other():
    assert one() is None
"""
CONFTEST = "import pytest\n\n\n@pytest.fixture\ndef name():\n    return 'x'\n"


def project(folder: Path, before: dict[str, float], after: dict[str, float]) -> Path:
    """Base has no benchmarks yet; the working tree has, beside what git ignores and what is not committed."""
    files(folder, {"src/work.py": WORK.format(**before), ".gitignore": "*.log\n__pycache__/\n"})
    files(
        folder, {"pyproject.toml": "[tool.pytest.ini_options]\naddopts = '--benchmark-disable'\npythonpath = ['src']\n"}
    )
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "-m", "base")
    files(folder, {"src/work.py": WORK.format(**after), "bench/test_it.py": BENCH, "bench/conftest.py": CONFTEST})
    files(folder, {"big.log": "ignored\n"})
    return folder


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "assay.ci.plugin", "-p", "no:cacheprovider", "-p", "no:assay"]
    given = ["--assay-base", "main", "--assay-most-foreign", "1e9", "--assay-delta", "50%", *more]
    path = os.pathsep.join(sys.path)
    named = {"PYTHONPATH": path, "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run([*command, *given], cwd=folder, env=named, capture_output=True, text=True, check=False)


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of the plugin's own section."""
    return [line for line in done.stdout.split("assay: against main")[1].splitlines()[1:] if line]


def test_one_benchmark_and_another_test(tmp_path: Path) -> None:
    """Base runs, the working tree's function does not: the benchmark fails in words, the other test passes."""
    folder = project(tmp_path / "p", {"one": 0, "two": 0}, {"one": 0, "two": 0})
    files(folder, {"src/work.py": "def one():\n    return None\n\n\ndef two():\n    return 1 / 0\n"})
    out = tmp_path / "out"
    done = run(folder, "bench/test_it.py::test_two", "bench/test_it.py::test_other", "--assay-out", str(out))
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    first, last = told(done)[:2]
    assert first.startswith("bench/test_it.py::test_two[1]: failed: candidate: ZeroDivisionError: division by zero (")
    assert (
        first.endswith("src/work.py:6, in two)") and last == f"RAW and pages: {out}" and "Traceback" not in done.stdout
    )
    assert not list(folder.glob("**/.assay")) and git(folder, "status", "--porcelain").split() == [
        *("M", "src/work.py", "??", "bench/"),
    ]


@pytest.mark.full
def test_a_suite_of_two_functions(tmp_path: Path) -> None:
    """One became slower, the other quicker: the first fails, in words, at levels divided by two."""
    folder = project(tmp_path / "p", {"one": 0.001, "two": 0.004}, {"one": 0.004, "two": 0.001})
    done = run(folder, f"--junitxml={tmp_path}/report.xml", "--assay-out", str(tmp_path / "out"))
    assert done.returncode == 1 and "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    lines = told(done)
    assert lines[0].startswith("bench/test_it.py::test_one: slower: the interval lies below 0, beyond the margin")
    assert any(line.startswith("bench/test_it.py::test_two[1]: faster: the interval lies above 0") for line in lines)
    assert (tmp_path / "report.xml").read_text().count("<testcase") == 3
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".html", ".html", ".jsonl", ".jsonl"]
    headers = [json.loads(path.read_text().splitlines()[0]) for path in (tmp_path / "out").glob("*.jsonl")]
    assert [header["plan"]["workloads"] for header in headers] == [2, 2]


def test_usage(tmp_path: Path) -> None:
    folder = project(tmp_path / "p", {"one": 0, "two": 0}, {"one": 0, "two": 0})
    for more, words in (
        (["--assay-base", "nowhere"], "--assay-base: expected a commit of the repository here, got nowhere"),
        (["--assay-delta", "5"], "--assay-delta: is 500 % meant?"),
    ):
        done = run(folder, *more)
        assert done.returncode == 4 and words in done.stderr + done.stdout, done.stdout + done.stderr
    done = run(folder, "bench/test_it.py::test_other", "--assay-base", "nowhere")
    assert done.returncode == 0  # nothing is to be judged


@contextmanager
def standing(folder: Path, name: str) -> Iterator[Worker]:
    workload = Workload("pytest", target=name, constant=True)
    (folder.parent / "places").mkdir(exist_ok=True)
    worker = started("base", workload, Trees.at({"base": folder}, folder.parent / "places", "links"), 0, 60.0)
    try:
        yield worker
    finally:
        worker.end()


def test_a_worker_stands_inside_the_test(tmp_path: Path) -> None:
    """What the fixture is handed is called as often as it is asked for; what cannot be is an error in words."""
    more = """
import threading


def test_thread(benchmark):
    benchmark(lambda: print(threading.current_thread() is threading.main_thread()))


def test_setup(benchmark):
    benchmark.pedantic(one, setup=lambda: None)


def test_wrong(benchmark):
    raise RuntimeError("before")
"""
    folder = project(tmp_path / "p", {"one": 0, "two": 0}, {"one": 0, "two": 0.002})
    files(folder, {"bench/test_it.py": BENCH + more})
    with standing(folder, "bench/test_it.py::test_two[1]") as worker:
        seconds = []
        for _ in range(3):
            worker.ask(b"i", 0.0, [b'21\n{"!":"tuple","of":[]}'])
            seconds.append(worker.ask(b"g").seconds)
        assert all(0.002 < one < 0.5 for one in seconds)
    for name, words in (
        ("test_setup", "without setup"),
        ("test_wrong", "expected a test that calls benchmark, pytest ended with status 1"),
        ("test_other", "expected a test that calls benchmark, pytest ended with status 0"),
        ("test_none", "expected a test that calls benchmark, pytest ended with status 4"),
    ):
        with pytest.raises(ArmError) as found, standing(folder, f"bench/test_it.py::{name}"):
            pass
        assert words in found.value.words, found.value.words


def test_a_working_tree_is_what_git_would_take(tmp_path: Path) -> None:
    folder = project(tmp_path / "p", {"one": 0, "two": 0}, {"one": 1, "two": 1})
    (folder / "src/link").symlink_to("work.py")
    (folder / "pyproject.toml").unlink()
    copy = checkout.working(folder, tmp_path / "copy")
    found = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file() or path.is_symlink()}
    assert found == {".gitignore", "src/work.py", "src/link", "bench/test_it.py", "bench/conftest.py"}
    assert (copy / "src/link").is_symlink() and "sleep(1)" in (copy / "src/work.py").read_text()


def test_pytest_finds_the_plugin_by_itself() -> None:
    project_ = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project_["entry-points"]["pytest11"] == {"assay": "assay.ci.plugin"}
