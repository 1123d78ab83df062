"""The build gate: every arm is set up and built alike, each with a cache of its own that is empty at first.

Arms are built beside each other. A' is built although its sources are base's: it says what a second build differs by.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import closing

from assay.arms import commands, turns
from assay.contract.frozen import written
from assay.contract.outcome import Outcome
from assay.gates.gate import Found, Gate, Given, Where

MARK = "built.json"
"""Beside the plan once all arms are built."""


def built(given: Given) -> Found:
    """Sets up and builds all arms, unless that was done. ValueError if a tree is not what was frozen.

    ValueError, too, if it was built where the plan was prepared, and is not what was built there.
    """
    given.renew()
    frozen, file, well = given.frozen, given.frozen.folder / MARK, f"{len(given.frozen.arms)} arms"
    if not file.exists():
        frozen.check()
        shutil.rmtree(frozen.folder / "cache", ignore_errors=True)
        if failed := _first_failure(given):
            return failed
        written(file, json.dumps({"sandboxed": given.sandboxed}) + "\n")
        return Found("", well)
    mark = json.loads(file.read_text())
    if "ahead" not in mark:
        return Found("", well)
    if not mark["seen"]:  # later on, arms have left caches in their trees
        frozen.check(mark["ahead"])
        written(file, json.dumps(mark | {"seen": True}) + "\n")
    return Found("", f"{well}, built where it was prepared: {_listed(mark['ahead'])}")


def build_ahead(given: Given) -> Found:
    """Builds all arms where the plan is prepared, and notes digests of what is then to be measured."""
    found = built(given)
    if not found.passed:
        return found
    digests = {arm: given.frozen.digest_of(arm) for arm in given.frozen.arms}
    mark = {"sandboxed": given.sandboxed, "ahead": digests, "seen": False}
    written(given.frozen.folder / MARK, json.dumps(mark) + "\n")
    return Found("", f"{found.words}: {_listed(digests)}")


def _listed(digests: Mapping[str, str]) -> str:
    return ", ".join(f"{arm} {digest}" for arm, digest in digests.items())


def _first_failure(given: Given) -> Found | None:
    """Builds the arms; what is found of the first one, in their order, that could not be built.

    A candidate that fails waits for base, which may fail as well. What stands behind the first that failed is stopped.
    """
    arms, failed = given.frozen.arms, dict[str, str]()
    with closing(turns.beside({arm: _arm(given, arm) for arm in arms}, given.jobs(len(arms)))) as ended:
        for name, words in ended:
            failed[name] = words
            first = next((arm for arm in arms if failed.get(arm, "not ended")), "")
            if failed.get(first):
                return Found("build_failed" if first == "candidate" else Outcome.TASK_INVALID, failed[first])
    return None


def _arm(given: Given, arm: str) -> turns.Steps[str]:
    """Builds one arm: what failed, in words, or ""."""
    words = yield from commands.prepared(given.frozen, arm, sandboxed=given.sandboxed, most=given.most)
    return words and f"{arm}: {words}"


GATE = Gate("build", built, Where.BOTH, rejects=("build_failed",), ahead=build_ahead)
