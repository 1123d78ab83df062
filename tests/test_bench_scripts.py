"""The scripts of benchmarks/: goals of experts, and plans of kernels that are to be timed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import batch_invariant
import experts_goals
import experts_variants
import host_path
import serving
import training
from moeyard.bench import experts_cells, layers, results, run, timing
from moeyard.bench.cases import grouped_gemm
from moeyard.bench.operators import Case, Provider
from moeyard.bench.training import TrainingStep
from moeyard.cuda.experts.plan import Way, product_plan
from moeyard.cuda.runtime.cards import Card
from moeyard.dispatch import refusals, table
from moeyard.testing import CPU, python

LIMITS: dict[str, float | None] = {"copy_time_us": 100.0, "read_time_us": 90.0, "product_time_us": 50.0}
SOMEONE = Provider("a", "x", len)


def cell(part: str, tokens: int = 4, scale: int = 32, model: str = "qwen3-30b-a3b") -> Case:
    return next(experts_cells.cells(part, (model,), (tokens,), scale))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(torch.initial_seed() % 2**31)


@pytest.mark.parametrize("which", experts_variants._WAYS)
def test_ways_to_be_timed_can_be_planned(which: str) -> None:
    for label, options in experts_variants._WAYS[which].items():
        way = Way(**options)
        plan = product_plan(65536, 128, 768, True, False, Card(132, 232448, True), way)
        assert plan.rows == (way.rows or 192), label


def test_launchers_as_variants() -> None:
    case = cell("biased", 5, model="gpt-oss-120b")
    inputs = layers.draw_layer(case, CPU, generator())
    launch = table.launcher("fused_experts", "torch", CPU, torch.bfloat16)
    assert layers.error(case, SOMEONE, inputs, experts_variants.launched(launch, case)(inputs)) is None
    case = cell("grouped", 5)
    rows = grouped_gemm.inputs(case, CPU, generator())
    launch = table.launcher("grouped_gemm", "torch", CPU, torch.bfloat16)
    assert grouped_gemm.error(case, SOMEONE, rows, experts_variants.launched(launch, case)(rows)) is None
    with pytest.raises(TypeError, match="chosen"):
        experts_variants.launched(launch, case, chosen=None)(rows)


def result_row(part: str, tokens: int, provider: str, time_us: float, **more: Any) -> dict[str, Any]:
    model = "gpt-oss-120b" if part == "biased" else "qwen3-30b-a3b"
    timed = timing.summarise([time_us] * 6)
    impl = {"moeyard": "cuda by offsets" if part == "grouped" else "cuda"}.get(provider, "1")
    return {**run.row_of(cell(part, tokens, 1, model), Provider(provider, impl, len), "graph", timed, LIMITS), **more}


@pytest.mark.parametrize(
    ("part", "tokens", "ours", "more", "met"),
    [
        ("targets", 1, 24.9, {}, [True]),
        ("targets", 1, 25.1, {}, [False]),
        ("targets", 64, 105.0, {}, [True]),
        ("targets", 64, 121.2, {}, [True]),
        ("targets", 64, 121.3, {}, [False]),
        ("targets", 1024, 50.0, {"ratio_to": {"vllm": [0.8, 0.7, 0.9]}}, [True, True]),
        ("targets", 1024, 50.0, {"ratio_to": {"vllm": [1.03, 1.01, 1.05]}}, [False, False]),
        ("grid", 32768, 50.0, {"ratio_to": {"vllm": [1.03, 0.99, 1.05]}}, [True]),
        ("shards", 1, 50.0, {"ratio_to": {"vllm": [0.51, 0.5, 0.52]}}, [False, True]),
        ("grouped", 1024, 50.0, {"ratio_to": {"deep_gemm": [1.02, 1, 1.1], "torch": [0.97, 0.9, 1]}}, [True, False]),
        ("biased", 64, 900.0, {"ratio_to": {"vllm": [1.0, 0.9, 1.1]}, "extra_bytes": 9}, [True, False]),
    ],
)
def test_goals(part: str, tokens: int, ours: float, more: dict[str, Any], met: list[bool]) -> None:
    rows = [result_row(part, tokens, "vllm", 120.0, extra_bytes=8), result_row(part, tokens, "moeyard", ours, **more)]
    assert [verdict.met for verdict in experts_goals.verdicts({"rows": rows})] == met


@pytest.mark.parametrize(("skewed", "met"), [(0.81, True), (0.83, False)])
def test_goals_of_skew(skewed: float, met: bool) -> None:
    """What it costs beside what it costs vLLM, whoever is the faster one."""
    even = result_row("targets", 2048, "moeyard", 50.0, ratio_to={"vllm": [0.8, 0.7, 0.9]})
    hot = {**even, "routing": "zipf", "ratio_to": {"vllm": [skewed, 0.7, 0.9]}}
    found = list(experts_goals.verdicts({"rows": [even, hot]}))
    assert [verdict.met for verdict in found] == [True, True, met] and "skew" in found[-1].wanted
    assert len(list(experts_goals.verdicts({"rows": [hot]}))) == 1, "nothing to compare with"


def test_goals_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {**result_row("targets", 8, "moeyard", 1.0), "time_us": None, "correct": False, "wrong": "hung"}
    machine = {"gpu": "a GPU"}
    results.write(
        tmp_path / "x.json", results.document([wrong, result_row("targets", 1, "moeyard", 20.0)], machine, {})
    )
    assert experts_goals.main([str(tmp_path / "x.json")]) == 1
    assert "wanted a right answer, got hung\n1 of 2 goals met" in capsys.readouterr().out
    assert experts_goals.main([]) == 2


def batches(with_option: int, without: int) -> list[dict[str, Any]]:
    return [{"invariant": {"batches": 9, "differ": with_option}, "default": {"batches": 9, "differ": without}}]


def test_batch_invariance_is_seen_and_so_is_its_control() -> None:
    assert batch_invariant.verdict(batches(0, 4)) == (0, "0 of 9 batches differ; without the option 4")
    assert batch_invariant.verdict(batches(1, 4))[0] == 1
    assert batch_invariant.verdict(batches(0, 0))[0] == 2 and batch_invariant.verdict([])[0] == 0


def test_cells_of_batch_invariance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of experts and layers; calls are made, and times that are given take the place of a GPU's."""
    if not refusals.installed("numba"):
        pytest.skip("numba is not installed")

    def timed(runs: Any, inputs: Any, **_: Any) -> list[timing.Times]:
        return [timing.summarise([100.0 + i + 0 * len(run(inputs[0]))] * 6) for i, run in enumerate(runs)]

    monkeypatch.setattr(timing, "rates", lambda _: timing.Rates(1.0, 1.0, 1.0, "bfloat16"))
    monkeypatch.setattr(timing, "time_graphs_within", timed)
    out, small = tmp_path / "x.json", ["--device", "cpu", "--scale", "64", "--number", "3", "--whole", "40"]
    given = [*small, "--no-warm-up", "--models", "gpt-oss-120b", "--kinds", "bfloat16,fp8 block", "--tokens", "2"]
    assert batch_invariant.main([*given, "--impls", "cpu", "--out", str(out)]) == 2, "nothing differs on a CPU at all"
    content = results.read(out)
    assert [row["impl"] for row in content["rows"]] == ["cpu", "cpu batch-invariant"]
    assert content["rows"][1]["ratio_to"]["default"][0] == 1.01 and all(row["correct"] for row in content["rows"])
    assert [row["op"] for row in content["batches"]] == ["fused_experts", "moe_layer"] * 2
    assert all(row["invariant"] == {"batches": 3, "differ": 0, "first": ""} for row in content["batches"])
    assert batch_invariant.main([*given, "--impls", "cpu", "--seconds", "0"]) == 0
    assert "left out: batches of fused_experts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'torch' refuses fused_experts"):
        batch_invariant.main([*given, "--impls", "torch"])


VLLM_TEST = """
import pytest, torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe import fused_experts, modular_kernel as mk
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, fp8_w8a8_moe_quant_config
from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import CutlassExpertsFp4, CutlassExpertsFp8

@pytest.mark.parametrize("m,n,k,e,topk", [(3, 64, 128, 4, 2), (64, 8192, 8192, 64, 8)])
@pytest.mark.parametrize("swapped", [False, True])
def test_cutlass(m, n, k, e, topk, swapped, workspace_init):
    torch.manual_seed(0)
    a = torch.randn((m, k), device="cuda", dtype=torch.half)
    w1, w2 = (torch.randn(e, *rows, device="cuda") / 10 for rows in ((2 * n, k), (k, n)))
    (w1_q, w1_s), (w2_q, w2_s) = (
        map(torch.stack, zip(*[ops.scaled_fp8_quant(w, use_per_token_if_dynamic=True) for w in one]))
        for one in (w1, w2)
    )
    config = fp8_w8a8_moe_quant_config(
        w1_scale=w1_s, w2_scale=w2_s, per_act_token_quant=True, per_out_ch_quant=True
    )
    ids, weights = torch.randint(0, e, (m, topk), device="cuda"), torch.rand(m, topk, device="cuda")
    got = mk.FusedMoEKernel(None, CutlassExpertsFp8(None, config)).apply(a, w1_q, w2_q, weights, ids)
    one = (w1_q.float() * w1_s).half()
    if swapped:
        one = torch.cat(one.chunk(2, 1)[::-1], 1)
    wanted = fused_experts(
        a, one, (w2_q.float() * w2_s).half(), weights, ids, quant_config=FUSED_MOE_UNQUANTIZED_CONFIG
    )
    torch.testing.assert_close(got, wanted, atol=0.15, rtol=1e-2)

def test_absent():
    CutlassExpertsFp4()

def test_cuda_graph():
    torch.cuda.Stream()
"""


def test_vllms_tests_are_run_against_moeyard(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "kernels" / "moe"
    folder.mkdir(parents=True)
    (folder / "test_cutlass_moe.py").write_text(VLLM_TEST)
    script = str(Path(__file__).parents[1] / "benchmarks" / "vllm_tests.py")
    done = python(script, str(tmp_path), "--device", "cpu")
    assert "2 failed, 1 passed, 3 deselected" in done.stdout, done.stdout + done.stderr
    assert (
        "NotImplementedError: vllm.model_executor.layers.fused_moe.experts.cutlass_moe.CutlassExpertsFp4" in done.stdout
    )
    assert "Tensor-likes are not close" in done.stdout  # gate and up swapped in the expectation
    assert "left out: 1 tests (needs a GPU's streams)" in done.stdout
    assert "left out: 2 tests (larger than 2e+08)" in done.stdout and done.returncode == 1
    assert "expected a folder with one of" in python(script, str(tmp_path / "absent")).stderr


@pytest.mark.parametrize("of_parts", [False, pytest.param(True, marks=pytest.mark.full)])
def test_steps_of_training_are_judged_before_they_are_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, of_parts: bool
) -> None:
    chosen = training.ours
    monkeypatch.delenv("MOEYARD_TRAINING_PEERS", raising=False)
    monkeypatch.setattr(training, "ours", lambda _="", save="product": chosen("torch", save))  # which loads quickest
    ours = training.ours()
    off = {"right": ours, "wrong": lambda given: ours(given) * 1.02, "raises": lambda _: len(None)}
    providers, step = training.providers(), TrainingStep(tokens=64, top_k=2, experts=4, hidden=64, inside=32)
    monkeypatch.setattr(
        training, "providers", lambda: {**providers, **{(name, ""): call for name, call in off.items()}}
    )
    cell = training.Cell("none", step, timing.Rates(1.0, 1.0, 1.0, "bfloat16"))
    rows = training.measure(cell, CPU, 0.0, of_parts=of_parts)
    results.write(tmp_path / "training.json", results.document(rows, {}, {}))
    assert results.read(tmp_path / "training.json")["rows"] == rows
    found = {row["provider"] + row["impl"]: row for row in rows if row["op"] == "training step"}
    assert {name for name, row in found.items() if not row["correct"]} == {"wrong", "raises"}
    assert "err more than" in found["wrong"]["wrong"] and found["raises"]["wrong"].startswith("TypeError")
    assert {"moeyardauto", "torchgrouped_mm", "right"} <= {name for name, row in found.items() if row["correct"]}
    assert all(row["time_us"] > 0 and row["rounds"] == 3 for row in rows if row["correct"])
    of_part = {row["op"] for row in rows if row["op"].startswith("part")}
    assert of_part == ({"part: w13", "part: w2", "part: activation"} if of_parts else set())
    fp8 = next(row for row in rows if row["op"] == "training step, fp8 blocks")
    assert fp8["correct"] and fp8["errors"]["w13"] < 2 * fp8["honest_errors"]["w13"] < 0.1
    mine = found["moeyardauto"]
    assert mine["kept_bytes_by_hand"] < mine["peak_bytes_by_hand"]["False"]["backward, second product"]


@pytest.mark.full
def test_serving_writes_what_it_measured(tmp_path: Path) -> None:
    """On a CPU, with small layers: host times in turn, and calls of random sizes."""
    out = tmp_path / "serving.json"
    small = "--device cpu --scale 32 --most 64 --calls 16 --rounds 5 --impls cpu".split()
    done = python("benchmarks/serving.py", "--out", str(out), *small)
    assert done.returncode == 0, done.stderr
    found = results.read(out)
    assert {row["mode"] for row in found["rows"]} == {"host"} and all(row["correct"] for row in found["rows"])
    assert {row["sizes"]["num_tokens"] for row in found["rows"]} == {1, 64}
    blocks = {row["impl"] for row in found["rows"] if row["op"] == "moe_block"}
    assert blocks == {"auto", "torch.compile, default", "torch.compile, reduce-overhead"}
    assert {row["provider"] for row in found["rows"] if row["op"] == "fused_experts"} == {
        "moeyard",
        "torch",
        "transformers",
    }
    (stalls,) = found["stalls"]
    assert stalls["calls"] >= 16 and stalls["compilations"] == 0 and "moe_layer" in stalls["longest_ms"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a GPU, and one is there")
def test_the_host_path_is_timed_and_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings")
    monkeypatch.setattr("sys.argv", ["host_path.py", "--rounds", "1", "--tokens", "1", "70"])
    host_path.main()
    one, more = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["tokens"], more["tokens"]) == (1, 70)
    assert one["us (least, median)"].keys() == one["calls"].keys() >= {"torch.mm", "fused_experts", "moe_layer"}
    launches = [
        found["calls"][name]["launches"] for found in (one, more) for name in ("fused_experts", "route_and_align")
    ]
    assert launches == [2, 1, 4, 2] and one["calls"]["torch.mm"]["launches"] == 0


def test_what_either_compiler_is_asked_for_is_noted() -> None:
    from moeyard.cuda.runtime import compile as building

    plain = building.compile_source
    with serving.compilations() as asked:
        with pytest.raises(TypeError):
            building.compile_source()  # type: ignore[call-arg]
        assert asked == ["compile_source"]
    assert building.compile_source is plain
