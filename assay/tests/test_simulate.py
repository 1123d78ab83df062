"""Promises of the procedure under simulated noise, and that the simulation can see them broken."""

import pytest

from assay.__main__ import main
from assay.proof.simulation import SCENARIOS, Scenario, failures, simulate

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


@pytest.mark.parametrize("name", [s.name for s in SCENARIOS if s.sound])
def test_level_and_coverage(name: str) -> None:
    scenario = BY_NAME[name]
    null = simulate(scenario, 0.0, 4000, seed=11)
    assert failures(null, scenario) == [] and null.void <= 0.02 * 4000
    planted = simulate(scenario, 0.05, 4000, seed=12)
    assert failures(planted, scenario) == [] and planted.claimed >= 0.9 * 4000


def test_one_persistent_pair_is_no_sample_however_many_blocks_it_runs() -> None:
    """Two processes that keep their own speed: blocks of them are not independent, and the null fails by far."""
    seen = simulate(BY_NAME["persistent"], 0.0, 2000, seed=5)
    assert seen.claimed > 0.2 * 2000, "called without cause, far above 0.5 %"
    assert seen.covered < 0.3 * 2000 and seen.void > 0.4 * 2000


def test_averaging_base_with_its_control_breaks_the_interval_under_skewed_times() -> None:
    tails = BY_NAME["tails"]
    assert any("covers" in words for words in failures(simulate(tails, 0.0, 4000, seed=3, pooled=True), tails))


def test_a_broken_promise_is_seen() -> None:
    """A scenario that claims to be sound and is not fails both checks."""
    liar = Scenario("liar", "", BY_NAME["persistent"].noise, persistent=0.02)
    found = failures(simulate(liar, 0.0, 1000, seed=1), liar)
    assert len(found) == 2 and "were called" in found[0] and "covers" in found[1]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--experiments", "500"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["scenario", "effect"] and len([x for x in lines if x.startswith("tails")]) == 3
    with pytest.raises(SystemExit) as stop:
        main(["simulate", "--experiments", "5"])
    assert stop.value.code == 2
