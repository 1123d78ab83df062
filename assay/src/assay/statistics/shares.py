"""Shares of attempts that succeed: Wilson's interval, and pass@k."""

import math
from statistics import NormalDist


def wilson(successes: int, attempts: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927); (0, 1) without attempts.

    ValueError for more successes than attempts, or a level that is none.
    """
    if not 0 <= successes <= attempts:
        raise ValueError(f"successes: expected 0 to {attempts}, got {successes}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    if attempts == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, part = successes / attempts, z * z / attempts
    middle = (share + part / 2) / (1 + part)
    half = math.sqrt(share * (1 - share) * part + part * part / 4) / (1 + part)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if successes == 0 else low), (1.0 if successes == attempts else high)


def pass_at(k: int, attempts: int, successes: int) -> float | None:
    """The chance that one of k attempts succeeds, without bias (Chen et al. 2021); None for fewer attempts than k."""
    if k < 1 or not 0 <= successes <= attempts:
        raise ValueError(f"pass@k: expected k from 1 on and 0 to {attempts} successes, got k {k}, {successes}")
    if attempts < k:
        return None
    return 1.0 - math.comb(attempts - successes, k) / math.comb(attempts, k)
