"""Figures of arms that take turns: what a round shares goes, what the arms differ by stays as it is."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from assay.experiment.samples import paired

ARMS = ["much", "null", "base", "candidate", "control", "little"]
PLANTED = np.log([1.2, 1, 1, 1.05, 1, 1.02])[:, None]


def shift_of_five_percent(figures: Callable[[Any, int, Sequence[str]], dict[str, float]]) -> float:
    """How far the mean of many figures of an arm 5 % slower than base is off, on a machine with skewed noise."""
    generator = np.random.default_rng(5)
    off = []
    for _ in range(3000):
        shape = (len(ARMS), 8)
        own = generator.normal(0, 0.01, shape) + (generator.random(shape) < 0.3) * generator.exponential(0.1, shape)
        found = figures(np.exp(PLANTED + own + generator.normal(0, 0.3, 8)), 8, ARMS)
        off.append(math.log(found["candidate"] / found["base"]) - math.log(1.05))
    return float(np.mean(off))


def test_figures_relative_to_a_round_are_not_shifted() -> None:
    def by_median_of_arms(calls: Any, _: int, arms: Sequence[str]) -> dict[str, float]:
        each = np.log(calls)
        return dict(zip(arms, np.exp(np.median(each - np.median(each, axis=0), axis=1)).tolist(), strict=True))

    assert abs(shift_of_five_percent(paired)) < 0.0015
    assert abs(shift_of_five_percent(by_median_of_arms)) > 0.003


def test_base_is_the_median_of_its_rounds_and_others_follow_it_through_a_change_of_speed() -> None:
    calls = np.array([[2.0, 2.0, 8.0, 8.0, 4.0, 4.0], [1.0, 1.0, 4.0, 4.0, 2.0, 2.0]])
    assert paired(calls, 3, ["candidate", "base"]) == {"candidate": pytest.approx(4.0), "base": pytest.approx(2.0)}
    calls[0, 1] = 100.0  # the median of a round's two calls is between them
    assert paired(calls, 3, ["candidate", "base"])["candidate"] == pytest.approx(4.0)
    assert paired([[1.0, 3.0, 2.0, 9.0, 5.0, 4.0]], 3, ["nothing"]) == {"nothing": pytest.approx(18**0.5)}
