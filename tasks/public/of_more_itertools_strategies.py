"""Few numbers, equal ones among them; every permutation of a few items, from either end."""

import math

from hypothesis import strategies


def extremes():
    return strategies.tuples(strategies.lists(strategies.integers(-9, 9), min_size=1, max_size=12), strategies.just(1))


@strategies.composite
def _permutations(draw):
    length = draw(strategies.integers(1, 8))
    chosen = draw(strategies.integers(1, length))
    most = math.perm(length, chosen)
    numbers = draw(strategies.lists(strategies.integers(-most, most - 1), min_size=1, max_size=6))
    return length, chosen, [str(one) for one in numbers], 1


def permutations():
    return _permutations()
