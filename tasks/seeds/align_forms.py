"""What of a layout counts: which ids each block holds and for which expert, and how many entries there are.

The order of an expert's ids is free. What lies behind the last entry is read by nobody.
"""

import numpy as np

BLOCK = 256


def form(output: list) -> list:
    """Layouts of `align.py` with each expert's ids in ascending order, cut to their lengths."""
    return [_one(*(np.asarray(part) for part in layout)) for layout in output]


def _one(ids: np.ndarray, experts: np.ndarray, total: np.ndarray) -> tuple:
    length = int(total.reshape(-1)[0])
    if length % BLOCK or not 0 <= length <= len(ids):
        raise ValueError(f"total: expected a multiple of {BLOCK} up to {len(ids)}, got {length}")
    taken = experts[: length // BLOCK]
    runs = np.repeat(np.cumsum(np.diff(taken, prepend=taken[:1]) != 0), BLOCK)
    order = np.lexsort((ids[:length], runs))
    return ids[:length][order], taken, length
