"""The benchmark of experts on a GPU, its plumbing on a CPU: cases, inputs, gates with mutants, processes that hang."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
from moeyard import Activation, Routing, impls
from moeyard.bench import (
    docs,
    experts_cells,
    experts_goals,
    experts_gpu,
    experts_worker,
    layer,
    layer_peers,
    products,
    providers,
    results,
    run,
    timing,
    vllm_peer,
    workloads,
)
from moeyard.bench import variants as bench_variants
from moeyard.bench.workloads import Case
from moeyard.testing import CPU, SOURCE, disagreement_error, plain_experts


def cell(part: str, tokens: int = 4, scale: int = 32, model: str = "qwen3-30b-a3b") -> Case:
    return next(experts_cells.cells(part, (model,), (tokens,), scale))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(torch.initial_seed() % 2**31)


def test_cells_are_those_of_the_issue() -> None:
    targets = list(experts_cells.cells("targets"))
    assert len(targets) == 35 and [c["num_tokens"] for c in targets[::5]] == [1, 8, 64, 256, 1024, 4096, 16384]
    grid = [*targets, *experts_cells.cells("grid")]
    assert len({(c.workload, c["num_tokens"]) for c in grid}) == len(grid) == 5 * 16
    assert all(layer_peers.activation(c) == Activation() and not c.model.get("bias") for c in grid)
    shards = list(experts_cells.cells("shards"))
    assert [(c.workload, c["intermediate_size"], c["num_tokens"]) for c in shards] == [
        ("qwen3-next-80b-a3b / 4", 128, 1), ("qwen3-235b-a22b / 8", 192, 1)
    ]  # fmt: skip
    grouped = list(experts_cells.cells("grouped"))
    assert {c.op for c in grouped} == {products.OP} and len(grouped) == 5 * 2 * 2
    biased = list(experts_cells.cells("biased"))
    assert biased and all(layer_peers.activation(c) == moeyard.GPT_OSS_ACTIVATION and c.model["bias"] for c in biased)
    assert {experts_gpu.model_of(c) for c in (*grid, *biased)} == set(experts_cells.MODELS)
    with pytest.raises(ValueError, match="part: expected one of"):
        next(experts_cells.cells("everything"))
    assert {(*c.sizes, c.routing) for c in grouped} == {(*c.sizes, c.routing) for c in workloads.load("grouped-gemm")}


@pytest.mark.parametrize("model", experts_cells.MODELS)
def test_single_tokens_go_through_all_experts(model: str) -> None:
    case = cell("targets", 1, model=model)
    sets, calls = layer.sets_and_calls(case)
    assert calls >= 20 and calls % sets == 0
    made = layer.make_sets(case, CPU, generator())
    ids = torch.cat([x.routing.topk_ids for x in made]).flatten()
    assert len(made) == sets and len(torch.unique(ids)) == len(ids) > case["num_experts"] - case["top_k"]
    whole = cell("targets", 1, scale=1, model=model)
    sets, _ = layer.sets_and_calls(whole)
    assert sets * whole["top_k"] * 3 * whole["hidden_size"] * whole["intermediate_size"] * 2 > 4 * 50e6


def test_graphs_of_long_calls_are_short() -> None:
    calls = [layer.sets_and_calls(cell("targets", n, 1, "deepseek-v3"))[1] for n in experts_cells.TARGET_TOKENS]
    assert calls == [32, 20, 20, 20, 2, 2, 2]
    assert layer.sets_and_calls(cell("targets", 1024, 1))[1] > 4


def test_floor_counts_the_experts_that_are_touched() -> None:
    case = cell("targets", 2)
    inputs = layer.make_inputs(case, CPU, generator())
    same = replace(inputs, routing=Routing(inputs.routing.topk_weights, torch.arange(8).int().expand(2, 8)))
    expert = 3 * case["hidden_size"] * case["intermediate_size"] * 2
    tokens = 2 * 2 * case["hidden_size"] * 2
    assert layer.bytes_read_and_written(same) == 8 * expert + tokens
    assert experts_worker._floor_us(case, [same], 1.0, 1e9) == pytest.approx((8 * expert + tokens) / 1e3)
    assert experts_worker._floor_us(case, [same], 1e9, 1.0) == pytest.approx(layer.operations(case) / 1e6)


def test_equal_routing() -> None:
    ids = workloads.ROUTINGS["equal"](64, 16, 4, generator())
    assert torch.bincount(ids.flatten()).tolist() == [16] * 16
    assert all(len(set(row)) == 4 for row in ids.tolist())


@pytest.mark.parametrize("routing", ["equal", "zipf"])
def test_every_product_is_right_and_mutants_are_not(routing: str) -> None:
    case = replace(cell("grouped", 24), routing=routing)
    inputs = products.make_inputs(case, CPU, generator())
    found = products.providers(case, CPU)
    ways = {impl.partition(" by ")[2] for name, impl, _ in found if name == "moeyard"}
    assert ways == set(products.WAYS if routing == "equal" else products.WAYS[:2])
    for name, impl, answer in found:
        got = answer(inputs)
        assert products.error(inputs, impl, got) is None, (name, impl)
        mutants = [got * 1.05, got * float("nan"), torch.zeros_like(got), got.float()]
        if routing == "equal":
            mutants.append(got.flip(0))
        for mutant in mutants:
            assert products.error(inputs, impl, mutant) is not None, (name, impl)


def test_padded_rows_find_their_way_back() -> None:
    inputs = products.make_inputs(replace(cell("grouped", 40), routing="zipf"), CPU, generator())
    right = inputs.rows @ inputs.weight[0].t()
    padded = right.new_full((int(inputs.padded.max()) + 1, right.shape[1]), torch.nan)
    padded[inputs.padded] = right
    assert torch.equal(products.compact(inputs, "2.5.0", padded), right)
    assert bool((inputs.padded[inputs.place == 0] % 128 == 0).all())
    owner = torch.div(inputs.padded, 128, rounding_mode="floor")
    pairs = set(zip(owner.tolist(), inputs.expert.tolist(), strict=True))
    assert len({block for block, _ in pairs}) == len(pairs), "a block of 128 rows has one expert"


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "gpt-oss-120b"])
def test_torch_with_grouped_products_is_right(model: str) -> None:
    part = "biased" if model == "gpt-oss-120b" else "targets"
    case = cell(part, 9, model=model)
    inputs, act = layer.make_inputs(case, CPU, generator()), layer_peers.activation(case)
    got = layer_peers.grouped_experts(act)(inputs)
    assert layer.error(case, "grouped_mm", inputs, got) is None
    assert layer.error(case, "grouped_mm", inputs, got.roll(1, 0)) is not None


def test_interleaved_weights_hold_gate_and_up_in_turn() -> None:
    case = cell("biased", 1, model="gpt-oss-120b")
    weights = layer.make_inputs(case, CPU, generator()).weights
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
    inputs = layer.make_inputs(case, CPU, generator())
    right = moeyard.fused_experts(inputs.hidden_states, inputs.routing, inputs.weights)
    someone = providers.Provider("moeyard", "x", lambda x: x)
    wrong, first = experts_worker._judge(case, someone, inputs, right, None)
    assert wrong is None and torch.equal(first, right)
    assert experts_worker._judge(case, someone, inputs, right, first)[0] is None
    assert experts_worker._judge(case, someone, inputs, right * 1.1, first)[0] is not None
    assert experts_worker._judge(case, someone, inputs, right, first.roll(1, 0))[0] is not None

    def fails(_: Any) -> Any:
        raise ValueError("no")

    assert experts_worker._failure(providers.Provider("a", "b", fails), inputs, CPU) == (None, "ValueError: no")


def test_cases_travel() -> None:
    for part in experts_cells.PARTS:
        case = cell(part, model="gpt-oss-120b")
        assert experts_worker.case_from(json.loads(json.dumps(experts_worker.case_to(case)))) == case


def variants(case: Case) -> list[tuple[str, Any]]:
    """What --variants asks for."""
    twice = [("right", 1.0), ("wrong", 2.0)]

    def make(factor: float) -> Any:
        return lambda x: moeyard.fused_experts(x.hidden_states, x.routing, x.weights, impl="cpu") * factor

    return [(f"{label} of {case['num_tokens']}", make(factor)) for label, factor in twice]


def test_launchers_as_variants() -> None:
    case = cell("biased", 5, model="gpt-oss-120b")
    inputs = layer.make_inputs(case, CPU, generator())
    launch = impls.launcher("fused_experts", "torch", CPU, torch.bfloat16)
    assert layer.error(case, "x", inputs, bench_variants.launched(launch, case)(inputs)) is None
    case = cell("grouped", 5)
    rows = products.make_inputs(case, CPU, generator())
    launch = impls.launcher("grouped_gemm", "torch", CPU, torch.bfloat16)
    assert products.error(rows, "x", bench_variants.launched(launch, case)(rows)) is None
    with pytest.raises(TypeError, match="chosen"):
        bench_variants.launched(launch, case, chosen=None)(rows)


def test_time_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "some_variants", sys.modules[__name__])
    request = {
        "seed": 1, "copy_gb_s": 20.0, "matrix_tflops": 0.1, "seconds": 0.1, "providers": ["moeyard", "torch"],
        "without": {"moeyard:right of 3": "hung"},
    }  # fmt: skip
    said: list[Any] = []
    case = cell("targets", 3)
    rows = experts_worker.time_case(case, CPU, {**request, "without": {}}, said.append)
    ours = [row for row in rows if row["provider"] == "moeyard"]
    assert ours and all(row["correct"] and row["ratio_to"]["torch"][0] > 0 for row in ours)
    assert all(key in row for row in rows for key in results.ROW_KEYS)
    assert said[0]["at"].startswith("torch:"), "peers come first"
    asked = {**request, "variants": "some_variants:variants"}
    rows = experts_worker.time_case(case, CPU, asked, said.append)
    found = {row["impl"]: row.get("wrong", "") for row in rows if row["provider"] == "moeyard"}
    assert found["right of 3"] == "hung" and "error" in found["wrong of 3"]


def test_torch_is_no_rival_of_itself_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [providers.Provider("moeyard", name, len) for name in ("cuda", "triton", "torch")]
    made += [providers.Provider("vllm", "0", len), providers.Provider("torch", "grouped_mm", len)]
    monkeypatch.setattr(providers, "providers", lambda case, device: made)
    monkeypatch.setattr(
        experts_worker.impls,
        "explain",
        lambda *_: moeyard.impls.Explanation("", None, "cuda", {}),  # type: ignore[arg-type]
    )
    cuda, case = torch.device("cuda"), cell("targets")
    names = [experts_worker.label_of(p) for p in experts_worker.answers(case, cuda, {})]
    assert names == ["torch:grouped_mm", "vllm:0", "moeyard:cuda"]
    monkeypatch.setattr(experts_worker.impls, "impl_names", lambda op: ("cuda", "triton", "torch"))
    names = [experts_worker.label_of(p) for p in experts_worker.answers(case, cuda, {"grid": True, "all": True})]
    assert names == ["vllm:0", "moeyard:cuda", "moeyard:triton"]
    asked = {"providers": ["moeyard:triton"], "all": True}
    assert [experts_worker.label_of(p) for p in experts_worker.answers(case, cuda, asked)] == ["moeyard:triton"]


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
    bench.facts = {"machine": {"copy_gb_s": 1.0, "matrix_tflops": 1.0}}
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
    bench.facts = {"machine": {"copy_gb_s": 1.0, "matrix_tflops": 1.0}}
    try:
        bench.start(["qwen3-30b-a3b"], 2)
        bench.compile([(cell("targets", n), {}) for n in (1, 2, 3)], 2)
        assert bench.lost == {"qwen3-30b-a3b": {"bad:1": "hung for 2 s"}}
        start = time.monotonic()
        assert bench.measure(cell("targets"), {}) == [{"rows of": ["bad:1"]}]
        assert time.monotonic() - start < 2
    finally:
        bench.finish()


def test_command_on_a_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    options = (
        "--device cpu --scale 32 --models qwen3-30b-a3b --tokens 1 --parts targets,grouped --shares 0 --seconds 100"
    )
    wanted = ["--providers", "torch,moeyard:cpu,moeyard:cpu by offsets"]
    assert experts_gpu.main([*options.split(), *wanted, "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    content = results.read(tmp_path / "experts_bf16.json")
    assert {row["op"] for row in content["rows"]} == {"fused_experts", "grouped_gemm"}
    assert content["machine"]["matrix_tflops"] > 0 and printed.count("floor") == 3 and "torch/ours" in printed
    table = docs.ratio_table(content, ["grouped_gemm"])
    assert "qwen3-30b-a3b, 1 tokens, equal, by offsets" in table and "TFLOP/s" in table


def test_ratio_table() -> None:
    def row(provider: str, impl: str, time_us: float | None, **more: Any) -> dict[str, Any]:
        case = cell("targets", 8, 1)
        timed = None if time_us is None else timing.summarise([time_us] * 6)
        return {**run.row_of(case, provider, impl, "graph", timed, 100.0), **more}

    machine = {"gpu": "a GPU", "copy_gb_s": 4000.0, "matrix_tflops": 800.0}
    rows = [
        row("vllm", "0.25.1", 150.0, extra_bytes=3_000_000),
        row("moeyard", "cuda", 120.0, extra_bytes=2_000_000, ratio_to={"vllm": [0.8, 0.75, 0.85]}),
        row("moeyard", "triton", 130.0),
    ]
    lines = docs.ratio_table(results.document(rows, machine, {"torch": "2"})).splitlines()
    assert lines[0].startswith("| µs a call | floor | moeyard | × floor | vllm | vllm / moeyard |")
    wanted = "| qwen3-30b-a3b, 8 tokens | 100 | 120 | 1.20 | 150 | 1.25 [1.18, 1.33] | 2.00 | 3.00 |"
    assert lines[2] == wanted and lines[3] == "", "one line: what auto does not choose is left out"
    wrong = results.document([row("moeyard", "cuda", None)], machine, {})
    assert "| wrong |" in docs.ratio_table(wrong)


def result_row(part: str, tokens: int, provider: str, time_us: float, **more: Any) -> dict[str, Any]:
    model = "gpt-oss-120b" if part == "biased" else "qwen3-30b-a3b"
    timed = timing.summarise([time_us] * 6)
    impl = {"moeyard": "cuda by offsets" if part == "grouped" else "cuda"}.get(provider, "1")
    return {**run.row_of(cell(part, tokens, 1, model), provider, impl, "graph", timed, 100.0), **more}


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


def test_experts_on_another_dtype_are_checked_too() -> None:
    case = cell("targets", 5)
    sizes = tuple({**dict(case.sizes), "dtype": "float16"}.items())
    inputs = layer.make_inputs(replace(case, sizes=sizes), CPU, generator())
    tokens, wide = inputs.checked
    again = plain_experts(inputs.hidden_states, inputs.routing, inputs.weights, dtype=torch.float64)
    assert torch.equal(again[tokens], wide)
