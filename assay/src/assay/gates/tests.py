"""The tests gate: every test that passes in base must be reported and pass in the candidate.

Base is trusted and its own report says which tests there are. A candidate that ends pytest early, or that takes tests
away from it, reports fewer. It could write a report itself: the gate is necessary and no proof. Tests that pass with
files that cannot be imported test something else, as a package of the same name that is installed.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from assay.arms import commands
from assay.arms.sandbox import Finished
from assay.contract.outcome import INFRA, Outcome
from assay.gates.gate import Found, Gate, Given, Where
from assay.gates.poison import code, poison, some

_REPORT = "tests.xml"
_MOST_REPORT = 64 << 20


def tested(given: Given) -> Found:
    """The tests of the task, and whether they import what is judged."""
    assert given.read is not None
    wanted = given.read.task.tests
    with tempfile.TemporaryDirectory(prefix="tests-", dir=given.frozen.folder) as folder:
        run = _Run(given, list(wanted.command), wanted.timeout_s, Path(folder))
        base, ended = run.of("base", "base")
        if ended.status or not base:
            return Found(Outcome.TASK_INVALID, f"the tests of base: {commands.words(ended)}")
        found = compared(base, *run.of("candidate", "candidate"))
        return imported(run, base, found) if found.passed else found


@dataclass(frozen=True)
class _Run:
    """Tests in one tree or another, each with caches of its own that are thrown away."""

    given: Given
    command: list[str]
    timeout_s: float
    folder: Path

    def of(self, arm: str, name: str, tree: Path | None = None) -> tuple[dict[str, str], Finished]:
        """What the tests report of an arm, in its own tree or another, and how they ended."""
        frozen, sandboxed = self.given.frozen, self.given.sandboxed
        cache = self.folder / name
        cache.mkdir(exist_ok=True)
        report = commands.cache_inside(frozen, arm, cache, sandboxed=sandboxed) / _REPORT
        command = [*self.command, "-p", "no:cacheprovider", f"--junitxml={report}"]
        ended = commands.run(
            frozen, arm, command, sandboxed=sandboxed, timeout_s=self.given.most(self.timeout_s), cache=cache, tree=tree
        )
        self.given.most(1)
        return results(cache / _REPORT), ended

    def copy(self, name: str, poisoned: Sequence[str], *, before: bool) -> tuple[Path, bool]:
        """A copy of the candidate in which some files raise when they are imported, and whether it could be built.

        `before`: they raise already while it is set up and built, so that what is installed from it does so, too.
        """
        tree, cache = self.folder / f"tree-{name}", self.folder / name
        self.given.write(tree)
        cache.mkdir()
        wanted = self.given.frozen.content["commands"]
        if before:
            poison(tree, poisoned)
        well = True
        for command in [*wanted["setup"], *wanted["build"]]:
            ended = commands.run(
                self.given.frozen,
                "candidate",
                command,
                sandboxed=self.given.sandboxed,
                timeout_s=self.given.most(wanted["timeout_s"]),
                writable=True,
                cache=cache,
                tree=tree,
            )
            well = well and not ended.status
        if not before:
            poison(tree, poisoned)
        return tree, well


def imported(run: _Run, base: dict[str, str], found: Found) -> Found:
    """`found`, if the tests import the tree that is judged and not, say, a package that is installed beside it.

    They do if they no longer pass once the files that were changed raise when they are imported; where no Python file
    was changed, once all of them do that do not test, measure or build.
    """
    frozen = run.given.frozen
    tree = frozen.tree("candidate")
    files = [path for path in code(frozen.content["patch"]["changed"]) if (tree / path).is_file()]
    files = files or code([path.relative_to(tree).as_posix() for path in tree.rglob("*.py") if path.is_file()])
    if not files:
        return found
    copy, built = run.copy("poisoned", files, before=True)
    if not built:  # what is built needs the files; do the tests?
        copy, built = run.copy("poisoned-late", files, before=False)
    if not built:
        return Found(f"{INFRA}tests", "a second build of the candidate failed")
    seen, _ = run.of("candidate", copy.name.removeprefix("tree-"), copy)
    if all(seen.get(name) == "passed" for name, result in base.items() if result == "passed"):
        words = f"the tests pass though {some(files)} raise when they are imported"
        return Found(Outcome.NOT_EVALUATED, f"{words}: they do not test the tree that is judged")
    return Found("", f"{found.words}; they import the tree that is judged")


def compared(base: dict[str, str], candidate: dict[str, str], ended: Finished) -> Found:
    """What two reports, from a test's name to `passed`, `failed` or `skipped`, say together."""
    last_words = commands.words(ended)
    missing = [name for name in base if name not in candidate]
    failed = [name for name, result in base.items() if result == "passed" and candidate.get(name, "") != "passed"]
    worse = [name for name in failed if name not in missing]
    if missing:
        return Found(
            "tests_failed", f"{len(missing)} of {len(base)} tests were not reported: {some(missing)}; {last_words}"
        )
    if worse:
        return Found("tests_failed", f"{len(worse)} of {len(base)} tests did not pass: {some(worse)}; {last_words}")
    passed = sum(result == "passed" for result in base.values())
    return Found("", f"{passed} tests passed, {len(base) - passed} were skipped in base")


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


GATE = Gate(
    "tests",
    tested,
    Where.PREPARED,
    rejects=("tests_failed",),
    asked=lambda task, _: bool(task.tests.command),
    otherwise="the task has no tests",
)
