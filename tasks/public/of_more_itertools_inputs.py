"""Numbers from a seed."""

import math
import random


def extremes(seed):
    drawn = random.Random(seed)
    return [drawn.randint(-(10**6), 10**6) for _ in range(500)], 80


def permutations(seed):
    drawn = random.Random(seed)
    length, chosen = 60, 12
    return length, chosen, [str(drawn.randrange(math.perm(length, chosen))) for _ in range(20)], 20
