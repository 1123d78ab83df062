"""Judges beside each other: who measures does so alone, who waits says so, and who is killed stands in nobody's way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from assay.machine import gpu, locks
from small_project import FASTER, assay, candidate, environment, project

HOLDS = """
import sys, time
from assay.machine import gpu, locks
alone, seconds = sys.argv[1] == "alone", float(sys.argv[2])
with locks.held("cpu", alone=alone, waiting=lambda name: print("waits for", name, flush=True)):
    print("has", time.monotonic(), flush=True)
    time.sleep(seconds)
    print("had", time.monotonic(), flush=True)
"""


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks that other tests of this machine do not hold."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@contextmanager
def holder(how: str, seconds: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDS, how, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


@pytest.mark.parametrize(("first", "second"), [("alone", "alone"), ("alone", "shared"), ("shared", "alone")])
def test_the_second_waits_and_says_so(first: str, second: str) -> None:
    with holder(first, 0.5) as one:
        assert said(one)[0] == "has"
        with holder(second, 0) as two:
            assert said(two) == ["waits", "for", locks.names("cpu")[0]]
            begun, ended = float(said(two)[1]), float(said(one)[1])
    assert begun >= ended


def test_building_beside_each_other() -> None:
    with holder("shared", 60) as one, holder("shared", 60) as two:
        assert said(one)[0] == said(two)[0] == "has"


def test_a_killed_holder_frees_it() -> None:
    with holder("alone", 600) as one:
        assert said(one)[0] == "has"
        with holder("alone", 0) as two:
            assert said(two)[0] == "waits"
            os.kill(one.pid, signal.SIGKILL)
            assert said(two)[0] == "has"


MEASURES = """
import sys, time
from assay.__main__ import main
from assay.report.terminal import Progress
told = Progress.told
def noted(progress, row):
    if row["kind"] in ("header", "block"):
        with open(sys.argv[1], "a") as file: print(time.monotonic(), file=file)
    told(progress, row)
Progress.told = noted
sys.exit(main(["measure", sys.argv[2], "--out", sys.argv[3], "--no-sandbox"]))
"""


@pytest.mark.full
def test_two_judges_that_measure(tmp_path: Path) -> None:
    """Two plans, measured at once, the first judge killed in the middle: no block of one within those of another."""
    task = project(tmp_path)
    tree = candidate(task, "fast", {"pkg/__init__.py": FASTER})
    plans = []
    for name in ("one", "two"):
        given = ["--tree", tree, "--store", tmp_path / name, "--no-sandbox", "--skip", "tests,equivalence"]
        done = assay("prepare", task, *given)
        assert done.returncode == 0, done.stderr
        plans.append(done.stdout.strip().removeprefix("prepared: "))

    def measure(i: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MEASURES, str(tmp_path / f"times{i}"), plans[i], str(tmp_path / f"raw{i}")]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())

    def times(i: int) -> list[float]:
        """When rows were written."""
        file = tmp_path / f"times{i}"
        return [float(line) for line in (file.read_text().splitlines() if file.exists() else [])]

    first = measure(0)
    stop = time.monotonic() + 60
    while len(times(0)) < 3:
        assert time.monotonic() < stop and first.poll() is None
        time.sleep(0.01)
    second = measure(1)
    assert second.stderr is not None
    assert second.stderr.readline() == f"waiting: another judge has {locks.names('cpu')[0]}\n"
    more = len(times(0)) + 3
    while len(times(0)) < more and first.poll() is None:
        time.sleep(0.01)
    assert not times(1)
    first.kill()
    first.communicate()
    killed = time.monotonic()
    second.communicate(timeout=120)
    assert second.returncode == 0 and times(1)[0] > times(0)[-1] and times(1)[0] < killed + 30
    again = measure(0)
    again.communicate(timeout=120)
    assert again.returncode == 0 and min(times(0)[-3:]) > times(1)[-1]


def test_a_gpu_is_one_of_those_that_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that is free; two judges that are given a GPU each do not take each other's."""
    made = [gpu.State(index, "made up", 0, 0, 0, 0, 0) for index in range(3)]
    monkeypatch.setattr(gpu, "states", lambda seen=None: [one for one in made if seen is None or one.index in seen])
    monkeypatch.setattr(locks, "names", lambda device: ["gpu"])
    for numbered, wanted in (("2", ["2", None]), ("1,2", ["1", "2"]), ("", ["0", "1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", numbered)
        with locks.held("gpu", alone=True) as first:
            if wanted[1] is not None:
                with locks.held("gpu", alone=True) as second:
                    assert second["CUDA_VISIBLE_DEVICES"] == wanted[1]
            assert first == {"CUDA_VISIBLE_DEVICES": wanted[0], "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
