"""Texts from a seed; plain versions are the most, as they are in an index of packages."""

import random

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def requirements(seed):
    drawn = random.Random(seed)
    marks = ["", '; python_version >= "3.8"', '; extra == "test" and sys_platform != "win32"']
    return [
        f"{_name(drawn)}{drawn.choice(['', '[a,b]'])}>={_version(drawn)},<9{drawn.choice(marks)}" for _ in range(20)
    ], 8


def names(seed):
    drawn = random.Random(seed)
    return [
        drawn.choice(["{}", "{}_{}", "{}.{}-{}", "{}__{}"]).format(*(_name(drawn) for _ in range(3))) for _ in range(40)
    ], 60


def versions(seed):
    drawn = random.Random(seed)
    return [_version(drawn) + drawn.choice(["", "", "", "rc1"]) for _ in range(40)], 60


def _name(drawn):
    return drawn.choice("abcABC") + "".join(drawn.choices(_LETTERS, k=drawn.randint(3, 12)))


def _version(drawn):
    return ".".join(str(drawn.randint(0, 40)) for _ in range(drawn.randint(1, 4)))
