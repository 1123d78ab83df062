"""Documents of a few lines: every kind of value, keys with dots, tables and arrays of them."""

from hypothesis import strategies

_VALUES = strategies.sampled_from(
    [
        "1",
        "-0x1f".removeprefix("-"),
        "1_000",
        "1.5e3",
        "true",
        '"a\\tb"',
        "'c'",
        '"""\nd\\\n  e"""',
        "'''f'''",
        "[1, [2, 3],]",
    ]
) | strategies.sampled_from(["{a = 1, b.c = 2}", "1979-05-27", "07:32:00", "1979-05-27T07:32:00", "[ # x\n 1 ]", "inf"])
_TEXT = strategies.text(strategies.sampled_from("ab \u00e9\U0001f600"), max_size=12).map(lambda text: f'"{text}"')


@strategies.composite
def _documents(draw):
    lines = []
    for i in range(draw(strategies.integers(1, 8))):
        kind = draw(strategies.sampled_from(["key", "dotted", "table", "array", "comment", "empty"]))
        value = draw(_VALUES | _TEXT)
        lines += {
            "key": [f"k{i} = {value}  # c"],
            "dotted": [f"d{i}.'x y'.z = {value}"],
            "table": [f"[t{i}.u]", f"v = {value}"],
            "array": [f"[[a{i}]]", f"v = {value}", f"[[a{i}]]"],
            "comment": ["# a comment with \u20ac"],
            "empty": ["", "  "],
        }[kind]
    return "\n".join(lines), 1


def documents():
    return _documents()


strings = comments = documents
