"""One block: a worker per arm, in random order, with nothing of another arm running."""

import random
import statistics
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from assay.arms.handle import Reply, Worker, started
from assay.arms.inside.wire import encode
from assay.arms.process import MOST_FROZEN_S
from assay.arms.trees import Trees
from assay.contract.errors import ArmError, NotRepeatableError
from assay.contract.workload import Plan, Workload
from assay.experiment import pacing
from assay.experiment.canonical import UNREADABLE, canonical
from assay.experiment.exchange import After, Exchange, asked
from assay.experiment.outputs import digest, same
from assay.machine import gpu
from assay.machine.objects import held

_MOST_BODIES = 32 << 20


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
    """Seconds of every timed call, with what sending takes."""
    echoes: list[float] = field(default_factory=list)
    """Seconds that sending alone takes, once per round."""
    spared: list[float] = field(default_factory=list)
    """Seconds of a copy of arguments and output per call of a request, once per round."""
    followed: list[float] = field(default_factory=list)
    """Seconds from one answer to the next, of calls that followed one another at once."""
    outputs: list[bytes] = field(default_factory=list)
    bodies: dict[int, bytes] = field(default_factory=dict)
    """By call, the output as it was sent, as far as there is room: what people are shown of one that differs."""
    more: list[bytes] = field(default_factory=list)
    """Outputs of the calls that followed the last one of a turn; in the end they stand behind the others."""
    room: int = _MOST_BODIES
    """Bytes of outputs that may still be kept so."""
    late: float = 0.0
    """Seconds that a call takes longer, beside base's, where the next one follows at once."""
    awake_s: float = 0.0
    """Seconds in which the arm's processes were not frozen."""
    after: dict[int, After] = field(default_factory=dict)
    """By call, how its arguments and outputs were afterwards, for those after which it was asked."""
    gpus: list[gpu.State] = field(default_factory=list)
    """At the end, with the arm's clocks and what slowed them."""
    printed: str = ""
    """By a command that was started by another program."""


def worker_samples(
    plan: Plan,
    trees: Trees,
    order: random.Random,
    inputs: list[bytes],
    seed: int,
    expected: int | None = None,
    loops: int = 1,
    more: Sequence[bytes] = (),
) -> dict[str, Sample]:
    """A fresh worker an arm, in the order that `order` draws; the calls of each, with the same inputs.

    With one round an arm's worker has ended before the next one starts. With more, all are started, and take turns: the
    others are frozen meanwhile, and their processor time is read before and after. `expected`: bytes of base's outputs.
    `loops`: calls a request, as calibrated; all seconds are those of one call. `more`: inputs of the calls that follow
    at once (pacing.py), one per round, or none.
    """
    arms = list(trees.trees)
    order.shuffle(arms)
    workload = plan.workload
    samples: dict[str, Sample] = {}
    turns = _turns(workload, order, inputs, more)
    if workload.rounds == 1:
        for arm in arms:
            with ExitStack() as stack:
                exchange = _started(arm, plan, trees, seed, turns[0], samples, expected, loops)
                stack.callback(exchange.worker.end)
                begun = time.perf_counter()
                _take(exchange, workload, turns[1], samples[arm], loops)
                samples[arm].awake_s += time.perf_counter() - begun
                _close(exchange.worker, samples[arm], reached(trees))
    else:
        with ExitStack() as stack:
            exchanges: dict[str, Exchange] = {}
            used: dict[str, float] = {}
            for arm in arms:
                exchanges[arm] = _started(arm, plan, trees, seed, turns[0], samples, expected, loops)
                stack.callback(exchanges[arm].worker.end)
                used[arm] = exchanges[arm].worker.running.freeze()
            _take_turns(exchanges, used, workload, order, turns[1:], samples, loops)
            for arm, exchange in exchanges.items():
                _close(exchange.worker, samples[arm], reached(trees))
    for sample in samples.values():
        sample.outputs += sample.more
    _figures(workload, samples)
    return samples


@dataclass
class _Turn:
    """What a worker is asked between two freezes."""

    inputs: Sequence[bytes]
    questions: Sequence[bool]
    """After which of them it is asked, which is in no figure."""
    more: bytes | None = None
    """The input of a call that follows at once."""


def _turns(workload: Workload, order: random.Random, inputs: Sequence[bytes], more: Sequence[bytes]) -> list[_Turn]:
    """The calls that are not timed, then a turn per round."""
    questions = [workload.compares and asked(order) for _ in inputs]
    first, share = workload.warmups, -(-(len(inputs) - workload.warmups) // workload.rounds)
    found = [_Turn(inputs[:first], questions[:first])]
    for start in range(first, len(inputs), share):
        found.append(_Turn(inputs[start : start + share], questions[start : start + share]))
    if more:
        left = iter(more)
        for turn, paced in zip(found[1:], pacing.drawn(order, workload.rounds), strict=True):
            if paced:
                turn.more, turn.questions = next(left), [*turn.questions[:-1], False]
    return found


def _figures(workload: Workload, samples: Mapping[str, Sample]) -> None:
    """The steady state of every arm, without what sending takes in base's own worker; the same for all arms.

    An arm's own echo would be in its own hands: encoder and pipe are in the process that is judged.
    """
    for arm, sample in samples.items():
        sample.figures["transport"], sample.figures["spared"] = transport(samples, arm), spared(samples, arm)
    calls = [[without(one, sample.figures["transport"]) for one in sample.calls] for sample in samples.values()]
    for arm, seconds in paired(calls, workload.rounds, list(samples)).items():
        samples[arm].figures["steady"] = seconds
    if "base" in samples and workload.clock == "judge":
        base = samples["base"]
        for sample in samples.values():
            base_s, own_s = (
                [without(one, base.figures["transport"]) for one in each.followed] for each in (base, sample)
            )
            sample.late = pacing.late(base_s, own_s, (base.figures["steady"], sample.figures["steady"]))


def transport(samples: Mapping[str, Sample], arm: str) -> float:
    """Seconds that sending takes in base's worker, or in the arm's own where base is not among them."""
    echoes = samples.get("base", samples[arm]).echoes
    return statistics.median(echoes) if echoes else 0.0


def spared(samples: Mapping[str, Sample], arm: str) -> float:
    """Seconds that an arm could spare that has patched its worker, beside sending; as `transport`."""
    found = samples.get("base", samples[arm]).spared
    return statistics.median(found) if found else 0.0


def without(seconds: float, sending: float) -> float:
    """A call without what sending takes; a tenth of it at least, as an echo may be slower than what it stands for."""
    return max(seconds - sending, seconds / 10)


def _echo(exchange: Exchange, workload: Workload, given: bytes, sample: Sample, loops: int) -> None:
    """Every arm echoes, so that all are treated alike; only base's is used."""
    if workload.clock == "judge":
        sample.echoes.append(exchange.echo(None if workload.constant else given) / loops)
        sample.spared.append(exchange.spared() / loops)


def _take_turns(
    exchanges: dict[str, Exchange],
    used: dict[str, float],
    workload: Workload,
    order: random.Random,
    turns: Sequence[_Turn],
    samples: dict[str, Sample],
    loops: int,
) -> None:
    for turn in turns:
        arms = list(exchanges)
        order.shuffle(arms)
        for arm in arms:
            exchange, sample = exchanges[arm], samples[arm]
            sample.frozen_cpu_s += max(0.0, exchange.worker.running.thaw() - used[arm])
            begun = time.perf_counter()
            exchange.worker.ask(b"p")  # it is awake again
            _take(exchange, workload, turn, sample, loops)
            used[arm] = exchange.worker.running.freeze()
            sample.awake_s += time.perf_counter() - begun
            if exchange.worker.running.sandboxed:
                sample.escapes += [words for words in held(exchange.worker.running.members()) if not sample.escapes]
    for arm, exchange in exchanges.items():
        samples[arm].frozen_cpu_s += max(0.0, exchange.worker.running.thaw() - used[arm])


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


def _started(
    arm: str,
    plan: Plan,
    trees: Trees,
    hash_seed: int,
    turn: _Turn,
    samples: dict[str, Sample],
    expected: int | None,
    loops: int,
) -> Exchange:
    """A worker that has answered its first calls, which are kept apart."""
    workload, sample, begun = plan.workload, Sample({}, 0.0), time.perf_counter()
    weighs, expected = plan.primary == "memory", expected if arm == "candidate" else None
    exchange = Exchange(started(arm, workload, trees, hash_seed, plan.timeout_s, weighs=weighs), expected)
    try:
        if workload.keeps(loops):
            exchange.keep(turn.inputs[0])
        _calls(exchange, workload, turn, sample, loops)
        sample.figures = {"import": exchange.worker.import_s, "first": sample.calls[0]}
    except ArmError:
        exchange.worker.end()
        raise
    sample.calls.clear()
    sample.followed.clear()
    sample.awake_s = time.perf_counter() - begun
    samples[arm] = sample
    return exchange


def called(exchange: Exchange, workload: Workload, given: bytes, loops: int = 1) -> Reply:
    """One request and its reply; its seconds are those of one call, on the declared clock."""
    reply = exchange.call(None if workload.keeps(loops) else given, loops)
    if loops > 1:
        return replace(reply, seconds=reply.seconds / loops)
    return reply if workload.clock == "judge" else replace(reply, seconds=_told(exchange.worker, reply.inner))


def _told(worker: Worker, seconds: float) -> float:
    """A time that only the worker can tell. ArmError for none at all, of which no logarithm can be taken."""
    if not seconds:
        raise ArmError(worker.arm, "said that something took no time", tampered=True)
    return seconds


def _calls(
    exchange: Exchange,
    workload: Workload,
    turn: _Turn,
    sample: Sample,
    loops: int,
) -> None:
    """Calls one after another, and what was asked after them."""
    before: float | None = None
    for given, question in zip(turn.inputs, turn.questions, strict=True):
        reply = called(exchange, workload, given, loops)
        sample.calls.append(reply.seconds)
        sample.followed += [] if before is None else [(reply.at - before) / loops]
        before = None if question else reply.at
        sample.outputs.append(_kept(reply, workload))
        if workload.compares and len(reply.body) <= sample.room:
            sample.bodies[len(sample.outputs) - 1] = bytes(reply.body)
            sample.room -= len(reply.body)
        if question:
            after = exchange.after()
            sample.after[len(sample.outputs) - 1] = replace(after, arguments=_kept_bytes(after.arguments, workload))
            if workload.constant:
                exchange.keep(given)  # it was overwritten

    if turn.more is not None and before is not None:
        reply = called(exchange, workload, turn.more, loops)
        sample.followed.append((reply.at - before) / loops)
        sample.more.append(_kept(reply, workload))


def _take(exchange: Exchange, workload: Workload, turn: _Turn, sample: Sample, loops: int) -> None:
    """A turn."""
    _calls(exchange, workload, turn, sample, loops)
    _echo(exchange, workload, turn.inputs[-1] if turn.more is None else turn.more, sample, loops)


def _kept(reply: Reply, workload: Workload) -> bytes:
    """All of an output if tolerances have to look at it, else its digest."""
    if not workload.compares:
        return b""
    said = canonical(workload.canonical, bytes(reply.body))
    return said if said == UNREADABLE else _kept_bytes(said, workload)


def _kept_bytes(body: bytes, workload: Workload) -> bytes:
    return body if workload.rtol or workload.atol else digest(body)


def compared(workload: Workload, base: Sample) -> int:
    """How many calls of base gave something that can be compared: None, and arguments that stay, are no output."""
    if UNREADABLE in base.outputs:
        raise NotRepeatableError(
            f"canonical: expected a function of base's outputs, got an error of {workload.canonical}"
        )
    nothing = _kept_bytes(b"".join(bytes(part) for part in encode(None)), workload)
    return sum(one != nothing for one in base.outputs) if workload.compares else 0


def reached(trees: Trees) -> Container[int] | None:
    """Which GPUs the arms can reach, whichever arms there are; None: all."""
    return gpu.visible(trees.environment(next(iter(trees.trees)), 0))


def _close(worker: Worker, sample: Sample, gpus: Container[int] | None) -> None:
    worker.ask(b"p")  # the last call has not sent more than its reply
    worker.running.watch(now=True)
    if worker.running.woken:
        sample.escapes.append("a frozen process woke itself")
    sample.figures["memory"] = float(worker.running.peak_kib())
    sample.cpu_s = worker.running.cpu_seconds()
    sample.figures["processors"] = sample.cpu_s / sample.awake_s
    sample.gpus = gpu.states(gpus)


def differing(workload: Workload, base: Sample, other: Sample) -> list[int]:
    """Which calls of a block gave outputs, or left arguments, that differ beyond the tolerances.

    An output that changes later, or when arguments are overwritten, differs from one that stays.
    """

    def alike(one: bytes, two: bytes) -> bool:
        exact = not (workload.rtol or workload.atol)
        return one == two or (not exact and same(one, two, workload.rtol, workload.atol))

    pairs = zip(base.outputs, other.outputs, strict=True)
    found = {i for i, (one, two) in enumerate(pairs) if not alike(one, two)}
    for i, after in base.after.items():
        kept = alike(after.arguments, other.after[i].arguments) and (other.after[i].lasts or not after.lasts)
        found |= set() if kept else {i}
    return sorted(found)


def too_busy_while_frozen(samples: Mapping[str, Sample]) -> bool:
    """Whether an arm's processor time advanced by more than a step of its count while it was frozen."""
    return any(sample.frozen_cpu_s > MOST_FROZEN_S for sample in samples.values())
