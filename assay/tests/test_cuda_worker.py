"""Workloads on a GPU: events inside the worker, graphs, evidence of clocks.

What a whole run of that kind says is kept in `proof/judge-align-h200` (test_ab_proof.py).
"""

import io
import json
from pathlib import Path

import pytest

from assay.arms.trees import Trees
from assay.contract.workload import Plan, Workload
from assay.experiment.series import measured
from assay.machine import gpu

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TREE = """
import torch
def work(x):
    for _ in range({times}): y = x * 2
    return y
def make(seed):
    return (torch.full((1 << 20,), float(seed % 1000), device="cuda"),)
"""


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_kernels_are_timed_by_events(graph: bool, tmp_path: Path) -> None:
    """One block: its figures, and that nothing of its own is taken for a stranger on the GPU."""
    found = {}
    for arm, times in (("base", 8), ("candidate", 2), ("control", 8)):
        found[arm] = tmp_path / arm
        found[arm].mkdir()
        (found[arm] / "work.py").write_text(TREE.format(times=times))
    workload = Workload("call", target="work:work", inputs="work:make", clock="cuda", links=20, graph=graph, rounds=2)
    raw = io.StringIO()
    assert measured(Plan(workload, most_foreign=9.0).checked(), Trees.at(found, tmp_path), raw, seconds=1e-9) is None
    header, block = (json.loads(line) for line in raw.getvalue().splitlines())
    assert header["clock"] == "cooperative" and header["machine"]["gpus"]
    assert block["reasons"] == [], "the process that makes inputs is not foreign"
    assert block["compared"] and not block["differing"]
    assert (
        block["gpus"]["base"][0]["sm_mhz"] > 0 and 0 < block["primary"]["candidate"] < block["primary"]["base"] < 1e-3
    )
    assert 2.5 < block["primary"]["base"] / block["primary"]["candidate"] < 6 or not graph


def test_states_of_the_gpu() -> None:
    state = gpu.states()[0]
    assert state.name and state.celsius > 0 and state.sm_mhz > 0
