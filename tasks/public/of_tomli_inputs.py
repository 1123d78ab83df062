"""Documents from a seed."""

import random

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def documents(seed):
    drawn = random.Random(seed)
    return "\n".join(_table(drawn, i) for i in range(12)), 6


def strings(seed):
    drawn = random.Random(seed)
    lines = [f'{_word(drawn)}{i} = "{" ".join(_word(drawn) for _ in range(20))}"' for i in range(30)]
    return "\n".join([*lines, 'long = """', *(_word(drawn) * 5 for _ in range(20)), '"""']), 6


def comments(seed):
    drawn = random.Random(seed)
    lines = [
        f"# {' '.join(_word(drawn) for _ in range(12))}\n{_word(drawn)}{i} = {i}  # {_word(drawn) * 4}"
        for i in range(60)
    ]
    return "\n".join(lines), 6


def _table(drawn, i):
    lines = [f"[{_word(drawn)}{i}.{_word(drawn)}]"]
    lines += [f"{_word(drawn)}{j} = {value}" for j, value in enumerate(_values(drawn))]
    return "\n".join(lines)


def _values(drawn):
    yield from (str(drawn.randint(0, 10**6)), f"{drawn.random():.6f}", "true", "1979-05-27T07:32:00Z")
    yield f'"{_word(drawn)} \\n {_word(drawn)}"'
    yield str([drawn.randint(0, 99) for _ in range(8)])
    yield f"{{a = 1, b = '{_word(drawn)}'}}"


def _word(drawn):
    return "".join(drawn.choices(_LETTERS, k=drawn.randint(3, 9)))
