"""load_experts: shards and their index, broken files, memory, interrupts, the bar."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
from moeyard.checkpoints import files
from moeyard.testing import SOURCE, checkpoints, python
from moeyard.testing.checkpoints import FORMS, PREFIX
from moeyard.values import ExpertWeights

pytest.importorskip("safetensors")
SIZES: dict[str, Any] = {"experts": 2, "hidden_size": 64, "intermediate_size": 64}


def load(folder: Path, **options: Any) -> ExpertWeights:
    return moeyard.load_experts(folder, PREFIX, **{"device": "cpu", **options})


def refused(folder: Path, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load(folder)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A checkpoint in two shards with an index."""
    from safetensors.torch import load_file

    form = FORMS["fp8 channel"]
    checkpoints.write(tmp_path, form, "apart", **SIZES)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    home = {}
    for number in (0, 1):
        names = [name for name in tensors if f".{number}." in name.removeprefix(PREFIX)]
        file = f"model-0000{number + 1}-of-00002.safetensors"
        checkpoints.save(tmp_path, {name: tensors[name] for name in names}, form.config, file)
        home |= dict.fromkeys(names, file)
    (tmp_path / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return tmp_path


def edit_index(folder: Path, **change: Any) -> None:
    index = json.loads((folder / files.INDEX).read_text())
    for name, file in change.items():
        index["weight_map"] |= {name: file}
    (folder / files.INDEX).write_text(json.dumps(index))


ONE, TWO = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
WEIGHT = f"{PREFIX}.1.up_proj.weight"


def test_shards_with_and_without_an_index(shards: Path) -> None:
    with_index = load(shards)
    (shards / files.INDEX).unlink()
    without = load(shards)
    assert torch.equal(with_index.w13.view(torch.uint8), without.w13.view(torch.uint8))


def test_an_index_that_is_wrong_is_named(shards: Path) -> None:
    """Trap 34."""
    edit_index(shards, **{"lm_head.weight": "model-00003.safetensors"})
    refused(
        shards, f"tensor lm_head.weight is said to be in {shards / 'model-00003.safetensors'}, which does not exist"
    )
    edit_index(shards, **{"lm_head.weight": ONE, WEIGHT: ONE})
    refused(shards, f"{TWO}: tensor {WEIGHT}: the index has it in {ONE}")
    edit_index(shards, **{WEIGHT: TWO, f"{PREFIX}.1.up_proj.bias": TWO})
    refused(shards, f"{TWO}: tensor {PREFIX}.1.up_proj.bias is missing, which the index has there")
    (shards / files.INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}')
    refused(shards, f"{files.INDEX}: expected a once, got it twice")
    (shards / files.INDEX).write_text('{"weight_map": 3}')
    refused(shards, f"{files.INDEX}: expected weight_map")
    (shards / files.INDEX).write_text("nothing")
    refused(shards, f"{files.INDEX}: expected JSON")


@pytest.mark.parametrize("index", [True, False])
def test_a_tensor_in_two_shards_is_named(shards: Path, index: bool) -> None:
    """Trap 34: also where the index names one of the two, and where the other shard has nothing else of this layer."""
    tensor = {WEIGHT: torch.zeros(64, 64).to(torch.float8_e4m3fn), "other": torch.zeros(1)}
    checkpoints.save(shards, tensor, FORMS["fp8 channel"].config, "model-00009.safetensors")
    if index:
        edit_index(shards, other="model-00009.safetensors")
        refused(shards, f"model-00009.safetensors: tensor {WEIGHT}")
    else:
        (shards / files.INDEX).unlink()
        refused(shards, f"model-00009.safetensors: tensor {WEIGHT}: is in {shards / TWO}, too")


def test_files_that_are_broken_are_named(shards: Path) -> None:
    whole = (shards / TWO).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for broken, words in (
        (whole[:-1], "is it cut off?"),
        (whole[: length // 2], "expected a safetensors file, got"),
        (b"", "expected a safetensors file, got 0 bytes"),
        (whole[:8] + b"[" + whole[9:], "expected a header in JSON"),
        (whole.replace(b'"shape":[64,64]', b'"shape":[64,32]', 1), "bytes to hold F8_E4M3 of shape (64, 32)"),
        (whole.replace(b'"dtype":"F8_E4M3"', b'"type":"F8_E4M3" ', 1), "expected dtype, shape and data_offsets"),
    ):
        (shards / TWO).write_bytes(broken)
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            load(shards)
        assert TWO in str(caught.value)


def test_tensors_that_overlap_are_named(tmp_path: Path) -> None:
    header = {f"{PREFIX}.0.{part}.weight": {"dtype": "F32", "shape": [4], "data_offsets": [at, at + 16]}
              for at, part in ((0, "w1"), (8, "w2"))}  # fmt: skip
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
    refused(tmp_path, f"tensor {PREFIX}.0.w2.weight: begins inside tensor {PREFIX}.0.w1.weight")


def test_paths_that_hold_nothing_are_named(tmp_path: Path) -> None:
    refused(tmp_path, "path: expected *.safetensors in the folder")
    refused(tmp_path / "absent", "path: expected a folder or a safetensors file")


def test_one_file_is_a_path_too(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, FORMS["fp8 channel"], "apart", **SIZES)
    one, two = load(tmp_path), load(tmp_path / "model.safetensors")
    assert one.scheme == two.scheme and torch.equal(one.w2.view(torch.uint8), two.w2.view(torch.uint8))


PEAK = """
import sys, threading, torch, moeyard
from moeyard.checkpoints import files
def resident():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssFile")))
moeyard.load_experts(sys.argv[2], "m", device="cpu")  # what a first call imports
torch.set_num_threads(1)
peak, read = 0, files.Reader.read
def watched(self, span, target):
    global peak
    read(self, span, target)
    peak = max(peak, resident())
files.Reader.read = watched
before = resident()
weights = moeyard.load_experts(sys.argv[1], "m", device="cpu", tensor_parallel=(0, int(sys.argv[3])))
kept = sum(t.nbytes for t in (weights.w13, weights.w2)) // 1024
if weights.scales is not None:
    kept += (weights.scales.w13.nbytes + weights.scales.w2.nbytes) // 1024
print(max(peak, resident()) - before - kept)
"""


@pytest.mark.parametrize(
    ("name", "layout", "parts"), [("bfloat16", "stacked fused", 4), ("awq", "apart", 1), ("int8 packed", "stacked", 4)]
)
def test_host_memory_stays_below_the_largest_tensor(name: str, layout: str, parts: int, tmp_path: Path) -> None:
    """What is resident beyond the result: at most the largest tensor of an expert and a tenth, and not the file."""
    sizes: dict[str, Any] = {"experts": 3, "hidden_size": 4096, "intermediate_size": 4096, "prefix": "m"}
    form = FORMS[name]
    once = {
        shape: form.draw(*shape) for shape in ((4096, 4096), (8192, 4096)) if ("fused" in layout) or shape[0] == 4096
    }
    checkpoints.write(tmp_path / "large", form._replace(draw=lambda *shape: once[shape]), layout, **sizes)
    checkpoints.write(tmp_path / "small", form, layout, **{**SIZES, "prefix": "m"})
    entries = files.entries_under(tmp_path / "large", "m").values()
    largest = max(entry.size for entry in entries) // (3 if "stacked" in layout else 1)
    done = python("-c", PEAK, str(tmp_path / "large"), str(tmp_path / "small"), str(parts))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 <= 1.1 * largest


INTERRUPTED = """
import os, sys, torch, moeyard
from moeyard.checkpoints import files
read = files.Reader.read
def slow(self, span, target):
    print("reading", flush=True)
    import time; time.sleep(0.05)
    read(self, span, target)
files.Reader.read = slow
try:
    moeyard.load_experts(sys.argv[1], sys.argv[2], device="cpu", show_progress=True)
except KeyboardInterrupt:
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    print([name for name in opened if name.endswith(".safetensors")], "again")
    files.Reader.read = read
    print(moeyard.load_experts(sys.argv[1], sys.argv[2], device="cpu").num_local_experts)
"""


def test_an_interrupt_leaves_no_open_file(tmp_path: Path) -> None:
    """Trap 34: the next load works."""
    checkpoints.write(tmp_path, FORMS["fp8 channel"], "apart", **SIZES)
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), PREFIX]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert printed.splitlines()[-2:] == ["[] again", "2"]


HIDDEN = """
from importlib import util
there = util.find_spec
util.find_spec = lambda name, package=None: None if name == "rich" else there(name, package)
"""


@pytest.mark.parametrize("rich", [True, False])
def test_a_terminal_shows_a_bar(rich: bool, tmp_path: Path) -> None:
    """rich's, or a line where rich is not installed."""
    checkpoints.write(tmp_path, FORMS["fp8 channel"], "apart", **SIZES)
    hidden = "" if rich else HIDDEN
    code = f"{hidden}import moeyard; moeyard.load_experts({str(tmp_path)!r}, {PREFIX!r}, device='cpu')"
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)}, stderr=theirs, check=False
        )
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0, shown
    assert PREFIX.rpartition(".")[0] in shown and ("of 0.00 GB" in shown) == (not rich)


def test_without_a_terminal_a_line_is_shown_if_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.write(tmp_path, FORMS["fp8 channel"], "apart", **SIZES)
    load(tmp_path)
    assert capsys.readouterr().err == ""
    load(tmp_path, show_progress=True)
    assert capsys.readouterr().err.startswith(f"\r{PREFIX}: 0.00 of 0.00 GB")
