"""Python files that raise as soon as they are imported: what still works then does not use them."""

from collections.abc import Sequence
from pathlib import Path

from assay.contract.patterns import CHECKS, UNASKED, matches

_RAISES = 'raise SystemExit("assay: is this file imported?")\n'
"""No ImportError, which a caller may catch to go on without the file."""
_SHOWN = 5


def code(paths: Sequence[str]) -> list[str]:
    """Python files among paths of a tree, but for those that test, measure or build."""
    return [path for path in paths if path.endswith(".py") and not matches(path, (*CHECKS, *UNASKED))]


def poison(tree: Path, files: Sequence[str]) -> None:
    """Makes files of a tree raise."""
    for path in files:
        (tree / path).write_text(_RAISES)


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
