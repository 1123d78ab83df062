"""Recorded traffic: what is recorded, what a file holds, and what the benchmark and the picture make of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
from moeyard.bench import run, timing, traces, workloads
from moeyard.bench.operators import Provider, operators
from moeyard.integrations import vllm
from moeyard.testing import CPU, draw_routing, python, same_bits


def layers() -> list[moeyard.ExpertWeights]:
    return [moeyard.ExpertWeights(torch.randn(6, 64, 64), torch.randn(6, 64, 32)) for _ in range(2)]


def recorded(path: Path) -> list[torch.Tensor]:
    """Two steps of two layers, and an alignment; the ids in the order of the calls."""
    weights, given = layers(), []
    with traces.record(path):
        for step in range(2):
            for layer in weights:
                routing = draw_routing(5, 6, 2) if step else moeyard.Routing(torch.rand(9, 2), torch.full((9, 2), 4))
                rows = torch.randn(routing.topk_ids.shape[0], 64)
                seen = moeyard.fused_experts(rows, routing, layer)
                given.append(routing.topk_ids)
                out = torch.empty_like(seen)
                vllm.fused_experts(rows, layer.w13, layer.w2, routing.topk_weights, routing.topk_ids)
                given.append(routing.topk_ids)
                assert same_bits(seen, moeyard.fused_experts(rows, routing, layer, out=out))
                given.append(routing.topk_ids)
        ids = torch.tensor([[0, -1], [70000, 5], [-(2**40), 3]])
        vllm.moe_align_block_size(ids, 4, 6)
        moeyard.moe_align_block_size(ids.view(-1), num_experts=6, block_size=1, top_k=2)
        moeyard.moe_sum(torch.ones(2, 2, 2))
    given += [torch.tensor([[0, -1], [-1, 5], [-1, 3]])] * 2
    return given


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    path = tmp_path / "traffic.trace"
    given = recorded(path)
    trace = traces.read(path)
    assert [call.ids.tolist() for call in trace.calls] == [ids.tolist() for ids in given]
    assert [call.layer for call in trace.calls] == [0, 0, 0, 1, 1, 1] * 2 + [-1, -1]
    assert {call.op for call in trace.calls} == {"fused_experts", "moe_align_block_size"}
    assert trace.layers == [{"hidden_size": 64, "intermediate_size": 32, "dtype": "float32"}] * 2
    assert trace.machine["torch"] == torch.__version__ and path.stat().st_size < 2000
    counts, unit = trace.loads("fused_experts")
    assert unit == "layer" and counts.shape == (2, 6) and int(counts.sum()) == sum(ids.numel() for ids in given[:12])
    assert (
        counts[0].tolist()
        == torch.bincount(torch.cat([i.view(-1) for i in given[:3] + given[6:9]]), minlength=6).tolist()
    )
    counts, unit = trace.loads("moe_align_block_size")
    assert unit == "call" and counts.tolist() == [[1, 0, 0, 1, 0, 1]] * 2
    again = tmp_path / "again.trace"
    traces.write(again, trace)
    assert again.read_bytes() == path.read_bytes()


def test_a_block_that_raises_keeps_its_calls(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    with pytest.raises(KeyError), traces.record(path):
        moeyard.moe_align_block_size(torch.zeros(2, 2, dtype=torch.int32), num_experts=1, block_size=1)
        raise KeyError
    assert len(traces.read(path).calls) == 1
    with (
        pytest.raises(traces.NothingRecordedError, match="record: expected calls of"),
        traces.record(path),
    ):
        pass
    assert len(traces.read(path).calls) == 1
    with (
        pytest.raises(ValueError, match=r"path: expected a name that ends in .trace"),
        traces.record(tmp_path / "a.json"),
    ):
        pass


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    for content in (b"", b"no gzip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected a file of `moeyard trace`"):
            traces.read(path)
    call = traces.Call("fused_experts", 0, 4, torch.zeros(3, 2, dtype=torch.int16))
    traces.write(path, traces.Trace([call]))
    whole = traces.read(path)
    short = traces.Trace([traces.Call("fused_experts", 0, 4, torch.zeros(0, 2, dtype=torch.int16))])
    traces.write(path, short)
    with pytest.raises(ValueError, match="expected a call of at least one token"):
        workloads.load(str(path))
    traces.write(path, traces.Trace([]))
    with pytest.raises(ValueError, match="at least one call"):
        traces.read(path)
    assert whole.calls[0].ids.shape == (3, 2)


def test_a_trace_is_a_workload(tmp_path: Path) -> None:
    path = tmp_path / "traffic.trace"
    given = recorded(path)
    cases = workloads.load(str(path))
    assert [(case.op, case["num_tokens"]) for case in cases] == [
        ("moe_align_block_size", 3), ("fused_experts", 3), ("moe_align_block_size", 5), ("fused_experts", 5),
        ("moe_align_block_size", 9), ("fused_experts", 9),
    ]  # fmt: skip
    seen = [ids.tolist() for ids in given]
    for case in cases:
        inputs = operators()[case.op].inputs(case, CPU, torch.Generator().manual_seed(3))
        ids = inputs.routing.topk_ids if case.op == "fused_experts" else inputs
        assert ids.dtype == torch.int32 and ids.tolist() in seen, case
        providers = operators()[case.op].providers(case, CPU)
        assert operators()[case.op].failure(case, providers[0], inputs, CPU) is None, case
    assert workloads.load(str(path), 4)[-1]["hidden_size"] == 64


def test_heat_map(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from moeyard.bench import plots

    path = tmp_path / "traffic.trace"
    recorded(path)
    assert plots.plot_loads(traces.read(path), tmp_path / "loads.svg") == (2, 6)
    text = (tmp_path / "loads.svg").read_text()
    assert text.startswith("<?xml") and len(text) > 3000


SCRIPT = """
import sys, torch, moeyard
assert sys.argv[1:] == ["--out", "7"] and __name__ == "__main__"
weights = moeyard.ExpertWeights(torch.randn(4, 64, 64), torch.randn(4, 64, 32))
for _ in range(3):
    routing = moeyard.Routing(torch.rand(5, 2), torch.randint(0, 4, (5, 2), dtype=torch.int32))
    moeyard.fused_experts(torch.randn(5, 64), routing, weights)
"""


def test_the_command(tmp_path: Path) -> None:
    script, out = tmp_path / "model.py", tmp_path / "model.trace"
    script.write_text(SCRIPT)
    done = python("-m", "moeyard", "trace", "--out", str(out), str(script), "--out", "7")
    assert done.returncode == 0, done.stderr
    assert "3 calls" in done.stderr and len(traces.read(out).calls) == 3
    script.write_text("print('nothing')")
    done = python("-m", "moeyard", "trace", "--out", str(out), str(script))
    assert done.returncode == 2 and "expected calls of moeyard.fused_experts" in " ".join(done.stderr.split())
    done = python("-m", "moeyard", "trace", "--out", "a.json", str(script))
    assert done.returncode == 2 and "--out: expected a .trace file" in done.stderr


# providers of others

KERNEL = """
import torch
from dataclasses import replace
from moeyard.bench.operators import Provider
import moeyard

def total(case, device):
    if case.op != "moe_sum":
        return None
    return lambda inputs: moeyard.moe_sum(inputs[0] if isinstance(inputs, tuple) else inputs)

def wrong(case, device):
    return Provider("x", "y", lambda inputs: torch.zeros(1))

nothing = 7
"""


def test_providers_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeyard.bench import others

    (tmp_path / "their_kernels.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "w.toml").write_text(
        "description = 'x'\nop = ['moe_sum', 'permute']\nrouting = ['uniform']\n[sizes]\nnum_tokens = [4]\n"
        "num_experts = [4]\ntop_k = [2]\nblock_size = [1]\nhidden_size = [64]\ndtype = ['float32']\n"
    )
    cases = workloads.load(str(tmp_path / "w.toml"))
    giving = others.find("their_kernels:total")
    bad = others.find("their_kernels:wrong")
    assert giving is not None and bad is not None and others.find("nobody") is None
    assert [len(giving(case, CPU)) for case in cases] == [1, 0]
    rates = timing.Rates(20.0, 30.0, 0.5, "bfloat16")
    rows: list[dict[str, Any]] = run.run_case(
        cases[0], CPU, rates=rates, rounds=3, wanted=lambda p: p.name == "moeyard", seed=0, advance=lambda: None,
        others=lambda *call: [*giving(*call), *bad(*call)],
    )  # fmt: skip
    named = {(row["provider"], row["impl"]): row for row in rows}
    theirs, failed = named["their_kernels", "total"], named["their_kernels", "wrong"]
    assert theirs["time_us"] > 0 and not failed["correct"] and failed["wrong"]
    ours = next(row for row in rows if row["provider"] == "moeyard")
    assert set(ours["ratio_to"]) == {"their_kernels"}
    with pytest.raises(ValueError, match="--provider: expected a function at their_kernels:nothing, got int"):
        others.find("their_kernels:nothing")
    assert isinstance(bad(cases[1], CPU)[0], Provider)
