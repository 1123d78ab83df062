"""The ledger: rows are only added, a stage appears once, and an attempt is taken up again by one judge alone."""

import sqlite3
from pathlib import Path

import pytest

from assay.judgement.ledger import Key, Ledger

KEY = Key("task", "patch", "environment", "protocol")


def test_stages_once_and_one_last_row(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with ledger.attempt(KEY, sandboxed=True, facts={"a": 1}) as attempt:
        assert attempt.number == 1 and attempt.folder.is_dir()
        assert ledger.begin(attempt, "build") is None and ledger.begin(attempt, "build") is None
        assert ledger.finish(attempt, "build", {"outcome": ""}) == {"outcome": ""}
        assert ledger.begin(attempt, "build") == {"outcome": ""}
        with pytest.raises(sqlite3.IntegrityError):
            ledger.finish(attempt, "build", {"outcome": "build_failed"})
    with Ledger(tmp_path).attempt(KEY, sandboxed=True, facts={}) as again:
        assert again == attempt  # it was not finished
        assert ledger.begin(again, "build") == {"outcome": ""}
        ledger.close_attempt(again, {"outcome": "faster"})
        with pytest.raises(sqlite3.IntegrityError):
            ledger.close_attempt(again, {"outcome": "slower"})
    assert ledger.closed(attempt) and ledger.attempts("task", "patch") == 1
    with ledger.attempt(KEY, sandboxed=True, facts={}) as new:
        assert new.number == 2 and new.id != attempt.id and not ledger.closed(new)
    assert [(row["number"], row["outcome"]) for row in ledger.listing()] == [(1, "faster"), (2, "")]


def test_what_makes_a_key(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with ledger.attempt(KEY, sandboxed=True, facts={}) as first:
        pass
    for i in range(4):
        other = Key(*(value + "2" * (i == j) for j, value in enumerate(KEY)))
        with ledger.attempt(other, sandboxed=True, facts={}) as found:
            assert found.number == 1 and found.id != first.id
    with ledger.attempt(KEY, sandboxed=False, facts={}) as outside:
        assert outside.id != first.id and outside.number == 2  # what ran unprotected never goes on in a sandbox
    assert ledger.attempts("task", "patch") == 4


def test_an_attempt_that_somebody_works_on_is_left_alone(tmp_path: Path) -> None:
    ledger, other = Ledger(tmp_path), Ledger(tmp_path)
    with (
        ledger.attempt(KEY, sandboxed=True, facts={}) as one,
        other.attempt(KEY, sandboxed=True, facts={}) as two,
    ):
        assert (one.number, two.number) == (1, 2)
    with ledger.attempt(KEY, sandboxed=True, facts={}) as again:
        assert again.number == 1


@pytest.mark.parametrize("table", ["attempts", "begun", "done", "final"])
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET rowid = rowid + 1"])
def test_rows_are_only_added(table: str, statement: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with ledger.attempt(KEY, sandboxed=True, facts={}) as attempt:
        ledger.begin(attempt, "build")
        ledger.finish(attempt, "build", {})
        ledger.close_attempt(attempt, {"outcome": "void"})
    with (
        sqlite3.connect(tmp_path / "ledger.sqlite") as rows,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        rows.execute(statement.format(table))


def test_folders_that_a_killed_judge_left_are_removed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with ledger.temporary() as mine:
        (tmp_path / "tmp/old").mkdir()
        (tmp_path / "tmp/old.lock").touch()
        (tmp_path / "tmp/none.lock").touch()  # killed before there was a folder
        with Ledger(tmp_path).temporary() as other:
            assert mine.is_dir() and other.is_dir() and not (tmp_path / "tmp/old").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_ledger_of_another_version(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as rows:
        rows.execute("PRAGMA user_version=7")
    with pytest.raises(ValueError, match="ledger: expected version 1, got 7"):
        Ledger(tmp_path)
