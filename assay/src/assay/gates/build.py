"""The build gate: every arm is set up and built alike, each with a cache of its own that is empty at first."""

import json
import shutil

from assay.arms import commands
from assay.contract.outcome import Outcome
from assay.gates.gate import Found, Gate, Given, Where

MARK = "built.json"
"""Beside the plan once all arms are built."""


def built(given: Given) -> Found:
    """Sets up and builds all arms, unless that was done. ValueError if a tree is not what was frozen."""
    given.renew()
    frozen = given.frozen
    wanted, well = frozen.content["commands"], Found("", f"{len(frozen.arms)} arms")
    if (frozen.folder / MARK).exists():
        return well
    frozen.check()
    shutil.rmtree(frozen.folder / "cache", ignore_errors=True)
    for arm in frozen.arms:
        for command in [*wanted["setup"], *wanted["build"]]:
            ended = commands.run(
                frozen,
                arm,
                command,
                sandboxed=given.sandboxed,
                writable=True,
                timeout_s=given.most(wanted["timeout_s"]),
            )
            given.most(1)
            if ended.status:
                words = f"{arm}: {' '.join(command)}: {commands.words(ended)}"
                return Found("build_failed" if arm == "candidate" else Outcome.TASK_INVALID, words)
    (frozen.folder / MARK).write_text(json.dumps({"sandboxed": given.sandboxed}) + "\n")
    return well


GATE = Gate("build", built, Where.BOTH, rejects=("build_failed",))
