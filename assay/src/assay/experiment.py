"""Two trees, one command: blocks of fresh processes in random order until a look decides.

RAW is a file of JSON lines: first a header, then a line a block, written as they end, then the verdict. A block holds
one run of A, of B and of A'; its datum is the judge's wall clock from start to end of the process, in seconds.
"""

import hashlib
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from assay import sense
from assay.stats import LOOKS, MOST_CONTAMINATED, Interval, Judgement, judge

SCHEMA = 1
ARMS = ("base", "candidate", "control")
_TOO_MANY = MOST_CONTAMINATED * LOOKS[-1].blocks / (1 - MOST_CONTAMINATED)


class ArmError(RuntimeError):
    """A run did not end with status 0 in time; `arm` says whose."""

    def __init__(self, arm: str, words: str) -> None:
        super().__init__(f"{arm}: {words}")
        self.arm = arm


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first sample."""

    command: tuple[str, ...]
    delta: float = 0.02
    seed: int = 0
    timeout_s: float = 600.0
    most_foreign: float = 0.1
    """Processor seconds of others, a second of a block: above it the block is left out."""
    looks: tuple[tuple[int, float], ...] = field(default=tuple((look.blocks, look.alpha) for look in LOOKS), init=False)

    def digest(self) -> str:
        """Identity of the protocol and its options."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Blocks:
    """What has been measured so far."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    contaminated: int = 0

    def add(self, block: dict[str, Any]) -> None:
        """Takes a block of RAW: its times if it is clean."""
        if not block["clean"]:
            self.contaminated += 1
            return
        for arm in ARMS:
            self.seconds[arm].append(block["seconds"][arm])

    def judge(self, delta: float) -> Judgement | None:
        """The judgement at the look that the clean blocks have just reached; None between looks."""
        reached = len(self.seconds["base"])
        if reached not in [look.blocks for look in LOOKS]:
            return None
        base, candidate, control = (self.seconds[arm] for arm in ARMS)
        return judge(base, candidate, control, delta=delta, contaminated=self.contaminated)


def run(
    base: Path, candidate: Path, plan: Plan, out: TextIO, *, control: Path | None = None, told: Callable[[str], None]
) -> Judgement:
    """Measures until a look decides, and writes RAW to `out`. `told` hears of progress.

    Without `control`, A' is a copy of base made for the occasion. All trees are reached through one path, the current
    directory of the command. Raises ArmError if a run fails, ValueError for what is no directory.
    """
    for name, tree in (("A", base), ("B", candidate), ("--prime", control)):
        if tree is not None and not tree.is_dir():
            raise ValueError(f"{name}: expected a directory, got {tree}")
    with tempfile.TemporaryDirectory(prefix="assay-") as folder:
        if control is None:
            control = Path(folder) / "control"
            shutil.copytree(base, control, symlinks=True)
        trees = dict(zip(ARMS, (base, candidate, control), strict=True))
        _write(out, _header(plan, {arm: str(tree) for arm, tree in trees.items()}))
        blocks, shuffler = Blocks(), random.Random(plan.seed)
        for block in _measure(trees, plan, Path(folder) / "tree", shuffler):
            _write(out, block)
            blocks.add(block)
            clean = len(blocks.seconds["base"])
            told(f"{clean} of at most {LOOKS[-1].blocks} blocks, {blocks.contaminated} left out")
            seen = blocks.judge(plan.delta) if block["clean"] else None
            if seen is None and blocks.contaminated > _TOO_MANY:
                seen = _hopeless(blocks)
            if seen is not None and seen.verdict != "continue":
                _write(out, {"kind": "verdict", **asdict(seen)})
                return seen
    raise AssertionError("the last look always decides")


def replay(lines: Sequence[str]) -> tuple[Judgement, dict[str, Any]]:
    """The judgement that RAW's blocks lead to, and its header. ValueError says what is missing or not RAW."""
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as problem:
        raise ValueError(f"RAW: expected JSON lines, got {problem}") from None
    if not rows or rows[0].get("kind") != "header" or rows[0].get("schema") != SCHEMA:
        raise ValueError(f"RAW: expected a header of schema {SCHEMA} in the first line")
    looks = [[look.blocks, look.alpha] for look in LOOKS]
    if rows[0]["plan"]["looks"] != looks:
        raise ValueError(f"RAW: expected the looks of this version, {looks}, got {rows[0]['plan']['looks']}")
    blocks, seen = Blocks(), None
    for row in rows:
        if row["kind"] == "block":
            blocks.add(row)
            if row["clean"]:
                seen = blocks.judge(rows[0]["plan"]["delta"]) or seen
            if seen is not None and seen.verdict != "continue":
                return seen, rows[0]
    if blocks.contaminated > _TOO_MANY:
        return _hopeless(blocks), rows[0]
    raise ValueError(f"RAW: expected blocks up to a look that decides, got {len(blocks.seconds['base'])} clean ones")


def _hopeless(blocks: Blocks) -> Judgement:
    """Void before the last look: so much was left out that the last look could not be valid."""
    clean = len(blocks.seconds["base"])
    reason = f"{blocks.contaminated} of {clean + blocks.contaminated} blocks were contaminated"
    return Judgement("void", reason, math.nan, Interval(-math.inf, math.inf), clean, 1.0, False, math.inf)


def _measure(trees: dict[str, Path], plan: Plan, link: Path, shuffler: random.Random) -> Iterator[dict[str, Any]]:
    number = 0
    while True:
        order = list(ARMS)
        shuffler.shuffle(order)
        environment = dict(os.environ, PYTHONHASHSEED=str(shuffler.randrange(2**32)), PWD=str(link))
        load, start = sense.Load.now(), time.perf_counter()
        runs = {arm: _run_once(arm, trees[arm], plan, link, environment) for arm in order}
        elapsed, foreign = time.perf_counter() - start, load.foreign_since()
        left = sum(one["survivors"] for one in runs.values())
        clean = (foreign is None or foreign <= plan.most_foreign * elapsed + 0.02) and not left
        yield {
            "kind": "block",
            "number": number,
            "order": order,
            "clean": clean,
            "foreign_cpu_s": None if foreign is None else round(foreign, 3),
            "elapsed_s": round(elapsed, 6),
            **{key: {arm: runs[arm][key] for arm in ARMS} for key in ("seconds", "cpu_s", "rss_kib", "survivors")},
        }
        number += 1


def _run_once(arm: str, tree: Path, plan: Plan, link: Path, environment: dict[str, str]) -> dict[str, Any]:
    """One fresh process; nothing of it is left when this returns."""
    link.unlink(missing_ok=True)
    link.symlink_to(tree.resolve(), target_is_directory=True)
    running: list[int] = []
    late = threading.Timer(plan.timeout_s, _kill, [running])
    late.daemon = True
    with tempfile.TemporaryFile() as log:
        late.start()
        start = time.perf_counter()
        try:
            child = subprocess.Popen(
                plan.command,
                cwd=link,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as problem:
            late.cancel()
            raise ArmError(arm, f"cannot start {plan.command[0]}: {problem.strerror}") from None
        running.append(child.pid)
        try:
            _, status, usage = os.wait4(child.pid, 0)  # not Popen.wait: with a time limit it polls
            seconds = time.perf_counter() - start
        finally:
            running.clear()
            late.cancel()
            left = sense.end_session(child.pid)
        child.returncode = os.waitstatus_to_exitcode(status)
        if seconds >= plan.timeout_s:
            raise ArmError(arm, f"did not end within {plan.timeout_s:g} s")
        if child.returncode:
            log.seek(0)
            words = log.read()[-2000:].decode(errors="replace").strip()
            raise ArmError(arm, f"ended with status {child.returncode}: {words}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_s": round(cpu_s, 6), "rss_kib": usage.ru_maxrss, "survivors": left}


def _kill(leaders: list[int]) -> None:
    for leader in leaders:
        os.killpg(leader, signal.SIGKILL)


def _header(plan: Plan, trees: dict[str, str]) -> dict[str, Any]:
    return {
        "kind": "header",
        "schema": SCHEMA,
        "protocol": plan.digest(),
        "plan": asdict(plan),
        "trees": trees,
        "machine": {"system": platform.platform(), "processors": os.cpu_count(), "python": platform.python_version()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _write(out: TextIO, row: dict[str, Any]) -> None:
    out.write(json.dumps(row) + "\n")
    out.flush()
