"""Counts of instructions: which source, how exact beside other work, and that they stand beside the verdict."""

import json
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from assay.__main__ import main
from assay.arms import counters
from assay.arms.counters import COUNTERS, best
from assay.arms.inside.counting import counted
from assay.arms.trees import Trees
from assay.cli.shown import schema
from assay.contract.workload import Plan, Workload
from assay.experiment import instructions
from assay.experiment.inputs import Inputs
from assay.experiment.raw import replay
from assay.judgement.decision import decide
from assay.proof import goals
from assay.report import instructions as shown
from assay.report import verdict
from made_up import FASTER, raw

SUM = "def work(n):\n    total = n\n    for i in range({units} * 1000): total += i * i\n    return total\n"
MAKE = "def make(seed): return (seed % 1000,)\n"
EXACT = 1e-3
"""By how much counts of equal code may differ."""


def test_the_best_source_that_the_machine_allows() -> None:
    def only(*names: str) -> Any:
        return lambda name: "" if name in names else f"{name}: not here"

    assert [best("best", worker=True, refused=only(*COUNTERS))[0], best("best", worker=True, refused=only())] == [
        COUNTERS["perf"],
        (None, ["perf: not here", "valgrind: not here", "bytecode: not here"]),
    ]
    counter, why = best("best", worker=True, refused=only("bytecode"))
    assert counter == COUNTERS["bytecode"] and why == ["perf: not here", "valgrind: not here"]
    assert best("best", worker=False, refused=only("bytecode"))[0] is None
    assert best("valgrind", worker=False, refused=only("valgrind"))[0] == COUNTERS["valgrind"]
    assert best("perf", worker=True, refused=only("valgrind")) == (None, ["perf: not here"])


def test_what_counters_print() -> None:
    assert COUNTERS["perf"].read("x\n12345,,instructions:u,100,100.00,,\n") == 12345
    both = "==7== I refs:        1,234,567\nwords\n==9== I   refs:      3\n"
    assert COUNTERS["valgrind"].read(both) == 1234570
    for name, text in (("perf", "<not supported>,,instructions:u,0,100.00,,"), ("valgrind", "")):
        with pytest.raises(ValueError, match=f"^{name}: expected a count of instructions, got"):
            COUNTERS[name].read(text)


def test_a_source_that_is_not_there_is_refused_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counters.refusal.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert counters.refusal("valgrind") == "valgrind: expected it on PATH, found none"
    (tmp_path / "perf").write_text("#!/bin/sh\necho '<not supported>,,instructions:u,0,100.00,,' >&2\n")
    (tmp_path / "perf").chmod(0o755)
    assert counters.refusal("perf").startswith("perf: expected a count of instructions, got '<not supported>")
    assert counters.refusal("bytecode") == ""
    counters.refusal.cache_clear()


def test_bytecode_is_counted() -> None:
    def loop(n: int) -> int:
        total = 0
        for i in range(n):
            total += i
        return total

    few, more = counted(lambda: loop(10)), counted(lambda: loop(110))
    per_turn = (more - few) / 100
    assert few > 10 and per_turn == int(per_turn) and 3 <= per_turn <= 20
    assert counted(lambda: loop(10)) == few and sys.gettrace() is None
    with pytest.raises(ZeroDivisionError):
        counted(lambda: 1 / 0)
    assert sys.gettrace() is None
    assert counted(lambda: sum(range(100000))) == counted(lambda: sum(range(3)))  # as it is said of it


def trees(folder: Path, units: dict[str, int]) -> Trees:
    for arm, count in units.items():
        (folder / arm).mkdir()
        (folder / arm / "work.py").write_text(SUM.format(units=count) + MAKE)
    return Trees.at({arm: folder / arm for arm in units}, folder)


ARMS = {"base": 33, "candidate": 30, "control": 33}


def row(folder: Path, source: str, units: dict[str, int] | None = None, **options: Any) -> dict[str, Any]:
    """What is counted of calls that take some milliseconds."""
    workload = Workload("call", target="work:work", inputs="work:make", **options)
    plan = Plan(workload, seed=1, instructions=source).checked()  # type: ignore[arg-type]
    here = trees(folder, units or ARMS)
    inputs = Inputs(plan, here)
    try:
        return instructions.counted(plan, here, inputs, loops=1, call_s=0.05)
    finally:
        inputs.end()


def spread(counts: list[float]) -> float:
    return (max(counts) - min(counts)) / statistics.median(counts)


def test_counts_of_equal_code_are_equal_beside_other_work(tmp_path: Path) -> None:
    """20 workers a source that takes little time, and another process that is busy half of the time."""
    units = {f"arm{i:02}": 30 for i in range(19)} | {"base": 30}
    with goals.load(0.5):
        found = row(tmp_path, "bytecode", units)
    assert len(found["counts"]) == 20 and spread(list(found["counts"].values())) <= EXACT, found


@pytest.mark.full
@pytest.mark.parametrize("source", ["perf", "valgrind"])
def test_machine_instructions_of_equal_code_are_equal_beside_other_work(source: str, tmp_path: Path) -> None:
    """20 runs; the processor's own counter and valgrind's, where they are to be had."""
    if refused := counters.refusal(source):
        pytest.skip(refused)
    units = {f"arm{i:02}": 33 for i in range(19)} | {"base": 33}
    with goals.load(0.5):
        found = row(tmp_path, source, units)
    assert len(found["counts"]) == 20 and spread(list(found["counts"].values())) <= EXACT, found


@pytest.mark.full
def test_valgrind_counts_what_a_candidate_spares(tmp_path: Path) -> None:
    if refused := counters.refusal("valgrind"):
        pytest.skip(refused)
    found = row(tmp_path, "valgrind", {"base": 110, "candidate": 100})
    assert found["counts"]["base"] / found["counts"]["candidate"] == pytest.approx(1.1, abs=0.005), found


def test_a_row_where_nothing_can_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "refusal", lambda name: f"{name}: not here")
    monkeypatch.setattr(instructions, "best", lambda wanted, worker: best(wanted, worker=worker, refused=str.upper))
    found = row(tmp_path, "best")
    assert found["counts"] == {} and found["words"] == "PERF; VALGRIND; BYTECODE"
    assert shown.lines([found]) == ["instructions: not counted: PERF; VALGRIND; BYTECODE"]


def counts(base: float, candidate: float, control: float, **more: Any) -> dict[str, Any]:
    by_arm = {"base": base, "candidate": candidate, "control": control}
    row = {"kind": "instructions", "source": "valgrind", "what": "valgrind", "calls": 3, "counts": by_arm, "words": ""}
    return {**row, **more}


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ((1000.0, 900.0, 1000.0), "fewer"),
        ((1000.0, 1100.0, 1000.0), "more"),
        ((1000.0, 999.5, 1000.0), "alike"),
        ((1000.0, 900.0, 950.0), "alike"),
    ],
)
def test_words(given: tuple[float, float, float], word: str) -> None:
    """What two builds of base differ by is believed of no candidate."""
    (line,) = shown.lines([counts(*given)])
    assert line.startswith(f"instructions: {word}: ") and line.endswith("(valgrind); beside times, it decides nothing")


def test_counts_never_replace_the_verdict_of_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They stand in verdict, terminal and reports, and change no outcome whatever they say."""
    for name, extra in (("none", []), ("more", [counts(1.0, 5.0, 1.0)]), ("fewer", [counts(5.0, 1.0, 5.0)])):
        folder = raw(tmp_path / name, {"w": FASTER})
        lines = (folder / "w.jsonl").read_text().splitlines()
        lines[-1:-1] = [json.dumps(one) for one in extra]
        (folder / "w.jsonl").write_text("\n".join(lines) + "\n")
        found = decide(folder)
        assert (found["outcome"], found["status"]) == ("faster", 0)
        assert replay(lines[:-1])[0].verdict == "faster"
        jsonschema.validate(json.loads(json.dumps(found)), schema("verdict"))
        for row in extra:
            jsonschema.validate(row, schema("raw"))
        seen = found["workloads"][0]["instructions"]
        assert (seen is None) == (name == "none")
        if seen is None:
            continue
        assert seen["candidate"] == pytest.approx(math.log(0.2 if name == "more" else 5.0))
        words = f"instructions: {name}: "
        reports = ["\n".join(verdict.lines(found)), verdict.markdown(found), verdict.junit(found), verdict.table(found)]
        assert all(words in text for text in reports)
    assert main(["replay", str(tmp_path / "more")]) == 0
    assert "instructions: more: 5 a call against base's 1, +400.00%" in capsys.readouterr().out


@pytest.mark.full
def test_ab_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees(tmp_path, {"base": 33, "candidate": 11})
    given = ["ab", str(tmp_path / "base"), str(tmp_path / "candidate"), "--call", "work:work", "--inputs", "work:make"]
    raw_ = tmp_path / "raw"
    options = ["--no-compare", "--rounds", "1", "--calls", "3", "--most-foreign", "1e9", "--out", str(raw_)]
    main([*given, *options, "--instructions", "bytecode", "--html", str(tmp_path / "page.html")])
    rows = [json.loads(line) for line in raw_.read_text().splitlines()]
    assert [row["kind"] for row in rows[-2:]] == ["instructions", "verdict"]
    assert rows[-2]["counts"]["base"] / rows[-2]["counts"]["candidate"] == pytest.approx(3, abs=0.01)
    assert rows[-2]["counts"]["base"] == rows[-2]["counts"]["control"]
    line = "instructions: fewer: "
    assert line in capsys.readouterr().out and line in (tmp_path / "page.html").read_text()


def test_a_command_is_counted_as_a_whole(tmp_path: Path) -> None:
    if refused := counters.refusal("valgrind"):
        pytest.skip(refused)
    here = trees(tmp_path, {"base": 1, "candidate": 1})
    program = shutil.which("true")
    assert program is not None
    plan = Plan(Workload("command", (program,)), instructions="best").checked()
    found = instructions.counted(plan, here, None, loops=1, call_s=0.0)
    assert found["source"] in ("perf", "valgrind") and found["calls"] == 1
    base, candidate = found["counts"].values()
    assert base == pytest.approx(candidate, rel=EXACT) and base > 1e4
