"""What people read: changes and levels, where outputs differ, what got worse, margins that are asked about, traces."""

import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.__main__ import main
from assay.cli.table import COMMANDS
from assay.contract import task, traces
from assay.contract.errors import Status, TaskError
from assay.experiment import beside
from assay.experiment.outputs import difference
from assay.judgement.decision import status
from assay.report import wording
from small_project import BASE, FASTER, candidate, edited, files, git, project, verdict


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.4596, "+45.96%"),
        (0.98, "-2.00%"),
        (457.2064, "×457"),
        (4.6, "×4.6"),
        (0.2, "×0.2"),
        (1.999, "+99.90%"),
        (1e-4, "×1.0e-04"),
    ],
)
def test_a_change_is_per_cent_or_a_factor(ratio: float, words: str) -> None:
    assert wording.change(math.log(ratio)) == words


def test_an_interval_is_written_as_its_estimate_is() -> None:
    logs = [math.log(ratio) for ratio in (4.6, 1.7, 9.0)]
    assert wording.changes(logs[0], (logs[1], None)) == ("×4.6", "×1.7", "unbounded")
    assert wording.changes(logs[1], (0.0, logs[2])) == ("+70.00%", "+0.00%", "+800.00%")


@pytest.mark.parametrize("alpha", [0.05, 0.001, 0.003, 0.0005, 0.001 / 3, 0.001 / 7, 1e-6, 0.003 / 41])
def test_a_level_is_never_rounded_up_to_100(alpha: float) -> None:
    number, sign = wording.level(alpha).split(" ")
    assert sign == "%" and float(number) < 100 and abs(100 - float(number) - 100 * alpha) < 6 * alpha


def test_levels() -> None:
    assert [wording.level(alpha) for alpha in (0.0005, 0.001, 0.05)] == ["99.95 %", "99.9 %", "95 %"]


@pytest.mark.parametrize(
    ("base", "other", "words"),
    [
        (
            np.arange(1000),
            np.where(np.arange(1000) == 700, -1, np.arange(1000)),
            "1 of 1000 elements differ, first at [700]",
        ),
        (np.zeros((2, 3)), np.array([[0, 0, 0], [0, -0.0, 1.0]]), "2 of 6 elements differ, first at [1, 1]"),
        (np.array([1.0, np.nan]), np.array([1.0, 2.0]), "1 of 2 elements differ, first at [1]: expected nan, got 2."),
        ("a" * 200, "a" * 150 + "b" * 50, "differs from place 150 on"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "output['a'][1]: expected 2, got 3"),
    ],
)
def test_where_outputs_differ(base: Any, other: Any, words: str) -> None:
    assert words in difference(base, other, 0.0, 0.0)


TRACE = """before
Traceback (most recent call last):
  File "/assay/worker.py", line 297, in serve
    workload = Workload(wire, marshal.loads(body))
               ~~~~~~~~^^^^^^^^^^^
  File "pkg/__init__.py", line 3, in work
    raise ValueError("no")
ValueError: no
after"""


def test_a_traceback_is_a_line() -> None:
    assert traces.brief(TRACE) == "before\nValueError: no (pkg/__init__.py:3, in work)\nafter"
    assert traces.brief("plain\nwords") == "plain\nwords"
    assert traces.brief(
        'Traceback (most recent call last):\n  File "a.py", line 1\n    x x\nSyntaxError: bad'
    ).endswith("SyntaxError: bad (a.py:1)")


@pytest.mark.parametrize(
    ("given", "value"), [("0.02", 0.02), ("2%", 0.02), ("2 %", 0.02), ("500%", 5.0), ("100%", 1.0)]
)
def test_margins(given: str, value: float) -> None:
    from assay.cli.command import margin

    assert margin(given) == pytest.approx(value)


@pytest.mark.parametrize(("given", "words"), [("5", "is 500 % meant? 5% is 0.05"), ("1", "is 100 % meant?")])
def test_margins_that_are_asked_about(given: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["ab", ".", ".", f"--delta={given}", "--", "true"])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_tasks_margin_is_asked_about(tmp_path: Path) -> None:
    file = edited(project(tmp_path), "delta = 0.02", "delta = 5")
    with pytest.raises(TaskError, match=r":3: delta: .*is 500 % meant\? 5 % is 0.05"):
        task.read(file)


MARGIN = math.log1p(0.02)


@pytest.mark.parametrize(
    ("low", "high", "material", "expected", "words"),
    [
        (0.05, 0.2, True, Status.SHOWN, ", beyond the margin"),
        (0.001, 0.015, False, Status.REFUTED, ", within the margin"),
        (0.001, 0.2, False, Status.OPEN, ", not shown to be beyond the margin"),
        (0.001, None, False, Status.OPEN, ", not shown to be beyond the margin"),
    ],
)
def test_faster_within_the_margin(low: float, high: float | None, material: bool, expected: Status, words: str) -> None:
    """`require = "material"` asks for more than `faster` does, and the words tell them apart."""
    one = {"name": "w", "verdict": "faster", "interval": [low, high], "material": material}
    assert status("faster", "material", [one], MARGIN) == expected and status("faster", "faster", [one], MARGIN) == 0
    assert wording.beside_margin("faster", material, low, high, 0.02) == words
    assert wording.beside_margin("equivalent", False, low, high, 0.02) == ""


def test_several_workloads_need_one_that_is_material() -> None:
    some = [{"name": str(i), "verdict": "faster", "interval": [0.001, 0.01], "material": i == 1} for i in range(2)]
    assert status("faster", "material", some, MARGIN) == Status.SHOWN
    assert status("equivalent", "material", some, MARGIN) == Status.REFUTED
    assert status("undecided", "material", some, MARGIN) == Status.OPEN


def rows(blocks: int, **factors: float) -> list[dict[str, Any]]:
    """RAW's blocks, in which the candidate's figures are so many times base's."""
    base = {"import": 0.1, "first": 0.01, "memory": 1e4, "processors": 1.0, "steady": 0.02}
    noise = np.random.default_rng(0)
    found = []
    for _ in range(blocks):
        arms = {
            arm: {name: value * noise.uniform(0.99, 1.01) * (factors.get(name, 1.0) if arm == "candidate" else 1.0)
                  for name, value in base.items()}
            for arm in ("base", "candidate")
        }  # fmt: skip
        cpu = {arm: 0.5 * (factors.get("cpu", 1.0) if arm == "candidate" else 1.0) for arm in arms}
        found.append({"kind": "block", "reasons": [], "differing": [], "figures": arms, "cpu_s": cpu})
    return found


@pytest.mark.parametrize("name", ["import", "first", "memory", "processors", "cpu"])
def test_what_got_worse(name: str) -> None:
    (found,) = beside.worse(rows(12, **{name: 1.5}), "steady", MARGIN)
    assert found["name"] == name and found["candidate"] / found["base"] == pytest.approx(1.5, rel=0.02)
    assert wording.worse([found]).startswith("worse: ")
    assert beside.worse(rows(12, **{name: 1.5}), name, MARGIN) == []  # that figure has a verdict of its own
    assert beside.worse(rows(11, **{name: 1.5}), "steady", MARGIN) == []
    assert beside.worse(rows(12, **{name: 1.005}), "steady", MARGIN) == []


def test_a_mismatch_shows_input_both_outputs_and_where(tmp_path: Path) -> None:
    """A real one: a reply of a timed call that is off by one in one place. The page shows the patch, too."""
    made = edited(project(tmp_path), '[[property]]\nname = "sums"', '[[property]]\nname = "small"')
    text = BASE.replace("return total", "return [total, n + (n > 1000)]")
    good = BASE.replace("return total", "return [total, n]")
    files(
        tmp_path / "repo",
        {
            "pkg/__init__.py": good,
            "tests/test_work.py": "from pkg import work\n\n\ndef test_one():\n    assert work(1)\n",
        },
    )
    git(tmp_path / "repo", "commit", "--all", "-m", "pairs")
    tree = candidate(made, "wrong", {"pkg/__init__.py": text})
    found = verdict(made, "--tree", tree, "--store", tmp_path / "store", "--no-sandbox")
    assert found["outcome"] == "incorrect"
    (words,) = found["words"]
    assert "was given (60" in words and "output[1]: expected 60" in words and "the candidate [" in words, words
    folder = tmp_path / "store/attempts" / found["attempt"]["id"]
    block = json.loads((folder / "raw/squares.jsonl").read_text().splitlines()[1])
    assert block["mismatch"]["where"].startswith("output[1]: expected 60")
    page = (folder / "report.html").read_text()
    assert (
        '<span class="more">+    return [total, n + (n &gt; 1000)]</span>' in page
        and (folder / "raw/patch.diff").exists()
    )


def test_patches_that_are_none_have_digests_of_their_own(tmp_path: Path) -> None:
    made = project(tmp_path)
    name = "pkg/__init__.py"
    there = f"diff --git a/{name} b/{name}\n--- a/{name}\n+++ b/{name}\n@@ -1 +1 @@\n-no\n+x\n"
    found = []
    for name, text in (("empty", ""), ("garbage", "nonsense\n"), ("other", "more nonsense\n"), ("unfit", there)):
        (tmp_path / f"{name}.diff").write_text(text)
        found.append(verdict(made, "--patch", tmp_path / f"{name}.diff", "--store", tmp_path / "s", "--no-sandbox"))
    found.append(verdict(made, "--tree", tmp_path / "repo", "--store", tmp_path / "s", "--no-sandbox"))
    assert {one["outcome"] for one in found} == {"no_patch"}
    assert len({one["patch"]["digest"] for one in found}) == 5 and {one["attempt"]["of_patch"] for one in found} == {1}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"pkg:work", in', '"pkg:wrok", in', ":21: workload[0].run.target: expected a name that pkg defines (work)"),
        ('"pkg:work", in', '"pgk:work", in', "expected a module of base in ., src or one that is installed, got pgk"),
        ("inputs.py:squares", "inputs.py:sqaures", "expected a name that inputs.py defines (squares), got 'sqaures'"),
        ("strategies.py:arguments", "strategies.py:args", ":26: property[0].strategy: expected a name that strat"),
        ('["python", "-m", "pytest"', '["pyhton", "-m", "pytest"', ":17: tests.command: expected a program, got 'pyh"),
        ('["python", "-m", "pytest"', '["python", "-m", "pytset"', "got pytset, which is not installed"),
        ("[tests]", '[commands]\nbuild = [["maek"]]\n\n[tests]', "commands.build[0]: expected a program, got 'maek'"),
    ],
)  # fmt: skip
def test_task_check_finds_what_would_fail(
    old: str, new: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = project(tmp_path)
    assert main(["task", "check", str(file)]) == 0
    edited(file, old, new)
    assert main(["task", "check", str(file)]) == 4
    assert words in capsys.readouterr().err


def test_task_check_says_only_what_is_certain(tmp_path: Path) -> None:
    file = project(tmp_path)
    for text in ("from other import *\n", "def __getattr__(name):\n    return int\n", "globals()['work'] = int\n"):
        files(tmp_path / "repo", {"pkg/__init__.py": text})
        git(tmp_path / "repo", "commit", "--all", "-m", "dynamic")
        assert main(["task", "check", str(file)]) == 0
    edited(file, 'target = "pkg:work", inputs', 'target = "json:dumps", inputs')
    assert main(["task", "check", str(file)]) == 0
    edited(file, 'target = "json:dumps", inputs', 'target = "made:work", inputs')
    edited(file, "[tests]", '[commands]\nbuild = [["python", "make.py"]]\n\n[tests]')
    assert main(["task", "check", str(file)]) == 0


def test_a_base_that_fails_is_told_once_and_without_a_traceback(tmp_path: Path) -> None:
    from small_project import assay

    made = edited(project(tmp_path), 'target = "pkg:work", inputs', 'target = "pkg:wrok", inputs')
    tree = candidate(made, "fast", {"pkg/__init__.py": FASTER})
    done = assay("judge", made, "--tree", tree, "--store", tmp_path / "s", "--no-sandbox")
    assert done.returncode == 3 and "Traceback" not in done.stdout + done.stderr
    assert done.stdout.count("has no attribute 'wrok'") == 1, done.stdout


def test_a_failing_command_is_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files(tmp_path, {"a/work.py": "def no():\n    1 / 0\nno()\n", "b/work.py": ""})
    given = ["ab", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "raw")]
    assert main([*given, "--", sys.executable, "work.py"]) == 3
    told = capsys.readouterr().err
    assert "Traceback" not in told and "ZeroDivisionError: division by zero" in told and "work.py:2, in no" in told


@pytest.mark.parametrize(
    ("problem", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "assay doctor: interrupted"),
        (TypeError("what \x1b[1m"), 3, "a mistake of assay's own: TypeError: what \\x1b[1m; "),
    ],
)
def test_no_end_of_a_command_is_a_traceback(
    problem: BaseException,
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*_: Any) -> int:
        raise problem

    monkeypatch.setitem(COMMANDS, "doctor", replace(COMMANDS["doctor"], run=run))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["doctor"]) == status
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told
    kept = [file.read_text() for file in tmp_path.iterdir()]
    assert [text.startswith("Traceback") for text in kept] == [True] * (status == 3)


def test_the_default_number_of_examples(tmp_path: Path) -> None:
    assert task.read(edited(project(tmp_path), "examples = 10\n", "")).task.property[0].examples == 200
