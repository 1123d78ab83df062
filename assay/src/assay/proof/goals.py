"""Real experiments whose end is known: an effect beside load, and two builds of a call of microseconds.

Each is a line of JSON with all of its samples. A file of such lines may be cut anywhere and continued.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from assay.contract.errors import MeasurementError
from assay.contract.outcome import NOTHING
from assay.contract.workload import Plan, Workload
from assay.experiment.raw import replay
from assay.experiment.series import run
from assay.machine.conditions import Conditions
from assay.proof.campaign import allowed
from assay.statistics.looks import LOOKS

Told = Callable[[str], None]

BUSY_SHARE, _BUSY_PERIOD_S = 0.5, 0.1
"""Of a processor, and how often that begins anew."""
_LOAD = """import time
while True:
    stop = time.monotonic() + {busy}
    while time.monotonic() < stop: pass
    time.sleep({idle})
"""
CALL_S, EFFECT = 0.02, 1.1
"""Of base, about; what base has to do, over what the candidate has."""
MOST_S, LEAST_SHARE = 180.0, 0.9
"""In which so large a share of all experiments has to call the candidate faster."""
_SUM = """def work(n):
    total = n
    for i in range({count}): total += i * i
    return n
def make(seed): return (seed,)
"""
_MIX = """def work(n):
    for i in range({count}): n = (n * 31 + i) & 0xffffffff
    return n
def make(seed): return (seed,)
"""
_SHORT = 30
"""Rounds of `_MIX`: about 2 µs."""
_REQUESTS = 8
"""Of an arm in a block, one per round: 40 blocks then take some 15 s."""


@contextmanager
def load(share: float = BUSY_SHARE) -> Iterator[None]:
    """A process beside this one that uses so much of a processor, as long as this lasts."""
    code = _LOAD.format(busy=share * _BUSY_PERIOD_S, idle=(1 - share) * _BUSY_PERIOD_S)
    other = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def beside_load(number: int, told: Told) -> dict[str, Any]:
    """One experiment: a candidate that has a tenth less to do, beside half a processor of load."""
    count = _count()
    texts = [_SUM.format(count=count), _SUM.format(count=round(count / EFFECT))]
    with load():
        return _ran("busy", number, texts, 0, told)


def short(number: int, told: Told) -> dict[str, Any]:
    """One experiment: two equal trees, and a call of 2 µs in automatic loops."""
    return _ran("short", number, [_MIX.format(count=_SHORT)] * 2, _REQUESTS, told)


def _count() -> int:
    """How many rounds of `_SUM` take `CALL_S` on this machine, at its quickest."""
    scope: dict[str, Any] = {}
    exec(_SUM.format(count=10_000), scope)  # noqa: S102 - the text above
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        scope["work"](1)
        taken.append(time.perf_counter() - start)
    return round(10_000 * CALL_S / min(taken))


def _ran(condition: str, number: int, texts: Sequence[str], calls: int, told: Told) -> dict[str, Any]:
    """The two trees measured as `assay ab --pin` does, with all of RAW. `calls`: as in Workload."""
    plan = Plan(Workload("call", target="work:work", inputs="work:make", calls=calls), seed=number)
    clean = 0

    def follow(row: Mapping[str, Any]) -> None:
        nonlocal clean
        clean += row["kind"] == "block" and not row["reasons"]
        told(f"{condition} {number}: {clean} clean blocks")

    out, began, started = StringIO(), time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    problem = ""
    with tempfile.TemporaryDirectory(prefix="assay-") as folder:
        trees = [Path(folder) / name for name in ("a", "b")]
        for tree, text in zip(trees, texts, strict=True):
            tree.mkdir()
            (tree / "work.py").write_text(text)
        try:
            run(trees[0], trees[1], plan, out, conditions=Conditions(pinned=True), told=follow)
        except MeasurementError as seen:
            problem = str(seen)
    seconds = round(time.monotonic() - began, 1)
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    row = {"condition": condition, "number": number, "started": started, "seconds": seconds}
    return {**row, "problem": problem, "raw": [_brief(one) for one in rows]}


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    """A row of RAW without what no verdict follows from."""
    if row["kind"] != "block":
        return row
    figures = {arm: {name: one[name] for name in ("steady", "transport")} for arm, one in row["figures"].items()}
    left = ("gpus", "left", "escapes", "order", "cpu_s")
    return {**{name: value for name, value in row.items() if name not in left}, "figures": figures}


def verdict(row: Mapping[str, Any]) -> str:
    """What an experiment's samples say."""
    if row["problem"]:
        return "failed"
    return replay([json.dumps(one) for one in row["raw"] if one["kind"] in ("header", "block")])[0].verdict


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, int] = {}
    for row in rows:
        word = verdict(row)
        found[word] = found.get(word, 0) + 1
    return {"experiments": len(rows), "verdicts": dict(sorted(found.items()))}


def busy_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many were called faster in time."""
    seconds = sorted(row["seconds"] for row in rows)
    in_time = sum(verdict(row) == "faster" and row["seconds"] <= MOST_S for row in rows)
    return {**_verdicts(rows), "in_time": in_time, "median_s": seconds[len(seconds) // 2], "longest_s": seconds[-1]}


def busy_met(counts: Mapping[str, Any]) -> list[str]:
    """The goal, in words, if it is missed."""
    if counts["in_time"] >= LEAST_SHARE * counts["experiments"]:
        return []
    return [f"called faster within {MOST_S:.0f} s in {counts['in_time']} of {counts['experiments']}, 90 % needed"]


def short_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many were called, and how many may be: those of the proof's null."""
    counts = _verdicts(rows)
    called = sum(counts["verdicts"].get(word, 0) for word in ("faster", "slower"))
    judged = len(rows) - sum(counts["verdicts"].get(word, 0) for word in (*NOTHING, "failed"))
    may = allowed(judged, sum(look.alpha for look in LOOKS), 0.004) if judged else 0
    loops = sorted({row["raw"][0]["loops"] for row in rows if row["raw"]})
    return {**counts, "null_called": called, "null_allowed": may, "judged": judged, "loops": loops}


def short_met(counts: Mapping[str, Any]) -> list[str]:
    """The criteria that are broken, in words."""
    broken = []
    if counts["null_called"] > counts["null_allowed"]:
        broken.append(f"{counts['null_called']} null experiments were called, {counts['null_allowed']} allowed")
    if failed := counts["verdicts"].get("failed", 0):
        broken.append(f"{failed} experiments could not be measured")
    return broken
