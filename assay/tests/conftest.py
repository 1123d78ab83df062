"""Tests that need bubblewrap skip without it, which the run's last line tells. Where it is required they fail."""

import os
from typing import Any

import pytest

from assay.arms import sandbox

REQUIRED = "MOEYARD_REQUIRE_BWRAP"
"""Set to 1 where a missing sandbox is a failure: where everything has to be tested."""

SLOW = ("test_experiment", "test_judge", "test_callers", "test_campaign", "test_kill", "test_imported", "test_apart")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sandbox: needs bubblewrap")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files that take minutes first, so that no worker is left alone with one of them in the end."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


def pytest_runtest_setup(item: pytest.Item) -> None:
    refused = sandbox.refusal() if item.get_closest_marker("sandbox") else None
    if refused and os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED}: {refused}", pytrace=False)
    if refused:
        pytest.skip(refused)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    refused = sandbox.refusal()
    skipped = [one for one in terminalreporter.stats.get("skipped", []) if refused and refused in str(one.longrepr)]
    if skipped:
        words = f"NOT TESTED: {len(skipped)} tests of assay need a sandbox. {refused}. {REQUIRED}=1 makes them fail."
        terminalreporter.write_line(words, red=True)
