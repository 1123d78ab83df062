"""What was judged, stage by stage: an sqlite file to which rows are only added.

An attempt is keyed by task, patch, environment and protocol; judging the same again adds another one. A stage has one
row when it begins, however often it is interrupted, and one when it is done; an attempt has one last row. Triggers
refuse every change, so that after a kill at any point the rows of completed stages are what they were.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS attempts (
  id TEXT PRIMARY KEY, task TEXT NOT NULL, patch TEXT NOT NULL, environment TEXT NOT NULL, protocol TEXT NOT NULL,
  number INTEGER NOT NULL, sandboxed INTEGER NOT NULL, facts TEXT NOT NULL, started TEXT NOT NULL,
  UNIQUE (task, patch, environment, protocol, number)
);
CREATE TABLE IF NOT EXISTS begun (
  attempt TEXT NOT NULL REFERENCES attempts, stage TEXT NOT NULL, at TEXT NOT NULL, PRIMARY KEY (attempt, stage)
);
CREATE TABLE IF NOT EXISTS done (
  attempt TEXT NOT NULL REFERENCES attempts, stage TEXT NOT NULL, at TEXT NOT NULL, result TEXT NOT NULL,
  PRIMARY KEY (attempt, stage)
);
CREATE TABLE IF NOT EXISTS final (
  attempt TEXT PRIMARY KEY REFERENCES attempts, at TEXT NOT NULL, outcome TEXT NOT NULL, verdict TEXT NOT NULL
);
"""
_SAME = "task = ? AND patch = ? AND environment = ? AND protocol = ?"
_LAST = f"SELECT coalesce(max(number), 0) FROM attempts WHERE {_SAME}"  # noqa: S608
_UNFINISHED = (
    f"SELECT id, number FROM attempts WHERE {_SAME} AND sandboxed = ? "  # noqa: S608
    "AND id NOT IN (SELECT attempt FROM final) ORDER BY number"
)
_NAMES = ("attempts", "begun", "done", "final")


_RESERVE, _RESERVED = "reserve", 1 << 20
"""A file of so many bytes, which makes room for the last row where a disk is full."""


class Key(NamedTuple):
    """What makes two judgements the same: digests."""

    task: str
    patch: str
    environment: str
    protocol: str


@dataclass(frozen=True)
class Attempt:
    """One judgement, under way or not."""

    id: str
    number: int
    """Among those of its key, from 1."""
    folder: Path


class Ledger:
    """The ledger of a store, and the folders of its attempts."""

    def __init__(self, store: Path) -> None:
        """Opens or makes it."""
        self.store = store
        (store / "attempts").mkdir(parents=True, exist_ok=True)
        (store / "tmp").mkdir(exist_ok=True)
        self.rows = sqlite3.connect(store / "ledger.sqlite", timeout=60, isolation_level=None)
        self.rows.execute("PRAGMA journal_mode=WAL")
        self.rows.execute("PRAGMA synchronous=FULL")
        if not self._one("SELECT count(*) FROM sqlite_master WHERE name = 'final_kept_delete'"):
            with self._changes():
                for statement in filter(str.strip, _TABLES.split(";")):
                    self.rows.execute(statement)
                for name in _NAMES:
                    for what in ("update", "delete"):
                        self.rows.execute(
                            f"CREATE TRIGGER IF NOT EXISTS {name}_kept_{what} BEFORE {what.upper()} ON {name} "
                            f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
                        )
                self.rows.execute(f"PRAGMA user_version={SCHEMA}")
        version = self._one("PRAGMA user_version")
        if version != SCHEMA:
            raise ValueError(f"ledger: expected version {SCHEMA}, got {version}")
        with contextlib.suppress(OSError), (store / _RESERVE).open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, _RESERVED)

    def release(self) -> None:
        """Gives back what is kept in reserve: from now on there is room for a few rows."""
        (self.store / _RESERVE).unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file."""
        self.rows.close()

    @contextlib.contextmanager
    def attempt(self, key: Key, *, sandboxed: bool, facts: dict[str, Any]) -> Iterator[Attempt]:
        """The key's attempt that was interrupted and that nobody works on, or a new one; locked meanwhile."""
        with self._changes():
            lock = None
            for name, number in self.rows.execute(_UNFINISHED, (*key, sandboxed)).fetchall():
                lock = self._locked(name)
                if lock is not None:
                    found = Attempt(name, number, self.store / "attempts" / name)
                    break
            else:
                number = 1 + self._one(_LAST, *key)
                name = sha256(json.dumps([*key, number]).encode()).hexdigest()[:12]
                lock = self._locked(name)
                if lock is None:
                    raise RuntimeError(f"ledger: expected nobody to hold the new attempt {name}")
                row = (name, *key, number, sandboxed, json.dumps(facts, sort_keys=True), _now())
                self.rows.execute("INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                found = Attempt(name, number, self.store / "attempts" / name)
        try:
            yield found
        finally:
            os.close(lock)

    def begin(self, attempt: Attempt, stage: str) -> dict[str, Any] | None:
        """Notes that a stage begins, once. What it gave, if it is already done."""
        with self._changes():
            self.rows.execute("INSERT OR IGNORE INTO begun VALUES (?, ?, ?)", (attempt.id, stage, _now()))
        row = self._one("SELECT result FROM done WHERE attempt = ? AND stage = ?", attempt.id, stage)
        return None if row is None else json.loads(row)

    def finish(self, attempt: Attempt, stage: str, result: dict[str, Any]) -> dict[str, Any]:
        """Notes what a stage gave; itself."""
        with self._changes():
            text = json.dumps(result, sort_keys=True)
            self.rows.execute("INSERT INTO done VALUES (?, ?, ?, ?)", (attempt.id, stage, _now(), text))
        return result

    def close_attempt(self, attempt: Attempt, verdict: dict[str, Any]) -> None:
        """The last row of an attempt."""
        with self._changes():
            text = json.dumps(verdict, sort_keys=True)
            self.rows.execute("INSERT INTO final VALUES (?, ?, ?, ?)", (attempt.id, _now(), verdict["outcome"], text))

    def closed(self, attempt: Attempt) -> bool:
        """Whether the attempt has its last row."""
        return self._one("SELECT 1 FROM final WHERE attempt = ?", attempt.id) is not None

    def attempts(self, task: str, patch: str) -> int:
        """How often this patch has been judged for this task, wherever and however."""
        return int(self._one("SELECT count(*) FROM attempts WHERE task = ? AND patch = ?", task, patch))

    def listing(self) -> list[dict[str, Any]]:
        """A row an attempt, oldest first; outcome "" while it is not finished."""
        names = ("id", "task", "patch", "environment", "protocol", "number", "sandboxed", "facts", "started", "outcome")
        given = "SELECT a.*, coalesce(f.outcome, '') FROM attempts a LEFT JOIN final f ON f.attempt = a.id"
        rows = self.rows.execute(f"{given} ORDER BY a.started, a.rowid").fetchall()
        return [dict(zip(names, row, strict=True)) for row in rows]

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Path]:
        """A folder in the store for the time being; those that killed judges left are removed."""
        place = self.store / "tmp"
        for old in place.glob("*.lock"):
            if (lock := _lock(old)) is not None:
                shutil.rmtree(old.with_suffix(""), ignore_errors=True)
                old.unlink(missing_ok=True)
                os.close(lock)
        folder = place / f"{os.getpid()}-{time.time_ns():x}"
        lock = None
        while lock is None:  # the lock is there before the folder is, so that a kill leaves none without
            lock = _lock(folder.with_suffix(".lock"))
            if lock is not None and not folder.with_suffix(".lock").exists():  # swept before it was held
                os.close(lock)
                lock = None
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".lock").unlink(missing_ok=True)
            os.close(lock)

    def _locked(self, name: str) -> int | None:
        folder = self.store / "attempts" / name
        folder.mkdir(exist_ok=True)
        return _lock(folder / "lock")

    def _one(self, query: str, *values: Any) -> Any:
        row = self.rows.execute(query, values).fetchone()
        return None if row is None else row[0]

    @contextlib.contextmanager
    def _changes(self) -> Iterator[None]:
        self.rows.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.rows.execute("ROLLBACK")
            raise
        self.rows.execute("COMMIT")


def _lock(path: Path) -> int | None:
    """A descriptor that holds the file's lock; None if somebody else does."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
