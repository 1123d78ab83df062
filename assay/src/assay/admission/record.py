"""Admissions on disk: what is done of one that is under way, and the record, each written whole or not at all.

An admission has a folder of its own in the store, named after task, reference and machine. A check that is done is not
done again, and a record that is there is the last word until somebody admits anew.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assay import __version__
from assay.contract.admission import VERSION, Reason
from assay.contract.frozen import written

FILE, UNDER_WAY = "admission.json", "checks.json"
_SECONDS = "%Y-%m-%dT%H:%M:%SZ"
DAYS = 90


@dataclass(frozen=True)
class Key:
    """What an admission is valid for: digests."""

    task: str
    reference: str
    machine: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return digest([self.task, self.reference, self.machine])


def digest(value: Any) -> str:
    """Identity of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Checks:
    """What has been found so far, in a file beside the record."""

    def __init__(self, folder: Path, how: dict[str, Any]) -> None:
        """Goes on where it was cut short, if it was asked in the same way: `how` are the options."""
        self.file, self.how = folder / UNDER_WAY, {**how, "assay": __version__, "schema": VERSION}
        self.found: dict[str, list[Reason]] = {}
        if self.file.exists():
            content = json.loads(self.file.read_text())
            if content["how"] == self.how:
                self.found = {name: [Reason(**one) for one in many] for name, many in content["found"].items()}

    def once(self, name: str, check: Callable[[], Sequence[Reason]]) -> list[Reason]:
        """What a check finds, or has found before."""
        if name not in self.found:
            self.found[name] = list(check())
            found = {one: [asdict(reason) for reason in many] for one, many in self.found.items()}
            written(self.file, json.dumps({"how": self.how, "found": found}, indent=1) + "\n")
        return self.found[name]


def finish(folder: Path, content: dict[str, Any]) -> Path:
    """Writes the record, and forgets the checks; in this order, so that a kill loses nothing."""
    written(folder / FILE, json.dumps(content, indent=1) + "\n")
    (folder / UNDER_WAY).unlink(missing_ok=True)
    return folder / FILE


@contextlib.contextmanager
def locked(store: Path, key: Key, waiting: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
    """The folder of an admission, held alone; the lock ends with the process."""
    folder = store / "admissions" / key.name
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting("an admission of this task")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(file)


def read(file: Path) -> dict[str, Any]:
    """A record from its file. ValueError if it is none of this version."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as problem:
        raise ValueError(f"ADMISSION: expected an admission, got {problem}") from None
    if not isinstance(found, dict) or (found.get("kind"), found.get("schema")) != ("admission", VERSION):
        raise ValueError(f"ADMISSION: expected an admission of schema {VERSION}, got {file}")
    return found


def refusal(found: dict[str, Any], key: Key, now: datetime.datetime | None = None) -> str:
    """Why a record does not admit a task on a machine now, in words; "" if it does."""
    if found["outcome"] != "admitted":
        return f"it is {found['outcome']}"
    for name, was, wanted in (
        ("task", found["task"]["digest"], key.task),
        ("reference", found["reference"], key.reference),
        ("machine", digest(found["machine"]), key.machine),
    ):
        if was != wanted:
            return f"it was admitted for another {name}, {was}, than {wanted}"
    if found["expires"] <= stamp(now or datetime.datetime.now(datetime.UTC)):
        return f"the admission has expired on {found['expires'][:10]}"
    return ""


def stamp(when: datetime.datetime) -> str:
    """A time in UTC, as records have it."""
    return when.astimezone(datetime.UTC).strftime(_SECONDS)
