"""A benchmark run: for every case make inputs, gate, time in turn, and hand over rows."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from moeyard.bench import providers as who
from moeyard.bench.timing import Times, summarise, time_graphs_in_turn, time_in_turn
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
            rows += [_row(case, provider.name, provider.impl, mode, None, floor) | {"wrong": wrong} for mode in modes]
    for mode in modes:
        timed = [provider for provider in right if not (mode == "graph" and provider.waits)]
        runs = [provider.run for provider in timed]
        if mode == "graph":
            calls = 20 if case["num_tokens"] >= 32768 else 50
            times = time_graphs_in_turn(runs, inputs, rounds=rounds, calls=calls, after_round=advance, seed=seed)
        else:
            finish = torch.cuda.synchronize if mode == "eager" else _nothing
            times = time_in_turn(
                runs, inputs, rounds=rounds, sample_us=1e4, finish=finish, after_round=advance, seed=seed
            )
        rows += [_row(case, p.name, p.impl, mode, time, floor) for p, time in zip(timed, times, strict=True)]
    return rows


def run_cold(case: Case, rounds: int, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """First call of an align case in fresh processes on the CPU: import of moeyard and the call, torch imported before.

    The kernel cache is warm after the first process, which is not counted.
    """
    rows = []
    for impl in ("cpu", "torch"):
        code = _COLD.format(
            n=case["num_tokens"], k=case["top_k"], e=case["num_experts"], b=case["block_size"], impl=impl
        )
        seconds = []
        for i in range(rounds + 1):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"first call in a fresh process failed:\n{done.stderr}")
            if i:
                seconds.append(float(done.stdout) * 1e6)
            advance()
        rows.append(_row(case, "moeyard", impl, "cold", summarise(seconds), None))
    return rows


_COLD = """
import time, torch
ids = torch.randint(0, {e}, ({n}, {k}), dtype=torch.int32)
start = time.perf_counter()
import moeyard
moeyard.moe_align_block_size(ids, num_experts={e}, block_size={b}, impl="{impl}")
print(time.perf_counter() - start)
"""


def _nothing() -> None:
    pass


def _row(case: Case, provider: str, impl: str, mode: str, times: Times | None, floor: float | None) -> dict[str, Any]:
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
