"""From made-up blocks to outcome and exit status, through the plan, RAW and the command that decides again."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from assay.__main__ import main
from assay.contract.outcome import REQUIREMENTS
from assay.gates import notes
from assay.gates.gate import Found
from assay.judgement.decision import decide
from assay.statistics.signed_rank import p_value
from made_up import BOUNDED, EQUIVALENT, FASTER, SLOWER, UNBOUNDED, WITHIN, raw

OUTCOMES = {
    "faster": (FASTER, {"faster": 0, "material": 0, "not_slower": 0, "any": 0}),
    "faster, within the margin": (WITHIN, {"faster": 0, "material": 1, "not_slower": 0, "any": 0}),
    "slower": (SLOWER, {"faster": 1, "material": 1, "not_slower": 1, "any": 0}),
    "equivalent": (EQUIVALENT, {"faster": 1, "material": 1, "not_slower": 0, "any": 0}),
    "undecided, bounded": (BOUNDED, {"faster": 5, "material": 5, "not_slower": 0, "any": 0}),
    "undecided, unbounded": (UNBOUNDED, {"faster": 5, "material": 5, "not_slower": 5, "any": 0}),
}


@pytest.mark.parametrize("require", REQUIREMENTS)
@pytest.mark.parametrize("name", OUTCOMES)
def test_what_a_task_may_require(name: str, require: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratios, statuses = OUTCOMES[name]
    assert main(["replay", str(raw(tmp_path, {"w": ratios}, require=require))]) == statuses[require]
    shown = capsys.readouterr().out
    words = {0: "met", 1: "not met", 5: "not shown"}[statuses[require]]
    assert shown.startswith(f"{name.partition(',')[0]}: ") and f"require {require}: {words}; sandboxed" in shown


@pytest.mark.parametrize("require", REQUIREMENTS)
def test_what_meets_no_requirement(require: str, tmp_path: Path) -> None:
    def status(folder: str, **more: Any) -> tuple[str, int]:
        found = decide(raw(tmp_path / folder, {"w": FASTER}, require=require, **more))
        return found["outcome"], found["status"]

    assert status("1", differing=[3]) == ("incorrect", 1)
    assert status("2", reasons=["foreign"]) == ("void", 3)
    assert status("3", found={"tests": Found("tests_failed", "one")}) == ("tests_failed", 1)
    assert status("4", found={"provenance": Found("not_evaluated", "unused")}) == ("not_evaluated", 5)
    assert status("5", found={"equivalence": Found("infra.equivalence", "no box")}) == ("infra.equivalence", 3)
    assert status("6", found={"build": Found("task_invalid", "base: no")}) == ("task_invalid", 4)
    assert status("7", reasons=["frozen"], escapes={"candidate": ["woke"]}) == ("tampered", 1)


def test_no_workload_may_be_worse_than_the_margin(tmp_path: Path) -> None:
    for other, outcome, status in (
        (BOUNDED, "faster", 0),
        (UNBOUNDED, "undecided", 5),
        (SLOWER, "slower", 1),
        (EQUIVALENT, "faster", 0),
    ):
        for require in ("faster", "not_slower"):
            found = decide(raw(tmp_path, {"one": FASTER, "two": other}, require=require))
            assert (found["outcome"], found["status"]) == (outcome, status), found


def signed(p: float) -> list[float]:
    """40 log-ratios whose exact p-value is at most p and nearly so, of which 24 show nothing yet."""
    ranks, negative = list(range(1, 41)), []
    for rank in reversed(ranks):
        if p_value([-r if r in (*negative, rank) else r for r in ranks]) <= p:
            negative.append(rank)
    values = [0.01 * (-rank if rank in negative else rank) for rank in ranks]
    order = random.Random(0)
    while min(p_value(values[:12]), p_value(values[:24])) < 0.05:
        order.shuffle(values)
    return values


def test_holm_overturns_a_single_look(tmp_path: Path) -> None:
    """At its last look 0.2 % suffice alone (0.3 %), not beside a null (0.15 %), and do beside a sure effect."""
    close = signed(0.002)
    assert 0.0015 < p_value(close) <= 0.002
    alone = decide(raw(tmp_path / "1", {"close": close}))
    assert (alone["outcome"], alone["workloads"][0]["holm"]) == ("faster", False)
    found = decide(raw(tmp_path / "2", {"close": close, "null": EQUIVALENT}))
    one = found["workloads"][0]
    assert found["outcome"] == "undecided" and found["status"] == 5, found
    assert (one["verdict"], one["holm"], one["alpha"]) == ("undecided", False, 0.0015)
    assert one["p"] == pytest.approx(p_value(close) * 0.005 / 0.003) and 0.0025 < one["p"] < 0.005
    found = decide(raw(tmp_path / "3", {"close": close, "sure": FASTER}))
    assert [(one["verdict"], one["holm"]) for one in found["workloads"]] == [("faster", True), ("faster", False)]
    assert (found["outcome"], found["status"]) == ("faster", 0)
    worse = [-value for value in close]
    found = decide(raw(tmp_path / "4", {"close": worse, "sure": FASTER}))
    assert (found["outcome"], found["status"], found["workloads"][0]["holm"]) == ("slower", 1, True)


ASKED = ("tests", "equivalence", "provenance")
PASSED = {"build": Found("", "3 arms"), **{name: Found("", "well") for name in ASKED}}


def test_a_gate_that_was_asked_for_and_not_run(tmp_path: Path) -> None:
    """It takes away what speaks for the patch; what speaks against it stands."""
    assert decide(raw(tmp_path / "0", {"w": FASTER}, asked=ASKED, found=PASSED))["outcome"] == "faster"
    for i, missing in enumerate(ASKED):
        run = {name: gate for name, gate in PASSED.items() if name != missing}
        found = decide(raw(tmp_path / f"a{i}", {"w": FASTER}, asked=ASKED, found=run))
        assert (found["outcome"], found["status"]) == ("not_evaluated", 5)
        assert found["words"] == [f"{missing}: asked for and not run"] and found["workloads"][0]["verdict"] == "faster"
        others = [name for name in ASKED if name != missing]
        assert decide(raw(tmp_path / f"b{i}", {"w": FASTER}, asked=others, found=run))["outcome"] == "faster"
        for ratios, require, outcome in (
            (SLOWER, "faster", "slower"),
            (SLOWER, "any", "not_evaluated"),
            (UNBOUNDED, "faster", "not_evaluated"),
            (WITHIN, "material", "not_evaluated"),
            (EQUIVALENT, "not_slower", "not_evaluated"),
        ):
            place = tmp_path / f"{i}{require}{outcome}"
            found = decide(raw(place, {"w": ratios}, asked=ASKED, found=run, require=require))
            assert found["outcome"] == outcome
    wrong = decide(raw(tmp_path / "d", {"w": FASTER}, asked=ASKED, differing=[1]))
    assert (wrong["outcome"], wrong["status"]) == ("incorrect", 1)


def test_a_gate_that_was_left_out_on_request(tmp_path: Path) -> None:
    skipped = ("tests", "equivalence")
    run = {name: gate for name, gate in PASSED.items() if name not in skipped}
    found = decide(raw(tmp_path, {"w": FASTER}, asked=ASKED[:2], skipped=ASKED, found=run))
    assert (found["outcome"], found["status"]) == ("faster", 0)
    assert found["trust"] == ["sandboxed", "left out on request: tests, equivalence"]
    gates = [(gate["name"], gate["outcome"]) for gate in found["gates"]]
    assert gates == [("build", ""), ("tests", "skipped"), ("equivalence", "skipped"), ("provenance", "")]


def test_what_got_worse_stands_beside_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It changes nothing of the outcome."""
    figures = {arm: {"wall": 1.0, "memory": 1024.0 * (1 + (arm == "candidate"))} for arm in ("base", "candidate")}
    place = raw(tmp_path, {"w": FASTER}, figures=figures, cpu_s={"base": 1.0, "candidate": 1.0})
    found = decide(place)
    (worse,) = found["workloads"][0]["worse"]
    assert (worse["name"], worse["base"], worse["candidate"]) == ("memory", 1024.0, 2048.0)
    assert found["outcome"] == "faster" and worse["interval"][0] == pytest.approx(math.log(2))
    assert main(["replay", str(place)]) == 0
    assert "  worse: memory 1.0 MiB to 2.0 MiB" in capsys.readouterr().out.splitlines()


def test_gates_of_another_plan(tmp_path: Path) -> None:
    place = raw(tmp_path, {"w": FASTER}, asked=ASKED, found=PASSED)
    content = json.loads((place / notes.FILE).read_text())
    (place / notes.FILE).write_text(json.dumps({**content, "plan": "1" * 16}))
    with pytest.raises(ValueError, match="GATES: expected those of plan"):
        decide(place)


def test_what_was_not_compared_speaks_for_no_patch(tmp_path: Path) -> None:
    for unchecked, ratios, outcome in (
        (False, FASTER, "not_evaluated"),
        (False, SLOWER, "slower"),
        (True, FASTER, "faster"),
    ):
        for require in ("faster", "not_slower"):
            place = tmp_path / f"{unchecked}{outcome}{require}"
            found = decide(raw(place, {"w": ratios}, require=require, unchecked=unchecked, compared=0))
            assert found["outcome"] == outcome, found
            assert "outputs not compared: w" in found["trust"]
    assert not found["workloads"][0].keys() & {"outputs", "ratios"}
    alone = decide(raw(tmp_path / "two", {"one": FASTER, "two": FASTER}, compared=0))
    assert [words.partition(":")[0] for words in alone["words"]] == ["one", "two"]
