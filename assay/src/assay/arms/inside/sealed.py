"""Loops over calls that take microseconds: each input is hidden until the output before it is known.

Standard library only. Many inputs travel in one request, so that sending is shared among their calls. A process that
saw them all at once could answer them together, as no caller could let it. So every input but the first is sealed: it
is added, bit by bit, to a hash of the output of the call before. Who has not made that call cannot read the next
input, and who made it wrongly reads nothing. All outputs are thereby compared with base's.

That takes outputs whose bytes are the same in each process: numbers, texts and None, and tuples, lists and dicts of
them (`plain`). And it takes outputs that cannot be guessed: base's worker counts how often a guess would fail.
"""

from __future__ import annotations

from marshal import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

_VERSION = 2
"""Of marshal: floats in binary, no marks for values that are shared, so that bytes follow from the value alone."""
_SIZE, _TAG = 64, b"good"
_WORDS = "numbers, texts and None, and tuples, lists and dicts of them"
_PLAIN = (type(None), bool, int, float, str)


def plain(value: Any) -> bool:
    """Whether equal bytes of `dumps` mean an equal value: exact types, and no buffers, which all look like bytes."""
    if type(value) in (tuple, list):
        return all(map(plain, value))
    if type(value) is dict:
        return all(plain(key) and plain(one) for key, one in value.items())
    return type(value) in _PLAIN


def guesses(outputs: Sequence[Any]) -> float:
    """How many guesses an output takes on average for who knows how often each of them comes."""
    counts: dict[bytes, int] = {}
    for one in outputs:
        key = dumps(one, _VERSION)
        counts[key] = counts.get(key, 0) + 1
    often = sorted(counts.values(), reverse=True)
    return sum(rank * count for rank, count in enumerate(often, 1)) / max(1, len(outputs))


def seal(inputs: Sequence[bytes], outputs: Sequence[Any], named: bool) -> bytes:
    """A request for `walk`, from inputs as `packed` gives them, and base's outputs of all but the last.

    `named`: whether inputs are keywords.
    """
    longest = max(map(len, inputs)) + len(_TAG)
    size = max(_SIZE, longest)
    hidden = [one.ljust(size - len(_TAG), b"\0") + _TAG for one in inputs]
    keys = [bytes(size), *(_pad(size)(dumps(one, _VERSION)) for one in outputs)]
    return dumps((named, [_added(one, key) for one, key in zip(hidden, keys, strict=True)]), _VERSION)


def packed(given: Any) -> bytes:
    """An input's bytes: a tuple of arguments, or a tuple with a dict of keywords. ValueError if it is not plain."""
    if not plain(given):
        raise ValueError(f"expected an input of {_WORDS}, got {type(given).__name__}")
    return dumps(given if isinstance(given, tuple) else (given,), _VERSION)


def requests(
    make: Callable[[int], Any], function: Callable[..., Any], seeds: Sequence[int], loops: int, many: int
) -> tuple[list[bytes], float] | int:
    """So many requests of so many calls each, and how many guesses an output takes; in base's worker.

    Instead of these the number of inputs that are not alike, where the seeds give too few. ValueError in words for
    inputs and outputs that cannot be sealed.
    """
    inputs: dict[bytes, bool] = {}
    for seed in seeds:
        given = make(seed)
        inputs[packed(given)] = isinstance(given, dict)
    if len(inputs) < loops * many:
        return len(inputs)
    found, everything = [], []
    for first in range(0, loops * many, loops):
        part = list(inputs)[first : first + loops]
        named = inputs[part[0]]
        outputs = [function(**loads(one)[0]) if named else function(*loads(one)) for one in part]
        if not all(map(plain, outputs)):
            raise ValueError(f"expected outputs of {_WORDS}, got {type(outputs[0]).__name__}")
        found.append(seal(part, outputs[:-1], named))
        everything += outputs
    return found, guesses(everything)


def walk(function: Callable[..., Any], body: bytes | bytearray) -> tuple[list[Any], Any]:
    """Calls with each input of a request in turn; all outputs, and the last input.

    It ends early where an output is not base's, so that the next input cannot be read; then there are fewer outputs.
    """
    named, sealed = loads(body)
    pad, given, outputs = _pad(len(sealed[0])), loads(sealed[0]), []
    if named:
        called = function
        function = lambda keywords: called(**keywords)  # noqa: E731 - as little around a call as can be
    for hidden in sealed[1:]:
        output = function(*given)
        outputs.append(output)
        try:
            opened = _added(hidden, pad(dumps(output, _VERSION)))
        except ValueError:  # it is not plain, and so not base's
            return outputs, given
        if not opened.endswith(_TAG):
            return outputs, given
        given = loads(opened)
    outputs.append(function(*given))
    return outputs, given


def again(outputs: Sequence[Any], body: bytes | bytearray) -> None:
    """What `walk` does with a request, but for the calls: it takes their outputs from before."""
    _, sealed = loads(body)
    pad, _, kept = _pad(len(sealed[0])), loads(sealed[0]), []
    for hidden, output in zip(sealed[1:], outputs, strict=False):
        kept.append(output)
        opened = _added(hidden, pad(dumps(output, _VERSION)))
        if opened.endswith(_TAG):
            loads(opened)


def _pad(size: int) -> Callable[[bytes], bytes]:
    """Output's bytes -> so many bytes that nobody can tell who does not know them."""
    import hashlib

    if size == _SIZE:
        return lambda data: hashlib.blake2b(data).digest()
    return lambda data: hashlib.shake_128(data).digest(size)


def _added(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")
