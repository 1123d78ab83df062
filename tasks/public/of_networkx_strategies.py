"""Small grids, also such that fall apart."""

from hypothesis import strategies


def paths():
    size, missing = strategies.integers(1, 4), strategies.lists(strategies.integers(0, 100), max_size=6)
    return strategies.tuples(strategies.integers(2, 4), size, missing, strategies.just(1))
