"""The examples run, and show what they say."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from moeyard.dispatch import refusals
from moeyard.testing import python

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.skipif(not refusals.installed("transformers"), reason="transformers is not installed")
@pytest.mark.filterwarnings("ignore")
def test_qwen3_moe_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("qwen3_moe", EXAMPLES / "qwen3_moe.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def within(dtype: str) -> bool:
        """Errors of the logits against float64 as those of transformers' own; a largest one varies more."""
        rows = {(kind, experts): errors for kind, experts, *errors, _ in example.compare(96, 2)}
        assert len(rows) == 4
        (their_largest, their_rms), (largest, rms) = rows[dtype, "eager"], rows[dtype, "moeyard"]
        return 0 < rms <= 1.1 * their_rms and largest <= 1.5 * their_largest

    assert within("float32") and within("bfloat16")
    known = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    right = known["moeyard"]
    monkeypatch.setitem(known._global_mapping, "moeyard", lambda *arguments: right(*arguments) * 1.001)
    assert not within("float32")


@pytest.mark.parametrize("name", ["qwen3_moe.py", pytest.param("transformers_generate.py", marks=pytest.mark.full)])
def test_examples_say_how_they_are_used(name: str) -> None:
    if not refusals.installed("transformers"):
        pytest.skip("transformers is not installed")
    done = python(str(EXAMPLES / name), "--help")
    assert done.returncode == 0 and "--tokens" in done.stdout, done.stderr


@pytest.mark.full
def test_expert_parallel_has_the_bits_of_one_process() -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = {"MOEYARD_IMPL": "torch", "GLOO_SOCKET_IFNAME": "lo"}
    done = python(*launch, str(EXAMPLES / "expert_parallel.py"), "--tokens", "20", environment=environment)
    assert done.returncode == 0 and "same bits as one process in that order: True" in done.stdout, done.stderr
    if refusals.installed("transformers"):
        assert "4 of 8 experts" in done.stdout and float(done.stdout.split()[-1]) < 1e-5


@pytest.mark.skipif(not refusals.installed("transformers"), reason="transformers is not installed")
@pytest.mark.filterwarnings("ignore")
def test_transformers_generate_times_what_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("transformers_generate", EXAMPLES / "transformers_generate.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    given = ["--device", "cpu", "--small", "--rounds", "2", "--steps", "2", "--tokens", "24", "--layers", "1"]
    content = example.main([*given, "--out", str(tmp_path)])
    rows = content["rows"]
    assert {row["implementation"] for row in rows} == {"eager", "batched_mm", "grouped_mm", "moeyard"}
    assert len(rows) == 8 and all(len(row["tokens_per_s"]) == 2 and row["error"] < 1e-5 for row in rows)
    assert json.loads((tmp_path / "transformers_generate.json").read_text()) == content
    assert (tmp_path / "transformers_generate.png").stat().st_size > 10_000

    def wrong(self: torch.nn.Module, hidden_states: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return hidden_states

    monkeypatch.setitem(example.integration.ALL_EXPERTS_FUNCTIONS._global_mapping, "batched_mm", wrong)
    rows = example.main(given)["rows"]
    assert [row["implementation"] for row in rows if row["problem"].startswith("wrong: ")] == ["batched_mm"] * 2
