"""How many instructions each arm executes: evidence beside times, which noise of the machine hardly touches.

A counter stands around a process and tells of all that it executed. So a worker runs twice, with few calls and with
more, and the difference is that of the calls. An arm could print counts of its own: they decide nothing.
"""

import secrets
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from assay.arms.counters import Counter, best
from assay.arms.handle import started
from assay.arms.trees import Trees
from assay.contract import seeds
from assay.contract.errors import ArmError, MeasurementError
from assay.contract.rows import Counted
from assay.contract.workload import Plan
from assay.experiment.exchange import Exchange
from assay.experiment.inputs import Inputs
from assay.experiment.processes import command_sample

_CALLS, _LEAST_CALLS = 8, 2
_SLOWER, _SPAN_S = 50.0, 2.0
"""How much slower a call is under a counter, at most about, and how long all counted calls of a worker may take."""
_END_S = 60.0


def counted(plan: Plan, trees: Trees, inputs: Inputs | None, *, loops: int, call_s: float) -> dict[str, Any]:
    """A row of RAW: instructions of each arm, or in words why there are none.

    Args:
        plan: what is run; `plan.instructions` says which counter is wanted.
        trees: the arms.
        inputs: of callables.
        loops: calls a request, as calibrated.
        call_s: what a call takes, about.
    """
    counter, refused = best(plan.instructions, worker=plan.workload.worker)
    if counter is None:
        return asdict(Counted(source="", what="", calls=0, counts={}, words="; ".join(refused)))
    row = Counted(source=counter.name, what=counter.words, calls=1, counts={}, words="; ".join(refused))
    hash_seed = secrets.randbits(32)
    try:
        if inputs is None:
            counts = {arm: _command(counter, plan, trees, arm, hash_seed) for arm in trees.trees}
        else:
            many = max(_LEAST_CALLS, min(_CALLS, round(_SPAN_S / (_SLOWER * max(call_s * loops, 1e-6)))))
            given = _given(plan, inputs, loops, many + plan.workload.warmups)
            row = replace(row, calls=many * loops)
            counts = {arm: _worker(counter, plan, trees, arm, hash_seed, given, loops) for arm in trees.trees}
    except (MeasurementError, ValueError) as problem:
        return asdict(replace(row, calls=0, words=f"{counter.name}: {problem}".splitlines()[0]))
    return asdict(replace(row, counts=counts))


def _given(plan: Plan, inputs: Inputs, loops: int, wanted: int) -> list[bytes]:
    drawn = seeds.inputs(plan.seed, "instructions")
    if loops > 1 and not plan.workload.repeats:
        return inputs.sealed(drawn, loops, wanted)[0]
    if plan.workload.repeats:
        return inputs.make([next(drawn)]) * wanted
    return inputs.fresh(drawn, wanted)


def _command(counter: Counter, plan: Plan, trees: Trees, arm: str, hash_seed: int) -> float:
    """Of a whole run, all its processes together."""
    runs = [command_sample(arm, plan, trees, hash_seed, counter.prefix).printed for _ in range(counter.runs)]
    return float(statistics.median(counter.read(output) for output in runs))


def _worker(
    counter: Counter, plan: Plan, trees: Trees, arm: str, hash_seed: int, given: Sequence[bytes], loops: int
) -> float:
    """Of one call, with what sends its input and output."""
    warmups = plan.workload.warmups
    calls = (len(given) - warmups) * loops
    if not counter.prefix:
        return statistics.fmean(_inside(plan, trees, arm, hash_seed, given))
    few, all_ = (
        statistics.median(
            counter.read(_whole(counter, plan, trees, arm, hash_seed, part, loops)) for _ in range(counter.runs)
        )
        for part in (given[:warmups], given)
    )
    return max(0.0, (all_ - few) / calls)


def _whole(
    counter: Counter, plan: Plan, trees: Trees, arm: str, hash_seed: int, given: Sequence[bytes], loops: int
) -> str:
    """What a counter prints at the end of a worker that has made these calls."""
    worker = started(arm, plan.workload, trees, hash_seed, plan.timeout_s, prefix=counter.prefix)
    try:
        exchange = Exchange(worker)
        if plan.workload.keeps(loops):
            exchange.keep(given[0])
        for one in given:
            exchange.call(None if plan.workload.keeps(loops) else one, loops)
        return worker.finish(_END_S)
    finally:
        worker.end()


def _inside(plan: Plan, trees: Trees, arm: str, hash_seed: int, given: Sequence[bytes]) -> list[float]:
    """Instructions of calls, as the worker counts them."""
    worker = started(arm, plan.workload, trees, hash_seed, plan.timeout_s)
    try:
        found = [worker.ask(b"n", 0.0, [one]).inner for one in given]
        if not all(found):
            raise ArmError(arm, "executed no bytecode at all")
        return found[plan.workload.warmups :]
    finally:
        worker.end()
