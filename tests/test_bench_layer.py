"""Workloads of named models, their providers, and the checks of their answers with mutants."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import moeyard
from moeyard import Routing
from moeyard.bench import memory, results, workloads
from moeyard.bench.operators import Provider, operators
from moeyard.bench.peers import installed
from moeyard.testing import CPU
from moeyard_command.app import app

MODELS = {
    "mixtral-8x7b": (8, 2, 4096, 14336), "qwen3-30b-a3b": (128, 8, 2048, 768), "qwen3-235b-a22b": (128, 8, 4096, 1536),
    "qwen3-next-80b-a3b": (512, 10, 2048, 512), "deepseek-v3": (256, 8, 7168, 2048), "gpt-oss-20b": (32, 4, 2880, 2880),
    "gpt-oss-120b": (128, 4, 2880, 2880), "olmoe-1b-7b": (64, 8, 2048, 1024),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_have_their_sizes(name: str) -> None:
    keys = ("num_experts", "top_k", "hidden_size", "intermediate_size")
    cases = workloads.load(name)
    assert {case.op for case in cases} == {"route", "fused_experts", "moe_layer"}
    for case in cases:
        sizes = dict(case.sizes)
        assert all(sizes.get(key, size) == size for key, size in zip(keys, MODELS[name], strict=True))
    for case in workloads.load(name, scale=16):
        for key, whole in zip(keys[2:], MODELS[name][2:], strict=True):
            assert dict(case.sizes).get(key, max(64, whole // 16 // 64 * 64)) == max(64, whole // 16 // 64 * 64)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-next-80b-a3b", "deepseek-v3", "gpt-oss-20b", "olmoe-1b-7b"])
def test_every_provider_is_right(name: str) -> None:
    for case in workloads.load(name, scale=32):
        if case["num_tokens"] > 32 or (case["dtype"] == "float32" and case.op == "moe_layer"):
            continue
        operator = operators()[case.op]
        inputs = operator.inputs(case, CPU, torch.Generator().manual_seed(0))
        found = operator.providers(case, CPU)
        names = {provider.name for provider in found}
        assert "moeyard" in names
        if case.op == "fused_experts" and installed("transformers"):
            assert {p.impl for p in found if p.name == "transformers"} >= {"eager", "grouped_mm"}
        for provider in found:
            assert operator.failure(case, provider, inputs, CPU) is None, (str(case), provider)


def test_checks_reject_mutants() -> None:
    for case in workloads.load("gpt-oss-20b", scale=32):
        if case["num_tokens"] != 32 or case.op == "moe_layer":
            continue
        operator = operators()[case.op]
        inputs, someone = operator.inputs(case, CPU, torch.Generator().manual_seed(0)), Provider("a", "x", len)
        if case.op == "route":
            right = moeyard.route(inputs.logits, top_k=4, renormalize=True)
            assert operator.error(case, someone, inputs, right) is None
            assert operator.error(case, someone, inputs, Routing(right.topk_weights * 1.01, right.topk_ids))
            continue
        act = moeyard.GPT_OSS_ACTIVATION
        right = moeyard.fused_experts(inputs.hidden_states, inputs.routing, inputs.weights, activation=act)
        assert operator.error(case, someone, inputs, right) is None
        for wrong in (right * 1.05, right * float("nan"), right.flip(0), torch.zeros_like(right)):
            assert operator.error(case, someone, inputs, wrong)
        other = moeyard.fused_experts(inputs.hidden_states, inputs.routing, inputs.weights)
        assert operator.error(case, someone, inputs, other), "plain silu is not gpt-oss's"


def test_memory_is_seen() -> None:
    extra = memory.peak_extra_bytes(lambda x: torch.ones(1 << 24), None, CPU)
    if extra is None:
        pytest.skip("the peak of resident memory is not to be had here")
    assert (60 << 20) < extra < (90 << 20)


@pytest.mark.parametrize(
    ("model", "message"),
    [("colour = 'red'", "model: expected keys of .*, got colour = 'red'"), ("bias = 1", "model: .* got bias = 1")],
)
def test_bad_models_say_what_is_wrong(model: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text((workloads.FOLDER / "mixtral-8x7b.toml").read_text() + model)
    with pytest.raises(ValueError, match=message):
        workloads.load(str(path))


def test_command_with_a_scale(tmp_path: Path) -> None:
    text = (workloads.FOLDER / "mixtral-8x7b.toml").read_text().replace("[1, 32, 512]", "[2]")
    source, out = tmp_path / "small.toml", tmp_path / "small.json"
    source.write_text(text)
    options = ["--scale", "32", "--op", "fused_experts", "--op", "moe_layer", "--rounds", "3", "--device", "cpu"]
    done = CliRunner().invoke(app, ["bench", "-w", str(source), *options, "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows: list[dict[str, Any]] = results.read(out)["rows"]
    assert all(row["correct"] and row["sizes"]["hidden_size"] == 128 for row in rows)
    experts = [row for row in rows if row["provider"] == "moeyard"]
    assert experts and all(row["error_rms"] > 0 and row["needed_bytes"] > 0 for row in experts)
