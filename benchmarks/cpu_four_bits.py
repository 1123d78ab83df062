"""gpt-oss-20b's layer at decode on a CPU, beside a copy: `python benchmarks/cpu_four_bits.py --out FILE [--rounds N]`.

One process, as many threads as torch has. In each round a copy of 256 MB into existing memory, a read of it, and six
calls of one token with four random experts of 32 are timed in turn. Rates count bytes: of a copy those that it reads
and writes, of a layer codes and scales once. FILE has medians, and the median of the rounds' ratios, by two clocks: on
the wall, and of the process by thread. The second leaves out what other processes take from this one's time, and not
what they take of its caches and memory.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import moeyard
from moeyard import GPT_OSS_ACTIVATION, ExpertWeights, QuantScheme, Routing
from moeyard.bench import results
from moeyard.bench.timing import Rates, matrix_tflops
from moeyard.quant import MXFP4, int4_scheme
from moeyard.testing import draw_quantised, judged_experts

EXPERTS, TOP_K, HIDDEN, SIZE = 32, 4, 2880, 2880
SCHEMES = {"mxfp4": MXFP4, "int4 g128": int4_scheme()}
_COPIED = 1 << 28
_CALLS = 6
GOAL = 0.6
"""Of the copy bandwidth, on two cores."""


def layer_bytes(weights: ExpertWeights) -> int:
    """Codes and scales of a token's experts."""
    assert weights.scales is not None
    held = (weights.w13, weights.w2, weights.scales.w13, weights.scales.w2)
    return TOP_K * sum(tensor[0].nbytes for tensor in held)


def measure(scheme: QuantScheme, rounds: int) -> dict[str, Any]:
    """Rates in GB/s of rounds that take turns; ValueError if the answer is wrong."""
    weights = draw_quantised(EXPERTS, HIDDEN, SIZE, scheme, torch.bfloat16, bias=True)
    hidden, threads = torch.randn(1, HIDDEN).bfloat16(), torch.get_num_threads()
    routings = [Routing(torch.rand(1, TOP_K), torch.randperm(EXPERTS)[None, :TOP_K].int()) for _ in range(64)]
    source, target = torch.zeros(_COPIED // 4), torch.zeros(_COPIED // 4)

    def layer(number: int) -> Any:
        routing = routings[number % len(routings)]
        return moeyard.fused_experts(hidden, routing, weights, activation=GPT_OSS_ACTIVATION, impl="cpu")

    error = judged_experts(hidden, routings[0], weights, activation=GPT_OSS_ACTIVATION).error(layer(0))
    if error is not None:
        raise ValueError(f"fused_experts: expected an answer within its budget, got {error}")

    def rates(bytes_: int, call: Callable[[], Any]) -> tuple[float, float]:
        wall, own = time.perf_counter(), time.process_time()
        call()
        return bytes_ / (time.perf_counter() - wall) / 1e9, bytes_ * threads / (time.process_time() - own) / 1e9

    seen: dict[str, list[tuple[float, float]]] = {"copy": [], "read": [], "layer": []}
    for number in range(-2, rounds):
        copy, read = rates(2 * _COPIED, lambda: target.copy_(source)), rates(_COPIED, source.sum)
        calls = [
            rates(layer_bytes(weights), lambda i=i: layer(i)) for i in range(_CALLS * number, _CALLS * (number + 1))
        ]
        if number >= 0:  # two rounds to warm up
            seen["copy"].append(copy)
            seen["read"].append(read)
            seen["layer"].append((statistics.median(wall for wall, _ in calls), statistics.median(o for _, o in calls)))
    times = sorted(layer_bytes(weights) / wall / 1e3 for wall, _ in seen["layer"])  # GB/s to us
    row: dict[str, Any] = {
        "mode": "eager", "time_us": round(statistics.median(times), 1),
        "time_us_p10": round(times[len(times) // 10], 1), "time_us_p90": round(times[-1 - len(times) // 10], 1),
        "product_time_us": None,
        "threads": threads, "rounds": rounds, "needed_bytes": layer_bytes(weights),
    }  # fmt: skip
    for clock, name in enumerate(("wall", "own_time")):
        for what, values in seen.items():
            row[f"{what}_gb_s_{name}"] = round(statistics.median(pair[clock] for pair in values), 2)
        pairs = zip(seen["layer"], seen["copy"], strict=True)
        row[f"layer_over_copy_{name}"] = round(statistics.median(a[clock] / b[clock] for a, b in pairs), 3)
    for what in ("copy", "read"):
        row[f"{what}_time_us"] = round(layer_bytes(weights) / row[f"{what}_gb_s_wall"] / 1e3, 1)
    return row


def main(arguments: list[str] | None = None) -> int:
    """Measures every scheme and writes the file; 1 if a ratio by the wall's clock misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    load, rows, cpu = os.getloadavg()[0], [], torch.device("cpu")
    sizes = {"num_tokens": 1, "num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN, "intermediate_size": SIZE}
    for name, scheme in SCHEMES.items():
        rows.append({
            "op": "fused_experts", "workload": f"gpt-oss-20b {name}", "routing": "uniform",
            "sizes": {**sizes, "dtype": "bfloat16", "scheme": str(scheme)}, "provider": "moeyard", "impl": "cpu",
            "correct": True, **measure(scheme, given.rounds),
        })  # fmt: skip
        print(rows[-1])
    rates = Rates(
        rows[0]["copy_gb_s_wall"], rows[0]["read_gb_s_wall"], matrix_tflops(cpu, torch.float32, 1024), "float32"
    )
    versions = {"torch": torch.__version__} | {name: version(name) for name in ("numpy", "numba")}
    content = results.document(rows, results.machine(cpu, rates), versions)
    results.write(given.out, {"load_at_start": round(load, 1), "goal_layer_over_copy": GOAL, **content})
    return int(any(row["layer_over_copy_wall"] < GOAL for row in rows))


if __name__ == "__main__":
    sys.exit(main())
