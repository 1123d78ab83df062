"""Made-up blocks in a folder of RAW, for the tests that decide on figures they know."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from assay.contract.frozen import FILE, Frozen
from assay.contract.plan import VERSION as SCHEMA
from assay.contract.rows import VERSION as RAW_SCHEMA
from assay.contract.workload import Plan, Workload
from assay.gates import notes
from assay.gates.gate import Found


def raw(
    folder: Path,
    ratios: Mapping[str, Sequence[float]],
    *,
    require: str = "faster",
    asked: Sequence[str] = (),
    skipped: Sequence[str] = (),
    found: Mapping[str, Found] | None = None,
    unchecked: bool = False,
    **block: Any,
) -> Path:
    """A folder of RAW: by workload the log-ratios of its blocks, base over candidate. A' takes as long as base."""
    plan = Plan(Workload("command", ("true",)), workloads=len(ratios), unchecked=unchecked).checked()
    content = {
        "kind": "plan",
        "schema": SCHEMA,
        "attempt": {"id": "0" * 12, "number": 1},
        "task": {"name": "t", "digest": "0" * 16, "delta": plan.delta, "require": require},
        "patch": {"digest": "0" * 16, "bytes": 1, "changed": ["a"], "restored": [], "left": []},
        "protocol": "0" * 16,
        "gates": {"asked": list(asked), "skipped": list(skipped)},
        "outcome": "",
        "words": [],
        "sandbox": {"wanted": True},
        "workloads": {name: asdict(plan) for name in ratios},
    }
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(json.dumps(content))
    frozen = Frozen.read(folder / FILE)
    for name, gate in (found or {}).items():
        notes.note(frozen, name, gate)
    for name, values in ratios.items():
        rows: list[dict[str, Any]] = [
            {
                "kind": "header",
                "schema": RAW_SCHEMA,
                "plan": asdict(plan),
                "isolation": "sandbox",
                "clock": "judge",
            }
        ]
        for value in values:
            primary = {"base": 1.0, "candidate": math.exp(-value), "control": 1.0}
            rows.append({"kind": "block", "differing": [], "compared": 1, "reasons": [], "primary": primary, **block})
        rows.append({"kind": "verdict"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def about(centre: float, spread: float) -> list[float]:
    """40 log-ratios, evenly spread about their centre, in an order of no meaning."""
    values = [centre + spread * (i - 19.5) / 19.5 for i in range(40)]
    random.Random(1).shuffle(values)
    return values


FASTER, SLOWER, EQUIVALENT = about(0.1, 0.01), about(-0.1, 0.01), about(0.0, 0.01)
WITHIN = about(0.01, 0.005)
BOUNDED, UNBOUNDED = about(0.012, 0.05), about(0.0, 0.2)
"""Both undecided: the first is shown to be no worse than 2 %, the second is not."""
