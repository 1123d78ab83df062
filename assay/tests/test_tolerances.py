"""Outputs that differ by less than a tolerance, and by more; calls that are too short, and chains of them."""

from pathlib import Path

import pytest

from small_trees import CALL, call, rows, tree

NOISY = CALL.replace("return total", "import numpy; return numpy.array([n % 7 + {noise}, 1.0])").replace("{units}", "8")
FEW = ("--rounds", "4", "--calls", "4")


def noisy(folder: Path, noise: str, before: str = "") -> Path:
    """A tree whose output is off by `noise`, an expression, in its first element."""
    text = NOISY.format(noise=noise).replace("return", before + "return")
    return tree(folder, 0, text="import random, time\n" + text)


@pytest.mark.full
def test_outputs_within_tolerances_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, near = noisy(tmp_path / "a", "0.0"), noisy(tmp_path / "near", "1e-7", "time.sleep(0.006); ")
    assert call(a, near, tmp_path / "raw", "--atol", "1e-6", *FEW) == 1 and "0 differ" in capsys.readouterr().out
    assert rows(tmp_path / "raw")[-1]["verdict"] == "slower"


def test_outputs_outside_tolerances(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, far = noisy(tmp_path / "a", "0.0"), noisy(tmp_path / "far", "1e-2")
    assert call(a, far, tmp_path / "far.jsonl", "--atol", "1e-6", *FEW) == 1
    assert rows(tmp_path / "far.jsonl")[-1]["verdict"] == "incorrect"
    assert call(a, noisy(tmp_path / "near", "1e-7"), tmp_path / "near.jsonl", *FEW) == 1
    assert rows(tmp_path / "near.jsonl")[-1]["verdict"] == "incorrect"
    random = noisy(tmp_path / "random", "random.random()")
    assert call(random, random, tmp_path / "raw", *FEW) == 2
    assert "expected two builds of base to agree" in capsys.readouterr().err


CHAINED = "def work(n):\n    return n + 1\ndef chain(given, output):\n    return (output,)\n"


def test_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = tree(tmp_path / "a", 0, text=CHAINED)
    assert call(a, a, tmp_path / "raw1") == 2 and not (tmp_path / "raw1").exists()
    assert "too_short: a call takes" in capsys.readouterr().err
    assert call(a, a, tmp_path / "raw2", "--links", "40000") == 2
    assert "--links: expected --chain" in capsys.readouterr().err


@pytest.mark.full
def test_a_chain_is_long_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = tree(tmp_path / "a", 0, text=CHAINED)
    b = tree(tmp_path / "b", 0, text=CHAINED.replace("return n + 1", "return sum([n, *[0] * 40, 1])"))
    assert call(a, b, tmp_path / "raw", "--links", "40000", "--chain", "work:chain") == 1
    assert capsys.readouterr().out.startswith("slower") and rows(tmp_path / "raw")[-1]["blocks"] == 12
