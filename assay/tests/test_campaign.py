"""The campaign's arithmetic on made-up experiments, what is committed of the real one, and the command line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from assay.__main__ import main
from assay.proof import campaign, selftest

PROOF = Path(__file__).parents[1] / "proof"


def made_up(
    number: int, planted: float = 1.0, noise: float = 0.01, dirty: int = 0, blocks: int = 40
) -> dict[str, object]:
    """An experiment on a machine with normal noise, in which the planted arms are `planted` times off what they say."""
    generator = np.random.default_rng(number)
    factors = [1 if units == 100 else planted * units / 100 for units in campaign.UNITS.values()]
    times = np.exp(generator.normal(0, noise, (blocks + dirty, len(factors)))) * factors * 28000
    rows = [[round(float(value)) for value in row] for row in times]
    return {
        "condition": "quiet",
        "number": number,
        "waited_s": 0.0,
        "nothing": 0,
        "dirty": list(range(dirty)),
        "blocks": rows,
    }


def test_an_honest_machine_meets_the_criteria_and_a_dishonest_one_does_not() -> None:
    counts = campaign.summary([made_up(number) for number in range(100)])
    assert campaign.met("quiet", counts) == [] and counts["void"] <= 2
    assert all(one["valid"] >= 95 and one["found"] >= 95 for arm, one in counts["planted"].items() if arm != "plus2")
    wrong = campaign.summary([made_up(number, planted=1.01) for number in range(100)])
    assert [words.partition(":")[0] for words in campaign.met("quiet", wrong)] == list(campaign.PLANTED)


def test_a_null_that_is_called_too_often_breaks_the_promise() -> None:
    rows = [made_up(number) for number in range(20)]
    column = list(campaign.UNITS).index("null")
    for row in rows:
        for block in row["blocks"]:  # type: ignore[attr-defined]
            block[column] = round(block[column] * 0.97)
    counts = campaign.summary(rows)
    assert counts["null_called"] > counts["null_allowed"] == 2
    assert campaign.met("quiet", counts) == [f"{counts['null_called']} null experiments were called, 2 allowed"]


def test_noise_and_contamination_are_void() -> None:
    counts = campaign.summary([made_up(number, noise=0.3) for number in range(10)])
    assert counts["void"] == 10
    counts = campaign.summary([made_up(number, dirty=14, blocks=20) for number in range(10)])
    assert counts["void"] == 10 and campaign.met("spinners", counts) == []
    assert "more than 20 %" in campaign.met("bursts", counts)[0]


def test_allowances_are_binomial() -> None:
    assert campaign.allowed(200, 0.005, 0.004) == 4 and 200 - campaign.allowed(200, 0.05, 0.002) == 180
    for n, chance, risk in ((200, 0.005, 0.004), (57, 0.05, 0.002), (1, 0.5, 0.6)):
        k = campaign.allowed(n, chance, risk)
        tails = [
            sum(math.comb(n, i) * chance**i * (1 - chance) ** (n - i) for i in range(m + 1, n + 1)) for m in (k, k - 1)
        ]
        assert tails[0] <= risk and (k == 0 or tails[1] > risk)


def test_what_a_call_costs_without_work_is_part_of_the_truth() -> None:
    row = {**made_up(0), "nothing": 2800}
    assert campaign.truth(row, "plus20") == pytest.approx(-math.log(0.1 + 0.9 * 1.2), rel=1e-2)
    assert campaign.truth(row, "null") == pytest.approx(0.0)


@pytest.mark.parametrize("condition", list(campaign.CONDITIONS))
def test_the_committed_summary_follows_from_the_samples(condition: str) -> None:
    path = PROOF / f"{condition}.jsonl"
    if not path.exists():
        pytest.skip(f"no campaign under {condition} has been committed")
    rows = campaign.read(path)
    committed = json.loads((PROOF / "summary.json").read_text())[condition]
    counts = campaign.summary(rows)
    assert {name: committed[name] for name in counts} == counts
    assert committed["broken"] == campaign.met(condition, counts)
    assert len({row["number"] for row in rows}) == len(rows)
    assert {row["condition"] for row in rows} == {condition}


@pytest.mark.full
def test_a_real_experiment_and_going_on_after_a_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other tests run beside it, so it may well be void; what is asked is that it is written, counted and continued."""
    given = ["selftest", "--full", str(tmp_path), "--condition", "spinners", "--experiments", "1"]
    assert main(given) in (0, 1)
    line = (tmp_path / "spinners.jsonl").read_text()
    row = json.loads(line)
    assert row["number"] == 0 and all(len(block) == len(campaign.UNITS) for block in row["blocks"])
    assert all(value > 0 for block in row["blocks"] for value in block)
    (tmp_path / "spinners.jsonl").write_text(line + line[: len(line) // 2])
    main([*given, "--summary"])
    assert "1 experiments" in capsys.readouterr().out
    main(given)
    assert (tmp_path / "spinners.jsonl").read_text() == line


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--condition", "quiet"]) == 2
    assert "--condition: expected --full" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["selftest", "--full", "x", "--shard", "3/2"])
    assert "expected I/N with I below N, got 3/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "canary",
    [
        pytest.param(
            canary, id=canary.name, marks=[pytest.mark.full] if canary.name.startswith(("hog", "slower")) else []
        )
        for canary in selftest.CANARIES
    ],
)
def test_canaries(canary: selftest.Canary) -> None:
    """With other tests beside it, whose load must not make all blocks void, luck may decide once, a fault always."""
    found = [selftest.tried(canary, most_foreign=1e9)]
    if found[0] not in canary.expected:
        found.append(selftest.tried(canary, most_foreign=1e9))
    assert found[-1] in canary.expected, found


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--seconds", "0.1"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "namespaces",
        "bwrap",
        "cgroups",
        "governor",
        "SMT",
        "GPU",
        "foreign load",
        "noise floor",
        "detectable",
    ):
        assert f" {name}" in shown
