"""Measuring beside other work: who it is, waiting, one processor, refusal of noise, advice."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.__main__ import main
from assay.contract.errors import IsolationError
from assay.contract.rows import VERSION
from assay.contract.workload import Plan, Workload
from assay.experiment import series
from assay.experiment.blocks import NOISE_BLOCKS, Blocks
from assay.experiment.raw import replay
from assay.judgement.decision import decide
from assay.machine import isolation, load
from assay.machine.conditions import PATIENCE_S, Conditions, quietest
from assay.proof import campaign, goals, proofs, selftest
from assay.report import verdict
from assay.report.advice import advice
from assay.report.terminal import Progress, others
from made_up import raw

ALLOWED = os.sched_getaffinity(0)


@pytest.fixture
def spinner() -> Iterator[int]:
    """A process that never rests on the first of our processors."""
    code = f"import os\nos.sched_setaffinity(0, [{min(ALLOWED)}])\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-S", "-c", code])
    time.sleep(0.2)
    yield other.pid
    other.kill()
    other.wait()


def test_who_uses_the_processors_is_seen() -> None:
    code = "named = 'a foreign process'\nwhile True: pass"
    shell = subprocess.Popen(["setsid", "--fork", sys.executable, "-S", "-c", code])
    shell.wait()
    try:
        before = load.Load.now()
        time.sleep(0.5)
        seen = before.since()
    finally:
        for number in _named(code):
            os.kill(number, 9)
    assert seen.seconds is not None and seen.seconds > 0.1
    assert any(name.startswith("python") and used > 0.05 for name, used in seen.by.items()), seen


def _named(code: str) -> list[int]:
    """Processes that were started with this code."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found += [int(folder.name)] if code in words else []
    return found


def block(foreign: float = 0.0, **more: Any) -> dict[str, Any]:
    """A block of RAW that is left out if others used more than a tenth of a processor."""
    reasons = [f"{load.FOREIGN}: {foreign:.2f} s in 1.00 s"] if foreign > 0.1 else []
    primary = {"base": 1.0, "candidate": 1.0, "control": 1.0}
    return {
        "kind": "block",
        "differing": [],
        "compared": 1,
        "reasons": reasons,
        "primary": primary,
        "foreign_cpu_s": foreign,
        "others": {"cc1plus": foreign} if foreign else {},
        "elapsed_s": 1.0,
        "cpu_s": dict.fromkeys(primary, 0.3),
        **more,
    }


def test_a_row_says_how_much_it_was_and_who() -> None:
    assert others(block(0.5)) == "others use 0.50 of a processor (cc1plus 0.50)"
    assert others(block(0.01)) == "" and others(block(0.0) | {"foreign_cpu_s": None}) == ""


def test_load_is_shown_while_it_is_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = {
        "kind": "load",
        "foreign_cpu_s": 0.25,
        "others": {"py\x1b[2Jthon": 0.2},
        "elapsed_s": 0.5,
        "patience_s": 5.0,
    }
    progress = Progress()
    for _ in range(3):
        progress.told(waits)
    said = capsys.readouterr().err
    words = "waiting until others rest, 5 s at most, which --patient extends: others use 0.50 of a processor"
    assert said == f"{words} (py\\x1b[2Jthon 0.40)\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    progress = Progress()
    progress.told(waits)
    progress.told(block(0.5))
    shown = capsys.readouterr().err
    assert "waiting until others rest; block 0" in shown and "\x1b" not in shown
    assert "block 0, next look at 12, 1 left out; others use 0.50 of a processor (cc1plus 0.50)" in shown


def work(folder: Path, rounds: int) -> Path:
    folder.mkdir()
    (folder / "work.py").write_text(f"def work():\n    for i in range({rounds}): pass\n    return 0\n")
    return folder


@pytest.mark.full
def test_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block waits if that is asked for, else one that follows a block left out for load; RAW says how long."""
    waited: list[float] = []

    def wait(patience_s: float, **_: Any) -> float:
        waited.append(patience_s)
        return 0.0

    monkeypatch.setattr(series.load, "wait_for_calm", wait)
    a, b = work(tmp_path / "a", 9000), work(tmp_path / "b", 90000)
    given = ["ab", str(a), str(b), "--call", "work:work", "--rounds", "1", "--calls", "3"]
    for name, options in (("usual", []), ("patient", ["--patient"]), ("more", ["--patient", "9", "--pin"])):
        waited.clear()
        main([*given, *options, "--most-foreign", "1e9", "--out", str(tmp_path / name)])
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        blocks = sum(row["kind"] == "block" for row in rows)
        expected = {"usual": (5.0, 0), "patient": (600.0, blocks), "more": (9.0, blocks)}[name]
        assert (rows[0]["patience_s"], len(waited)) == expected and set(waited) <= {expected[0]}
        assert len(rows[0]["processors"]) == (1 if "--pin" in options else len(ALLOWED))
    waited.clear()
    assert main([*given, "--most-foreign", "1e-9", "--out", str(tmp_path / "never")]) in (0, 1, 3, 5)
    rows = [json.loads(line) for line in (tmp_path / "never").read_text().splitlines()]
    left_out = sum(bool(row["reasons"]) for row in rows[:-2] if row["kind"] == "block")
    assert len(waited) == left_out and set(waited) <= {PATIENCE_S}


def test_what_is_waited_for_is_told() -> None:
    told: list[tuple[load.Foreign, float]] = []
    with goals.load(0.9):
        load.wait_for_calm(1.0, most=0.0, told=lambda *seen: told.append(seen))
    assert len(told) == 2 and all(0.4 < seconds < 2 for _, seconds in told)


def test_one_processor_is_kept_to(spinner: int) -> None:
    if len(ALLOWED) < 2:
        pytest.skip("one processor")
    looks = (quietest(0.5) for _ in range(8))  # other tests may fill the other one for a moment
    assert spinner and any(look != min(ALLOWED) for look in looks)
    with Conditions(pinned=True).kept():
        (number,) = os.sched_getaffinity(0)
        child = subprocess.run(
            [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], capture_output=True, check=True
        )
        assert child.stdout.decode().strip() == f"{{{number}}}"
    assert os.sched_getaffinity(0) == ALLOWED


def test_a_control_group_is_entered_and_left() -> None:
    before = Path("/proc/self/cgroup").read_text()
    try:
        with Conditions(isolated=True).kept():
            assert "assay-" in Path("/proc/self/cgroup").read_text()
    except IsolationError as problem:
        assert str(problem).startswith("--isolate: expected a control group that this user may make in ")
        assert str(problem).endswith("; --pin needs none")
    assert Path("/proc/self/cgroup").read_text() == before and os.sched_getaffinity(0) == ALLOWED


def test_what_is_written_into_a_group_of_version_2(tmp_path: Path) -> None:
    """The files of a folder take the place of the kernel's, which few machines let a test have."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu")
    own = isolation._own(tmp_path, True)
    own.mkdir(parents=True, exist_ok=True)
    with isolation.group(3, tmp_path) as words:
        (folder,) = tmp_path.glob("assay-*")
        written = {name: (folder / name).read_text() for name in ("cpu.weight", "cpuset.cpus", "cgroup.procs")}
        assert written == {"cpu.weight": "10000", "cpuset.cpus": "3", "cgroup.procs": str(os.getpid())}
        assert words == "weight 10000, processor 3 for nobody else"
    assert (own / "cgroup.procs").read_text() == str(os.getpid())
    with (
        pytest.raises(IsolationError, match="--isolate: expected a control group"),
        isolation.group(3, tmp_path / "no"),
    ):
        pass


def noisy(scatter: float, effect: float, rounds: int, seed: int, blocks: int = NOISE_BLOCKS) -> str:
    """The verdict after three blocks whose A / A' scatters so much; "" if they go on."""
    drawn, found = np.random.default_rng(seed), Blocks(rounds=rounds)
    seen = None
    for _ in range(blocks):
        each = scatter * math.sqrt(rounds) / (1.2533 if rounds > 1 else 1.0) / math.sqrt(2)
        shifts = {"base": 0.0, "candidate": -effect, "control": 0.0}
        calls = {arm: np.exp(shift + each * drawn.standard_normal(rounds)).tolist() for arm, shift in shifts.items()}
        base = np.log(calls["base"])
        primary = {arm: math.exp(float(np.median(np.log(one) - base))) for arm, one in calls.items()}
        found.add(block(primary=primary, calls=calls, figures={arm: {"steady": one} for arm, one in primary.items()}))
        seen = found.decision(0.02)
    return "" if seen is None else seen.verdict


@pytest.mark.parametrize("rounds", [1, 8, 32])
def test_a_machine_that_is_too_noisy_is_refused_after_three_blocks(rounds: int) -> None:
    """Half the 95 % interval of 40 blocks is a third of the scatter: 6 % of scatter are just good enough for 2 %."""
    refused = {
        (scatter, effect): sum(noisy(scatter, effect, rounds, seed) == "infra.noise" for seed in range(300)) / 300
        for scatter, effect in ((0.05, 0.0), (0.06, 0.0), (1.0, 0.0), (0.3, 1.0))
    }
    assert refused[0.05, 0.0] == 0 and refused[0.06, 0.0] <= 0.01
    assert refused[1.0, 0.0] >= (0.45 if rounds == 1 else 0.6), refused
    assert refused[0.3, 1.0] <= 0.02  # what is large beside the noise is looked for all the same


def test_the_refusal_is_an_outcome_with_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = raw(tmp_path / "task", {"w": [0.01, 0.0, -0.01]})
    lines = (folder / "w.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row, scatter in zip(rows[1:4], (0.4, -0.5, 0.6), strict=True):
        row["primary"]["control"] = math.exp(scatter)
    (folder / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = decide(folder)
    assert found["outcome"] == "infra.noise" and found["status"] == 3
    (words,) = found["words"]
    assert words.startswith("two builds of base scatter by 110% from block to block: 40 blocks could show 26.5% here")
    assert any("`assay doctor` says" in line for line in verdict.lines(found))
    assert "infra.noise" in verdict.junit(found) and "assay doctor" in verdict.markdown(found)
    seen, _ = replay([json.dumps(row) for row in rows[:-1]])
    assert (seen.verdict, seen.blocks) == ("infra.noise", 3)
    assert main(["replay", str(folder)]) == 3
    shown = capsys.readouterr().out
    assert "infra.noise: " in shown and "advice: " in shown


def header(**more: Any) -> dict[str, Any]:
    plan = Plan(Workload("call", target="a:b")).checked()
    found = {"kind": "header", "schema": VERSION, "plan": json.loads(json.dumps(plan, default=vars)), "calls": 8}
    return {**found, "processors": [0, 1], "patience_s": 5.0, **more}


def test_advice_names_who_it_was_and_what_helps() -> None:
    loaded = [header(), *[block(0.5)] * 14]
    found = advice("void", loaded)
    assert found[0] == "others used 0.50 of a processor in blocks that were left out: cc1plus 0.50"
    assert [words.split()[0] for words in found[1:4]] == ["--patient", "--pin", "--isolate"]
    assert "--instructions" in found[-2] and "assay doctor" in found[-1]
    patient = advice("void", [header(patience_s=600.0, processors=[1]), *[block(0.5)] * 14])
    assert not any(words.startswith(("--patient", "--pin")) for words in patient)
    threads = [header(), *[block(0.5, cpu_s=dict.fromkeys(("base", "candidate", "control"), 1.0))] * 14]
    assert not any(words.startswith("--pin") for words in advice("void", threads))
    scatters = advice("infra.noise", [header(), *[block()] * 3])
    assert any(words.startswith("--rounds 32") for words in scatters) and not any("others" in one for one in scatters)
    left = advice("void", [header(), *[block(reasons=["a process outlived its arm"])] * 14])
    assert any("have to end with its call" in words for words in left)
    assert all(advice(word, loaded) == [] for word in ("faster", "slower", "equivalent", "undecided", "incorrect"))


def test_a_selftest_that_saw_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The samples are those of eight committed experiments beside processes that never rest."""
    rows = campaign.read(Path(__file__).parents[1] / "proof" / "spinners.jsonl")
    monkeypatch.setattr(campaign, "experiment", lambda number, *_, **__: rows[number])
    monkeypatch.setattr(selftest, "_SIMULATED", 100)
    monkeypatch.setattr(selftest, "CANARIES", ())
    assert main(["selftest"]) == 3
    said = capsys.readouterr()
    assert "8: null void, plus2 void, plus5 void, plus20 void" in said.out
    words = "all 8 real experiments are void: this machine is too busy, or scatters too much"
    assert words in said.err
    assert selftest.nothing_shown({"void": 7, "experiments": 8}) == ""


@pytest.mark.parametrize("condition", ["busy", "short"])
def test_committed_experiments_say_what_their_summary_says(condition: str) -> None:
    folder = Path(__file__).parents[1] / "proof"
    path = folder / f"{condition}.jsonl"
    if not path.exists():
        pytest.skip("no campaign has been committed")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["number"] for row in rows}) == len(rows)
    counts = json.loads(json.dumps(proofs.PROOFS[condition].summary(rows)))
    committed = json.loads((folder / "summary.json").read_text())[condition]
    assert committed == {**counts, "broken": proofs.PROOFS[condition].met(counts)}


def test_the_load_is_half_a_processor() -> None:
    before = os.times().children_user
    with goals.load():
        time.sleep(1.0)
    assert 0.01 < os.times().children_user - before < 0.75  # beside other work it may get less than it wants
