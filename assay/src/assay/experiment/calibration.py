"""How many calls a block and a request have, and whether calls are long enough for the judge's clock."""

import statistics
import time
from dataclasses import dataclass

from assay.arms.handle import started
from assay.arms.inside.wire import decode
from assay.arms.trees import Trees
from assay.contract import seeds
from assay.contract.errors import ArmError, TooShortError
from assay.contract.workload import Plan
from assay.experiment.exchange import NOTHING, Exchange
from assay.experiment.inputs import Inputs
from assay.experiment.samples import called

_SPAN_S = 0.02
_MOST_BYTES = 256 << 20
_CALLS = 8
TOO_SHORT = 0.1
"""The largest share of a call that the transport may take."""
_TOO_SHORT_IN_A_LOOP = 2 / 3
"""Of a request: what hides its inputs takes as much for all calls, and is measured with them."""
_LOOP_S, _MOST_LOOPS, _LEAST_S = 2e-3, 1 << 14, 1e-7
"""How long a request with a loop lasts, if that is not too many calls; and no call takes less."""
_GUESS_S, _SAMPLES = 2.5e-7, 1024
"""What a guess at an output takes; how many outputs tell at least how many guesses one needs."""
_ADVICE = "--chain with --links N, --constant, or --clock cuda measure shorter ones"


@dataclass(frozen=True)
class Calibrated:
    """What base's calls need."""

    calls: int
    """Timed requests a block."""
    loops: int
    """Calls a request."""
    seconds: dict[str, float]
    """What base's call, the transport and start-up take; and bytes of its longest reply."""


@dataclass(frozen=True)
class _Tried:
    call_s: list[float]
    """One a request, but for the first; of a loop, of one call of it."""
    transport_s: list[float]
    start_s: float
    sent: int
    """Bytes of the longest request."""
    replied: int

    def too_short(self, most: float) -> bool:
        """Whether the transport takes more than its share. The quickest of each decide: load only makes them slower."""
        return min(self.transport_s) > most * min(self.call_s)


def calibrate(plan: Plan, trees: Trees, inputs: Inputs, hash_seed: int) -> Calibrated:
    """Raises TooShortError if sending takes too much of the calls, however many of them a request holds.

    The transport is what an echo takes: the same input decoded, an output like base's sent back. Calls ten times as
    long are requests of their own. Shorter ones are made in loops, so many that a request lasts 2 ms: a power of two,
    which hardly depends on the moment. In a loop sending may take two thirds, as most of it hides inputs.
    """
    workload, loops = plan.workload, max(plan.workload.loops, 1)
    seen = _tried(plan, trees, inputs, hash_seed, 1)
    short = workload.clock == "judge" and seen.too_short(TOO_SHORT)
    if loops > 1 or (short and workload.loops != 1):
        words = f"too_short: a call takes {_micro(seen.call_s)} and sending input and output {_micro(seen.transport_s)}"
        if not workload.may_loop:
            raise TooShortError(f"{words}, more than a tenth of it; {_ADVICE}")
        call_s = max(min(seen.call_s) - min(seen.transport_s), _LEAST_S)
        while workload.loops == 0 and loops < _MOST_LOOPS and loops * call_s < _LOOP_S:
            loops *= 2
        try:
            if not workload.repeats:
                _unforeseen(plan, inputs, call_s)
            seen = _tried(plan, trees, inputs, hash_seed, loops)
        except ArmError as problem:
            why = problem.words.splitlines()[-1]
            raise TooShortError(f"{words}; no loop can be made of it: {why}; {_ADVICE}") from None
        if seen.too_short(_TOO_SHORT_IN_A_LOOP):
            share = f"in a loop {_micro(seen.call_s)} a call, of which {_micro(seen.transport_s)} hide its input"
            raise TooShortError(f"{words}; {share}, more than two thirds; {_ADVICE}")
    elif short:
        words = f"a call takes {_micro(seen.call_s)} and sending input and output {_micro(seen.transport_s)}"
        raise TooShortError(f"too_short: {words}, more than a tenth of it; {_ADVICE}")
    call_s = statistics.median(seen.call_s)
    size = seen.sent + 3 * seen.replied
    calls = workload.calls or max(3, min(200, round(_SPAN_S / (call_s * loops)), _MOST_BYTES // max(size, 1)))
    calls = -(-calls // workload.rounds) * workload.rounds
    found = {"call_s": call_s, "transport_s": statistics.median(seen.transport_s), "start_s": seen.start_s}
    return Calibrated(calls, loops, {**found, "reply_bytes": float(seen.replied)})


def _micro(seconds: list[float]) -> str:
    return f"{min(seconds) * 1e6:.3g} µs"


def _unforeseen(plan: Plan, inputs: Inputs, call_s: float) -> None:
    """TooShortError if base's outputs can be guessed in less time than a call takes; ArmError if none can be sealed."""
    needed = call_s / _GUESS_S
    many = max(_SAMPLES, 4 * round(needed))
    _, guesses = inputs.sealed(seeds.inputs(plan.seed, "guesses"), many, 1)
    if guesses < max(needed, _SAMPLES / 8):
        raise TooShortError(
            f"too_short: no loop can be made of calls of {call_s * 1e6:.3g} µs whose outputs are guessed in "
            f"{guesses:.0f} tries: a candidate could read inputs ahead; {_ADVICE}"
        )


def _tried(plan: Plan, trees: Trees, inputs: Inputs, hash_seed: int, loops: int) -> _Tried:
    """A few requests to base, each for so many calls, and echoes of them."""
    workload = plan.workload
    drawn = seeds.inputs(plan.seed, f"calibration of loops of {loops}" if loops > 1 else "calibration")
    if workload.repeats and loops > 1:
        made = inputs.make([next(drawn)]) * _CALLS
    elif loops > 1:
        made, _ = inputs.sealed(drawn, loops, _CALLS)
    else:
        made = inputs.make([next(drawn)]) * _CALLS if workload.constant else inputs.fresh(drawn, _CALLS)
    start = time.perf_counter()
    worker = started("base", workload, trees, hash_seed, plan.timeout_s)
    exchange = Exchange(worker)
    try:
        start_s = time.perf_counter() - start
        if workload.repeats or loops == 1:
            exchange.keep(made[0])
        replies, echoes = [], []
        for one in made:
            replies.append(called(exchange, workload, one, loops))
            if loops > 1 and not workload.repeats and decode(replies[-1].body)[0] != loops:
                raise ArmError("base", "two processes gave different outputs for one input")
            if workload.clock == "judge":
                worker.ask(b"k", 0.0, [replies[-1].body])
                sent = NOTHING if workload.keeps(loops) else one
                echoes += [worker.ask(b"e", 0.0, [sent]).seconds / loops for _ in range(_CALLS)]
    finally:
        worker.end()
    sizes = [max(map(len, made)), max(len(reply.body) for reply in replies)]
    return _Tried([reply.seconds for reply in replies[1:]], echoes or [0.0], start_s, *sizes)
