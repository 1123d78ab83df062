"""The Hopper kernels of products and experts on the GPU: against float64, at every size of tile, in graphs.

Groups of cases run side by side, each in a process that a kernel without an end cannot hold for long.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from moeyard.testing import SOURCE
from moeyard.testing.hopper import FIRST_LIMIT_S, GROUPS, LIMIT_S, problems, unlucky


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[list[dict[str, Any]], str]]:
    """Of every group: its cases' results, and what its process said on stderr if it did not end well."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these kernels are for compute capability 9.0")
    paths = (str(SOURCE), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "2"}
    running = {
        group: subprocess.Popen(
            [sys.executable, "-m", "moeyard.testing.hopper", group],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for group in GROUPS
    }  # fmt: skip
    done = {}
    for group, process in running.items():
        try:
            printed, said = process.communicate(timeout=FIRST_LIMIT_S + 2 * LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, said = process.communicate()
            said = "took too long\n" + said
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        done[group] = (lines, said[-3000:] if process.returncode else "")
    return done


@pytest.mark.parametrize("group", GROUPS)
def test_hopper(group: str, results: dict[str, tuple[list[dict[str, Any]], str]]) -> None:
    cases, said = results[group]
    for case in cases:
        print(group, case)
    wrong = [problem for case in cases for problem in problems(case)]
    assert not wrong and not said, "\n".join([*wrong, f"{len(cases)} cases ended", said])


def test_what_is_wrong_is_seen() -> None:
    """The mutants of `problems`."""
    good = {
        "case": "c",
        "errors": [1e-3, 1e-4],
        "budget": [1e-3, 1e-4],
        "scale": 1.0,
        "count": 10**6,
        "guard": False,
        "same": True,
    }
    assert not problems(good)
    for change in (
        {"same": False}, {"guard": True}, {"errors": [2e-3, 1e-4]}, {"errors": [1e-3, 2e-4]},
        {"errors": [float("nan"), float("nan")]},
    ):  # fmt: skip
        assert len(problems({**good, **change})) >= 1, change
        assert unlucky({**good, **change}) == (change.get("errors") == [2e-3, 1e-4])
    assert not unlucky(good)
