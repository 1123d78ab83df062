"""What every gate found, in a file beside the plan: gates are tried on different machines, the verdict needs all.

A gate that the task asks for and that nobody has tried leaves a patch not evaluated. One that was left out on request
does not, and the verdict says so.
"""

import json
from pathlib import Path

from assay.contract.frozen import Frozen, written
from assay.contract.outcome import Outcome
from assay.gates import table
from assay.gates.gate import LEFT_OUT, Found

FILE = "gates.json"


def noted(frozen: Frozen, folder: Path) -> dict[str, Found]:
    """What was found of a plan, from the file in a folder; nothing if there is none. ValueError if it is another's."""
    file = folder / FILE
    if not file.exists():
        return {}
    content = json.loads(file.read_text())
    if content.get("plan") != frozen.digest:
        raise ValueError(f"GATES: expected those of plan {frozen.digest}, got {content.get('plan')} in {file}")
    return {name: Found(*found) for name, found in content["gates"].items()}


def note(frozen: Frozen, name: str, found: Found) -> Found:
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


def complete(frozen: Frozen, found: dict[str, Found]) -> list[dict[str, str]]:
    """All gates in their order, as a verdict names them; one that was asked for and not tried is `not_evaluated`."""
    gates = dict.fromkeys(left_out(frozen), LEFT_OUT)
    gates |= {name: Found(Outcome.NOT_EVALUATED, f"{name}: asked for and not run") for name in wanted(frozen)}
    gates |= found
    return [{"name": name, **gates[name]._asdict()} for name in table.NAMES if name in gates]
