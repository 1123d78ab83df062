"""Real experiments with a known truth: the null and planted slow-downs share blocks with A and A'.

The workload is pure Python, equal units of work, 100 of them in base: 2 to 3 ms. An experiment is a line of JSON with
all of its samples; a campaign is a file of such lines, which may be cut anywhere and continued.
"""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from assay.arms.inside.wire import encode
from assay.arms.trees import Trees
from assay.contract.outcome import NOTHING
from assay.contract.workload import Plan, Workload
from assay.experiment.blocks import ARMS, Blocks
from assay.experiment.samples import Sample, worker_samples
from assay.machine.conditions import PATIENCE_S
from assay.machine.load import Load, wait_for_calm
from assay.statistics.looks import LOOKS, MOST_CONTAMINATED, Judgement
from assay.statistics.signed_rank import exact_interval

UNITS = {"base": 100, "control": 100, "null": 100, "plus2": 102, "plus5": 105, "plus20": 120}
PLANTED = ("plus2", "plus5", "plus20")
CONDITIONS = {
    "quiet": "nothing of ours beside it; begins, and goes on after a block that was left out, when others rest",
    "bursts": "one process that is busy 0.2 s of every 2 s",
    "spinners": "a process that is always busy for every processor that the arms may use",
}
_WORK = """def work(units={units}):
    for _ in range(units):
        total = 0
        for i in range(400):
            total += i * i
    return units
"""
"""Every unit is the same work: integers that grew from unit to unit would make later ones dearer."""
_BURST = """import time
while True:
    stop = time.monotonic() + 0.2
    while time.monotonic() < stop: pass
    time.sleep(1.8)
"""
_STEP = 1e-7
"""Seconds of the unit in which samples are kept."""
_CALM_S = 600.0
_TURNS = 8
_EMPTY = 12
"""Workers that measure what a call without units takes."""
_DELTA = 0.02


def plan(seed: int) -> Plan:
    """What every experiment does: fresh workers that take eight turns of one call, after one that is not timed."""
    workload = Workload("call", target="work:work", constant=True, compare=False, rounds=_TURNS, calls=_TURNS)
    return Plan(workload, delta=_DELTA, seed=seed).checked()


@contextmanager
def trees(folder: Path, units: Mapping[str, int] = UNITS) -> Iterator[Trees]:
    """A tree for every arm; they differ in one number."""
    found = {}
    for arm, count in units.items():
        found[arm] = folder / f"arm-{arm}"
        found[arm].mkdir()
        (found[arm] / "work.py").write_text(_WORK.format(units=count))
    yield Trees.at(found, folder)


@contextmanager
def load(condition: str) -> Iterator[None]:
    """The condition's other processes, as long as the block lasts."""
    if condition not in CONDITIONS:
        raise ValueError(f"condition: expected one of {', '.join(CONDITIONS)}, got {condition}")
    many = {"quiet": 0, "bursts": 1, "spinners": len(os.sched_getaffinity(0))}[condition]
    code = _BURST if condition == "bursts" else "while True: pass"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(many)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def experiment(
    number: int, condition: str, told: Callable[[str], None] = lambda _: None, calm_s: float = _CALM_S
) -> dict[str, Any]:
    """One experiment: blocks of all six arms until 40 are clean or too many are not.

    `calm_s`: how long a quiet one waits for others to be gone, before it begins and after a block that was left out.
    """
    seed = 1000 * list(CONDITIONS).index(condition) + number
    order, the_plan = random.Random(seed), plan(seed)
    given = [b"".join(bytes(part) for part in encode(()))] * (_TURNS + the_plan.workload.warmups)
    patience_s = {"quiet": calm_s, "bursts": PATIENCE_S, "spinners": 0.0}[condition]
    with tempfile.TemporaryDirectory(prefix="assay-") as folder, trees(Path(folder), {**UNITS, "nothing": 0}) as here:
        six, empty = (
            Trees({arm: here.trees[arm] for arm in arms}, here.folder, here.namespaces)
            for arms in (UNITS, ("nothing",))
        )
        nothing = [worker_samples(the_plan, empty, order, given, 0)["nothing"].figures["steady"] for _ in range(_EMPTY)]
        waited = wait_for_calm(calm_s) if condition == "quiet" else 0.0
        blocks: list[list[int]] = []
        dirty: list[int] = []
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        most = MOST_CONTAMINATED * LOOKS[-1].blocks / (1 - MOST_CONTAMINATED)
        while len(blocks) - len(dirty) < LOOKS[-1].blocks and len(dirty) <= most:
            now, start = Load.now(), time.perf_counter()
            samples = worker_samples(the_plan, six, order, given, order.randrange(2**32))
            _, reasons = now.disturbances(time.perf_counter() - start, the_plan.most_foreign)
            if reasons:
                dirty.append(len(blocks))
                waited += wait_for_calm(patience_s)
            blocks.append([_kept(samples[arm]) for arm in UNITS])
            told(f"{condition} {number}: {len(blocks) - len(dirty)} clean, {len(dirty)} left out")
    return {
        "condition": condition,
        "number": number,
        "started": started,
        "waited_s": round(waited, 1),
        "nothing": round(float(np.median(nothing)) / _STEP),
        "dirty": dirty,
        "blocks": blocks,
    }


def _kept(sample: Sample) -> int:
    return round(sample.figures["steady"] / _STEP)


def judged(row: Mapping[str, Any], candidate: str) -> tuple[Judgement, bool | None]:
    """The protocol's judgement of one arm, and whether the 95 % interval of all its blocks holds the truth.

    The second is None where the last look was not reached.
    """
    column = dict(zip(UNITS, range(len(UNITS)), strict=True))
    seen = Blocks()
    decided: Judgement | None = None
    for i, block in enumerate(row["blocks"]):
        times = dict(zip(ARMS, (block[column[arm]] for arm in ("base", candidate, "control")), strict=True))
        seen.add({"differing": [], "reasons": ["dirty"] if i in row["dirty"] else [], "primary": times})
        now = seen.decision(_DELTA)
        if decided is None and now is not None and now.verdict != "continue":
            decided = now
    assert decided is not None
    base, other = np.array(seen.seconds["base"], float), np.array(seen.seconds["candidate"], float)
    if len(base) < LOOKS[-1].blocks:
        return decided, None
    return decided, not exact_interval(np.log(base / other), 0.05).excludes(truth(row, candidate))


def truth(row: Mapping[str, Any], candidate: str) -> float:
    """The log-ratio that was planted: units, and what a call without any costs."""
    clean = [block[0] for i, block in enumerate(row["blocks"]) if i not in row["dirty"]]
    fixed = row["nothing"] / float(np.median(clean))
    return -math.log(fixed + (1 - fixed) * UNITS[candidate] / UNITS["base"])


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of one condition's experiments, and what is allowed of those that are not void.

    A null is called with a chance of at most 0.5 %, a 95 % interval misses the truth with one of at most 5 %. A correct
    tool exceeds what is allowed in 0.4 % of campaigns for the null, in 0.2 % for each planted effect: 1 % together.
    """
    null = [judged(row, "null")[0] for row in rows]
    void = sum(seen.verdict in NOTHING for seen in null)
    called = sum(seen.verdict in ("faster", "slower") for seen in null)
    found: dict[str, Any] = {"experiments": len(rows), "void": void, "null_called": called}
    found["null_allowed"] = allowed(len(rows) - void, sum(look.alpha for look in LOOKS), 0.004)
    covers = {}
    for arm in PLANTED:
        pairs = [judged(row, arm) for row in rows]
        valid = [hit for (seen, hit) in pairs if seen.verdict not in NOTHING and hit is not None]
        covers[arm] = {
            "valid": len(valid),
            "covered": sum(valid),
            "needed": len(valid) - allowed(len(valid), 0.05, 0.002),
            "found": sum(seen.verdict == "slower" for seen, _ in pairs),
        }
    found["planted"] = covers
    found["waited_s"] = round(sum(row["waited_s"] for row in rows), 1)
    return found


def met(condition: str, counts: Mapping[str, Any]) -> list[str]:
    """The criteria that a condition's counts break, in words."""
    broken, share = [], counts["void"] / max(1, counts["experiments"])
    if condition == "spinners" and share >= 0.95:
        return []
    if condition == "bursts" and share > 0.2:
        broken.append(f"void in {counts['void']} of {counts['experiments']} experiments, more than 20 %")
    if counts["null_called"] > counts["null_allowed"]:
        broken.append(f"{counts['null_called']} null experiments were called, {counts['null_allowed']} allowed")
    for arm, one in counts["planted"].items():
        if one["covered"] < one["needed"]:
            broken.append(f"{arm}: {one['covered']} of {one['valid']} intervals cover, {one['needed']} needed")
    return broken


def allowed(n: int, chance: float, risk: float) -> int:
    """The smallest k that a binomial count of n exceeds with a probability of at most `risk`."""
    tail, k, term = 1.0, -1, (1 - chance) ** n
    while tail > risk:
        k += 1
        tail -= term
        term *= (n - k) / (k + 1) * chance / (1 - chance)
    return k


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a campaign's file; a line that was cut off is not counted."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
