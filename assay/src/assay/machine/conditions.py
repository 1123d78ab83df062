"""What is done against others on the machine while blocks are measured: waiting, one processor, a control group."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from assay.machine import isolation, load

PATIENCE_S = 5.0
"""How long a block waits for others to be gone, after one that was left out."""
VERY_PATIENT_S = 600.0
"""How long each block waits on request."""
_LOOK_S = 1.0


@dataclass(frozen=True)
class Conditions:
    """How blocks are measured beside others; no statistic depends on it."""

    patience_s: float = PATIENCE_S
    """How long a block waits for others to rest: after one that was left out; above PATIENCE_S, each of them."""
    pinned: bool = False
    """Whether judge and arms stay on one processor. That suits code that works with one thread."""
    isolated: bool = False
    """Whether a control group keeps others away from it, too."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Holds as long as this lasts. IsolationError if no control group may be made."""
        with ExitStack() as stack:
            if self.pinned or self.isolated:
                number = stack.enter_context(_pinned())
                if self.isolated:
                    stack.enter_context(isolation.group(number))
            yield


def quietest(seconds: float = _LOOK_S) -> int:
    """The processor, of those that this process may use, on which least was done or stolen in so many seconds.

    The last of them where /proc is missing.
    """
    before = load.by_processor()
    if before is None:
        return max(os.sched_getaffinity(0))
    time.sleep(seconds)
    used = {number: sum(count) - sum(before[number]) for number, count in (load.by_processor() or before).items()}
    return min(used, key=lambda number: (used[number], -number))


@contextmanager
def _pinned() -> Iterator[int]:
    """Keeps this process, and what it starts meanwhile, on the quietest processor; its number."""
    allowed = os.sched_getaffinity(0)
    number = quietest()
    os.sched_setaffinity(0, {number})
    try:
        yield number
    finally:
        os.sched_setaffinity(0, allowed)
