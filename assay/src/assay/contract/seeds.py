"""What is drawn from a plan's secret. Each draw has a label of its own, and none of them says anything of another.

A candidate sees its hash seed, the turns that it takes and its inputs. The secret has 256 bits, and a draw is a SHA-256
of it: whoever knows some draws knows neither the secret nor the next draw.
"""

import hashlib
import random
import secrets
from collections.abc import Iterator
from itertools import count

BITS = 256
_INPUT_BITS, _HASH_BITS = 53, 32


def secret() -> int:
    """A new one."""
    return secrets.randbits(BITS)


def inputs(seed: int, *label: object) -> Iterator[int]:
    """Seeds for what makes inputs, one after another: 53 bits each, which a double holds."""
    return (_drawn(seed, "input", *label, number) >> (BITS - _INPUT_BITS) for number in count())


def hash_seed(seed: int, *label: object) -> int:
    """For PYTHONHASHSEED."""
    return _drawn(seed, "hash", *label) >> (BITS - _HASH_BITS)


def order(seed: int, *label: object) -> random.Random:
    """For the order of arms and turns, and for the questions after calls."""
    return random.Random(_drawn(seed, "order", *label))


def property_(seed: int, *label: object) -> int:
    """For what hypothesis draws."""
    return _drawn(seed, "property", *label)


def _drawn(seed: int, *label: object) -> int:
    text = ":".join(map(str, (seed, *label)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest())
