"""How many calls a block has, and whether they are long enough for the judge's clock."""

import statistics
import time

from assay.arms.handle import started
from assay.arms.trees import Trees
from assay.contract import seeds
from assay.contract.errors import TooShortError
from assay.contract.workload import Plan
from assay.experiment.exchange import NOTHING, Exchange
from assay.experiment.inputs import Inputs
from assay.experiment.samples import called

_SPAN_S = 0.02
_MOST_BYTES = 256 << 20
_CALLS = 8
TOO_SHORT = 0.1
"""The largest share of a call that the transport may take."""


def calibrate(plan: Plan, trees: Trees, inputs: Inputs, hash_seed: int) -> tuple[int, dict[str, float]]:
    """Timed calls a block; what base's call, the transport and start-up take (seconds), and its longest reply (bytes).

    The transport is what an echo takes: the same input decoded, an output like base's sent back. Raises TooShortError
    if that is more than a tenth of the call and the judge's clock is to count.
    """
    workload = plan.workload
    drawn = seeds.inputs(plan.seed, "calibration")
    made = inputs.make([next(drawn)]) * _CALLS if workload.constant else inputs.fresh(drawn, _CALLS)
    start = time.perf_counter()
    worker = started("base", workload, trees, hash_seed, plan.timeout_s)
    exchange = Exchange(worker)
    try:
        start_s = time.perf_counter() - start
        exchange.keep(made[0])
        replies = [called(exchange, workload, one) for one in made]
        call_s = statistics.median(reply.seconds for reply in replies[1:])
        transport_s = 0.0
        if workload.clock == "judge":
            worker.ask(b"k", 0.0, [replies[-1].body])
            echoed = made if not workload.constant else [NOTHING] * _CALLS
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
    longest = float(max(len(reply.body) for reply in replies))
    return calls, {"call_s": call_s, "transport_s": transport_s, "start_s": start_s, "reply_bytes": longest}
