"""Whose processes are on a GPU: the judge's own, strangers', and what a container shows of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from assay.arms.trees import Trees
from assay.contract.box import Box
from assay.experiment import samples
from assay.machine import gpu

HOLDS = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A process of ours that has open what one with a context has."""
    held = tmp_path / "held"
    held.touch()
    monkeypatch.setattr(gpu, "_HELD", held)
    command = [sys.executable, "-c", HOLDS, str(held)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield process.pid
        process.kill()


def listed(monkeypatch: pytest.MonkeyPatch, *processes: list[int]) -> list[str]:
    monkeypatch.setattr(gpu, "_listed", lambda: list(processes))
    return gpu.foreign(patience_s=0.0)


def test_what_is_ours_is_not_foreign(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert listed(monkeypatch) == listed(monkeypatch, [], []) == []
    assert listed(monkeypatch, [child]) == listed(monkeypatch, [child, os.getpid()], [child]) == []


def test_strangers_are_named(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = Path("/proc/1/comm").read_text().strip()
    assert listed(monkeypatch, [], [child, 1]) == [f"GPU 1: foreign processes 1 ({comm})"]
    assert listed(monkeypatch, [child, 4194300]) == ["GPU 0: foreign processes 4194300"], "none that is seen here"


def test_numbers_of_another_namespace_are_counted(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert listed(monkeypatch, [4194300]) == []
    assert listed(monkeypatch, [4194300, 4194301]) == ["GPU 0: foreign processes 4194301"]


def test_without_a_driver_nobody_is_foreign() -> None:
    if gpu.states():
        pytest.skip("there is a GPU")
    assert gpu.foreign() == []


def test_strangers_on_gpus_that_the_arms_cannot_reach_do_not_count(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_listed", lambda: [[child, 1], [child]])
    assert gpu.foreign(frozenset({1}), patience_s=0.0) == []
    assert len(gpu.foreign(frozenset({0}), patience_s=0.0)) == len(gpu.foreign(None, patience_s=0.0)) == 1


@pytest.mark.parametrize(
    ("given", "seen"), [(None, None), ("", None), ("1", {1}), ("0,3", {0, 3}), ("GPU-8932f937", None), ("-1", None)]
)
def test_arms_reach_the_gpus_that_are_visible_by_number(given: str | None, seen: set[int] | None) -> None:
    assert gpu.visible({} if given is None else {"CUDA_VISIBLE_DEVICES": given}) == seen


@pytest.mark.parametrize("arm", ["base", "candidate", "control"])
def test_what_one_arm_alone_reaches(arm: str, tmp_path: Path) -> None:
    """Gates run a patch alone, in a sandbox or without."""
    box = Box(tmp_path, environment={"CUDA_VISIBLE_DEVICES": "2"})
    assert samples.reached(Trees({arm: tmp_path}, tmp_path, False, {arm: box})) == {2}
