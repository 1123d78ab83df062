"""The benchmark of experts on a GPU: cases made, checked, captured and timed there, at a sixteenth of whole sizes."""

from dataclasses import replace

import pytest
import torch

from moeyard.bench import experts_cells, experts_worker, layers, timing
from moeyard.bench.cases import fused_experts
from moeyard.bench.operators import Case

CUDA = torch.device("cuda")
RATES = {"copy_gb_s": 4000.0, "read_gb_s": 4400.0, "matrix_tflops": 800.0, "matrix_dtype": "bfloat16"}
REQUEST = {"seed": 1, "rates": RATES, "seconds": 0.05, "without": {}}


def cells() -> list[Case]:
    model = ("qwen3-30b-a3b",)
    few = [case for part in ("targets", "grouped") for case in experts_cells.cells(part, model, (1, 300), 16)]
    return [*few, *experts_cells.cells("biased", ("gpt-oss-120b",), (33,), 16)]


@pytest.mark.parametrize("case", cells(), ids=str)
def test_every_provider_is_right_and_timed(case: Case) -> None:
    said: list[dict[str, str]] = []
    rows = experts_worker.time_case(case, CUDA, REQUEST, said.append)
    assert {row["provider"] for row in rows} >= {"moeyard", "torch"}
    for row in rows:
        assert row["correct"], (row["provider"], row["impl"], row["wrong"])
        assert row["rounds"] >= 6 and row["calls"] >= (20 if case["num_tokens"] <= 256 else 2) and row["time_us"] > 1
        if case.op == "fused_experts" and row["mode"] == "graph":
            assert row["extra_bytes"] >= case["num_tokens"] * case["hidden_size"] * 2
            assert 0 < row["error_rms"] < row["answer_rms"]
    assert {row["mode"] for row in rows} <= {"graph", "graph_pdl"} and said


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cells()[0]
    right = fused_experts.grouped_experts
    monkeypatch.setattr(fused_experts, "grouped_experts", lambda act: lambda x: right(act)(x) * 1.1)
    rows = experts_worker.time_case(case, CUDA, {**REQUEST, "providers": ["torch"]}, lambda _: None)
    assert [row["correct"] for row in rows] == [False] and "error" in rows[0]["wrong"]


def test_routings_are_drawn_on_the_device() -> None:
    case = cells()[1]
    for routing in ("uniform", "zipf", "one_hot", "equal", "half_empty"):
        inputs = layers.draw_layer(replace(case, routing=routing), CUDA, torch.Generator().manual_seed(3))
        ids = inputs.routing.topk_ids.sort(1).values
        assert ids.is_cuda and ids.dtype == torch.int32
        assert bool((ids.diff(dim=1) > 0).all()) and int(ids.min()) >= 0 and int(ids.max()) < case["num_experts"]


def test_rates() -> None:
    copied, read = timing.copy_gb_s(CUDA), timing.read_gb_s(CUDA)
    assert 500 < copied < 10_000 and 0.8 < read / copied < 1.5, (copied, read)
    assert 10 < timing.matrix_tflops(CUDA, torch.bfloat16, 8192) < 3000
