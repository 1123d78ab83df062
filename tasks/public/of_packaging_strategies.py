"""Texts that are right, among them those of odd form."""

from hypothesis import strategies

_NAMES = strategies.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,20}[A-Za-z0-9])?", fullmatch=True)
_VERSIONS = strategies.from_regex(
    r"v?([0-9]{1,2}!)?[0-9]{1,4}(\.[0-9]{1,4}){0,4}((a|b|rc|alpha|c)[0-9]{0,2})?(\.post[0-9]{1,2}|-[0-9]{1,2})?(\.dev[0-9]{1,2})?"
    r"(\+[a-z0-9]{1,4}([._-][a-z0-9]{1,4})?)?",
    fullmatch=True,
)
_PLAIN = strategies.from_regex(r"[0-9]{1,4}(\.[0-9]{1,4}){0,4}", fullmatch=True)
_MARKERS = strategies.sampled_from(
    ["", '; python_version < "3.9"', '; (os_name == "posix" or extra == "x") and platform_machine in "a b"']
)
_PARTS = strategies.tuples(_NAMES, strategies.sampled_from(["", "[a]", "[b, a]"]), _PLAIN, _MARKERS)
_REQUIREMENTS = _PARTS.map(lambda one: f"{one[0]}{one[1]} >= {one[2]}, != 1.*{one[3]}")
_ONCE = strategies.just(1)


def requirements():
    return strategies.tuples(strategies.lists(_REQUIREMENTS, min_size=1, max_size=6), _ONCE)


def names():
    return strategies.tuples(strategies.lists(_NAMES, min_size=1, max_size=8), _ONCE)


def versions():
    one = _VERSIONS | _PLAIN
    return strategies.tuples(strategies.lists(one, min_size=1, max_size=8), _ONCE)
