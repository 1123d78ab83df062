"""What of a candidate got worse beside the figure that is judged: import, first call, memory, processors, their time.

A figure is told if the exact interval of its log-ratio, candidate over base, lies beyond the margin. It decides
nothing: the level is that of one figure, and a task says by `primary` which figure is judged.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from assay.contract.rows import BESIDE
from assay.statistics.looks import LOOKS
from assay.statistics.signed_rank import exact_interval

ALPHA = 0.001
_MOST_ALONE = 1.1
"""Processors that one thread seems to use at most, as its time is counted in steps."""


def worse(rows: Sequence[Mapping[str, Any]], primary: str, margin: float) -> list[dict[str, Any]]:
    """What got worse in RAW's clean blocks, each as {"name", "base", "candidate", "interval"}, figures as medians.

    Args:
        rows: rows of RAW; fewer clean blocks than the first look has show nothing.
        primary: the figure that is judged, which is not beside itself.
        margin: a log-ratio that the whole interval, of candidate over base, must lie beyond.
    """
    blocks = [row for row in rows if row["kind"] == "block" and "figures" in row]
    clean = [row for row in blocks if not row["reasons"] and not row["differing"]]
    if len(clean) < LOOKS[0].blocks:
        return []
    found = []
    for name in BESIDE:
        base, candidate = ([_figure(row, name, arm) for row in clean] for arm in ("base", "candidate"))
        if name == primary or not all((*base, *candidate)):
            continue
        interval = exact_interval(np.log(candidate) - np.log(base), ALPHA)
        before, after = statistics.median(base), statistics.median(candidate)
        if interval.low > margin and not (name == "processors" and after <= _MOST_ALONE):
            found.append({"name": name, "base": before, "candidate": after, "interval": [interval.low, interval.high]})
    return found


def _figure(row: Mapping[str, Any], name: str, arm: str) -> float:
    """A figure of an arm; 0 where the block has none, or none that was counted."""
    return float(row["cpu_s"][arm] if name == "cpu" else row["figures"][arm].get(name, 0.0))
