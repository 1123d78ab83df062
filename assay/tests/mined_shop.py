"""A repository with commits that claim to be faster, for the tests that make tasks from commits and records."""

from pathlib import Path

from small_project import files, git

SLOW = """import re


class Price:
    def __init__(self, cents: int, name: str = ""):
        self.cents = cents

    def shown(self, places: int) -> str:
        text = ""
        for _ in range(places):
            text = text + "0"
        return f"{self.cents}.{text}"


def total(prices: list[int], tax: float) -> float:
    found = 0
    for one in prices:
        found = found + one
    return found * tax


def _helper(table):
    return [one for one in table]
"""
FAST = SLOW.replace(
    "    found = 0\n    for one in prices:\n        found = found + one\n    return found * tax",
    "    return sum(prices) * tax",
)
FASTER = FAST.replace(
    '        text = ""\n        for _ in range(places):\n            text = text + "0"\n',
    '        text = "0" * places\n',
)
TESTS = "from shop.prices import total\n\n\ndef test_total():\n    assert total([1, 2], 2.0) == 6.0\n"


def repository(folder: Path) -> Path:
    """Seven commits, of which three claim something and one takes back another."""
    place = folder / "shop"
    history_of = [
        ("start", {"src/shop/__init__.py": "", "src/shop/prices.py": SLOW, "tests/test_prices.py": TESTS}),
        ("Speed up total (#3)\n\nBefore: 12.5 us, after: 3 us.", {"src/shop/prices.py": FAST, "bench/total.py": "1\n"}),
        ("docs: how to be faster", {"docs/x.md": "x\n"}),
        ('Revert "Speed up total (#3)" (#4)', {"src/shop/prices.py": SLOW}),
        ("Reword", {"src/shop/prices.py": SLOW.replace("_helper", "_help")}),
        ("total: twice", {"src/shop/prices.py": FAST.replace("_helper", "_help")}),
        ("perf: 30-40% faster shown", {"src/shop/prices.py": FASTER.replace("_helper", "_help")}),
    ]
    place.mkdir()
    git(place, "init", "--quiet", "-b", "main")
    for message, contents in history_of:
        files(place, contents)
        git(place, "add", "--all")
        git(place, "commit", "--quiet", "-m", f"{message}\n\nSigned-off-by: A Person <a.person@example.org>")
    return place
