"""Grids from a seed, of 3432 paths where no edge is missing."""

import random


def paths(seed):
    drawn = random.Random(seed)
    return 8, 8, [drawn.randrange(1000) for _ in range(3)], 4
