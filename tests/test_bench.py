"""Workloads, operators, the correctness gate and its mutants, timing."""

import io
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import moeyard
from moeyard import Layout
from moeyard.bench import cases, docs, results, run, timing, workloads
from moeyard.bench.operators import Provider, operators
from moeyard.bench.timing import Rates, Times, ratio_interval, summarise, time_in_turn
from moeyard.testing import ROUTINGS, fp8_error, layout_error, rows_error, sum_error
from moeyard_command.app import app

CPU = torch.device("cpu")
RATES = Rates(20.0, 30.0, 0.5, "bfloat16")


def draw(routing: str, tokens: int = 500, experts: int = 16, top_k: int = 4) -> torch.Tensor:
    return ROUTINGS[routing](tokens, experts, top_k, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("routing", sorted(ROUTINGS))
def test_routings_are_what_they_say(routing: str) -> None:
    ids = draw(routing)
    counts = torch.bincount(ids[ids >= 0].long(), minlength=16)
    assert ids.shape == (500, 4) and ids.dtype == torch.int32 and int(ids.max()) < 16
    assert torch.equal(ids, draw(routing))
    if routing not in ("independent", "dropped"):
        assert all(len(set(row)) == 4 for row in ids.tolist())
    if routing == "uniform":
        assert 80 < int(counts.min()) and int(counts.max()) < 175
    if routing == "zipf":
        assert int(counts[0]) > 3 * int(counts[15])
    if routing == "one_hot":
        assert int(counts[0]) == 500
    if routing == "half_empty":
        assert not counts[1::2].any()
    assert (0.07 < float((ids < 0).float().mean()) < 0.13) == (routing == "dropped")


def named(layout: Layout) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in zip(Layout.TENSORS, layout.tensors, strict=True)}


MUTANTS = {
    "two routes of an expert swapped": lambda x: x["sorted_token_ids"].__setitem__(
        slice(0, 2), x["sorted_token_ids"][:2].flip(0).clone()
    ),
    "a route twice": lambda x: x["sorted_token_ids"].__setitem__(0, int(x["sorted_token_ids"][1])),
    "a route lost": lambda x: x["sorted_token_ids"].__setitem__(0, 2000),
    "padding unwritten": lambda x: x["sorted_token_ids"].__setitem__(-1, 0),
    "another expert": lambda x: x["expert_ids"].__setitem__(0, 1),
    "the end of expert_ids unwritten": lambda x: x["expert_ids"].__setitem__(-1, 0),
    "a block too many": lambda x: x["num_tokens_post_padded"].add_(16),
    "an offset off by one": lambda x: x["expert_offsets"].__setitem__(3, int(x["expert_offsets"][3]) + 1),
    "a count off by one": lambda x: x["expert_counts"].__setitem__(3, int(x["expert_counts"][3]) + 1),
    "the inverse of another route": lambda x: x["route_rows"].__setitem__(7, int(x["route_rows"][8])),
    "slots missing": lambda x: x.__setitem__("sorted_token_ids", x["sorted_token_ids"][:1000]),
}


@pytest.mark.parametrize("routing", sorted(ROUTINGS))
def test_the_gate_accepts_what_is_right(routing: str) -> None:
    ids = draw(routing)
    layout = moeyard.moe_align_block_size(ids, num_experts=16, block_size=16)
    assert layout_error(ids, 16, 16, named(layout), stable=True) is None
    swapped = named(layout)
    MUTANTS["two routes of an expert swapped"](swapped)
    del swapped["route_rows"]
    assert layout_error(ids, 16, 16, swapped, stable=False) is None


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
@pytest.mark.parametrize("stable", [True, False])
def test_the_gate_rejects_every_mutant(mutant: str, stable: bool) -> None:
    ids = draw("uniform")
    wrong = named(moeyard.moe_align_block_size(ids, num_experts=16, block_size=16))
    MUTANTS[mutant](wrong)
    if mutant.startswith("two routes") and not stable:
        del wrong["route_rows"]
        assert layout_error(ids, 16, 16, wrong, stable=False) is None
        return
    assert layout_error(ids, 16, 16, wrong, stable=stable)


@pytest.mark.parametrize("group_size", [None, 128])
def test_the_gate_of_quantised_rows_rejects_mutants(group_size: int | None) -> None:
    hidden = torch.randn(30, 256).bfloat16()
    layout = moeyard.moe_align_block_size(draw("dropped", 30, 6, 2), num_experts=6, block_size=4)
    right = moeyard.permute_to_fp8(hidden, layout, group_size=group_size)
    assert fp8_error(hidden, layout, right, group_size) is None
    slot = int(layout.route_rows[layout.route_rows >= 0][0])
    rows = moeyard.Permuted(right.rows.clone(), right.scales)
    rows.rows.view(torch.uint8)[slot, 7] ^= 1
    assert (
        fp8_error(hidden, layout, rows, group_size) == f"1 of {int(layout.expert_counts.sum())} quantised rows "
        "differ from their token's"
    )
    assert right.scales is not None
    scales = moeyard.Permuted(right.rows, right.scales.clone())
    assert scales.scales is not None
    scales.scales.view(torch.int32).view(layout.capacity, -1)[slot, 0] += 1
    assert fp8_error(hidden, layout, scales, group_size) == "scales differ from the scales of the tokens"


def test_the_gates_of_rows_reject_mutants() -> None:
    ids = draw("dropped", tokens=20)
    layout = moeyard.moe_align_block_size(ids, num_experts=16, block_size=4)
    hidden = torch.randn(20, 8).bfloat16()
    rows = moeyard.permute(hidden, layout).rows
    assert rows_error(hidden, layout, rows) is None
    wrong = rows.clone()
    wrong[int(layout.route_rows.max()), 3] += 1
    assert rows_error(hidden, layout, wrong) == f"1 of {int(layout.expert_counts.sum())} rows differ from their token's"
    wide = torch.randn(6, 9, dtype=torch.float64)
    assert sum_error(wide, wide.bfloat16(), 2) is None and sum_error(wide, wide.float(), 2) is None
    assert sum_error(wide, wide.float()[:5], 2)
    for mutant in (wide.bfloat16() * 1.01, wide.bfloat16() * float("nan"), wide.float() + 1e-5):
        assert sum_error(wide, mutant, 2)
    off_by_one_bit = (wide.bfloat16().view(torch.int16) + 1).view(torch.bfloat16)
    assert sum_error(wide, off_by_one_bit, 2)


def test_a_wrong_provider_is_shown_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = workloads.load("seed")[0]
    calls = []

    def wrong(inputs: Any) -> Any:
        calls.append(inputs)
        layout = moeyard.moe_align_block_size(inputs, num_experts=64, block_size=128, impl="torch")
        layout.expert_ids[0] = 7
        return layout

    def broken(inputs: Any) -> Any:
        raise RuntimeError("no such kernel")

    found = [Provider("peer", "wrong", wrong), Provider("peer", "broken", broken)]
    changed = {**operators(), case.op: replace(operators()[case.op], providers=lambda case, device: found)}
    monkeypatch.setattr(run, "operators", lambda: changed)
    rows = run.run_case(case, CPU, rates=RATES, rounds=3, wanted=lambda _: True, seed=0, advance=lambda: None)
    assert [row["correct"] for row in rows] == [False, False] and [row["time_us"] for row in rows] == [None, None]
    assert rows[0]["wrong"] == "expert_ids name other experts than the blocks hold"
    assert rows[1]["wrong"] == "RuntimeError: no such kernel"
    assert len(calls) == 1  # the first wrong answer ended it


def test_every_provider_of_every_op_is_right() -> None:
    for name in ("seed", "rows", "routing", "router", "grouped", "decode", "models", "fp8"):
        for case in workloads.load(name):
            if case["num_tokens"] > (4096 if name in ("seed", "routing") else 64):
                continue
            operator = operators()[case.op]
            inputs = operator.inputs(case, CPU, torch.Generator().manual_seed(0))
            found = operator.providers(case, CPU)
            assert {p.name for p in found} >= {"moeyard"} | ({"torch"} if case.op != "route_and_align" else set())
            for provider in found:
                for _ in range(2):
                    assert operator.failure(case, provider, inputs, CPU) is None, (case, provider)


def test_timing_is_in_turn_and_tells_slow_from_fast() -> None:
    order: list[str] = []

    def make(name: str, seconds: float) -> Any:
        def call(value: Any) -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    times = time_in_turn(
        [make("fast", 0.001), make("slow", 0.004)],
        [1, 2],
        rounds=8,
        sample_us=10,
        finish=lambda: order.append("|"),
        after_round=lambda: order.append("\n"),
    )
    assert 900 < times[0].median < 3500 < times[1].median and times[0].p10 <= times[0].median <= times[0].p90
    rounds = "".join(part[0] for part in order).split("\n")[:8]
    assert len({r[-8:] for r in rounds}) > 1  # both orders occur
    assert summarise([1.0, 2.0, 3.0, 4.0]).median == 2.5


def test_workloads_that_come_along() -> None:
    assert len(workloads.load("vllm-grid")) == 4 * 6 * 3
    assert {case.routing for case in workloads.load("routing")} == {
        "uniform",
        "zipf",
        "one_hot",
        "half_empty",
        "dropped",
    }
    (seed,) = workloads.load("seed")
    assert (seed["num_tokens"], seed["num_experts"], seed["top_k"], seed["block_size"]) == (4096, 64, 2, 128)
    assert set(workloads.names()) == {path.stem for path in workloads.FOLDER.glob("*.toml")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("op = [", "expected TOML"),
        ("description = 'x'", r"op: expected a list of at least one value, got None"),
        ("op = ['sort']\nrouting = ['uniform']", r"op: expected one of .* got 'sort'"),
        ("op = ['moe_sum']\nrouting = ['fair']", r"routing: expected one of .* got 'fair'"),
        ("op = ['moe_sum']\nrouting = ['uniform']\n[sizes]\nnum_tokens = 3", "num_tokens: expected a list"),
        (
            "op = ['moe_sum']\nrouting = ['uniform']\n[sizes]\ntokens = [3]",
            r"sizes: expected keys of .* got \['tokens'\]",
        ),
        ("op = ['moe_sum']\nroutings = ['uniform']", r"expected keys of \['description', 'op', .* got \['routings'\]"),
        (
            "op = ['moe_sum']\nrouting = ['uniform']\npoints = [{ num_tokens = 4, tokens = 3 }]",
            r"points: expected keys of .* got \['tokens'\]",
        ),
        ("op = ['moe_sum']\nrouting = ['uniform']\npoints = [{}]\n[sizes]\ntop_k = [1]", "expected none beside points"),
        (
            "op = ['moe_align_block_size']\nrouting = ['uniform']\n[sizes]\nnum_tokens = [0]\nnum_experts = [2]\n"
            "top_k = [1]\nblock_size = [8]",
            "num_tokens: expected integers of 1 and above, got 0",
        ),
        (
            "op = ['moe_align_block_size']\nrouting = ['uniform']\n[sizes]\nnum_tokens = [4]\nnum_experts = [2]\n"
            "top_k = [3]\nblock_size = [8]",
            "top_k: expected at most num_experts=2, got 3",
        ),
        (
            "op = ['permute_to_fp8']\nrouting = ['uniform']\npoints = [{ num_tokens = 4, num_experts = 2, top_k = 1, "
            "block_size = 1, hidden_size = 128, group_size = 64, dtype = 'bfloat16' }]",
            r"group_size: expected one of \(0, 128\), got 64",
        ),
    ],
)
def test_bad_workloads_say_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        workloads.load(str(path))
    with pytest.raises(ValueError, match="workload: expected one of"):
        workloads.load("absent")


def test_what_bytes_and_operations_take() -> None:
    assert Rates(20.0, 40.0, 0.5, "bfloat16").times_us(8e6, 1e9, torch.bfloat16) == {
        "copy_time_us": 400.0, "read_time_us": 200.0, "product_time_us": 2000.0
    }  # fmt: skip
    assert Rates(20.0, 40.0, 0.5, "bfloat16").times_us(8e6, 1e9, torch.float32)["product_time_us"] is None
    assert Rates(20.0, 40.0, 0.5, "bfloat16").times_us(8e6, 0, torch.bfloat16)["product_time_us"] is None
    assert Rates(20.0, 40.0, 0.5, "float32").times_us(8e6, 1e9, torch.float32)["product_time_us"] == 2000.0
    row = {"copy_time_us": 400.0, "read_time_us": 200.0, "product_time_us": None}
    assert results.yardstick_us(row) == 400 and results.yardstick_us(row | {"product_time_us": 500.0}) == 500
    assert results.yardstick_us(dict.fromkeys(row)) is None


def test_reads_are_measured_beside_copies() -> None:
    """A reduction cannot be much quicker than memory, nor a tenth of a copy."""
    assert 0.1 < timing.read_gb_s(CPU) / timing.copy_gb_s(CPU) < 10


def test_ratio_intervals_cover_what_they_should() -> None:
    """Of 2000 experiments with a true median ratio of 1.1, at least 95 % of the intervals hold it, and not all."""
    generator = random.Random(5)
    held = 0
    for _ in range(2000):
        theirs = [generator.uniform(1, 2) for _ in range(15)]
        ours = [1.1 * value * generator.lognormvariate(0, 0.3) for value in theirs]
        middle, low, high = ratio_interval(Times(0, 0, 0, tuple(ours)), Times(0, 0, 0, tuple(theirs)))
        assert low <= middle <= high
        held += low <= 1.1 <= high
    assert 0.95 <= held / 2000 < 0.99
    pair = Times(0, 0, 0, (2.0, 3.0)), Times(0, 0, 0, (1.0, 1.0))
    assert ratio_interval(*pair) == (2.5, 2.0, 3.0), "too few rounds: the whole range"


DOUBLED = """
import torch
from moeyard.bench.operators import Operator, Provider

def inputs(case, device, generator):
    return torch.randn(case["num_tokens"], generator=generator).to(device)

def providers(case, device):
    return [Provider("mine", "right", lambda x: x * 2), Provider("mine", "wrong", lambda x: x * 3)]

def error(case, provider, given, got):
    return None if torch.equal(got, given + given) else "not doubled"

OPERATOR = Operator(("num_tokens",), inputs, providers, error, lambda case: 8 * case["num_tokens"])
"""
SIZED = "description = 'x'\nop = ['doubled']\nrouting = ['uniform']\n[sizes]\nnum_tokens = [100, 4000]\n"


def test_an_operator_is_one_file_and_a_workload_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but these two names them, from the workload to the table on the terminal, the picture and Markdown."""
    folders = [tmp_path / "cases", tmp_path / "workloads"]
    for folder, name, text in zip(folders, ("doubled.py", "sized.toml"), (DOUBLED, SIZED), strict=True):
        folder.mkdir()
        (folder / name).write_text(text)
    monkeypatch.setattr(cases, "__path__", [*cases.__path__, str(folders[0])])
    monkeypatch.setattr(workloads, "FOLDER", folders[1])
    operators.cache_clear()
    try:
        assert workloads.names() == {"sized": "x"} and "doubled" in operators()
        out = tmp_path / "out.json"
        done = CliRunner().invoke(app, ["bench", "-w", "sized", "--rounds", "3", "--device", "cpu", "--out", str(out)])
        assert done.exit_code == 1 and "doubled (cpu)" in done.output and "not doubled" in done.output
        rows = results.read(out)["rows"]
        assert [(row["impl"], row["correct"]) for row in rows] == 2 * [("wrong", False), ("right", True)]
        assert all(
            row["copy_time_us"] >= row["read_time_us"] / 10 > 0 for row in rows if row["sizes"]["num_tokens"] > 999
        )
        assert "doubled: 100 tokens; uniform" in docs.table(results.read(out))
    finally:
        operators.cache_clear()


def test_tables_fit_80_columns() -> None:
    rich = pytest.importorskip("rich.console")
    from moeyard.bench.tables import tables

    sizes = {
        "num_tokens": 4096,
        "num_experts": 128,
        "hidden_size": 7168,
        "intermediate_size": 2048,
        "dtype": "bfloat16",
    }
    base = {"op": "fused_experts", "mode": "graph", "routing": "half_empty", "sizes": sizes}
    times = {"time_us": 1234567.8, "time_us_p10": 98765.4, "time_us_p90": 1234999.0}
    timed = {**base, **times, "copy_time_us": 12.0, "read_time_us": None}
    rows = [
        {**timed, "provider": "moeyard", "impl": "cuda"},
        {**timed, "provider": "transformers", "impl": "Qwen3MoeExperts grouped_mm", "time_us": 4321.0},
        {**timed, "provider": "their_kernels", "impl": "permute", "time_us": None},
    ]
    console = rich.Console(width=80, record=True, file=io.StringIO())
    for shown in tables(rows):
        console.print(shown)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for words in (
        "num_tokens 4096, num_experts 128, hidden_size 7168, intermediate_size 2048, bfloat16; half_empty",
        "moeyard cuda 1235k 98765 1235k 102881",
        "4321 98765",
        "their_kernels permute wrong",
        "x best",
    ):
        assert words in text, text
