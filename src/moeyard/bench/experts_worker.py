"""A process that measures cases of experts, one a request: JSON lines in, JSON lines out (see `main`)."""

import argparse
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from moeyard import impls
from moeyard.bench import layer, products, results, timing
from moeyard.bench import providers as who
from moeyard.bench.run import programmatically, row_of
from moeyard.bench.workloads import Case
from moeyard.testing import disagreement_error

_LARGEST = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8, torch.float32: 2.0**-12}
"""How far a row may be from another provider's, relative to its own root mean square: both round in between."""
_PDL_TOKENS = 16  # up to here what a launch waits for is worth a look
_KEPT_BYTES = 4 << 30  # freed memory that a process may keep from the others
_PEERS_FIRST = {"torch": 0, "vllm": 1, "deep_gemm": 2, "moeyard": 3}
Say = Callable[[dict[str, Any]], None]


def case_to(case: Case) -> dict[str, Any]:
    """A case as JSON has it."""
    return asdict(case)


def case_from(value: dict[str, Any]) -> Case:
    """The case that `case_to` wrote."""
    sizes = tuple((str(key), size) for key, size in value["sizes"])
    return Case(value["workload"], value["op"], value["routing"], sizes, value["model"])


def facts(device: torch.device) -> dict[str, Any]:
    """The machine with its two ceilings, and what takes part."""
    machine = results.machine(device, timing.copy_gb_s(device))
    rate = timing.matrix_tflops(device, 8192 if device.type == "cuda" else 512)
    peers = results.peers(results.peer_version("vllm") if device.type == "cuda" else "")
    if device.type == "cuda" and results.peer_version("deep_gemm"):
        peers["deep_gemm"] = results.peer_version("deep_gemm")
    return {"machine": {**machine, "matrix_tflops": float(f"{rate:.4g}")}, "peers": peers}


def answers(case: Case, device: torch.device, request: dict[str, Any]) -> list[who.Provider]:
    """Who takes part: peers first, since the first right answer is what the others are compared with.

    Of our implementations it is the one that "auto" chooses; with `all`, all but torch's. `variants`,
    "module:function", gives (label, run) pairs for a case that stand in their place. `grid` leaves out what the
    comparison with vLLM does not need; `providers` names those that are wanted.
    """
    if request.get("variants"):
        module, _, function = request["variants"].partition(":")
        made = getattr(importlib.import_module(module), function)(case)
        found = [p for p in who.providers(case, device) if p.name != "moeyard"]
        found += [who.Provider("moeyard", label, run) for label, run in made]
    else:
        found = who.providers(case, device)
        chosen = impls.explain(case.op, device, getattr(torch, case["dtype"])).chosen
        taken = (chosen,) if not request.get("all") else tuple(i for i in impls.impl_names(case.op) if i != "torch")
        found = [p for p in found if p.name != "moeyard" or p.impl.split()[0] in taken]
    if request.get("grid"):
        found = [p for p in found if p.name in ("moeyard", "vllm")]
    wanted = request.get("providers")
    found = [p for p in found if not wanted or p.name in wanted or label_of(p) in wanted]
    return sorted(found, key=lambda p: _PEERS_FIRST.get(p.name, 0))


def label_of(provider: who.Provider) -> str:
    """A provider's name for messages and requests."""
    return f"{provider.name}:{provider.impl}"


def compile_case(case: Case, device: torch.device, request: dict[str, Any], say: Say) -> dict[str, Any]:
    """Calls every provider once, so that its kernels are in the caches on disk."""
    inputs = who.make_inputs(case, device, torch.Generator().manual_seed(0))
    failed = {}
    for provider in answers(case, device, request):
        if label_of(provider) in request["without"]:
            continue
        say({"at": label_of(provider)})
        wrong = _failure(provider, inputs, device)[1]
        if wrong is not None:
            failed[label_of(provider)] = wrong
    return {"failed": failed}


def time_case(case: Case, device: torch.device, request: dict[str, Any], say: Say) -> list[dict[str, Any]]:
    """Rows of a case: answers checked, then timed in turn as replays of graphs (on a CPU: as calls)."""
    generator = torch.Generator().manual_seed(request["seed"])
    if case.op == "fused_experts":
        inputs: list[Any] = layer.make_sets(case, device, generator)
    else:
        inputs = [products.make_inputs(case, device, generator) for _ in range(2)]
    floor = _floor_us(case, inputs, request["copy_gb_s"], request["matrix_tflops"])
    mode = "graph" if device.type == "cuda" else "cpu"
    rows, right, first = [], [], None
    for provider in answers(case, device, request):
        say({"at": label_of(provider)})
        wrong = request["without"].get(label_of(provider))
        if wrong is None:
            got, wrong = _failure(provider, inputs[0], device)
            if wrong is None:
                wrong, first = _judge(case, provider, inputs[0], got, first)
            del got
        if wrong is None:
            right.append((provider, mode, provider.run, _beside_time(case, provider, inputs[0])))
        else:
            rows.append({**row_of(case, provider.name, provider.impl, mode, None, floor), "wrong": wrong})
    if mode == "graph" and case["num_tokens"] <= _PDL_TOKENS and torch.cuda.get_device_capability(device) >= (9, 0):
        ours = [entry for entry in right if entry[0].name == "moeyard" and entry[0].impl.startswith("cuda")]
        right += [(provider, "graph_pdl", programmatically(run), {}) for provider, _, run, _ in ours]
    first = None
    return [*_timed(case, device, right, inputs, floor, request, say), *rows] if right else rows


def _timed(
    case: Case, device: torch.device, right: list[Any], inputs: list[Any], floor: float, request: Any, say: Say
) -> list[dict[str, Any]]:
    runs = [run for _, _, run, _ in right]
    calls = 1
    if device.type == "cuda":
        calls = layer.sets_and_calls(case)[1]
        times = timing.time_graphs_within(
            runs, inputs, calls=calls, seconds=request["seconds"], seed=request["seed"],
            captured=lambda i: say({"at": label_of(right[i][0])}),
            most_rounds=request.get("rounds", timing.MOST_ROUNDS),
        )  # fmt: skip
    else:
        times = timing.time_in_turn(
            runs, inputs[:2], rounds=7, sample_us=1e3, finish=_nothing, after_round=_nothing, seed=request["seed"]
        )
    theirs = {p.name: time for (p, _, _, _), time in zip(right, times, strict=True) if p.name != "moeyard"}
    rows = []
    for (provider, mode, _, beside), time in zip(right, times, strict=True):
        row = {**row_of(case, provider.name, provider.impl, mode, time, floor), **beside}
        if provider.name == "moeyard" and theirs:
            ratios = {name: timing.ratio_interval(time, peer) for name, peer in theirs.items()}
            row["ratio_to"] = {name: [round(value, 4) for value in ratio] for name, ratio in ratios.items()}
        rows.append({**row, "calls": calls, "rounds": len(time.samples)})
    return rows


def _failure(provider: who.Provider, inputs: Any, device: torch.device) -> tuple[Any, str | None]:
    """(answer, None), or (None, what was raised); memory that a call gets holds NaN before."""
    try:
        if device.type == "cuda":
            _poison(inputs)
        got = provider.run(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as problem:  # whatever a peer raises is a finding, not the end of the run
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises again where the process cannot go on
        return None, f"{type(problem).__name__}: {str(problem)[:300]}"
    return got, None


def _poison(inputs: Any) -> None:
    """Fills blocks of the sizes that experts need with NaN and frees them: the allocator hands them out next."""
    case, hidden = inputs.case, inputs.hidden_states
    routes, size = case["num_tokens"] * case["top_k"], case["intermediate_size"]
    for count in (hidden.numel(), routes * 2 * size, routes * size, routes * hidden.shape[1]):
        hidden.new_full((count,), torch.nan)


def _judge(case: Case, provider: who.Provider, inputs: Any, got: Any, first: Any) -> tuple[str | None, Any]:
    """(what is wrong with an answer, the first right one): some rows against float64, all against that one's."""
    if case.op == products.OP:
        wrong, rows = products.error(inputs, provider.impl, got), products.compact(inputs, provider.impl, got)
    else:
        wrong, rows = layer.error(case, provider.impl, inputs, got), got
    if wrong is None and first is None:
        return None, rows.clone()  # some answer into memory that they use again
    if wrong is None:
        wrong = disagreement_error(first, rows, _LARGEST[rows.dtype])
    return wrong, first


def _beside_time(case: Case, provider: who.Provider, inputs: Any) -> dict[str, Any]:
    """Errors against float64 over some tokens, and how far a call raises memory; the layer's alone."""
    if case.op == products.OP:
        return {}
    rms, largest, scale = layer.errors(inputs, provider.run(inputs))
    return {
        "error_rms": float(f"{rms:.4g}"),
        "error_max": float(f"{largest:.4g}"),
        "answer_rms": float(f"{scale:.4g}"),
        "extra_bytes": layer.peak_extra_bytes(provider.run, inputs),
    }


def _floor_us(case: Case, inputs: list[Any], copy_gb_s: float, matrix_tflops: float) -> float:
    """What bytes take at the copy bandwidth or operations at the matrix rate, whichever is more; mean of the inputs."""
    if case.op == products.OP:
        moved, count = float(products.bytes_moved(case)), products.operations(case)
    else:
        moved = sum(layer.bytes_read_and_written(x) for x in inputs) / len(inputs)
        count = layer.operations(case)
    return max(moved / copy_gb_s / 1e3, count / matrix_tflops / 1e6)


def _nothing() -> None:
    pass


def main() -> int:
    """Answers requests until the input ends.

    A request has `do` (facts, compile, time), for the last two `case`, and what `answers`, `compile_case` and
    `time_case` read. An answer is a line with `done`; before it come lines with `at`, the provider that is in hand, so
    that who waits knows which one hung or ended the process; the first of all says that imports are done. `lost` means
    that this process cannot go on.
    """
    parser = argparse.ArgumentParser(prog="python -m moeyard.bench.experts_worker", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = torch.device(parser.parse_args().device)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print goes to the log

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    gc.freeze()  # a capture may collect garbage: what imports left is not looked at again
    say({"at": ""})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "facts":
                done: Any = facts(device)
            elif request["do"] == "compile":
                done = compile_case(case_from(request["case"]), device, request, say)
            else:
                done = time_case(case_from(request["case"]), device, request, say)
        except Exception as problem:  # capture, or a device that answers nothing any more
            say({"lost": f"{type(problem).__name__}: {str(problem)[:300]}"})
            raise
        if device.type == "cuda" and torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > _KEPT_BYTES:
            torch.cuda.empty_cache()
        say({"done": done})
    return 0


if __name__ == "__main__":
    sys.exit(main())
