"""The command line, in this process and as a subprocess."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import moeyard
from moeyard.dispatch import refusals, table
from moeyard.testing import checkpoints, python
from moeyard_command.app import app

TINY = """
description = "tiny"
op = ["moe_align_block_size", "permute", "combine", "moe_sum"]
routing = ["uniform", "dropped"]
[sizes]
num_tokens = [8]
num_experts = [4]
top_k = [2]
block_size = [1]
hidden_size = [64]
dtype = ["bfloat16"]
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def command(*arguments: str) -> Result:
    """The command in this process, on a terminal of 160 columns."""
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, arguments, prog_name="moeyard")


def test_help_and_version() -> None:
    for arguments in (
        ["--help"],
        ["bench", "--help"],
        ["bench", "experts", "--help"],
        ["plot", "--help"],
        ["doctor", "--help"],
        ["warmup", "--help"],
        ["explain", "--help"],
    ):
        done = command(*arguments)
        assert done.exit_code == 0 and "Usage: moeyard" in done.stdout, done.stderr
    assert python("-m", "moeyard", "--version").stdout == f"moeyard {moeyard.__version__}\n"


def test_bench_prints_a_table_and_writes_json(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "tiny.json"
    done = python("-m", "moeyard", "bench", "-w", str(tiny), "--device", "cpu", "--rounds", "3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    for word in ("moeyard torch", "torch plain", "moe_align_block_size (cpu)", "combine (cpu)", "copy bandwidth"):
        assert word in done.stdout
    content = json.loads(out.read_text())
    assert {row["op"] for row in content["rows"]} == {"moe_align_block_size", "permute", "combine", "moe_sum"}
    assert all(row["correct"] and row["time_us_p10"] <= row["time_us"] <= row["time_us_p90"] for row in content["rows"])
    assert {row["mode"] for row in content["rows"]} == {"cpu"}
    picture = tmp_path / "tiny.svg"
    done = python("-m", "moeyard", "plot", str(out), "--out", str(picture))
    assert done.returncode == 0 and picture.read_text().startswith("<?xml"), done.stderr


def test_bench_of_some_providers_and_ops(tiny: Path) -> None:
    only = ("--op", "permute", "--provider", "moeyard:torch", "--rounds", "3", "--device", "cpu")
    done = python("-m", "moeyard", "bench", "-w", str(tiny), *only)
    assert done.returncode == 0, done.stderr
    assert "moeyard torch" in done.stdout and "torch plain" not in done.stdout and "combine" not in done.stdout


def test_bench_lists_workloads() -> None:
    done = python("-m", "moeyard", "bench", "--list")
    assert "seed: the seed script" in done.stdout and "vllm-grid: " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "-w", "absent"], "workload: expected one of"),
        (["bench", "--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["bench", "--provider", "nobody", "--device", "cpu"], "--provider: expected some of moeyard:"),
        (["bench", "--provider", "absent:run", "--device", "cpu"], "--provider: expected a module to import, got"),
        (["bench", "--provider", "json:absent", "--device", "cpu"], "--provider: expected a function of json, got"),
        (["bench", "--op", "softmax"], "--op: expected ops of these workloads (moe_align_block_size), got softmax"),
        (["bench", "-w", "rows", "--op", "moe_sum", "--rounds", "1"], "Invalid value for '--rounds'"),
        (["bench", "-w", "rows", "--cold", "--device", "cpu"], "--cold: expected a workload of moe_align_block_size"),
        (["bench", "-w", "rows", "experts", "--out", "x"], "bench experts: expected its own options behind it"),
        (["bench", "experts", "--device", "cpu", "--out", "x", "--parts", "all"], "part: expected one of"),
        (["bench", "experts", "--device", "cpu", "--out", "x", "--models", "x"], "workload: expected one of"),
        (["bench", "experts", "--device", "cpu", "--out", "x", "--tokens", "1,b"], "--tokens: expected integers"),
        (["explain", "softmax"], "op: expected one of ['activate',"),
        (["explain", "permute", "--dtype", "real"], "--dtype: expected a dtype of torch, such as bfloat16, got 'real'"),
        (["explain", "permute", "--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["explain", "permute", "--capability", "9"], "--capability: expected MAJOR.MINOR, such as 9.0, got '9'"),
        (["explain", "permute", "--capability", "9.0"], "capability: expected None beside device 'cpu'"),
        (["explain", "permute", "--tokens", "3"], "--model: expected a model beside --tokens and --scheme, got none"),
        (["explain", "fused_experts", "--model", "x"], "model: expected one of deepseek-v3, gpt-oss-120b,"),
        (["plot", "absent.json"], "result file: expected JSON"),
        (["plot", "absent.json", "--out", "picture.gif"], "--out: expected a .png or .svg file, got picture.gif"),
        (["warmup", "--device", "tpu"], "--device: expected cpu or cuda"),
        (["warmup", "--model", "rows"], "model: expected one of deepseek-v3, gpt-oss-120b,"),
        (["warmup", "--model", "mixtral-8x7b", "--device", "cpu"], "--device: expected --arch beside --model"),
        (["warmup", "--model", "mixtral-8x7b", "--arch", "sm_42"], "arch: expected one of ['sm_100',"),
    ],
)
def test_mistakes_are_errors_in_words(arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_inspect_says_what_experts_are(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    for name, layout, words in (
        ("fp8 channel", "apart", "e4m3 1x*, e4m3 per row (float-quantized, one by one, gate and up apart); 0.0"),
        ("bfloat16", "stacked fused", "BF16 (unquantised, stacked, gate and up in one, gate first); 0.0"),
        ("modelopt nvfp4", "w1", "model.safetensors; activations of 4 bits are not quantised"),
    ):
        checkpoints.write(tmp_path, checkpoints.FORMS[name], layout)
        done = python("-m", "moeyard", "inspect", str(tmp_path))
        start = "model.layers.3.mlp.experts: 3 experts, hidden_size 192, intermediate_size 160; "
        assert done.returncode == 0 and done.stdout.startswith(start) and words in done.stdout, done.stderr
    done = python("-m", "moeyard", "inspect", str(tmp_path), "--prefix", "model.experts")
    assert done.returncode == 2 and "prefix: expected tensors in" in " ".join(done.stderr.split())


def test_explain_says_what_a_call_takes_and_why() -> None:
    done = command("explain", "permute", "--dtype", "float32")
    assert done.stdout == f"{moeyard.explain('permute', 'cpu', torch.float32)}\n", done.stderr
    hopper = ("explain", "fused_experts", "--device", "cuda", "--capability", "9.0", "--model", "qwen3-30b-a3b")
    few, many = (command(*hopper, "--tokens", count).stdout for count in ("1", "4096"))
    if refusals.installed("cuda.core") and refusals.installed("cuda.bindings"):
        assert "cuda (few tokens): chosen" in few
        assert "cuda (few tokens): takes a few tokens, got 4096 of 8 experts each" in many
        assert "cuda (products): chosen" in many
        coded = command(*hopper, "--tokens", "4096", "--scheme", "int4 1x128").stdout
        assert "cuda (products): takes no weights of scheme 'int4 1x128'" in coded
    assert "needs compute capability 8.0, got 7.5" in str(moeyard.explain("fused_experts", "cuda", capability=(7, 5)))
    listed = command("explain", "list").stdout.split()
    assert listed == list(table.TABLE)


def test_doctor_and_warmup() -> None:
    done = python("-m", "moeyard", "doctor")
    assert done.returncode == 0, done.stderr
    for word in (f"moeyard {moeyard.__version__}", "numba: ", "moe_align_block_size", "reference: only chosen by name"):
        assert word in done.stdout
    done = python("-m", "moeyard", "warmup", "--device", "cpu")
    assert done.returncode == 0 and "ms  moe_align_block_size" in done.stdout, done.stderr
