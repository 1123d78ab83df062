"""The procedure against enumeration of every sign pattern, against its own inversion, and against hand-made cases."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay import LOOKS, Interval, exact_interval, hodges_lehmann, judge, p_value
from assay.statistics.signed_rank import depth, holm, rank_sum_counts, walsh_averages

VALUES = st.lists(st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3)), min_size=5, max_size=14)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_distribution_is_that_of_all_sign_patterns(n: int) -> None:
    sums = [sum(r for r, s in enumerate(signs, 1) if s) for signs in itertools.product((0, 1), repeat=n)]
    assert list(rank_sum_counts(n)) == [sums.count(total) for total in range(n * (n + 1) // 2 + 1)]


@pytest.mark.parametrize(
    ("n", "alpha", "k"), [(12, 0.001, 1), (24, 0.001, 40), (40, 0.003, 193), (6, 0.05, 0), (5, 0.05, -1)]
)
def test_depths(n: int, alpha: float, k: int) -> None:
    """Those of small n are in every table of the signed-rank test; all are checked against the exact tail."""
    assert depth(n, alpha) == k
    tail = sum(rank_sum_counts(n)[: k + 1]) * 2 / 2**n
    assert tail <= alpha < sum(rank_sum_counts(n)[: k + 2]) * 2 / 2**n


def test_estimate_by_hand() -> None:
    assert walsh_averages([3.0, 1.0]).tolist() == [1.0, 2.0, 3.0]
    assert hodges_lehmann([1, 2, 100]) == np.median([1, 1.5, 2, 50.5, 51, 100])


@settings(deadline=None)
@given(VALUES, st.sampled_from([0.003, 0.01, 0.05, 0.1]))
def test_interval_excludes_zero_exactly_when_the_test_rejects(values: list[float], alpha: float) -> None:
    assert exact_interval(values, alpha).excludes(0) == (p_value(values) <= alpha)


@settings(deadline=None)
@given(VALUES, st.floats(-5, 5), st.sampled_from([0.01, 0.1]))
def test_interval_moves_and_flips_with_the_data(values: list[float], shift: float, alpha: float) -> None:
    here, there = exact_interval(values, alpha), exact_interval([v + shift for v in values], alpha)
    back = exact_interval([-v for v in values], alpha)
    assert there.low == pytest.approx(here.low + shift, abs=1e-9) and back == Interval(-here.high, -here.low)
    assert here.low <= hodges_lehmann(values) <= here.high


def test_p_value_of_distinct_values_is_the_share_of_patterns_as_extreme() -> None:
    values = [0.3, -0.1, 0.7, 1.1, -0.2, 0.9, 1.7]
    ranks = np.argsort(np.argsort(np.abs(values))) + 1
    mine = min(
        sum(r for r, v in zip(ranks, values, strict=True) if v > 0),
        sum(r for r, v in zip(ranks, values, strict=True) if v < 0),
    )
    sums = [sum(r for r, s in enumerate(signs, 1) if s) for signs in itertools.product((0, 1), repeat=7)]
    assert p_value(values) == pytest.approx(2 * sum(s <= mine for s in sums) / 2**7)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03], 0.05) == [True, False, False]
    assert holm([0.01, 0.02, 0.03], 0.06) == [True, True, True]
    assert holm([], 0.05) == []


def arm(centre: float, blocks: int, seed: int, spread: float = 0.01) -> np.ndarray:
    return np.exp(math.log(centre) + np.random.default_rng(seed).normal(0, spread, blocks))


@pytest.mark.parametrize(
    ("factor", "blocks", "verdict"),
    [(0.9, 12, "faster"), (1.1, 12, "slower"), (1.0, 12, "continue"), (1.0, 40, "equivalent"), (0.9, 39, "faster")],
)
def test_verdicts(factor: float, blocks: int, verdict: str) -> None:
    seen = judge(arm(1, blocks, 1), arm(factor, blocks, 2), arm(1, blocks, 3))
    assert seen.verdict == verdict and seen.reason
    assert seen.blocks == max(look.blocks for look in LOOKS if look.blocks <= blocks)
    assert seen.estimate == pytest.approx(-math.log(factor), abs=0.01)
    assert seen.material == (factor != 1.0)


def test_noise_leaves_it_undecided_and_says_what_could_have_been_seen() -> None:
    seen = judge(arm(1, 40, 1, 0.1), arm(1, 40, 2, 0.1))
    assert seen.verdict == "undecided" and 0.02 < seen.detectable < 0.1


def test_void() -> None:
    same = arm(1, 40, 1), arm(0.9, 40, 2)
    assert judge(*same, arm(1.05, 40, 3)).reason == "two builds of base differ"
    assert judge(*same, arm(1, 40, 3, 0.2)).reason == "two builds of base scatter by more than the margin"
    assert judge(*same, arm(1, 40, 3), contaminated=14).reason == "14 of 54 blocks were contaminated"
    assert judge(*same, arm(1, 40, 3), contaminated=13).verdict == "faster"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(11), np.ones(11)), "base: expected at least 12 blocks, got 11"),
        ((np.ones(12), np.ones(13)), "expected as many blocks as base, 12, got"),
        ((np.ones(12), np.zeros(12)), "candidate: expected a vector of positive"),
        ((np.full(12, np.nan), np.ones(12)), "base: expected a vector of positive"),
    ],
)
def test_refusals(arguments: tuple[np.ndarray, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(*arguments)
    with pytest.raises(ValueError, match="alpha: expected"):
        exact_interval([1.0, 2.0], 0.0)
    with pytest.raises(ValueError, match="values: expected finite"):
        hodges_lehmann([math.inf])
