"""Text that may come from anybody, as people and other tools may be shown it.

What a candidate prints, raises or calls its files could move a cursor, turn the direction of writing, or begin a line
of its own that reads like a verdict. So whatever leaves assay for a person passes through here.
"""

CONTINUED = "\n  | "
"""Begins each further line of a text, which thus never stands where a verdict does."""


def shown(text: object) -> str:
    """The text with every character escaped that does not print, but for line ends.

    Among them are control characters, marks that change the direction of writing, line separators of Unicode, and bytes
    of file names that are no UTF-8.
    """
    return "".join(letter if letter.isprintable() or letter == "\n" else _escaped(letter) for letter in str(text))


def told(text: object) -> str:
    """For a terminal or a log: escaped, further lines marked as such."""
    return shown(text).rstrip("\n").replace("\n", CONTINUED)


def on_one_line(text: object) -> str:
    """Escaped, all white space between words one space."""
    return shown(" ".join(str(text).split()))


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
