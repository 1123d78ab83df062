"""Outputs whose order is free: a function of the task's own says what of them counts, in the judge's process."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from assay.__main__ import main

ANY_LOAD = ["--most-foreign", "1e9"]  # tests run beside each other
WORK = """
import random, time
def work(n):
    found = [n + i for i in range(6)]
    random.SystemRandom().shuffle(found)
    time.sleep({seconds})
    return {answer}
"""
MAKE = "def make(seed):\n    return (seed,)\n"
FORM = """
import os
from pathlib import Path
def form(output):
    with Path({seen!r}).open("a") as file:
        file.write(f"{{os.getpid()}}\\n")
    return sorted(output)
def none(output):
    raise KeyError("nothing fits")
"""


def tree(folder: Path, answer: str = "found", seconds: float = 0.004) -> Path:
    folder.mkdir()
    (folder / "work.py").write_text(WORK.format(answer=answer, seconds=seconds))
    (folder / "inputs.py").write_text(MAKE)
    return folder


def judged(a: Path, b: Path, raw: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    given = ["--call", "work:work", "--inputs", "inputs:make", *ANY_LOAD, *options]
    status = main(["ab", str(a), str(b), "--out", str(raw), *given])
    return status, [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []


@pytest.mark.full
def test_a_form_that_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = tmp_path / "seen"
    (tmp_path / "form.py").write_text(FORM.format(seen=str(seen)))
    form = f"{tmp_path / 'form.py'}:form"
    good, quick = tree(tmp_path / "good"), tree(tmp_path / "quick", seconds=0.001)
    status, _ = judged(good, quick, tmp_path / "0")
    assert status == 2 and "expected two builds of base to agree" in capsys.readouterr().err

    status, rows = judged(good, quick, tmp_path / "1", "--canonical", form)
    assert (status, rows[-1]["verdict"]) == (0, "faster"), capsys.readouterr().err
    blocks = [row for row in rows if row["kind"] == "block"]  # one call before, one more after some of eight rounds
    assert all(1 < row["compared"] - len(row["calls"]["base"]) <= 1 + 8 for row in blocks)
    assert set(seen.read_text().split()) == {str(os.getpid())}, "the function runs where no arm does"


@pytest.mark.parametrize("answer", ["found[1:]", "[*found[1:], 7]", "found and None", "{'list': found}"])
def test_a_wrong_form_is_incorrect(answer: str, tmp_path: Path) -> None:
    (tmp_path / "form.py").write_text(FORM.format(seen=str(tmp_path / "seen")))
    good, wrong = tree(tmp_path / "good"), tree(tmp_path / "wrong", answer, 0.001)
    status, rows = judged(good, wrong, tmp_path / "raw", "--canonical", f"{tmp_path / 'form.py'}:form")
    assert (status, rows[-1]["verdict"]) == (1, "incorrect")


def test_a_function_that_does_not_fit_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "form.py").write_text(FORM.format(seen=str(tmp_path / "seen")))
    good = tree(tmp_path / "good")
    status, _ = judged(good, good, tmp_path / "1", "--canonical", f"{tmp_path / 'form.py'}:none")
    assert status == 2
    assert "canonical: expected a function of base's outputs, got an error of" in capsys.readouterr().err
    status, _ = judged(good, good, tmp_path / "2", "--canonical", "work:form")
    assert status == 2 and "--canonical: expected FILE.py:FUNCTION, got 'work:form'" in capsys.readouterr().err
