"""What every gate found, in a file beside the plan: gates are tried on different machines, the verdict needs all.

A gate that the task asks for and that nobody has tried leaves a patch not evaluated. One that was left out on request
does not, and the verdict says so.
"""

import json
from pathlib import Path
from typing import NamedTuple

from assay.frozen import Frozen, written

FILE = "gates.json"
GATES = ("build", "tests", "equivalence", "provenance")
OPTIONAL = GATES[1:]
"""Those that may be left out on request."""
SKIPPED = "skipped"


class Gate(NamedTuple):
    """What a gate found: "" as outcome if it was passed, SKIPPED if it was left out on request."""

    outcome: str
    words: str


LEFT_OUT = Gate(SKIPPED, "left out on request")


def passed(found: Gate) -> bool:
    """Whether the next gate is tried."""
    return found.outcome in ("", SKIPPED)


def noted(frozen: Frozen, folder: Path) -> dict[str, Gate]:
    """What was found of a plan, from the file in a folder; nothing if there is none. ValueError if it is another's."""
    file = folder / FILE
    if not file.exists():
        return {}
    content = json.loads(file.read_text())
    if content.get("plan") != frozen.digest:
        raise ValueError(f"GATES: expected those of plan {frozen.digest}, got {content.get('plan')} in {file}")
    return {name: Gate(*found) for name, found in content["gates"].items()}


def note(frozen: Frozen, name: str, found: Gate) -> Gate:
    """Adds what a gate found to the file beside the plan; itself."""
    gates = {**noted(frozen, frozen.folder), name: found}
    text = json.dumps({"kind": "gates", "plan": frozen.digest, "gates": gates}, indent=1)
    written(frozen.folder / FILE, text + "\n")
    return found


def wanted(frozen: Frozen) -> list[str]:
    """Gates that the task asks for and that are not left out."""
    return [name for name in frozen.content["gates"]["asked"] if name not in frozen.content["gates"]["skipped"]]


def left_out(frozen: Frozen) -> list[str]:
    """Gates that the task asks for and that are left out on request."""
    return [name for name in frozen.content["gates"]["asked"] if name in frozen.content["gates"]["skipped"]]


def complete(frozen: Frozen, found: dict[str, Gate]) -> list[dict[str, str]]:
    """All gates in their order, as a verdict names them; one that was asked for and not tried is `not_evaluated`."""
    gates = dict.fromkeys(left_out(frozen), LEFT_OUT)
    gates |= {name: Gate("not_evaluated", f"{name}: asked for and not run") for name in wanted(frozen)}
    gates |= found
    return [{"name": name, **gates[name]._asdict()} for name in GATES if name in gates]
