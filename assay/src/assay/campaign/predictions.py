"""prediction.jsonl, as GSO and SWE-bench write it: who made which patch for which instance, one object per line."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from assay.contract.errors import UsageError

_NAMES = ("instance_id", "model_name_or_path", "model_patch")


@dataclass(frozen=True)
class Prediction:
    """One line."""

    instance: str
    model: str
    patch: bytes
    place: str = ""
    """File and line that it was read from."""


def read_predictions(file: Path) -> list[Prediction]:
    """The lines of a file; other keys than the three are not read. UsageError names the line that is wrong."""
    try:
        text = file.read_text(errors="surrogateescape")
    except OSError as problem:
        raise UsageError(f"{file}: expected predictions, got {problem.strerror}") from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except ValueError as problem:
            raise UsageError(f"{file}:{number}: expected a JSON object, got {problem}") from None
        if not isinstance(one, dict) or not all(isinstance(one.get(name), str) for name in _NAMES[:2]):
            raise UsageError(f"{file}:{number}: expected texts {', '.join(_NAMES)}, got {line[:80]}")
        patch = one.get(_NAMES[2])
        if patch is not None and not isinstance(patch, str):
            raise UsageError(f"{file}:{number}: {_NAMES[2]}: expected a text or null, got {type(patch).__name__}")
        data = (patch or "").encode(errors="surrogateescape")
        found.append(Prediction(one[_NAMES[0]], one[_NAMES[1]], data, f"{file}:{number}"))
    return found


def written_predictions(many: Iterable[Prediction]) -> str:
    """The lines of a file. Bytes of a patch that are no UTF-8 become U+FFFD, since JSON has none of them."""
    lines = []
    for one in many:
        values = (one.instance, one.model, one.patch.decode(errors="replace"))
        lines.append(json.dumps(dict(zip(_NAMES, values, strict=True))) + "\n")
    return "".join(lines)
