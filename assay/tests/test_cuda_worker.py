"""Workloads on a GPU: events inside the worker, graphs, evidence of clocks, and what the report says about trust."""

import json
from pathlib import Path

import pytest

from assay import gpu
from assay.__main__ import main

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


@pytest.mark.parametrize("graph", [[], ["--graph"]], ids=["eager", "graph"])
def test_kernels_are_timed_by_events(graph: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, times in (("quick", 2), ("slow", 8)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "work.py").write_text(TREE.format(times=times))
    options = [
        "--call",
        "work:work",
        "--inputs",
        "work:make",
        "--clock",
        "cuda",
        "--links",
        "20",
        "--rounds",
        "2",
        *graph,
    ]
    raw = tmp_path / "raw"
    assert (
        main(
            ["ab", str(tmp_path / "slow"), str(tmp_path / "quick"), "--out", str(raw), "--most-foreign", "9", *options]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "clock: cooperative" in shown and "trust: benign" in shown and "beyond the margin" in shown
    header, *rest = (json.loads(line) for line in raw.read_text().splitlines())
    assert header["clock"] == "cooperative" and header["machine"]["gpus"]
    block = rest[0]
    assert block["reasons"] == [], "the process that makes inputs is not foreign"
    assert (
        block["gpus"]["base"][0]["sm_mhz"] > 0 and 0 < block["primary"]["candidate"] < block["primary"]["base"] < 1e-3
    )
    assert 2.5 < block["primary"]["base"] / block["primary"]["candidate"] < 6 or not graph


def test_states_of_the_gpu() -> None:
    state = gpu.states()[0]
    assert state.name and state.celsius > 0 and state.sm_mhz > 0
