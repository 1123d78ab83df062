"""Calls that follow one another at once: work that is left for the time after an answer shows in the next one.

Between two timed calls a worker may be asked questions, echo, or be frozen, and its processor is nobody's concern
meanwhile. A candidate that answers first and works afterwards seems faster by that work. So the judge also takes its
time from one answer to the next, wherever nothing but the next call came between them. All that it did for a call is in
that, and what the judge takes between two calls (some 10 µs) counts against it. In about half of all turns,
drawn anew, one more call follows the last one at once; it is in no figure of its own. A worker cannot know
which calls are followed so before it has answered.
"""

import math
import random
import statistics
from collections.abc import Sequence


def drawn(order: random.Random, rounds: int) -> list[bool]:
    """Whether a turn ends with one more call; at least one does."""
    found = [order.random() < 0.5 for _ in range(rounds)]
    found[order.randrange(rounds)] = True
    return found


def late(base: Sequence[float], candidate: Sequence[float], figures: tuple[float, float]) -> float:
    """Seconds that a call of the candidate takes longer, beside base's, from answer to answer than from its request on.

    Args:
        base: seconds of calls that followed others at once, from their requests on.
        candidate: of the same calls, from the answer before, with what the judge takes between them.
        figures: of base and of the candidate, from requests on.

    With it the candidate's figure is base's times the median ratio of these seconds. It is 0 where there are none.
    """
    if not base:
        return 0.0
    ratio = statistics.median(math.log(two / one) for one, two in zip(base, candidate, strict=True))
    return figures[0] * math.exp(ratio) - figures[1]
