"""Texts with everything that is escaped, of one, two and four bytes a letter; tags that end."""

from hypothesis import strategies

_TEXTS = strategies.text(strategies.sampled_from("<>&'\"ab \u00e9\u20ac\U0001f600"), max_size=40)
_PIECES = strategies.sampled_from(["<!-- c -->", "<b>", "</b>", "a", " ", "\n", "&amp;", "&raquo;", "<a b='c'>"])


def escaped():
    return strategies.tuples(strategies.lists(_TEXTS, min_size=1, max_size=8), strategies.just(1))


def stripped():
    text = strategies.lists(_PIECES, max_size=12).map("".join)
    return strategies.tuples(strategies.lists(text, min_size=1, max_size=6), strategies.just(1))
