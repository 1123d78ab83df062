"""The tests gate: every test that passes in base must be reported and pass in the candidate.

Base is trusted and its own report says which tests there are. A candidate that ends pytest early, or that takes tests
away from it, reports fewer. It could write a report itself: the gate is necessary and no proof.
"""

import tempfile
from pathlib import Path
from xml.etree import ElementTree

from assay.arms import commands
from assay.contract.frozen import Frozen
from assay.contract.outcome import Outcome
from assay.gates.gate import Found, Gate, Given, Where

_REPORT = "tests.xml"
_MOST_REPORT = 64 << 20
_SHOWN = 5


def tested(given: Given) -> Found:
    """The tests of the task, if it has any."""
    assert given.read is not None
    wanted = given.read.task.tests
    if not wanted.command:
        return Found("", "the task has none")
    return tests(given.frozen, list(wanted.command), wanted.timeout_s, sandboxed=given.sandboxed)


def tests(frozen: Frozen, command: list[str], timeout_s: float, *, sandboxed: bool) -> Found:
    """Runs the tests in base and in the candidate, each with caches of its own that are thrown away."""
    with tempfile.TemporaryDirectory(prefix="tests-", dir=frozen.folder) as folder:
        seen = {}
        for arm in ("base", "candidate"):
            cache = Path(folder) / arm
            cache.mkdir()
            report = commands.cache_inside(frozen, arm, cache, sandboxed=sandboxed) / _REPORT
            given = [*command, "-p", "no:cacheprovider", f"--junitxml={report}"]
            ended = commands.run(frozen, arm, given, sandboxed=sandboxed, timeout_s=timeout_s, cache=cache)
            seen[arm] = results(cache / _REPORT)
            if arm == "base" and (ended.status or not seen[arm]):
                return Found(Outcome.TASK_INVALID, f"the tests of base: {commands.words(ended)}")
        return compared(seen["base"], seen["candidate"], commands.words(ended))


def compared(base: dict[str, str], candidate: dict[str, str], last_words: str) -> Found:
    """What two reports, from a test's name to `passed`, `failed` or `skipped`, say together."""
    missing = [name for name in base if name not in candidate]
    failed = [name for name, result in base.items() if result == "passed" and candidate.get(name, "") != "passed"]
    worse = [name for name in failed if name not in missing]
    if missing:
        return Found(
            "tests_failed", f"{len(missing)} of {len(base)} tests were not reported: {_some(missing)}; {last_words}"
        )
    if worse:
        return Found("tests_failed", f"{len(worse)} of {len(base)} tests did not pass: {_some(worse)}; {last_words}")
    passed = sum(result == "passed" for result in base.values())
    return Found("", f"{passed} tests passed, {len(base) - passed} were skipped in base")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def results(report: Path) -> dict[str, str]:
    """A JUnit report as a test's name -> `passed`, `failed` or `skipped`; {} if there is none that can be read.

    A name that is given twice has passed only if it has every time.
    """
    if report.is_symlink() or not report.is_file() or report.stat().st_size > _MOST_REPORT:
        return {}
    text = report.read_text(errors="replace")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # a report has none, and entities can grow without end
        return {}
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 - no entities are left
    except ElementTree.ParseError:
        return {}
    found: dict[str, str] = {}
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        kinds = {child.tag for child in case}
        result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[name] = result if found.get(name, result) == result else "failed"
    return found


GATE = Gate("tests", tested, Where.PREPARED, rejects=("tests_failed",), asked=lambda task, _: bool(task.tests.command))
