"""pytest --assay-base REV judges benchmarks that are written with pytest-benchmark: the working tree against a commit.

Each test that asks for the fixture `benchmark` is judged, and not run: what it hands to the fixture is called in fresh
processes, in blocks with base and a second copy of base. A test fails if it is slower, or cannot be run. All other
tests run as always, before. The benchmarks themselves, and the conftest files above them, are those of the working
tree, in base too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

_BASE = "--assay-base"
_FIXTURE = "benchmark"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options, in a group of their own."""
    group = parser.getgroup("assay", "is a change faster? benchmarks against an earlier commit")
    group.addoption(_BASE, metavar="REV", help="judge benchmarks of the working tree against this commit")
    group.addoption("--assay-delta", default="0.02", metavar="D", help="margin, 0.02 or 2%% (%(default)s)")
    group.addoption("--assay-setup", default="", metavar="CMD", help="shell command run once in each tree: a build")
    group.addoption("--assay-out", default="", metavar="DIR", help="folder of RAW and pages (temporary)")
    words = "processor seconds of others, a second of a block, above which it is left out (%(default)s)"
    group.addoption("--assay-most-foreign", type=float, default=0.1, metavar="S", help=words)


def pytest_configure(config: pytest.Config) -> None:
    """Takes part only where a base is given."""
    if config.getoption(_BASE):
        if config.getoption("numprocesses", None):
            raise pytest.UsageError(f"{_BASE}: expected one process, as benchmarks disturb each other, got -n")
        config.pluginmanager.register(_Judges(config), "assay-judges")


def _is_benchmark(item: pytest.Item) -> bool:
    return _FIXTURE in getattr(item, "fixturenames", ())


class _Judges:
    """Hooks of a run that judges."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.bench: Any = None
        self.lines: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Benchmarks come last, so that fixtures of other tests are taken down before anything is measured."""
        items.sort(key=_is_benchmark)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Writes out both trees."""
        if judged := [item for item in session.items if _is_benchmark(item)]:
            from assay.ci.benchmarks import Benchmarks

            option = self.config.getoption
            try:
                self.bench = Benchmarks(
                    base=option(_BASE),
                    delta=option("--assay-delta"),
                    setup=option("--assay-setup"),
                    out=option("--assay-out"),
                    most_foreign=option("--assay-most-foreign"),
                    here=Path(self.config.rootpath),
                    files=list(dict.fromkeys(item.path for item in judged)),
                    count=len(judged),
                )
            except ValueError as problem:
                raise pytest.UsageError(str(problem)) from None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Judges a benchmark in place of running it; no fixture of it is set up here."""
        if not _is_benchmark(item):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        call = pytest.CallInfo.from_call(lambda: self._judged(item), when="call")
        report = item.ihook.pytest_runtest_makereport(item=item, call=call)
        item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _judged(self, item: pytest.Item) -> None:
        found = self.bench.judged(item.path, item.nodeid.partition("::")[2])
        self.lines += [f"{item.nodeid}: {line}" for line in found.lines]
        if found.fails:
            pytest.fail("\n".join(found.lines), pytrace=False)
        if found.skips:
            pytest.skip(found.lines[0])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """A line per benchmark."""
        if self.lines:
            terminalreporter.section(f"assay: against {self.config.getoption(_BASE)}")
            self._write(terminalreporter, [*self.lines, f"RAW and pages: {self.bench.out}"])

    def _write(self, terminalreporter: Any, lines: Sequence[str]) -> None:
        from assay.contract import foreign

        for line in lines:
            terminalreporter.write_line(foreign.told(line))

    def pytest_unconfigure(self) -> None:
        """Takes the trees away."""
        if self.bench is not None:
            self.bench.end()
