"""A benchmark run: for every case make inputs, gate, time in turn, and hand over rows."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moeyard.bench import layer, results
from moeyard.bench import providers as who
from moeyard.bench.timing import Times, ratio_interval, summarise, time_graphs_in_turn, time_in_turn
from moeyard.bench.workloads import Case

_SETS = 4  # input sets that calls rotate over
_SETS_BYTES = 1 << 28  # fewer sets when they would take more than this
_CHECKED_BYTES = 1 << 24  # above this one input set is checked instead of all


def run_case(
    case: Case,
    device: torch.device,
    *,
    bandwidth: float,
    rounds: int,
    wanted: Callable[[str, str], bool],
    seed: int,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Rows of one case: every provider in every mode of the device; wrong ones without times.

    Args:
        bandwidth: copy bandwidth in GB/s, for floor_us.
        wanted: whether (provider, impl) takes part.
        advance: called `rounds` times a mode, for progress.
    """
    generator = torch.Generator().manual_seed(seed)
    sets = max(1, min(_SETS, _SETS_BYTES // max(1, who.bytes_moved(case))))
    if device.type == "cuda" and case.op == "fused_experts":
        inputs = layer.make_sets(case, device, generator)
    else:
        inputs = [who.make_inputs(case, device, generator) for _ in range(sets)]
    floor = who.bytes_moved(case) / bandwidth / 1e3
    rows, right = [], []
    modes = ["graph", "eager"] if device.type == "cuda" else ["cpu"]
    for provider in who.providers(case, device):
        if not wanted(provider.name, provider.impl):
            continue
        checked = inputs if who.bytes_moved(case) < _CHECKED_BYTES else inputs[:1]
        wrong = next(filter(None, (who.error(case, provider, value, device) for value in checked)), None)
        if wrong is None:
            right.append(provider)
        else:
            rows += [row_of(case, provider.name, provider.impl, mode, None, floor) | {"wrong": wrong} for mode in modes]
    for mode in modes:
        timed = list(_timed(case, right, mode, device))
        runs = [run for _, _, run in timed]
        if mode == "graph":
            calls = who.calls_of_graph(case)
            times = time_graphs_in_turn(runs, inputs, rounds=rounds, calls=calls, after_round=advance, seed=seed)
        else:
            finish = torch.cuda.synchronize if mode == "eager" else _nothing
            times = time_in_turn(
                runs, inputs, rounds=rounds, sample_us=1e4, finish=finish, after_round=advance, seed=seed
            )
        theirs = {_peer(p): time for (p, _, _), time in zip(timed, times, strict=True) if p.name not in _NO_PEERS}
        for (provider, label, _), time in zip(timed, times, strict=True):
            row = row_of(case, provider.name, provider.impl, label, time, floor)
            if provider.name == "moeyard" and theirs:
                row["ratio_to"] = {
                    name: [round(value, 4) for value in ratio_interval(time, peer)] for name, peer in theirs.items()
                }
            if layer.takes(case) and case.op != "route":
                row |= _beside_time(case, provider, inputs[0])
            rows.append(row)
    return rows


def _beside_time(case: Case, provider: who.Provider, inputs: Any) -> dict[str, Any]:
    """Errors against float64 over some tokens, and memory: how far a call raises it, and what intermediates need."""
    rms, largest, _ = layer.errors(inputs, provider.run(inputs))
    extra = layer.peak_extra_bytes(provider.run, inputs)
    return {
        "error_rms": float(f"{rms:.4g}"),
        "error_max": float(f"{largest:.4g}"),
        "extra_bytes": extra,
        "needed_bytes": layer.needed_bytes(case),
    }


def _peer(provider: who.Provider) -> str:
    """A peer by name; transformers has several ways."""
    return f"{provider.name} {provider.impl}" if provider.name == "transformers" else provider.name


_NO_PEERS = ("moeyard", "torch", "numba")


def _timed(
    case: Case, right: list[who.Provider], mode: str, device: torch.device
) -> Iterator[tuple[who.Provider, str, Callable[[Any], Any]]]:
    """(provider, mode of its row, what to time) of everything that is timed in turn."""
    for provider in right:
        if mode == "graph" and provider.waits:
            continue
        yield provider, mode, provider.run
        if provider.name == "moeyard" and provider.impl == "cuda":
            if mode == "graph" and torch.cuda.get_device_capability(device) >= (9, 0):
                yield provider, "graph_pdl", programmatically(provider.run)
            if mode == "eager" and case.op == "moe_align_block_size":
                yield provider, "eager_out", who.align_into_given(case)
                yield provider, "eager_triple", who.align_triple(case)


def programmatically(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    from moeyard.cuda.runtime.launch import programmatic_launch

    def with_programmatic_launch(inputs: Any) -> Any:
        before = programmatic_launch()
        programmatic_launch(True)
        try:
            return run(inputs)
        finally:
            programmatic_launch(before)

    return with_programmatic_launch


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
        if results.peer_version("vllm"):
            path = "vllm.model_executor.layers.fused_moe.moe_align_block_size"
            theirs = "align(ids, {b}, {e})"
            ready = f"from {path} import moe_align_block_size as align"
            kinds.append(("vllm", results.peer_version("vllm"), "cold_ready", ready, theirs))
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
        rows.append(row_of(case, provider, impl, mode, summarise(seconds), None))
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
    if results.peer_version("vllm"):
        kinds.append(("vllm", results.peer_version("vllm"), [], theirs))
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
        rows.append(row_of(case, provider, impl, "seed_script", summarise(microseconds), None))
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


def _nothing() -> None:
    pass


def row_of(case: Case, provider: str, impl: str, mode: str, times: Times | None, floor: float | None) -> dict[str, Any]:
    """A row of a result file; without times for a wrong answer, or where no run of it ended."""
    return {
        "op": case.op,
        "workload": case.workload,
        "routing": case.routing,
        "sizes": dict(case.sizes),
        "provider": provider,
        "impl": impl,
        "mode": mode,
        "time_us": None if times is None else round(times.median, 3),
        "time_us_p10": None if times is None else round(times.p10, 3),
        "time_us_p90": None if times is None else round(times.p90, 3),
        "floor_us": None if floor is None else round(floor, 3),
        "correct": times is not None,
    }
