"""Does assay keep its promises on this machine? Simulations, real experiments with a known truth, and canaries."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from assay.contract.errors import Status, TooShortError
from assay.contract.workload import Plan, Workload
from assay.experiment.series import run
from assay.machine.conditions import PATIENCE_S
from assay.machine.identity import machine
from assay.proof import campaign
from assay.proof.proofs import PROOFS
from assay.proof.simulation import SCENARIOS, failures, simulate

_SIMULATED, _REAL = 2000, 8


@dataclass(frozen=True)
class Canary:
    """A candidate with a known vice, and what must become of it."""

    name: str
    base: str
    candidate: str
    expected: tuple[str, ...]


_UNITS = "def work(n):\n    total = n\n    for i in range({count}): total += i * i\n    return n\n"
_NOTHING = "def work(n):\n    return n\n"
_INPUTS = "\ndef make(seed):\n    return (seed,)\n"
_HOG = "\nimport subprocess, sys\nfor _ in range(2): subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
CANARIES = (
    Canary("wrong results", _UNITS.format(count=20000), "def work(n):\n    return 0\n", ("incorrect",)),
    Canary("slower by half", _UNITS.format(count=20000), _UNITS.format(count=30000), ("slower", "void")),
    Canary(
        "hog: helpers that spin while others run",
        _UNITS.format(count=20000),
        _UNITS.format(count=20000) + _HOG,
        ("undecided", "equivalent", "void", "slower"),
    ),
    Canary("too short even for a loop", _NOTHING, _NOTHING, ("too_short",)),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `assay selftest`."""
    parser.add_argument("--full", type=Path, metavar="FOLDER", help="the whole proof, resumable: samples go to FOLDER")
    parser.add_argument("--condition", choices=tuple(PROOFS), help="only this one of the full proof")
    parser.add_argument("--experiments", type=int, help="of the full proof, per condition (200, busy 50)")
    parser.add_argument(
        "--for", dest="seconds", type=float, help="stop the full proof after so many seconds; run again to go on"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="experiments beside each other, each pinned to processors of its own"
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="only every Nth experiment, on an Nth of the processors",
    )
    parser.add_argument("--summary", action="store_true", help="of the full proof: only count what is there")


def main(given: argparse.Namespace) -> int:
    """Exit status 0 if all promises were kept, 1 if one was broken, 2 wrong usage, 5 if the proof is incomplete.

    3 if all real experiments of the short one were void, so that nothing was tried.
    """
    if given.jobs < 1 or (given.experiments is not None and given.experiments < 1):
        words = f"expected at least 1, got {given.experiments}, {given.jobs}"
        print(f"assay selftest: --experiments, --jobs: {words}", file=sys.stderr)
        return 2
    if given.full is None:
        for name in ("condition", "seconds", "summary"):
            if getattr(given, name):
                print(f"assay selftest: --{name}: expected --full FOLDER with it", file=sys.stderr)
                return 2
        return _quick()
    return _full(given)


def _say(words: str) -> None:
    print(words, flush=True)


def _follow(words: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{words:<70}", end="", file=sys.stderr, flush=True)


def _quick() -> int:
    start, broken = time.monotonic(), []
    _say(f"1. {_SIMULATED} simulated experiments a scenario, null and 5 %")
    for scenario in SCENARIOS:
        for effect in (0.0, 0.05):
            seen = simulate(scenario, effect, _SIMULATED, seed=1)
            broken += [f"{scenario.name}, {effect}: {words}" for words in failures(seen, scenario)]
            words = f"called {seen.claimed / _SIMULATED:.2%}, void {seen.void / _SIMULATED:.2%}"
            _say(f"   {scenario.name:<11} {effect:.2f}: {words}, 95 % covers {seen.covered / _SIMULATED:.1%}")
    _say(f"2. {_REAL} real experiments, pure Python of 3 ms: the same code, and 2, 5 and 20 % more work")
    rows = []
    # Judge and arms take turns: one processor is enough, and times scatter less on it. The proof was taken so, too.
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    for number in range(_REAL):
        rows.append(campaign.experiment(number, "quiet", _follow, calm_s=PATIENCE_S))
        verdicts = {arm: campaign.judged(rows[-1], arm)[0] for arm in ("null", *campaign.PLANTED)}
        _follow("")
        _say(f"\r   {number + 1}: " + ", ".join(f"{arm} {seen.verdict}" for arm, seen in verdicts.items()))
    os.sched_setaffinity(0, allowed)
    counts = campaign.summary(rows)
    broken += campaign.met("quiet", counts)
    covered = ", ".join(f"{arm} {one['covered']} of {one['valid']}" for arm, one in counts["planted"].items())
    _say(f"   null called: {counts['null_called']}; void: {counts['void']}; 95 % intervals hold the truth: {covered}")
    _say("3. canaries")
    for canary in CANARIES:
        verdict = tried(canary)
        _say(f"   {canary.name}: {verdict}")
        if verdict not in canary.expected:
            broken.append(f"canary {canary.name}: expected {' or '.join(canary.expected)}, got {verdict}")
    for words in broken:
        print(f"broken promise: {words}", file=sys.stderr)
    if unseen := nothing_shown(counts):
        print(unseen, file=sys.stderr)
    _say(
        f"{len(broken)} promises broken, {time.monotonic() - start:.0f} s. {_REAL} experiments show that it works here;"
    )
    _say("no error rate follows from so few: that is what `assay selftest --full` measures.")
    return Status.REFUTED if broken else Status.INFRASTRUCTURE if unseen else Status.SHOWN


def nothing_shown(counts: Mapping[str, Any]) -> str:
    """What to say where all real experiments are void, so that no promise was tried; "" otherwise."""
    if counts["void"] < counts["experiments"]:
        return ""
    return (
        f"all {counts['experiments']} real experiments are void: this machine is too busy, or scatters too much, for "
        f"them to show anything. Run this when others rest; `assay doctor` says how small an effect could be shown"
    )


def tried(canary: Canary, most_foreign: float = 0.5) -> str:
    """What becomes of a canary; `most_foreign` as in Plan."""
    with tempfile.TemporaryDirectory(prefix="assay-") as folder:
        trees = [Path(folder) / name for name in ("a", "b")]
        for tree, text in zip(trees, (canary.base, canary.candidate), strict=True):
            tree.mkdir()
            (tree / "work.py").write_text(text + _INPUTS)
        workload = Workload("call", target="work:work", inputs="work:make")
        try:
            plan = Plan(workload, timeout_s=20, most_foreign=most_foreign)
            seen = run(trees[0], trees[1], plan, StringIO())
            return seen.verdict if seen else "unfinished"
        except TooShortError:
            return "too_short"


def _full(given: argparse.Namespace) -> int:
    given.full.mkdir(parents=True, exist_ok=True)
    stop = time.monotonic() + (given.seconds or float("inf"))
    conditions = [given.condition] if given.condition else list(PROOFS)
    status = 0
    for condition in conditions:
        path = given.full / f"{condition}.jsonl"
        if not given.summary:
            _continue(path, condition, given, stop)
            if given.shard[1] > 1:
                continue  # the one who started the shards counts
        rows = campaign.read(path)
        status = max(status, _report(given.full, condition, rows, _wanted(condition, given), _say))
    return status


def _wanted(condition: str, given: argparse.Namespace) -> int:
    """How many experiments make a condition complete."""
    return int(given.experiments or PROOFS[condition].experiments)


def _continue(path: Path, condition: str, given: argparse.Namespace, stop: float) -> None:
    """Adds experiments to a campaign's file until it is complete or the time is over."""
    shard, shards = given.shard
    if given.jobs > 1:
        _beside_each_other(condition, given, stop)
        return
    rows = campaign.read(path)
    if shards == 1 and path.exists():  # a line that was cut off goes
        path.write_text("".join(_line(row) for row in rows))
    if shards > 1:
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, mine[shard * len(mine) // shards : (shard + 1) * len(mine) // shards])
    done = {row["number"] for row in rows}
    with path.open("ab", buffering=0) as out:
        for number in range(shard, _wanted(condition, given), shards):
            if number in done or time.monotonic() > stop:
                continue
            row = PROOFS[condition].experiment(number, _follow)
            out.write(_line(row).encode())  # one write: shards append to the same file


def _beside_each_other(condition: str, given: argparse.Namespace, stop: float) -> None:
    if given.jobs > len(os.sched_getaffinity(0)):
        raise SystemExit(
            f"--jobs: expected at most {len(os.sched_getaffinity(0))}, the processors there are, got {given.jobs}"
        )
    seconds = [f"--for={stop - time.monotonic()}"] if given.seconds else []
    command = [sys.executable, "-m", "assay", "selftest", f"--full={given.full}", f"--condition={condition}", *seconds]
    command += [f"--experiments={_wanted(condition, given)}"]
    others = [subprocess.Popen([*command, f"--shard={i}/{given.jobs}"]) for i in range(given.jobs)]
    try:
        for other in others:
            other.wait()
    finally:
        for other in others:
            other.kill()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":")) + "\n"


def _shard(text: str) -> tuple[int, int]:
    shard, _, shards = text.partition("/")
    if not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)):
        raise argparse.ArgumentTypeError(f"expected I/N with I below N, got {text}")
    return int(shard), int(shards)


def _report(folder: Path, condition: str, rows: list[dict[str, Any]], wanted: int, say: Callable[[str], None]) -> int:
    if len(rows) < wanted:
        say(f"{condition}: {len(rows)} of {wanted} experiments; run again to go on")
    if not rows:
        return 5
    proof = PROOFS[condition]
    counts = proof.summary(rows)
    broken = proof.met(counts)
    path = folder / "summary.json"
    everything = json.loads(path.read_text()) if path.exists() else {"machine": machine()}
    everything[condition] = {**counts, "broken": broken}
    path.write_text(json.dumps(everything, indent=1) + "\n")
    say(f"{condition} ({proof.words}): {counts['experiments']} experiments")
    for words in proof.lines(counts):
        say(f"  {words}")
    for words in broken:
        print(f"broken promise: {condition}: {words}", file=sys.stderr)
    if broken:
        return 1
    return 0 if len(rows) >= wanted else 5
