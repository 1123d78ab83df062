"""Every trick gets what it should, and would have got through without the defence that it meets."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from zoo_project import PROPERTY, TESTS, WORK, Setting, Trick, laid_out, outcome
from zoo_tricks import TRICKS

pytestmark = pytest.mark.sandbox
HONEST = Trick("honest", "", "", {"work.py": WORK.replace("PASSES = 2", "PASSES = 1")})


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    """All on one processor, so that arms can be in each other's way."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield Setting(tmp_path, monkeypatch)
    os.sched_setaffinity(0, allowed)


def needed(trick: Trick) -> None:
    if trick.name == "stale library" and shutil.which("cc") is None:
        pytest.skip("no C compiler")


def each(quick: bool) -> list[Any]:
    """Every trick; those that are measured before they are known are left to the full tests, or all if not `quick`."""
    quickly = [quick and trick.stops and not trick.later for trick in TRICKS]
    marks = [() if one else pytest.mark.full for one in quickly]
    return [pytest.param(t, id=t.name.replace(" ", "-"), marks=m) for t, m in zip(TRICKS, marks, strict=True)]


@pytest.mark.parametrize("trick", each(quick=True))
def test_it_does_not_work(trick: Trick, setting: Setting) -> None:
    needed(trick)
    laid_out(trick, setting)
    kind, _, wanted = trick.expected.partition(":")
    assert kind in ("rejected", "neutralised")
    noise = ("infra.noise",) if "void" in trick.or_else else ()
    assert outcome(setting, stop=trick.stops) in (wanted, *trick.or_else, *noise)
    assert trick.seen(setting.folder) == ""


@pytest.mark.parametrize("trick", each(quick=False))
def test_without_its_defence_it_would(trick: Trick, setting: Setting) -> None:
    needed(trick)
    laid_out(trick, setting)
    found = trick.control(setting) or outcome(setting, stop=trick.stops)
    assert found == trick.won


@pytest.mark.full
def test_an_honest_change_wins(setting: Setting) -> None:
    laid_out(HONEST, setting)
    setting.more = TESTS + PROPERTY
    assert outcome(setting, stop=False) == "faster"


def test_every_trick_is_in_the_list_of_threats() -> None:
    text = (Path(__file__).parents[2] / "THREATS.md").read_text()
    missing = [trick.name for trick in TRICKS if f"`{trick.name}`" not in text]
    assert not missing and len({trick.name for trick in TRICKS}) == len(TRICKS)
