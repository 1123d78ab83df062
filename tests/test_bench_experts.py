"""The benchmark of experts on a GPU, its plumbing on a CPU: cases, inputs, gates with mutants, processes that hang."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import moeyard
from moeyard import Activation, Routing
from moeyard.bench import (
    docs,
    experts_cells,
    experts_gpu,
    experts_worker,
    layer_peers,
    layers,
    results,
    run,
    timing,
    vllm_peer,
    workloads,
)
from moeyard.bench.cases import grouped_gemm
from moeyard.bench.operators import Case, Provider, operators
from moeyard.testing import CPU, ROUTINGS, SOURCE, disagreement_error, plain_experts
from moeyard_command.app import app

RATES = {"copy_gb_s": 20.0, "read_gb_s": 30.0, "matrix_tflops": 0.1, "matrix_dtype": "bfloat16"}
RATES_OF_ROWS = results.RATE_KEYS[results.SCHEMA]
LIMITS: dict[str, float | None] = {"copy_time_us": 100.0, "read_time_us": 90.0, "product_time_us": 50.0}
SOMEONE = Provider("a", "x", len)
EXPERTS = operators()["fused_experts"]


def cell(part: str, tokens: int = 4, scale: int = 32, model: str = "qwen3-30b-a3b") -> Case:
    return next(experts_cells.cells(part, (model,), (tokens,), scale))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(torch.initial_seed() % 2**31)


def test_cells_are_those_of_the_issue() -> None:
    targets = list(experts_cells.cells("targets"))
    assert len(targets) == 35 and [c["num_tokens"] for c in targets[::5]] == [1, 8, 64, 256, 1024, 4096, 16384]
    grid = [*targets, *experts_cells.cells("grid")]
    assert len({(c.workload, c["num_tokens"]) for c in grid}) == len(grid) == 5 * 16
    assert all(layers.activation(c) == Activation() and not c.model.get("bias") for c in grid)
    shards = list(experts_cells.cells("shards"))
    assert [(c.workload, c["intermediate_size"], c["num_tokens"]) for c in shards] == [
        ("qwen3-next-80b-a3b / 4", 128, 1), ("qwen3-235b-a22b / 8", 192, 1)
    ]  # fmt: skip
    grouped = list(experts_cells.cells("grouped"))
    assert {c.op for c in grouped} == {"grouped_gemm"} and len(grouped) == 5 * 2 * 2
    biased = list(experts_cells.cells("biased"))
    assert biased and all(layers.activation(c) == moeyard.GPT_OSS_ACTIVATION and c.model["bias"] for c in biased)
    assert {experts_gpu.model_of(c) for c in (*grid, *biased)} == set(experts_cells.MODELS)
    four = list(experts_cells.cells("four bits", tokens=(8,)))
    assert [c.workload for c in four] == ["gpt-oss-120b mxfp4", "qwen3-30b-a3b int4", "qwen3-30b-a3b nvfp4"]
    assert layers.activation(four[0]) == moeyard.GPT_OSS_ACTIVATION and "four bits" not in experts_cells.USUAL
    with pytest.raises(ValueError, match="part: expected one of"):
        next(experts_cells.cells("everything"))
    assert {(*c.sizes, c.routing) for c in grouped} == {(*c.sizes, c.routing) for c in workloads.load("grouped-gemm")}


@pytest.mark.parametrize("model", experts_cells.MODELS)
def test_single_tokens_go_through_all_experts(model: str) -> None:
    case = cell("targets", 1, model=model)
    sets, calls = layers.sets_and_calls(case)
    assert calls >= 20 and calls % sets == 0
    made = layers.draw_sets(case, CPU, generator())
    ids = torch.cat([x.routing.topk_ids for x in made]).flatten()
    assert len(made) == sets and len(torch.unique(ids)) == len(ids) > case["num_experts"] - case["top_k"]
    whole = cell("targets", 1, scale=1, model=model)
    sets, _ = layers.sets_and_calls(whole)
    assert sets * whole["top_k"] * 3 * whole["hidden_size"] * whole["intermediate_size"] * 2 > 4 * 50e6


def test_graphs_of_long_calls_are_short() -> None:
    calls = [layers.sets_and_calls(cell("targets", n, 1, "deepseek-v3"))[1] for n in experts_cells.TARGET_TOKENS]
    assert calls == [32, 20, 20, 20, 2, 2, 2]
    assert layers.sets_and_calls(cell("targets", 1024, 1))[1] > 4


def test_bytes_are_those_of_the_experts_that_are_touched() -> None:
    case = cell("targets", 2)
    inputs = layers.draw_layer(case, CPU, generator())
    same = replace(inputs, routing=Routing(inputs.routing.topk_weights, torch.arange(8).int().expand(2, 8)))
    expert = 3 * case["hidden_size"] * case["intermediate_size"] * 2
    tokens = 2 * 2 * case["hidden_size"] * 2
    assert layers.bytes_of(same) == 8 * expert + tokens
    limits = run.limits_of(EXPERTS, case, [same], timing.Rates(1.0, 2.0, 1.0, "bfloat16"))
    assert limits == {
        "copy_time_us": pytest.approx((8 * expert + tokens) / 1e3, abs=1e-3),
        "read_time_us": pytest.approx((8 * expert + tokens) / 2e3, abs=1e-3),
        "product_time_us": pytest.approx(layers.operations(case) / 1e6, abs=1e-3),
    }


def test_equal_routing() -> None:
    ids = ROUTINGS["equal"](64, 16, 4, generator())
    assert torch.bincount(ids.flatten()).tolist() == [16] * 16
    assert all(len(set(row)) == 4 for row in ids.tolist())


@pytest.mark.parametrize("routing", ["equal", "zipf"])
def test_every_product_is_right_and_mutants_are_not(routing: str) -> None:
    case = replace(cell("grouped", 24), routing=routing)
    inputs = grouped_gemm.inputs(case, CPU, generator())
    found = grouped_gemm.providers(case, CPU)
    ways = {p.impl.partition(" by ")[2] for p in found if p.name == "moeyard"}
    assert ways == set(grouped_gemm.WAYS if routing == "equal" else grouped_gemm.WAYS[:2])
    for provider in found:
        got = provider.run(inputs)
        assert grouped_gemm.error(case, provider, inputs, got) is None, provider
        mutants = [got * 1.05, got * float("nan"), torch.zeros_like(got), got.float()]
        if routing == "equal":
            mutants.append(got.flip(0))
        for mutant in mutants:
            assert grouped_gemm.error(case, provider, inputs, mutant) is not None, provider


def test_padded_rows_find_their_way_back() -> None:
    inputs = grouped_gemm.inputs(replace(cell("grouped", 40), routing="zipf"), CPU, generator())
    right = inputs.rows @ inputs.weight[0].t()
    padded = right.new_full((int(inputs.padded.max()) + 1, right.shape[1]), torch.nan)
    padded[inputs.padded] = right
    assert torch.equal(grouped_gemm.compact(Provider("deep_gemm", "2.5.0", len), inputs, padded), right)
    assert bool((inputs.padded[inputs.place == 0] % 128 == 0).all())
    owner = torch.div(inputs.padded, 128, rounding_mode="floor")
    pairs = set(zip(owner.tolist(), inputs.expert.tolist(), strict=True))
    assert len({block for block, _ in pairs}) == len(pairs), "a block of 128 rows has one expert"


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "gpt-oss-120b"])
def test_torch_with_grouped_products_is_right(model: str) -> None:
    part = "biased" if model == "gpt-oss-120b" else "targets"
    case = cell(part, 9, model=model)
    inputs, act = layers.draw_layer(case, CPU, generator()), layers.activation(case)
    got = layer_peers.grouped_experts(act)(inputs)
    assert layers.error(case, SOMEONE, inputs, got) is None
    assert layers.error(case, SOMEONE, inputs, got.roll(1, 0)) is not None


def test_interleaved_weights_hold_gate_and_up_in_turn() -> None:
    case = cell("biased", 1, model="gpt-oss-120b")
    weights = layers.draw_layer(case, CPU, generator()).weights
    mixed = vllm_peer._interleaved(weights)
    half = case["intermediate_size"]
    assert torch.equal(mixed.w13[:, 0::2], weights.w13[:, :half])
    assert torch.equal(mixed.w13[:, 1::2], weights.w13[:, half:])
    assert weights.w13_bias is not None and mixed.w13_bias is not None
    assert torch.equal(mixed.w13_bias[:, 1::2], weights.w13_bias[:, half:])
    with pytest.raises(ValueError, match="activation: expected"):
        vllm_peer.arrangement(Activation("gelu"))


def test_rows_that_differ_anywhere_are_found() -> None:
    first = torch.randn(9000, 24, generator=generator()).bfloat16()
    near = (first.float() * (1 + 2.0**-9)).bfloat16()
    assert disagreement_error(first, near, 2.0**-5) is None
    for row, value in ((0, 0.0), (4095, torch.nan), (8999, 2.0)):
        other = near.clone()
        other[row] *= value
        assert f"row {row} " in str(disagreement_error(first, other, 2.0**-5))
    assert "shape" in str(disagreement_error(first, first[:-1], 1.0))


def test_gate_of_a_worker() -> None:
    case = cell("targets", 6)
    inputs = layers.draw_layer(case, CPU, generator())
    right = moeyard.fused_experts(inputs.hidden_states, inputs.routing, inputs.weights)
    someone = Provider("moeyard", "x", lambda x: x)
    wrong, first = experts_worker._judge(EXPERTS, case, someone, inputs, right, None)
    assert wrong is None and torch.equal(first, right)
    assert experts_worker._judge(EXPERTS, case, someone, inputs, right, first)[0] is None
    assert experts_worker._judge(EXPERTS, case, someone, inputs, right * 1.1, first)[0] is not None
    assert experts_worker._judge(EXPERTS, case, someone, inputs, right, first.roll(1, 0))[0] is not None

    def fails(_: Any) -> Any:
        raise ValueError("no")

    assert experts_worker._failure(case, Provider("a", "b", fails), inputs, CPU) == (None, "ValueError: no")


def test_cases_travel() -> None:
    for part in experts_cells.PARTS:
        case = cell(part, model="qwen3-30b-a3b" if part == "eight bits" else "gpt-oss-120b")
        assert experts_worker.case_from(json.loads(json.dumps(experts_worker.case_to(case)))) == case


def variants(case: Case) -> list[tuple[str, Any]]:
    """What --variants asks for."""
    twice = [("right", 1.0), ("wrong", 2.0)]

    def make(factor: float) -> Any:
        return lambda x: moeyard.fused_experts(x.hidden_states, x.routing, x.weights, impl="cpu") * factor

    return [(f"{label} of {case['num_tokens']}", make(factor)) for label, factor in twice]


def test_time_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "some_variants", sys.modules[__name__])
    request = {
        "seed": 1, "rates": RATES, "seconds": 0.1, "providers": ["moeyard", "torch"],
        "without": {"moeyard:right of 3": "hung"},
    }  # fmt: skip
    said: list[Any] = []
    case = cell("targets", 3)
    rows = experts_worker.time_case(case, CPU, {**request, "without": {}}, said.append)
    ours = [row for row in rows if row["provider"] == "moeyard"]
    assert ours and all(row["correct"] and row["ratio_to"]["torch"][0] > 0 for row in ours)
    assert all(key in row for row in rows for key in (*results.ROW_KEYS, *RATES_OF_ROWS))
    assert said[0]["at"].startswith("torch:"), "peers come first"
    asked = {**request, "variants": "some_variants:variants"}
    rows = experts_worker.time_case(case, CPU, asked, said.append)
    found = {row["impl"]: row.get("wrong", "") for row in rows if row["provider"] == "moeyard"}
    assert found["right of 3"] == "hung" and "error" in found["wrong of 3"]


def test_torch_is_no_rival_of_itself_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Provider("moeyard", name, len) for name in ("cuda", "triton", "torch")]
    made += [Provider("vllm", "0", len), Provider("torch", "grouped_mm", len)]
    case, cuda = cell("targets"), torch.device("cuda")
    changed = {case.op: replace(EXPERTS, providers=lambda case, device: made)}
    monkeypatch.setattr(experts_worker, "operators", lambda: changed)
    seen = SimpleNamespace(able=("cuda", "triton", "torch"))
    monkeypatch.setattr(experts_worker.moeyard, "explain", lambda *_: seen)

    def labels(**asked: Any) -> list[str]:
        return [p.label for p in experts_worker.answers(case, cuda, asked)]

    assert labels() == ["torch:grouped_mm", "vllm:0", "moeyard:cuda"]
    assert labels(grid=True, all=True) == ["vllm:0", "moeyard:cuda", "moeyard:triton"]
    assert labels(providers=["moeyard:triton"], all=True) == ["moeyard:triton"]


FAKE = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    for provider in ("good:1", "bad:1"):
        if provider in request["without"]:
            continue
        print(json.dumps({"at": provider}), flush=True)
        if provider == "bad:1":
            time.sleep(60) if request["how"] == "hangs" else os._exit(3)
    print(json.dumps({"done": [{"rows of": sorted(request["without"])}]}), flush=True)
"""


@pytest.fixture
def fake_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    begun = experts_gpu.subprocess.Popen
    monkeypatch.setattr(
        experts_gpu.subprocess, "Popen", lambda _, **options: begun([sys.executable, str(script)], **options)
    )
    monkeypatch.setattr(experts_gpu, "_SILENT_S", 2.0)
    monkeypatch.setattr(experts_gpu, "_COMPILE_SILENT_S", 2.0)


@pytest.mark.usefixtures("fake_workers")
@pytest.mark.parametrize("how", ["hangs", "ends"])
def test_who_hangs_is_left_out(how: str, tmp_path: Path) -> None:
    bench = experts_gpu.Bench("cpu", tmp_path, "x", time.monotonic() + 60, {"how": how})
    bench.facts = {"rates": RATES}
    try:
        start = time.monotonic()
        assert bench.measure(cell("targets"), {}) == [{"rows of": ["bad:1"]}]
        assert time.monotonic() - start < 20
        reason = bench.lost["qwen3-30b-a3b"]["bad:1"]
        assert reason == ("hung for 2 s" if how == "hangs" else "its process ended")
        bench.end = time.monotonic() + 1
        assert bench.measure(cell("targets"), {}) == [], "no case begins that could not end"
    finally:
        bench.finish()


@pytest.mark.usefixtures("fake_workers")
def test_who_hangs_while_compiling_is_left_out_of_what_is_timed(tmp_path: Path) -> None:
    bench = experts_gpu.Bench("cpu", tmp_path, "x", time.monotonic() + 60, {"how": "hangs"})
    bench.facts = {"rates": RATES}
    try:
        bench.start(["qwen3-30b-a3b"], 2)
        bench.compile([(cell("targets", n), {}) for n in (1, 2, 3)], 2)
        assert bench.lost == {"qwen3-30b-a3b": {"bad:1": "hung for 2 s"}}
        start = time.monotonic()
        assert bench.measure(cell("targets"), {}) == [{"rows of": ["bad:1"]}]
        assert time.monotonic() - start < 2
    finally:
        bench.finish()


def test_command_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    options = (
        "--device cpu --scale 32 --models qwen3-30b-a3b --tokens 1 --parts targets,grouped --shares 0 --seconds 100"
    )
    wanted = ["--providers", "torch,moeyard:cpu,moeyard:cpu by offsets"]
    done = CliRunner().invoke(app, ["bench", "experts", *options.split(), *wanted, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    content = results.read(tmp_path / "experts_bf16.json")
    assert {row["op"] for row in content["rows"]} == {"fused_experts", "grouped_gemm"}
    assert content["machine"]["matrix_tflops"] > 0 and content["machine"]["read_gb_s"] > 0
    assert done.output.count("copy or product") == 3 and "torch/ours" in done.output
    table = docs.ratio_table(content, ["grouped_gemm"])
    assert "qwen3-30b-a3b, 1 tokens, equal, by offsets" in table and "TFLOP/s" in table


def test_ratio_table() -> None:
    def row(provider: str, impl: str, time_us: float | None, **more: Any) -> dict[str, Any]:
        case = cell("targets", 8, 1)
        timed = None if time_us is None else timing.summarise([time_us] * 6)
        return {**run.row_of(case, Provider(provider, impl, len), "graph", timed, LIMITS), **more}

    machine = {"gpu": "a GPU", "copy_gb_s": 4000.0, "read_gb_s": 4500.0, "matrix_tflops": 800.0}
    rows = [
        row("vllm", "0.25.1", 150.0, extra_bytes=3_000_000),
        row("moeyard", "cuda", 120.0, extra_bytes=2_000_000, ratio_to={"vllm": [0.8, 0.75, 0.85]}),
        row("moeyard", "triton", 130.0),
    ]
    lines = docs.ratio_table(results.document(rows, machine, {"torch": "2"})).splitlines()
    heads = "bytes / copy bandwidth | bytes / read bandwidth | FLOPs / product rate"
    assert lines[0].startswith(f"| µs per call | {heads} | moeyard | moeyard / copy or product time | vllm |")
    wanted = "| qwen3-30b-a3b, 8 tokens | 100 | 90.0 | 50.0 | 120 | 1.20 | 150 | 1.25 [1.18, 1.33] | 2.00 | 3.00 |"
    assert lines[2] == wanted and lines[3] == "", "one line: what auto does not choose is left out"
    wrong = results.document([row("moeyard", "cuda", None)], machine, {})
    assert "| wrong |" in docs.ratio_table(wrong)


def test_experts_on_another_dtype_are_checked_too() -> None:
    case = cell("targets", 5)
    sizes = tuple({**dict(case.sizes), "dtype": "float16"}.items())
    inputs = layers.draw_layer(replace(case, sizes=sizes), CPU, generator())
    tokens, wide = inputs.checked
    again = plain_experts(inputs.hidden_states, inputs.routing, inputs.weights, dtype=torch.float64)
    assert torch.equal(again[tokens], wide)
