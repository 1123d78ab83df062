"""Two trees, one workload: blocks of fresh processes in random order until a look decides.

RAW is a file of JSON lines (contract/rows.py): a header, written before the first sample that counts, then a line per
block as they end, then the verdict. A block holds a run of A, of B and of A'; its datum is the primary figure of each.
"""

import hashlib
import json
import math
import os
import random
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from assay.arms.caches import Caches
from assay.arms.trees import Trees
from assay.contract import seeds
from assay.contract.box import Box
from assay.contract.errors import NotRepeatableError
from assay.contract.rows import Block, Header, Resumed
from assay.contract.workload import Plan
from assay.experiment import elsewhere, mismatch
from assay.experiment.blocks import ARMS, Blocks
from assay.experiment.calibration import calibrate
from assay.experiment.copies import copied
from assay.experiment.inputs import Inputs
from assay.experiment.instructions import counted
from assay.experiment.processes import command_sample
from assay.experiment.raw import verdict_row
from assay.experiment.samples import (
    Sample,
    compared,
    differing,
    reached,
    too_busy_while_frozen,
    worker_samples,
)
from assay.machine import gpu, load
from assay.machine.conditions import PATIENCE_S, Conditions
from assay.machine.identity import machine
from assay.machine.objects import HELD
from assay.statistics.looks import LOOKS, Judgement


def run(
    base: Path,
    candidate: Path,
    plan: Plan,
    out: TextIO,
    *,
    control: Path | None = None,
    boxes: Mapping[str, Box] | None = None,
    conditions: Conditions | None = None,
    setup: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    earlier: Sequence[dict[str, Any]] = (),
    seconds: float = math.inf,
    told: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Judgement | None:
    """Measures until a look decides, and writes RAW to `out`. `told` hears every row of RAW as it is written.

    `conditions`: what is done against others on the machine; nothing but a little patience unless given.

    All three arms are copies made for the occasion; without `control`, A' is a second one of base. `setup` is run once
    in each. `names` are what RAW calls the trees. `earlier` and `seconds` are as in `measured`.

    With `boxes`, one for each of ARMS, whose trees then are the ones that count, every arm runs in its sandbox. Raises
    ArmError if a run fails, ValueError for what is no directory, makes no sense, is too short, or is not even
    repeatable in base.
    """
    plan = plan.checked()
    for name, tree in (("A", base), ("B", candidate), ("--prime", control)):
        if tree is not None and not tree.is_dir():
            raise ValueError(f"{name}: expected a directory, got {tree}")
    with tempfile.TemporaryDirectory(prefix="assay-") as folder:
        conditions = conditions or Conditions()
        if boxes is not None:
            trees = Trees.boxed({arm: boxes[arm] for arm in ARMS}, Path(folder))
            with conditions.kept():
                seen = measured(plan, trees, out, patience_s=conditions.patience_s, told=told)
        else:
            given = dict(zip(ARMS, (base, candidate, control or base), strict=True))
            with copied(given, Path(folder), plan.isolation, setup, plan.timeout_s) as trees, conditions.kept():
                named = replace(trees, names={**trees.names, **(names or {})})
                more: dict[str, Any] = {"earlier": earlier, "seconds": seconds, "patience_s": conditions.patience_s}
                seen = measured(plan, named, out, told=told, **more)
        return seen


def measured(
    plan: Plan,
    trees: Trees,
    out: TextIO,
    *,
    earlier: Sequence[dict[str, Any]] = (),
    seconds: float = math.inf,
    patience_s: float = PATIENCE_S,
    told: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Judgement | None:
    """Goes on where the `earlier` rows of RAW end, until a look decides; None if `seconds` do not suffice.

    After a block that was left out for load, the next one waits for calm, `patience_s` at most. With more than
    PATIENCE_S every block does. `told` hears what is waited for in rows of the kind "load", which are not in RAW.

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
        tell(_resumed(earlier) if earlier else _header(plan, trees, series, patience_s))
        blocks, loaded = Blocks(plan.workloads, plan.workload.rounds), False
        for row in earlier:
            if row["kind"] == "block":
                blocks.add(row)
        seen = blocks.decision(plan.delta) if series.number else None
        while seen is None or seen.verdict == "continue":
            begun = time.monotonic()
            if longest and begun - start + longest > seconds:  # a block at least, so that there is an end
                return None
            if loaded or patience_s > PATIENCE_S:
                most_s = min(patience_s, max(0.0, seconds - (begun - start)))
                load.wait_for_calm(most_s, told=lambda *seen, most_s=most_s: told(_waits(most_s, *seen)))
            block = series.block()
            blocks.add(block)
            loaded = any(words.startswith(load.FOREIGN) for words in block["reasons"])
            tell(block)
            longest = max(longest, time.monotonic() - begun)
            seen = blocks.decision(plan.delta)
        if plan.instructions and not any(row["kind"] == "instructions" for row in earlier):
            tell(series.instructions())
        tell(verdict_row(seen))
        return seen
    finally:
        series.end()


class _Series:
    """Blocks one after another, from one seed."""

    def __init__(self, plan: Plan, trees: Trees, earlier: Sequence[dict[str, Any]] = ()) -> None:
        """Calibrates, or runs every arm once before anything counts, so that caches are alike and errors come early."""
        self.plan, self.trees, self.number = plan, trees, sum(row["kind"] == "block" for row in earlier)
        folders = {arm: box.cache for arm, box in (trees.boxes or {}).items() if box.cache is not None}
        self.caches = Caches(folders, plan.digest())
        self.inputs: Inputs | None = None
        self.calibrated: dict[str, float] = {}
        self.calls, self.loops = 0, 1
        self.elsewhere = seeds.order(plan.seed, "elsewhere").randrange(LOOKS[0].blocks)
        """The block before which functions are called from another program: one before the first look."""
        if plan.workload.worker:
            self.inputs = Inputs(plan, trees)
            try:
                if earlier:
                    self.calls, self.calibrated = earlier[0]["calls"], earlier[0]["calibrated"]
                    self.loops = earlier[0].get("loops", 1)
                else:
                    found = calibrate(plan, trees, self.inputs, secrets.randbits(32))
                    self.calls, self.loops, self.calibrated = found.calls, found.loops, found.seconds
                self._workers(secrets.randbits(32))
            except BaseException:
                self.end()
                raise
        else:
            hash_seed = secrets.randbits(32)
            for arm in trees.trees:
                command_sample(arm, plan, trees, hash_seed)
        self.caches.keep()

    def block(self) -> dict[str, Any]:
        """The next row of RAW."""
        found = self._elsewhere() if self.number == self.elsewhere else ""
        self.caches.restore()
        drawn, hash_seed = seeds.order(self.plan.seed, self.number), seeds.hash_seed(self.plan.seed, self.number)
        reasons = gpu.foreign(reached(self.trees))
        if self.inputs is None:
            order = list(self.trees.trees)
            drawn.shuffle(order)
            before, start = load.Load.now(), time.perf_counter()
            samples = {arm: command_sample(arm, self.plan, self.trees, hash_seed) for arm in order}
            given: list[bytes] = []
        else:
            given = self._given()
            before, start = load.Load.now(), time.perf_counter()
            samples = self._samples(drawn, given, hash_seed)
        elapsed = time.perf_counter() - start
        evidence, more = before.disturbances(elapsed, self.plan.most_foreign)
        reasons += more
        slowed = {words for sample in samples.values() for state in sample.gpus for words in state.slowed()}
        reasons += sorted(slowed)
        if too_busy_while_frozen(samples):
            reasons.append("an arm ran while it was frozen")
        if any(words for sample in samples.values() for words in sample.escapes if words.startswith(HELD)):
            reasons.append("an arm held a lock that others could wait for")
        if any(sample.left for sample in samples.values()):
            reasons.append("a process outlived its arm")
        if differing(self.plan.workload, samples["base"], samples["control"]):
            raise NotRepeatableError(
                "outputs: expected two builds of base to agree; --rtol and --atol allow for less than equal bits"
            )
        differ = differing(self.plan.workload, samples["base"], samples["candidate"])
        row = Block(
            number=self.number,
            order=list(samples),
            reasons=reasons,
            elapsed_s=round(elapsed, 6),
            foreign_cpu_s=evidence.foreign_cpu_s,
            others=evidence.others,
            clock_mhz=evidence.clock_mhz,
            primary={arm: samples[arm].figures[self.plan.primary] for arm in samples},
            figures={arm: _rounded(samples[arm].figures) for arm in samples},
            cpu_s={arm: samples[arm].cpu_s for arm in samples},
            left={arm: samples[arm].left for arm in samples},
            escapes={arm: samples[arm].escapes for arm in samples},
            calls={arm: [float(f"{value:.4g}") for value in samples[arm].calls] for arm in samples},
            gpus={arm: [state.as_json() for state in samples[arm].gpus] for arm in samples},
            transport_s=self._sending(samples),
            spared_s=self._spared(samples),
            late_s=self._late(samples["candidate"]),
            inputs=hashlib.sha256(b"".join(given)).hexdigest()[:16] if given else "",
            compared=compared(self.plan.workload, samples["base"]),
            differing=differ,
            mismatch=mismatch.first(self.plan.workload, given, samples, differ),
            elsewhere=found,
        )
        self.number += 1
        return asdict(row)

    def _elsewhere(self) -> str:
        """How the candidate's function differs from base's where it is called by a program that it cannot know."""
        if self.inputs is None or not self.plan.workload.compares:
            return ""
        drawn = seeds.inputs(self.plan.seed, "elsewhere")
        given = self.inputs.make([next(drawn) for _ in range(elsewhere.CALLS)])
        return elsewhere.differs(self.plan, self.trees, given, seeds.hash_seed(self.plan.seed, "elsewhere"))

    def _of_base(self, name: str, samples: Mapping[str, Sample], primary: Sequence[str]) -> float:
        """A figure of base's worker, where one of these is what is judged; 0 where there is no worker."""
        return samples["base"].figures.get(name, 0.0) if self.plan.primary in primary else 0.0

    def _sending(self, samples: Mapping[str, Sample]) -> float:
        """What bounds `faster` whoever is trusted; only a patched worker could spare what a loop's sealing takes."""
        return self._of_base("transport", samples, ("steady",)) if self.loops == 1 else 0.0

    def _spared(self, samples: Mapping[str, Sample]) -> float:
        if self.plan.trusted:
            return 0.0
        sending = self._of_base("transport", samples, ("first",) if self.loops == 1 else ("steady", "first"))
        found = sending + self._of_base("spared", samples, ("steady", "first"))
        if self.plan.workload.chain:  # a patched worker may know what many calls come to, and make one
            found += self._of_base(self.plan.primary, samples, ("steady", "first"))
        return found

    def _late(self, candidate: Sample) -> float:
        return candidate.late if self.plan.primary == "steady" and not self.plan.trusted else 0.0

    def instructions(self) -> dict[str, Any]:
        """How many each arm executes, as a row of RAW."""
        call_s = self.calibrated.get("call_s", 0.0)
        return counted(self.plan, self.trees, self.inputs, loops=self.loops, call_s=call_s)

    def _given(self, counts: bool = True) -> list[bytes]:
        """A block's inputs: the first ones are not timed, and of the last ones, one per round, few are used."""
        assert self.inputs is not None
        workload = self.plan.workload
        wanted = self.calls + workload.warmups + workload.rounds
        drawn = seeds.inputs(self.plan.seed, self.number if counts else "first")
        if self.loops > 1 and not workload.repeats:
            return self.inputs.sealed(drawn, self.loops, wanted)[0]
        return self.inputs.make([next(drawn)]) * wanted if workload.constant else self.inputs.fresh(drawn, wanted)

    def _workers(self, hash_seed: int) -> dict[str, Sample]:
        return self._samples(seeds.order(self.plan.seed, "first"), self._given(counts=False), hash_seed)

    def _samples(self, order: random.Random, given: list[bytes], hash_seed: int) -> dict[str, Sample]:
        timed, more = given[: -self.plan.workload.rounds], given[-self.plan.workload.rounds :]
        return worker_samples(self.plan, self.trees, order, timed, hash_seed, self.expected, self.loops, more)

    @property
    def expected(self) -> int | None:
        """Bytes of base's longest output, as far as it is known; with a margin, as inputs differ."""
        return int(self.calibrated["reply_bytes"]) if "reply_bytes" in self.calibrated else None

    def end(self) -> None:
        """Ends what lives across blocks."""
        if self.inputs is not None:
            self.inputs.end()


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in figures.items()}


def _resumed(earlier: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row that says when measuring went on. ValueError if this is not the machine on which it began."""
    if earlier[0]["machine"] != machine():
        raise ValueError(
            f"RAW: expected to go on on the machine that began it, {earlier[0]['machine']}, got {machine()}"
        )
    return asdict(Resumed(started=_now()))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _waits(most_s: float, seen: load.Foreign, seconds: float) -> dict[str, Any]:
    row = {"kind": "load", "foreign_cpu_s": seen.seconds, "others": seen.by, "elapsed_s": seconds}
    return {**row, "patience_s": most_s}


def _header(plan: Plan, trees: Trees, series: _Series, patience_s: float) -> dict[str, Any]:
    header = Header(
        protocol=plan.digest(),
        plan=plan,
        trees={arm: trees.names.get(arm, str(tree)) for arm, tree in trees.trees.items()},
        isolation=trees.isolation,
        clock="cooperative" if plan.workload.clock == "cuda" else "judge",
        calibrated={name: float(f"{value:.4g}") for name, value in series.calibrated.items()},
        calls=series.calls,
        loops=series.loops,
        machine=machine(),
        started=_now(),
        processors=sorted(os.sched_getaffinity(0)),
        patience_s=patience_s,
    )
    return asdict(header)
