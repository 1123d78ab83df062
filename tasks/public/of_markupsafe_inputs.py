"""Texts from a seed: short ones without anything to escape, as most values of a template are, and pages with tags."""

import random

_WORDS = ["value", "one", "name", "x", "price", "of the", "a longer piece of text"]


def escaped(seed):
    drawn = random.Random(seed)
    return [f"{drawn.choice(_WORDS)} {drawn.randint(0, 10**6)}" for _ in range(50)], 200


def stripped(seed):
    drawn = random.Random(seed)
    pieces = ["<em>{}</em>", "<!-- {} -->", "{} &raquo; ", "<a href='{}'>", "  {}\n"]
    return ["".join(drawn.choice(pieces).format(drawn.choice(_WORDS)) for _ in range(40)) for _ in range(8)], 20
