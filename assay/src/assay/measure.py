"""One block: every arm once, in random order, with nothing of another arm running."""

import hashlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from assay import gpu, sandbox, wire
from assay.arms import MOST_FROZEN_S, ArmError, Running, Wrap, namespaces_work
from assay.compare import same
from assay.limits import Limits
from assay.plan import Plan, Workload
from assay.workers import Reply, Worker

_SPAN_S = 0.02
_MOST_BYTES = 256 << 20
TOO_SHORT = 0.1
"""The largest share of a call that the transport may take."""
_LATE_S = 0.1
"""How long what a command has left behind is looked at: whether it works."""


class TooShortError(ValueError):
    """The workload takes so little that the transport would be measured with it."""


@dataclass
class Sample:
    """What one arm did in one block."""

    figures: dict[str, float]
    """Seconds; memory in KiB."""
    cpu_s: float
    left: int = 0
    """Processes that still ran at the end."""
    frozen_cpu_s: float = 0.0
    """Processor time that advanced while the arm was frozen."""
    escapes: list[str] = field(default_factory=list)
    """What its processes did outside the arm's turn that none does by mistake, in words."""
    calls: list[float] = field(default_factory=list)
    """Seconds of every timed call."""
    outputs: list[bytes] = field(default_factory=list)
    gpus: list[gpu.State] = field(default_factory=list)
    """At the end, with the arm's clocks and what slowed them."""


@dataclass
class Trees:
    """The arms' trees and where they are shown: one place in a sandbox or namespaces, else links of equal length."""

    trees: Mapping[str, Path]
    folder: Path
    namespaces: bool
    boxes: Mapping[str, sandbox.Box] | None = None
    """With them every process of an arm runs in its sandbox, and nowhere else."""
    more: Mapping[str, str] = field(default_factory=dict)
    """What is set in the environment of arms that have no sandbox, beside the judge's own."""

    @classmethod
    def at(
        cls, trees: Mapping[str, Path], folder: Path, isolation: str = "auto", more: Mapping[str, str] | None = None
    ) -> "Trees":
        """Makes the place. ValueError if namespaces are asked for and not to be had."""
        if isolation not in ("auto", "namespaces", "links"):
            raise ValueError(f"--isolation: expected auto, namespaces or links, got {isolation}")
        able = isolation != "links" and namespaces_work()
        if isolation == "namespaces" and not able:
            raise ValueError(
                "--isolation: expected a machine that lets this user make namespaces, got one that does not"
            )
        if able:
            (folder / "tree").mkdir()
        return cls(trees, folder, able, more=more or {})

    @classmethod
    def boxed(cls, boxes: Mapping[str, sandbox.Box], folder: Path) -> "Trees":
        """Arms in sandboxes. ValueError says why there can be none here."""
        refused = sandbox.refusal()
        if refused:
            raise ValueError(refused)
        return cls({arm: box.tree for arm, box in boxes.items()}, folder, False, boxes)

    @property
    def isolation(self) -> str:
        """In a word, for RAW."""
        return "sandbox" if self.boxes else "namespaces" if self.namespaces else "links"

    def wrap(self, arm: str) -> Wrap | None:
        """How the arm's sandbox is entered, if there is one."""
        return sandbox.Entry(self.boxes[arm]) if self.boxes else None

    def limits(self, arm: str) -> Limits | None:
        """On the arm's memory and processes, if it has a sandbox."""
        return self.boxes[arm].limits if self.boxes else None

    def place(self, arm: str) -> Path:
        """What the arm sees as its tree."""
        if self.boxes:
            return sandbox.PLACE
        return self.folder / ("tree" if self.namespaces else f"tre{list(self.trees).index(arm)}")

    def environment(self, arm: str, hash_seed: int) -> dict[str, str]:
        """The sandbox's or the judge's own, with what must be equal in the arms of a block."""
        if self.boxes:
            return sandbox.environment(self.boxes[arm], {"PYTHONHASHSEED": str(hash_seed)})
        return {**os.environ, **self.more, "PYTHONHASHSEED": str(hash_seed), "PWD": str(self.place(arm))}


def command_sample(arm: str, plan: Plan, trees: Trees, hash_seed: int) -> Sample:
    """One run of the command, a process of its own. Raises ArmError if it fails or is too late."""
    place, environment = trees.place(arm), trees.environment(arm, hash_seed)
    with tempfile.TemporaryFile() as log:
        running = Running(
            arm,
            plan.workload.command,
            trees.trees[arm],
            place,
            environment,
            log=log.fileno(),
            namespaces=trees.namespaces,
            wrap=trees.wrap(arm),
            limits=trees.limits(arm),
        )
        try:
            start = running.release()
            ended = running.wait(plan.timeout_s)
            seconds = time.perf_counter() - start
            escapes = ["a process went on working after the end"] if ended.left and _works(running) else []
        finally:
            running.end()
        if ended.status:
            log.seek(0)
            words = log.read()[-2000:].decode(errors="replace").strip()
            raise ArmError(arm, f"ended with status {ended.status}: {words}")
    figures = {"wall": seconds, "memory": float(ended.rss_kib)}
    return Sample(figures, ended.cpu_s, ended.left, escapes=escapes, gpus=gpu.states())


def _works(running: Running) -> bool:
    """Whether what a command has left behind uses the processor; a helper that waits, or is about to end, does not."""
    used, stop = running.cpu_seconds(), time.monotonic() + _LATE_S
    while time.monotonic() < stop:  # a look in the end would not see what has ended by then
        time.sleep(_LATE_S / 20)
        if running.cpu_seconds() - used > MOST_FROZEN_S:
            return True
    return False


class Inputs:
    """Makes inputs in the base tree, in a worker of its own that is frozen while arms run."""

    def __init__(self, plan: Plan, trees: Trees) -> None:
        """Starts the worker if the workload has inputs at all."""
        self.worker: Worker | None = None
        if plan.workload.inputs:
            self.worker = _worker("base", plan, trees, 0)
            self.worker.running.freeze()

    def make(self, seeds: Sequence[int]) -> list[bytes]:
        """An encoded input a seed."""
        if self.worker is None:
            return [b"".join(bytes(part) for part in wire.encode(()))] * len(seeds)
        self.worker.running.thaw()
        made = [bytes(self.worker.ask(b"m", seed).body) for seed in seeds]
        self.worker.running.freeze()
        return made

    def end(self) -> None:
        """Ends the worker."""
        if self.worker is not None:
            self.worker.end()


def worker_samples(plan: Plan, trees: Trees, order: random.Random, inputs: list[bytes], seed: int) -> dict[str, Sample]:
    """A fresh worker an arm, in the order that `order` draws; the calls of each, with the same inputs.

    With one round an arm's worker has ended before the next one starts. With more, all are started, and take turns: the
    others are frozen meanwhile, and their processor time is read before and after.
    """
    arms = list(trees.trees)
    order.shuffle(arms)
    workload = plan.workload
    samples: dict[str, Sample] = {}
    if workload.rounds == 1:
        for arm in arms:
            with ExitStack() as stack:
                worker = _started(arm, plan, trees, seed, inputs, samples)
                stack.callback(worker.end)
                _calls(worker, workload, inputs[workload.warmups :], samples[arm])
                _close(worker, samples[arm])
    else:
        with ExitStack() as stack:
            workers, used = {}, {}
            for arm in arms:
                workers[arm] = _started(arm, plan, trees, seed, inputs, samples)
                stack.callback(workers[arm].end)
                used[arm] = workers[arm].running.freeze()
            _take_turns(workers, used, workload, order, inputs[workload.warmups :], samples)
            for arm, worker in workers.items():
                _close(worker, samples[arm])
    return samples


def _take_turns(
    workers: dict[str, Worker],
    used: dict[str, float],
    workload: Workload,
    order: random.Random,
    inputs: list[bytes],
    samples: dict[str, Sample],
) -> None:
    share = -(-len(inputs) // workload.rounds)
    for first in range(0, len(inputs), share):
        arms = list(workers)
        order.shuffle(arms)
        for arm in arms:
            worker, sample = workers[arm], samples[arm]
            sample.frozen_cpu_s += max(0.0, worker.running.thaw() - used[arm])
            worker.ask(b"p")  # it is awake again
            _calls(worker, workload, inputs[first : first + share], sample)
            used[arm] = worker.running.freeze()
    for arm, worker in workers.items():
        samples[arm].frozen_cpu_s += max(0.0, worker.running.thaw() - used[arm])
    for arm, seconds in paired([samples[arm].calls for arm in workers], workload.rounds, list(workers)).items():
        samples[arm].figures["steady"] = seconds


def paired(calls: Sequence[Sequence[float]], rounds: int, arms: Sequence[str]) -> dict[str, float]:
    """A figure an arm, from [arms, calls] seconds: what the arms of a round shared is taken out before the median.

    A machine whose own speed changes by half within seconds, as a shared one's does, slows all arms of a round alike.
    So base's figure is the median of its rounds (each the median of its calls), and another arm's is that times the
    median, over rounds, of its ratio to base in the round. The difference of two logarithms whose noise is alike is
    symmetric about what the arms differ by, however skewed the noise, so nothing is shifted. (Times relative to the
    median of a round's arms are shifted, since that median depends on which arms differ: 5 % came out as 4.5 %.)
    """
    times = np.log(np.asarray(calls, float).reshape(len(arms), rounds, -1))
    each = np.median(times, axis=2)
    base = each[arms.index("base") if "base" in arms else 0]
    figures = np.exp(np.median(base) + np.median(each - base, axis=1))
    return dict(zip(arms, figures.tolist(), strict=True))


def _worker(arm: str, plan: Plan, trees: Trees, hash_seed: int) -> Worker:
    return started(arm, plan.workload, trees, hash_seed, plan.timeout_s)


def started(arm: str, workload: Workload, trees: Trees, hash_seed: int, timeout_s: float) -> Worker:
    """A worker in an arm's tree, which has loaded the workload. ArmError if it cannot."""
    return Worker(
        arm,
        workload,
        trees.trees[arm],
        trees.place(arm),
        trees.environment(arm, hash_seed),
        timeout_s=timeout_s,
        namespaces=trees.namespaces,
        wrap=trees.wrap(arm),
        limits=trees.limits(arm),
    )


def _started(
    arm: str, plan: Plan, trees: Trees, hash_seed: int, inputs: list[bytes], samples: dict[str, Sample]
) -> Worker:
    """A worker that has answered its first calls, which are kept apart."""
    worker = _worker(arm, plan, trees, hash_seed)
    try:
        if plan.workload.constant:
            worker.ask(b"i", 0.0, [inputs[0]])
        first = [_call(worker, plan.workload, one) for one in inputs[: plan.workload.warmups]]
    except ArmError:
        worker.end()
        raise
    sample = Sample({"import": _told(worker, worker.import_s), "first": first[0].seconds}, 0.0)
    sample.outputs = [_kept(reply, plan.workload) for reply in first]
    samples[arm] = sample
    return worker


def _call(worker: Worker, workload: Workload, given: bytes) -> Reply:
    reply = worker.ask(b"g") if workload.constant else worker.ask(b"c", 0.0, [given])
    return reply if workload.clock == "judge" else replace(reply, seconds=_told(worker, reply.inner))


def _told(worker: Worker, seconds: float) -> float:
    """A time that only the worker can tell. ArmError for none at all, of which no logarithm can be taken."""
    if not seconds:
        raise ArmError(worker.arm, "said that something took no time", tampered=True)
    return seconds


def _calls(worker: Worker, workload: Workload, inputs: list[bytes], sample: Sample) -> None:
    for given in inputs:
        reply = _call(worker, workload, given)
        sample.calls.append(reply.seconds)
        sample.outputs.append(_kept(reply, workload))


def _kept(reply: Reply, workload: Workload) -> bytes:
    """All of an output if tolerances have to look at it, else its digest."""
    if not workload.compare:
        return b""
    return bytes(reply.body) if workload.rtol or workload.atol else hashlib.sha256(reply.body).digest()


def _close(worker: Worker, sample: Sample) -> None:
    worker.ask(b"p")  # the last call has not sent more than its reply
    if worker.running.woken:
        sample.escapes.append("a frozen process woke itself")
    sample.figures.setdefault("steady", statistics.median(sample.calls))
    sample.figures["memory"] = float(worker.running.peak_kib())
    sample.cpu_s = worker.running.cpu_seconds()
    sample.gpus = gpu.states()


def differing(workload: Workload, base: Sample, other: Sample) -> list[int]:
    """Which calls of a block gave outputs that differ beyond the tolerances."""
    pairs = zip(base.outputs, other.outputs, strict=True)
    exact = not (workload.rtol or workload.atol)
    return [
        i
        for i, (one, two) in enumerate(pairs)
        if one != two and (exact or not same(one, two, workload.rtol, workload.atol))
    ]


def calibrate(plan: Plan, trees: Trees, inputs: Inputs) -> tuple[int, dict[str, float]]:
    """Timed calls a block, and what base's call, the transport and start-up take (seconds).

    The transport is what an echo takes: the same input decoded, an output like base's sent back. Raises TooShortError
    if that is more than a tenth of the call and the judge's clock is to count.
    """
    workload = plan.workload
    made = inputs.make([plan.seed + i for i in range(8)])
    start = time.perf_counter()
    worker = _worker("base", plan, trees, 0)
    try:
        start_s = time.perf_counter() - start
        worker.ask(b"i", 0.0, [made[0]])
        replies = [_call(worker, workload, one) for one in made]
        call_s = statistics.median(reply.seconds for reply in replies[1:])
        transport_s = 0.0
        if workload.clock == "judge":
            worker.ask(b"k", 0.0, [replies[-1].body])
            echoed = made if not workload.constant else inputs_of_nothing()
            transport_s = statistics.median(worker.ask(b"e", 0.0, [one]).seconds for one in echoed * 8)
    finally:
        worker.end()
    if transport_s > TOO_SHORT * call_s:
        raise TooShortError(
            f"too_short: a call takes {call_s * 1e6:.0f} µs and sending input and output {transport_s * 1e6:.0f} µs, "
            f"more than a tenth of it; --chain with --links N, --constant, or --clock cuda measure shorter ones"
        )
    size = max(len(one) for one in made) + 3 * max(len(reply.body) for reply in replies)
    calls = workload.calls or max(3, min(200, round(_SPAN_S / call_s), _MOST_BYTES // max(size, 1)))
    calls = -(-calls // workload.rounds) * workload.rounds
    return calls, {"call_s": call_s, "transport_s": transport_s, "start_s": start_s}


def inputs_of_nothing() -> list[bytes]:
    """An empty input, as often as calibration needs."""
    return [b"".join(bytes(part) for part in wire.encode(()))] * 8


def too_busy_while_frozen(samples: Mapping[str, Sample]) -> bool:
    """Whether an arm's processor time advanced by more than a step of its count while it was frozen."""
    return any(sample.frozen_cpu_s > MOST_FROZEN_S for sample in samples.values())
