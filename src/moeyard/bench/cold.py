"""First calls in fresh processes."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moeyard.bench.operators import Case, Provider
from moeyard.bench.peers import peer_version
from moeyard.bench.results import RATE_KEYS, SCHEMA
from moeyard.bench.run import row_of
from moeyard.bench.timing import summarise

OP = "moe_align_block_size"
"""The op whose first calls are timed."""
_NO_LIMITS: dict[str, float | None] = dict.fromkeys(RATE_KEYS[SCHEMA])


def run_cold(case: Case, device: torch.device, rounds: int, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """First calls of an align case in fresh processes, torch imported and its device in use before the clock starts.

    `cold` includes the import of moeyard; on CUDA `cold_ready` has `moeyard.warmup()` (or vLLM's import) before it and
    `cold_empty` starts from an empty kernel cache. The kernel cache is filled by a first process, not counted.
    """
    sizes = {"n": case["num_tokens"], "k": case["top_k"], "e": case["num_experts"], "b": case["block_size"]}
    ours = "import moeyard\nmoeyard.moe_align_block_size(ids, num_experts={e}, block_size={b}, impl='{impl}')"
    kinds = [("moeyard", impl, "cold", "", ours) for impl in ("cpu", "torch")]
    if device.type == "cuda":
        ready = "import moeyard\nmoeyard.warmup('cuda')"
        kinds = [("moeyard", "cuda", "cold", "", ours), ("moeyard", "cuda", "cold_ready", ready, ours)]
        kinds.append(("moeyard", "cuda", "cold_empty", "", ours))
        if peer_version("vllm"):
            path = "vllm.model_executor.layers.fused_moe.moe_align_block_size"
            theirs = "align(ids, {b}, {e})"
            ready = f"from {path} import moe_align_block_size as align"
            kinds.append(("vllm", peer_version("vllm"), "cold_ready", ready, theirs))
    rows = []
    for provider, impl, mode, before, call in kinds:
        code = _COLD.format(before=before, call=call.format(**sizes, impl=impl), device=device.type, **sizes)
        seconds = []
        for i in range(rounds + 1):
            with tempfile.TemporaryDirectory() as empty:
                given = {"MOEYARD_CACHE": empty} if mode == "cold_empty" else {}
                done = subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | given
                )
            if done.returncode:
                raise RuntimeError(f"first call in a fresh process failed:\n{done.stderr}")
            if i:
                seconds.append(float(done.stdout.split()[-1]) * 1e6)
            advance()
        rows.append(row_of(case, _named(provider, impl), mode, summarise(seconds), _NO_LIMITS))
    if device.type == "cuda":
        rows += _run_seed_script(case, rounds)
    return rows


def _run_seed_script(case: Case, rounds: int) -> list[dict[str, Any]]:
    """What the script that the project began with prints, under moeyard's launcher and with vLLM's own operator.

    It times the first call of a fresh process, after its imports. vLLM takes ids of two dimensions only.
    """
    ours = f"topk_ids, {case['num_experts']}, {case['block_size']}, {case['top_k']}"
    theirs = f"topk_ids.view(-1, {case['top_k']}), {case['block_size']}, {case['num_experts']}"
    kinds = [("moeyard", "cuda", ["-m", "moeyard.integrations.vllm"], ours)]
    if peer_version("vllm"):
        kinds.append(("vllm", peer_version("vllm"), [], theirs))
    rows = []
    for provider, impl, launcher, call in kinds:
        microseconds = []
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "seed.py"
            script.write_text(_SEED.format(n=case["num_tokens"] * case["top_k"], e=case["num_experts"], call=call))
            for _ in range(rounds):
                done = subprocess.run(
                    [sys.executable, *launcher, str(script)], capture_output=True, text=True, check=False
                )
                found = re.search(r"Duration: ([0-9.]+) seconds", done.stdout)
                if done.returncode or found is None:
                    raise RuntimeError(f"the seed script failed:\n{done.stderr}")
                microseconds.append(float(found[1]) * 1e6)
        rows.append(row_of(case, _named(provider, impl), "seed_script", summarise(microseconds), _NO_LIMITS))
    return rows


_SEED = """
import torch
import time
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
topk_ids = torch.randint(0, {e}, ({n},), dtype=torch.int32, device='cuda')
torch.cuda.synchronize()
start = time.time()
moe_align_block_size({call})
torch.cuda.synchronize()
print(f"Duration: {{time.time() - start:.6f}} seconds")
"""
_COLD = """
import time, torch
ids = torch.randint(0, {e}, ({n}, {k}), dtype=torch.int32, device="{device}")
wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
wait()
{before}
start = time.perf_counter()
{call}
wait()
print(time.perf_counter() - start)
"""
COLD_KINDS = 4
"""Most kinds of first calls of a device, for progress."""


def _named(name: str, impl: str) -> Provider:
    """A provider whose calls are made elsewhere."""
    return Provider(name, impl, run=lambda inputs: inputs)
