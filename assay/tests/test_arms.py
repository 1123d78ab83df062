"""How an arm's process is held: what it sees, freezing, and that nothing of it survives."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from assay.arms import sandbox
from assay.arms.process import Running, namespaces_work
from assay.contract.box import Box
from assay.contract.errors import ArmError
from assay.machine import load
from holding import gone, python, start

DOUBLE_FORK = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open("escaped", "w").write(str(os.getpid()))
        while True: time.sleep(0.01)
    os._exit(0)
time.sleep(0.3)
"""
SPIN = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'])\nwhile True: pass\n"
MODES = [
    "links",
    pytest.param("namespaces", marks=pytest.mark.skipif(not namespaces_work(), reason="no namespaces here")),
    pytest.param("sandbox", marks=pytest.mark.sandbox),
]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "tree").mkdir()
    (tmp_path / "namespaces").mkdir()
    yield tmp_path


def test_a_double_fork_is_counted_and_killed(folder: Path, mode: str) -> None:
    with tempfile.TemporaryFile() as log:
        running = start(folder, mode, python(DOUBLE_FORK), log.fileno())
        running.release()
        ended = running.wait(20)
        members = running.members()
        assert ended.status == 0 and ended.left == 1 and len(members) == 1
        running.end()
        assert all(gone(process) for process in members) and (folder / "tree" / "escaped").exists()


def test_the_tree_is_seen_at_its_place(folder: Path, mode: str) -> None:
    (folder / "tree" / "mark").write_text("here")
    with tempfile.TemporaryFile() as log:
        code = "import os; print(os.getcwd(), open('mark').read(), sorted(os.listdir('/proc/self/fd')))"
        running = start(folder, mode, python(code), log.fileno())
        running.release()
        assert running.wait(20).status == 0
        running.end()
        log.seek(0)
        seen = log.read().decode().split(maxsplit=2)
    places = {"links": folder / "tree", "namespaces": folder / "namespaces", "sandbox": sandbox.PLACE}
    assert seen[:2] == [str(places[mode]), "here"]
    assert seen[2].strip() == "['0', '1', '2', '3']"  # 3 is the listing's own: no pipe of the judge is left open


def test_frozen_arms_use_nothing(folder: Path, mode: str) -> None:
    with tempfile.TemporaryFile() as log:
        running = start(folder, mode, python(SPIN), log.fileno())
        running.release()
        time.sleep(0.4)
        running.freeze()
        assert len(running.members()) == 2
        time.sleep(0.05)
        before = running.cpu_seconds()
        assert before > 0.05
        time.sleep(0.4)
        assert running.cpu_seconds() == before
        running.thaw()
        time.sleep(0.4)
        assert running.cpu_seconds() > before
        running.freeze()
        running.end()  # the frozen die, too


def test_the_time_of_arms_counts_as_the_judges(folder: Path, mode: str) -> None:
    """What is not counted so would be taken for foreign load, and every block be contaminated."""
    begun = load.own_seconds()
    with tempfile.TemporaryFile() as log:
        running = start(folder, mode, python(SPIN), log.fileno())
        running.release()
        time.sleep(0.6)
        running.freeze()
        used = running.cpu_seconds()
        running.end()
    assert used > 0.1 and load.own_seconds() - begun >= used - 0.02


def test_nothing_outlives_a_killed_judge(folder: Path, mode: str) -> None:
    judge = f"""
import time, tempfile
from pathlib import Path
from holding import python, start
log = tempfile.TemporaryFile()
running = start(Path({str(folder)!r}), {mode!r}, python("import time; time.sleep(60)"), log.fileno())
running.release()
while not running.members(): time.sleep(0.01)
print(running.root, *running.members(), flush=True)
time.sleep(60)
"""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    with subprocess.Popen([sys.executable, "-c", judge], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        processes = [int(word) for word in process.stdout.readline().split()]
        os.kill(process.pid, signal.SIGKILL)
    assert len(processes) == 2
    stop = time.monotonic() + 10
    while not all(gone(one) for one in processes):
        assert time.monotonic() < stop, processes
        time.sleep(0.02)


def test_a_command_that_cannot_start(folder: Path, mode: str) -> None:
    with tempfile.TemporaryFile() as log:
        running = start(folder, mode, ["no-such"], log.fileno())
        running.release()
        with pytest.raises(ArmError, match="arm: cannot start no-such"):
            running.wait(20)
        running.end()
        running.end()


@pytest.mark.sandbox
def test_the_clock_starts_when_the_command_stands_at_its_gate(folder: Path) -> None:
    """What it takes to make a sandbox, here half a second more than usual, is in no figure."""
    entry = sandbox.Entry(Box(folder / "tree"))

    def slow(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
        return ["/bin/sh", "-c", 'sleep 0.5; exec "$0" "$@"', *entry(arguments, environment)]

    with tempfile.TemporaryFile() as log:
        running = Running(
            "arm",
            ["true"],
            folder / "tree",
            sandbox.PLACE,
            sandbox.environment(entry.box),
            log=log.fileno(),
            namespaces=False,
            wrap=slow,
        )
        start = running.release()
        assert running.wait(20).status == 0 and time.perf_counter() - start < 0.4
        running.end()
