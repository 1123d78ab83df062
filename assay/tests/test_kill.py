"""A judge that is killed at any moment: completed stages keep their rows, nothing runs on, and the end is the same."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from assay.arms import sandbox
from holding import processes
from small_project import FASTER, assay, candidate, edited, environment, project

LONGEST_S = 3.0
"""Between the beginning of a stage, or of a judge that goes on behind it, and the kill."""
STAGES = ["prepare", "build", "tests", "equivalence", "provenance", "measure"]


def rows(store: Path, table: str) -> list[tuple[Any, ...]]:
    if not (store / "ledger.sqlite").exists():
        return []
    with sqlite3.connect(store / "ledger.sqlite") as ledger:
        if not ledger.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchall():
            return []
        return ledger.execute(f"SELECT * FROM {table} ORDER BY rowid").fetchall()


def under_way(store: Path) -> set[str]:
    """Stages that have begun in attempts that have no last row."""
    ended = {row[0] for row in rows(store, "final")}
    return {stage for attempt, stage, _ in rows(store, "begun") if attempt not in ended}


@pytest.mark.parametrize("most", [6, pytest.param(20, marks=pytest.mark.full)])
def test_kills(most: int, tmp_path: Path) -> None:
    task = edited(project(tmp_path), "rounds = 2, calls = 2", "rounds = 2, calls = 8")
    tree, store = candidate(task, "fast", {"pkg/__init__.py": FASTER}), tmp_path / "store"
    options = [] if sandbox.refusal() is None else ["--no-sandbox"]
    command = [sys.executable, "-m", "assay", "judge", str(task), "--tree", str(tree), "--store", str(store), *options]
    mark = f"ASSAY_TEST_{os.getpid()}_{time.time_ns()}"
    seed = int(os.environ.get("ASSAY_TEST_SEED", time.time_ns() % 10**6))
    print("seed", seed)
    moments = random.Random(seed)
    done: list[tuple[Any, ...]] = []
    finished, kills, reached = 0, 0, set()
    while kills < most:
        stage = STAGES[kills % len(STAGES)]  # a slow machine meets every one of them, too
        judge = subprocess.Popen(
            command, env=environment(MARK=mark), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while judge.poll() is None and stage not in under_way(store):
            time.sleep(0.02)
        try:
            status = judge.wait(moments.uniform(0.05, LONGEST_S))
        except subprocess.TimeoutExpired:
            judge.send_signal(signal.SIGKILL)
            judge.wait()
            kills += 1
        else:
            assert status in (0, 3), status  # a loaded machine may be void, and is never anything else
            finished += 1
        stop = time.monotonic() + 10
        while running := processes(mark, store):
            assert time.monotonic() < stop, running
            time.sleep(0.05)
        now = rows(store, "done")
        assert now[: len(done)] == done  # what was done is as it was, and nothing is done twice
        done = now
        reached |= {stage for _, stage, _ in rows(store, "begun")}
    complete = len(rows(store, "final"))  # a kill may come after the last row, before the judge has ended
    assert finished <= complete
    last = subprocess.run(command, env=environment(), check=False, capture_output=True, text=True)
    assert last.returncode in (0, 3), last.stderr
    attempts, begun, done = (rows(store, table) for table in ("attempts", "begun", "done"))
    final = rows(store, "final")
    assert len(attempts) == len(final) == complete + 1 and {row[0] for row in attempts} == {row[0] for row in final}
    assert [row[5] for row in attempts] == list(range(1, complete + 2))
    for attempt in attempts:
        stages = [row[1] for row in begun if row[0] == attempt[0]]
        assert stages == [row[1] for row in done if row[0] == attempt[0]] == STAGES
        raw = (store / "attempts" / attempt[0] / "raw/squares.jsonl").read_text()
        numbers = [line for line in raw.splitlines() if '"kind": "block"' in line]
        assert [f'"number": {i}, ' in line for i, line in enumerate(numbers)] == [True] * len(numbers)
    assert list((store / "tmp").iterdir()) == [] and "measure" in reached
    assert not [path for path in store.glob("attempts/*/*-*") if path.is_dir()]
    shown = assay("ledger", "--store", store).stdout
    assert len(shown.splitlines()) == complete + 1 and "not finished" not in shown
