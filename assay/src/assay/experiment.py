"""Two trees, one workload: blocks of fresh processes in random order until a look decides.

RAW is a file of JSON lines (raw.schema.json): a header, written before the first sample that counts, then a line a
block as they end, then the verdict. A block holds a run of A, of B and of A'; its datum is the primary figure of each.
"""

import hashlib
import json
import math
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from assay import gpu, sandbox, sense
from assay.arms import ArmError
from assay.measure import (
    Inputs,
    Sample,
    Trees,
    calibrate,
    command_sample,
    differing,
    too_busy_while_frozen,
    worker_samples,
)
from assay.plan import Plan
from assay.stats import LOOKS, MOST_CONTAMINATED, Interval, Judgement, Look, judge

__all__ = ["SCHEMA", "ArmError", "Blocks", "NotRepeatableError", "replay", "run"]
SCHEMA = 3
PATIENCE_S = 5.0
"""How long a block waits for others to be gone, after one that was left out."""
ARMS = ("base", "candidate", "control")
"""Every block has these. A fourth one, "reference", is shown and never judged."""


def _too_many(clean: int) -> float:
    """Beside so many clean blocks no more than this may be left out."""
    return MOST_CONTAMINATED * clean / (1 - MOST_CONTAMINATED)


class NotRepeatableError(ValueError):
    """Two builds of base gave different outputs, so that a candidate's cannot be compared with them."""


@dataclass
class Blocks:
    """What has been measured so far."""

    workloads: int = 1
    """How many are judged together: as in Plan."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    contaminated: int = 0
    escapes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ARMS, 0))
    """Blocks in which an arm's processes worked outside its turn."""
    escaped: str = ""
    """How the candidate's did it last, in words."""
    incorrect: str = ""
    grown: bool = False
    """Whether the last block was clean."""

    def add(self, block: dict[str, Any]) -> None:
        """Takes a block of RAW: its primary figures if it is clean."""
        self.grown = not (block["differing"] or block["reasons"])
        if block["differing"]:
            self.incorrect = f"outputs of {len(block['differing'])} of {block['compared']} calls differ from base's"
        elif block["reasons"]:
            self.contaminated += 1
            for arm, words in block.get("escapes", {}).items():
                self.escapes[arm] = self.escapes.get(arm, 0) + bool(words)
                self.escaped = words[0] if words and arm == "candidate" else self.escaped
        else:
            for arm, figure in block["primary"].items():
                self.seconds.setdefault(arm, []).append(figure)

    def decision(self, delta: float) -> Judgement | None:
        """The judgement, if the last block led to a look or to an end; its verdict may be "continue"."""
        clean = len(self.seconds["base"])
        if self.incorrect:
            return _without_times("incorrect", self.incorrect, clean)
        candidates, all_ = self.escapes["candidate"], clean + self.contaminated
        due = self.grown and clean in [look.blocks for look in LOOKS]
        if candidates > _too_many(clean if due else LOOKS[-1].blocks) and candidates == sum(self.escapes.values()):
            words = f"candidate: {self.escaped}, in {candidates} of {all_} blocks, and in no other arm"
            return _without_times("tampered", words, clean)
        if self.contaminated > _too_many(LOOKS[-1].blocks):
            return _without_times("void", f"{self.contaminated} of {all_} blocks contaminated", clean)
        if not due:
            return None
        base, candidate, control = (self.seconds[arm] for arm in ARMS)
        looks = [Look(look.blocks, look.alpha / self.workloads) for look in LOOKS]
        return judge(base, candidate, control, delta=delta, contaminated=self.contaminated, looks=looks)


def run(
    base: Path,
    candidate: Path,
    plan: Plan,
    out: TextIO,
    *,
    control: Path | None = None,
    boxes: Mapping[str, sandbox.Box] | None = None,
    told: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Judgement:
    """Measures until a look decides, and writes RAW to `out`. `told` hears every row of RAW as it is written.

    Without `control`, A' is a copy of base made for the occasion. With `boxes`, one for each of ARMS, whose trees then
    are the ones that count, every arm runs in its sandbox. Raises ArmError if a run fails, ValueError for what
    is no directory, makes no sense, is too short, or is not even repeatable in base.
    """
    plan = plan.checked()
    for name, tree in (("A", base), ("B", candidate), ("--prime", control)):
        if tree is not None and not tree.is_dir():
            raise ValueError(f"{name}: expected a directory, got {tree}")
    with tempfile.TemporaryDirectory(prefix="assay-") as folder:
        if control is None:
            control = Path(folder) / "control"
            shutil.copytree(base, control, symlinks=True)
        if boxes is not None:
            trees = Trees.boxed({arm: boxes[arm] for arm in ARMS}, Path(folder))
        else:
            trees = Trees.at(dict(zip(ARMS, (base, candidate, control), strict=True)), Path(folder), plan.isolation)
        seen = measured(plan, trees, out, told=told)
        assert seen is not None
        return seen


def measured(
    plan: Plan,
    trees: Trees,
    out: TextIO,
    *,
    earlier: Sequence[dict[str, Any]] = (),
    seconds: float = math.inf,
    told: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Judgement | None:
    """Goes on where the `earlier` rows of RAW end, until a look decides; None if `seconds` do not suffice.

    It measures one block at least. A block's order and inputs follow from the seed and its number, so that a cut
    changes nothing but the time. Raises as `run` does, and ValueError if the earlier rows are of another machine.
    """

    def tell(row: dict[str, Any]) -> None:
        out.write(json.dumps(row) + "\n")
        out.flush()
        told(row)

    start, longest = time.monotonic(), 0.0
    series = _Series(plan, trees, earlier)
    try:
        tell(_resumed(earlier) if earlier else _header(plan, trees, series))
        blocks, loaded = Blocks(plan.workloads), False
        for row in earlier:
            if row["kind"] == "block":
                blocks.add(row)
        seen = blocks.decision(plan.delta) if series.number else None
        while seen is None or seen.verdict == "continue":
            begun = time.monotonic()
            if longest and begun - start + longest > seconds:  # a block at least, so that there is an end
                return None
            if loaded:
                sense.wait_for_calm(PATIENCE_S)
            block = series.block()
            blocks.add(block)
            loaded = any(words.startswith(sense.FOREIGN) for words in block["reasons"])
            tell(block)
            longest = max(longest, time.monotonic() - begun)
            seen = blocks.decision(plan.delta)
        tell(verdict_row(seen))
        return seen
    finally:
        series.end()


class _Series:
    """Blocks one after another, from one seed."""

    def __init__(self, plan: Plan, trees: Trees, earlier: Sequence[dict[str, Any]] = ()) -> None:
        """Calibrates, or runs every arm once before anything counts, so that caches are alike and errors come early."""
        self.plan, self.trees, self.number = plan, trees, sum(row["kind"] == "block" for row in earlier)
        self.order = random.Random(plan.seed)
        self.inputs: Inputs | None = None
        self.calibrated: dict[str, float] = {}
        self.calls = 0
        if plan.workload.worker:
            self.inputs = Inputs(plan, trees)
            try:
                if earlier:
                    self.calls = earlier[0]["calls"]
                else:
                    self.calls, self.calibrated = calibrate(plan, trees, self.inputs)
                self._workers(0)
            except BaseException:
                self.end()
                raise
        else:
            for arm in trees.trees:
                command_sample(arm, plan, trees, 0)

    def block(self) -> dict[str, Any]:
        """The next row of RAW."""
        self.order = random.Random(f"{self.plan.seed}:{self.number}")
        hash_seed = self.order.randrange(2**32)
        reasons = gpu.foreign()
        if self.inputs is None:
            order = list(self.trees.trees)
            self.order.shuffle(order)
            load, start = sense.Load.now(), time.perf_counter()
            samples = {arm: command_sample(arm, self.plan, self.trees, hash_seed) for arm in order}
            given: list[bytes] = []
        else:
            given = self._given()
            load, start = sense.Load.now(), time.perf_counter()
            samples = worker_samples(self.plan, self.trees, self.order, given, hash_seed)
        elapsed = time.perf_counter() - start
        evidence, more = load.disturbances(elapsed, self.plan.most_foreign)
        reasons += more
        slowed = {words for sample in samples.values() for state in sample.gpus for words in state.slowed()}
        reasons += sorted(slowed)
        if too_busy_while_frozen(samples):
            reasons.append("an arm ran while it was frozen")
        if any(sample.left for sample in samples.values()):
            reasons.append("a process outlived its arm")
        if differing(self.plan.workload, samples["base"], samples["control"]):
            raise NotRepeatableError(
                "outputs: expected two builds of base to agree; --rtol and --atol allow for less than equal bits"
            )
        row = {
            "kind": "block",
            "number": self.number,
            "order": list(samples),
            "reasons": reasons,
            "elapsed_s": round(elapsed, 6),
            **evidence,
            "primary": {arm: samples[arm].figures[self.plan.primary] for arm in samples},
            "figures": {arm: _rounded(samples[arm].figures) for arm in samples},
            "cpu_s": {arm: samples[arm].cpu_s for arm in samples},
            "left": {arm: samples[arm].left for arm in samples},
            "escapes": {arm: samples[arm].escapes for arm in samples},
            "calls": {arm: [float(f"{value:.4g}") for value in samples[arm].calls] for arm in samples},
            "gpus": {arm: [state.as_json() for state in samples[arm].gpus] for arm in samples},
            "inputs": hashlib.sha256(b"".join(given)).hexdigest()[:16] if given else "",
            "compared": len(samples["base"].outputs) if self.plan.workload.compare else 0,
            "differing": differing(self.plan.workload, samples["base"], samples["candidate"]),
        }
        self.number += 1
        return row

    def _given(self) -> list[bytes]:
        """A block's inputs: the first ones are not timed."""
        assert self.inputs is not None
        workload = self.plan.workload
        wanted = 1 if workload.constant else self.calls + workload.warmups
        made = self.inputs.make([self.order.randrange(2**31) for _ in range(wanted)])
        return made * (self.calls + workload.warmups) if workload.constant else made

    def _workers(self, hash_seed: int) -> dict[str, Sample]:
        return worker_samples(self.plan, self.trees, random.Random(0), self._given(), hash_seed)

    def end(self) -> None:
        """Ends what lives across blocks."""
        if self.inputs is not None:
            self.inputs.end()


def replay(lines: Sequence[str]) -> tuple[Judgement, dict[str, Any]]:
    """The judgement that RAW's blocks lead to, and its header. ValueError says what is missing or not RAW."""
    rows = rows_of(lines)
    blocks = Blocks(rows[0]["plan"]["workloads"])
    for row in rows[1:]:
        if row["kind"] == "block":
            blocks.add(row)
            seen = blocks.decision(rows[0]["plan"]["delta"])
            if seen is not None and seen.verdict != "continue":
                return seen, rows[0]
    raise ValueError(f"RAW: expected blocks up to a look that decides, got {len(blocks.seconds['base'])} clean ones")


def rows_of(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of RAW, header first. ValueError if it is not RAW, or of another protocol."""
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as problem:
        raise ValueError(f"RAW: expected JSON lines, got {problem}") from None
    if not rows or rows[0].get("kind") != "header" or rows[0].get("schema") != SCHEMA:
        raise ValueError(f"RAW: expected a header of schema {SCHEMA} in the first line")
    looks = [[look.blocks, look.alpha] for look in LOOKS]
    if rows[0]["plan"]["looks"] != looks:
        raise ValueError(f"RAW: expected the looks of this version, {looks}, got {rows[0]['plan']['looks']}")
    return rows


def verdict_row(seen: Judgement) -> dict[str, Any]:
    """A judgement as a row of RAW: JSON knows no infinity, so what is not known is null."""
    interval = [value if math.isfinite(value) else None for value in (seen.interval.low, seen.interval.high)]
    numbers = {
        name: value if math.isfinite(value) else None
        for name, value in asdict(seen).items()
        if isinstance(value, float)
    }
    return {"kind": "verdict", **asdict(seen), **numbers, "interval": interval}


def _without_times(verdict: str, reason: str, blocks: int) -> Judgement:
    return Judgement(verdict, reason, math.nan, Interval(-math.inf, math.inf), blocks, 1.0, False, math.inf)


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in figures.items()}


def _resumed(earlier: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row that says when measuring went on. ValueError if this is not the machine on which it began."""
    if earlier[0]["machine"] != machine():
        raise ValueError(
            f"RAW: expected to go on on the machine that began it, {earlier[0]['machine']}, got {machine()}"
        )
    return {"kind": "resumed", "started": _now()}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _header(plan: Plan, trees: Trees, series: _Series) -> dict[str, Any]:
    return {
        "kind": "header",
        "schema": SCHEMA,
        "protocol": plan.digest(),
        "plan": asdict(plan),
        "trees": {arm: str(tree) for arm, tree in trees.trees.items()},
        "isolation": trees.isolation,
        "clock": "cooperative" if plan.workload.clock == "cuda" else "judge",
        "calibrated": {name: float(f"{value:.4g}") for name, value in series.calibrated.items()},
        "calls": series.calls,
        "machine": machine(),
        "started": _now(),
    }


def machine() -> dict[str, Any]:
    """What identifies the environment: hardware, kernel, interpreter."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "system": platform.platform(),
        "processor": model,
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "gpus": [state.name for state in gpu.states()],
    }
