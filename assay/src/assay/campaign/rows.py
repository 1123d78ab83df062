"""The journal of a campaign: a line of JSON per finished cell, added and never changed."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from assay.contract.cells import Row
from assay.contract.outcome import INFRA, Outcome

JOURNAL = "journal.jsonl"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of finished cells by their keys; a torn last line is left out.

    Of several rows of a key the first counts that infrastructure did not spoil, else the last.
    """
    file = folder / JOURNAL
    found: dict[str, dict[str, Any]] = {}
    for line in file.read_text().split("\n")[:-1] if file.exists() else []:
        row = json.loads(line)
        if row["key"] not in found or spoilt(found[row["key"]]["outcome"]):
            found[row["key"]] = row
    return found


def spoilt(outcome: str) -> bool:
    """Whether an outcome says nothing of whoever made the patch, and may be asked for again."""
    return outcome.startswith(INFRA) or outcome == Outcome.VOID


def add(folder: Path, row: Row) -> dict[str, Any]:
    """Adds a line, on disk when this returns; a torn line of a judge that was killed is taken away first."""
    found = asdict(row)
    with (folder / JOURNAL).open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            if whole < end:
                file.truncate(whole)
        file.write(json.dumps(found).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return found
