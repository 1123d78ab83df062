"""Deciding: what a task requires and the exit status, several workloads under Holm's procedure, budgets, locks."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay import devices, frozen
from assay.decide import FAMILY, decide
from assay.experiment import SCHEMA, Blocks, verdict_row
from assay.plan import Plan, Workload
from assay.stats import LOOKS, p_value
from small_project import BASE, FASTER, candidate, edited, environment, project, verdict

DELTA = 0.02


def folder_of(folder: Path, workloads: Mapping[str, Sequence[float]], require: str = "faster") -> Path:
    """RAW as measuring leaves it, of workloads whose candidates are faster by these log-ratios."""
    plan = Plan(Workload("command", command=("true",)), delta=DELTA, workloads=len(workloads))
    content = {
        "kind": "plan", "schema": frozen.SCHEMA, "assay": "0", "attempt": {"id": "a", "number": 1},
        "task": {"name": "t", "digest": "0" * 16, "delta": DELTA, "require": require},
        "patch": {"digest": "0" * 16, "bytes": 1, "changed": ["a"], "restored": [], "left": []},
        "protocol": "0" * 16, "outcome": "", "words": [], "trees": {},
        "gates": dict.fromkeys(("tests", "equivalence", "provenance"), "none"),
        "sandbox": {"wanted": True},
        "workloads": dict.fromkeys(workloads, frozen.plan_as_json(plan)),
    }  # fmt: skip
    folder.mkdir()
    (folder / frozen.FILE).write_text(json.dumps(content))
    draw = np.random.default_rng(5)
    for name, ratios in workloads.items():
        rows: list[dict[str, Any]] = [
            {
                "kind": "header",
                "schema": SCHEMA,
                "plan": frozen.plan_as_json(plan),
                "isolation": "sandbox",
                "clock": "judge",
            }
        ]
        blocks = Blocks(len(workloads))
        for ratio in ratios:
            primary = {"base": 1.0, "candidate": math.exp(-ratio), "control": math.exp(draw.normal(0, 0.005))}
            rows.append({"kind": "block", "reasons": [], "differing": [], "primary": primary, "elapsed_s": 1.0})
            blocks.add(rows[-1])
            seen = blocks.decision(DELTA)
            if seen is not None and seen.verdict != "continue":
                rows.append(verdict_row(seen))
                break
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def drawn(centre: float, spread: float, seed: int = 1) -> list[float]:
    """Log-ratios of 40 blocks with exactly this centre."""
    values = np.random.default_rng(seed).normal(0, spread, 40)
    shifted: list[float] = (values - np.median(values) + centre).tolist()
    return shifted


@pytest.mark.parametrize(
    ("centre", "spread", "outcome", "statuses"),
    [
        (0.10, 0.01, "faster", {"faster": 0, "not_slower": 0, "any": 0}),
        (0.00, 0.01, "equivalent", {"faster": 1, "not_slower": 0, "any": 0}),
        (-0.10, 0.01, "slower", {"faster": 1, "not_slower": 1, "any": 0}),
        (0.02, 0.06, "undecided", {"faster": 5, "not_slower": 0, "any": 0}),
        (0.00, 0.08, "undecided", {"faster": 5, "not_slower": 5, "any": 0}),
    ],
)
def test_what_a_task_requires(
    centre: float, spread: float, outcome: str, statuses: dict[str, int], tmp_path: Path
) -> None:
    """`not_slower` holds without a verdict where the interval lies above minus the margin."""
    for require, wanted in statuses.items():
        found = decide(folder_of(tmp_path / require, {"w": drawn(centre, spread)}, require))
        assert (found["outcome"], found["status"]) == (outcome, wanted), found["workloads"]
        low = found["workloads"][0]["interval"][0]
        assert outcome != "undecided" or (low > -math.log1p(DELTA)) == (statuses["not_slower"] == 0)


def between(low: float, high: float) -> list[float]:
    """Log-ratios above 0 whose p-value after 40 blocks lies between these, and which no earlier look calls."""
    for seed in range(2000):
        values = np.random.default_rng(seed).normal(0.006, 0.012, 40)
        p = [p_value(values[: look.blocks].tolist()) for look in LOOKS]
        if low < p[2] < high and all(one > look.alpha for one, look in zip(p, LOOKS[:2], strict=False)):
            found: list[float] = values.tolist()
            return found
    raise AssertionError("no such values")


def test_several_workloads(tmp_path: Path) -> None:
    """The levels are divided among them, and Holm's procedure gives back what the others do not need."""
    last = LOOKS[-1].alpha
    values, nothing, much = between(last / 2 * 1.1, last * 0.9), drawn(0, 0.008, 2), drawn(0.2, 0.01, 3)
    alone = decide(folder_of(tmp_path / "alone", {"w": values}))
    assert (alone["outcome"], alone["workloads"][0]["holm"]) == ("faster", False)
    beside = decide(folder_of(tmp_path / "beside", {"w": values, "null": nothing}))
    assert beside["outcome"] != "faster" and {one["verdict"] for one in beside["workloads"]} <= {
        "equivalent",
        "undecided",
    }
    strong = decide(folder_of(tmp_path / "strong", {"w": values, "much": much}))
    one, other = strong["workloads"]
    assert one["holm"] and one["verdict"] == "faster" and FAMILY / 2 < one["p"] < FAMILY, one
    assert one["reason"] == "Holm's procedure over all workloads rejects no change"
    assert (other["verdict"], other["holm"]) == ("faster", False) and strong["outcome"] == "faster"
    assert strong["joint"]["interval"][0] < strong["joint"]["estimate"] < strong["joint"]["interval"][1]


def test_one_faster_and_one_that_may_be_worse(tmp_path: Path) -> None:
    found = decide(folder_of(tmp_path / "raw", {"fast": drawn(0.2, 0.01), "wild": drawn(0, 0.08)}))
    assert (found["outcome"], found["status"]) == ("undecided", 5)
    assert found["words"] == ["fast: faster; wild: may be worse by the margin"]


def test_a_budget_that_does_not_suffice(tmp_path: Path) -> None:
    task = edited(project(tmp_path), "[budget]\n", "[budget]\nseconds = 0.5\n")
    tree = candidate(task, "fast", {"pkg/__init__.py": FASTER})
    found = verdict(task, "--tree", tree, "--store", tmp_path / "store", "--no-sandbox")
    assert (found["outcome"], found["status"]) == ("infra.budget", 3), found
    assert found["words"] == ["expected to be decided within the task's 0.5 s of measuring"]
    mark = str(tmp_path).encode()
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != str(os.getpid())]
    assert not [path for path in left if path.exists() and mark in path.read_bytes()]


HOLD = """
import sys, time
from assay import devices
with devices.held("cpu", alone=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_measurement_has_its_processors_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who builds waits as well; who was killed holds nothing."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with devices.held("cpu", alone=False), devices.held("cpu", alone=False, waiting=lambda name: pytest.fail(name)):
        pass  # several may build
    heard, got = threading.Event(), threading.Event()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=environment(TMPDIR=str(tmp_path))
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"

        def wait() -> None:
            with devices.held("cpu", alone=False, waiting=lambda _: heard.set()):
                got.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert heard.wait(10) and not got.wait(0.3)
        other.send_signal(signal.SIGKILL)
        assert got.wait(10)
        thread.join()


def test_a_judge_waits_for_one_that_measures(tmp_path: Path) -> None:
    task = project(tmp_path)
    tree = candidate(task, "c", {"pkg/__init__.py": "import os\nos._exit(0)\n" + BASE})
    store = tmp_path / "store"
    (tmp_path / "tmp").mkdir()
    where = environment(TMPDIR=str(tmp_path / "tmp"))
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=where) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        command = [sys.executable, "-m", "assay", "judge", str(task), "--tree", str(tree), "--store", str(store)]
        with subprocess.Popen(
            [*command, "--no-sandbox", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=where
        ) as one:
            assert one.stderr is not None
            said = ""
            while "another judge has cpu" not in said:
                line = one.stderr.readline()
                assert line, said
                said += line
            assert one.poll() is None and not list(store.glob("attempts/*/built.json"))
            other.kill()
            found = json.loads(one.communicate(timeout=120)[0])
    assert found["outcome"] == "tests_failed"
