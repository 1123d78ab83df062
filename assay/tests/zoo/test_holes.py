"""Each kind of hole that was found has a test, an entry of the zoo, and a control that shows the entry winning."""

import ast
import re
from functools import cache
from pathlib import Path

from zoo_project import Trick
from zoo_tricks import TRICKS

TESTS = Path(__file__).parents[1]
THREATS = (TESTS.parent / "THREATS.md").read_text()
KINDS = 11
NO_CONTROL = Trick("", "", "").control
"""What an entry has that takes no defence away."""


@cache
def named(file: str) -> list[str]:
    """Names of all tests in a file."""
    tree = ast.parse((TESTS / file).read_text())
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def kinds() -> dict[str, tuple[list[str], list[str]]]:
    """The rows of the table: a kind, its tests as `file::name`, and its entries."""
    table = THREATS.partition("## Kinds of holes")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    return {kind: (re.findall("`([^`]+)`", shown), re.findall("`([^`]+)`", tried)) for kind, shown, tried in rows}


def test_each_kind_has_a_test_an_entry_and_a_control() -> None:
    entries = {trick.name: trick for trick in TRICKS}
    assert len(kinds()) == KINDS
    for kind, (shown, tried) in kinds().items():
        assert shown and tried, kind
        for test in shown:
            file, _, name = test.partition("::")
            assert name in named(file), test
        for name in tried:
            assert entries[name].control is not NO_CONTROL, name


def test_a_control_shows_another_outcome_than_the_judge() -> None:
    """What an entry wins without its defence is nothing that it may come to with it."""
    for trick in TRICKS:
        assert trick.won not in (trick.expected.partition(":")[2], *trick.or_else), trick.name
