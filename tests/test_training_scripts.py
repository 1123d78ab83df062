"""Benchmarks of training: peers, how they are found and held against the reference, goals, and others' tests."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tile_kernels_tests
import training_goals
import training_peers
from moeyard.bench import results
from moeyard.testing import python

SCRIPT = str(Path(training_peers.__file__))
SIZES = {"tokens": 32768, "top_k": 8, "experts": 128, "hidden": 2048, "inside": 768, "itemsize": 2}
REACHED = {  # op, provider: time, TFLOP/s, peak
    ("training step", "moeyard"): (100.0, 430.0, 600),
    ("training step", "torch"): (120.0, 360.0, 1000),
    ("training step", "scattermoe"): (115.0, 370.0, 600),
    ("training step", "liger"): (140.0, 300.0, 900),
    ("forward", "moeyard"): (30.0, 500.0, None),
}


def rows_of(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a cell that reaches every goal, with changes by provider."""
    found = []
    for (op, provider), (time_us, tflops, peak) in REACHED.items():
        row = {
            "op": op, "workload": "qwen3-30b-a3b", "sizes": SIZES, "provider": provider, "impl": "auto",
            "correct": True, "time_us": time_us, "tflops": tflops, "peak_bytes": peak,
        }  # fmt: skip
        if (op, provider) == ("training step", "moeyard"):
            row["peak_bytes_by_hand"] = {"False": {"forward": 500, "backward": 590}, "True": {"forward": 620}}
        found.append({**row, **(changes.get(provider, {}) if op == "training step" else {})})
    return found


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"moeyard": {"time_us": 101.0}}, ["best peer (scattermoe)"]),
        ({"moeyard": {"tflops": 424.0}}, ["TFLOP/s"]),
        ({"moeyard": {"peak_bytes": 660}}, ["peak within", "peak of ours / of torch", "peak of ours / of scattermoe"]),
        ({"moeyard": {"correct": False, "wrong": "errs"}}, ["a right answer of auto"]),
        ({"liger": {"correct": False, "wrong": "raises"}}, ["liger runs"]),
        ({"torch": {"provider": "another"}}, ["torch runs"]),
    ],
)
def test_goals_of_training(changes: dict[str, dict[str, Any]], missed: list[str]) -> None:
    found = list(training_goals.verdicts({"rows": rows_of(**changes)}))
    wanted = [verdict.wanted for verdict in found if not verdict.met]
    assert len(wanted) == len(missed) and all(a.startswith(b) for a, b in zip(wanted, missed, strict=True)), wanted


def test_goals_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = dict.fromkeys((*results.ROW_KEYS, *results.RATE_KEYS[results.SCHEMA]))
    rows = [{**other, **row} for row in rows_of()]
    results.write(tmp_path / "x.json", results.document(rows, {"gpu": "a GPU"}, {}))
    assert training_goals.main([str(tmp_path / "x.json")]) == 0
    assert "8 of 8 goals met" in capsys.readouterr().out
    assert training_goals.main([]) == 2


def test_peers_are_found_in_folders_that_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a_peer_of_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(training_peers, "PACKAGES", {"scattermoe": package.name, "liger": "no_such_peer"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(training_peers.FOLDERS, str(tmp_path))
    assert list(training_peers.found()) == ["scattermoe"] and training_peers.versions() == {package.name: "unknown"}
    (package / "COMMIT").write_text("abc\n")
    assert training_peers.versions() == {package.name: "abc"}
    monkeypatch.setenv(training_peers.FOLDERS, str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"MOEYARD_TRAINING_PEERS: expected folders of packages, got '.*absent'"):
        training_peers.found()


TUNED = """
import os, sys
import torch, triton
import triton.language as tl
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
import training_peers


class Card:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Card())


@triton.autotune([triton.Config({"SIZE": size}, num_warps=warps) for size in (64, 128) for warps in (1, 2)], key=["n"])
@triton.jit
def double(given, out, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, 2 * tl.load(given + at, mask=at < n), mask=at < n)


tensors = torch.empty(64), torch.empty(64)
with training_peers.tuning_in_parallel():
    double.nargs = dict(zip(double.arg_names, (*tensors, 64)))
    configs = double.prune_configs({"grid": (1,), "warmup": False})
kernels = double.fn.device_caches[0][0].values()
assert len(configs) == 4 and len({kernel.hash for kernel in kernels}) == 4, len(kernels)
assert double._do_bench.keywords["rep"] == training_peers._TRIAL_MS
assert triton.runtime.autotuner.Autotuner.prune_configs.__name__ == "prune_configs"
print("compiled", len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))))
"""


@pytest.mark.full
def test_configurations_are_compiled_before_one_is_tried(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "tuned.py").write_text(TUNED)
    given = {"PYTHONPATH": os.pathsep.join((str(Path(SCRIPT).parent), os.environ.get("PYTHONPATH", "")))}
    done = python(str(tmp_path / "tuned.py"), environment={**given, "TRITON_CACHE_DIR": str(tmp_path / "cache")})
    assert "compiled 4" in done.stdout, done.stdout + done.stderr


@pytest.mark.full
def test_peers_are_right_by_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = python("-W", "ignore", SCRIPT, environment={"TRITON_INTERPRET": "1"})
    if "not importable: scattermoe, liger_kernel" in done.stdout:
        pytest.skip(f"no peer can be imported; {training_peers.FOLDERS} lists folders of packages")
    assert done.returncode == 0, done.stdout + done.stderr


LIGER_TEST = """
import pytest, torch
from liger_kernel.ops import LigerFusedMoEFunction
from liger_kernel.ops.fused_moe import compute_routing_metadata

def given():
    torch.manual_seed(0)
    w13, w2 = torch.randn(3, 8, 6), torch.randn(3, 6, 4)
    ids, factors = torch.tensor([[0, 2], [2, 1]], dtype=torch.int32), torch.rand(2, 2).requires_grad_()
    return [torch.randn(2, 6).requires_grad_(), w13.requires_grad_(), w2.requires_grad_(), ids, factors]

@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_gradients(scale):
    rows, w13, w2, ids, factors = given()
    wanted = 0
    for k in range(2):
        gate, up = torch.einsum("th,tih->ti", rows, w13[ids[:, k].long()]).chunk(2, 1)
        row = torch.einsum("ti,thi->th", torch.nn.functional.silu(gate) * up, w2[ids[:, k].long()])
        wanted = wanted + scale * factors[:, k, None] * row
    leaves = rows, w13, w2, factors
    ours = LigerFusedMoEFunction.apply(rows, w13, w2, ids, factors)
    for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

def test_metadata():
    ids = given()[3]
    counts, offsets, tokens, routes, slots, *_ = compute_routing_metadata(ids, 3)
    assert counts.tolist() == [1, 1, 2] and offsets.tolist() == [0, 1, 2, 4]
    assert routes.tolist() == [0, 3, 1, 2] and tokens.tolist() == [0, 1, 0, 1] and slots.tolist() == [0, 2, 3, 1]
"""


@pytest.mark.full
def test_ligers_tests_are_run_against_moeyard(tmp_path: Path) -> None:
    (tmp_path / "test_fused_moe.py").write_text(LIGER_TEST)
    script = str(Path(SCRIPT).with_name("liger_tests.py"))
    done = python(script, str(tmp_path), "--", "-p", "no:warnings")
    assert "1 failed, 2 passed" in done.stdout and "test_gradients[1.01]" in done.stdout, done.stdout + done.stderr
    assert "expected a folder with test_fused_moe.py" in python(script, str(tmp_path / "absent")).stderr


def test_adapters_for_the_tests_of_tile_kernels() -> None:
    ids = torch.tensor([[1, -1], [2, 1]])
    experts, tokens, routes, slots, first, last, counts, listed = tile_kernels_tests.get_fused_mapping(ids, 3, 0, 2)
    assert experts.tolist() == [1, 1, 2, -1] and tokens.tolist() == [0, 1, 1, -1] and routes.tolist() == [0, 3, 2, -1]
    assert slots.tolist() == [[0, -1], [2, 1]] and first.tolist() == [0, 0, 2] and last.tolist() == [0, 2, 4]
    assert counts.tolist() == listed == [0, 2, 2]
    rows = torch.tensor([[3.0], [5.0]])
    spread = tile_kernels_tests.expand_to_fused(rows, slots, experts)
    assert spread.tolist() == [[3.0], [5.0], [5.0], [0.0]]
    factors = torch.tensor([[2.0, 9.0], [1.0, 0.5]])
    assert tile_kernels_tests.reduce_fused(spread, factors, slots).tolist() == [[6.0], [7.5]]
    with pytest.raises(NotImplementedError, match="into 8 bits"):
        tile_kernels_tests.reduce_fused(spread, factors, slots, "e4m3")
    assert tile_kernels_tests.topk_gate(torch.tensor([[1.0, 3.0, 3.0]]), 2).tolist() == [[1, 2]]
    assert tile_kernels_tests.aux_fi(ids, 3, 2).tolist() == [0.0, 1.5, 0.75]
