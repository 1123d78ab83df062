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

import moeyard
from moeyard.bench import peers, results, timing
from moeyard.bench.operators import Case, Operator, Provider, operators
from moeyard.bench.run import limits_of, programmatically, row_of
from moeyard.bench.timing import Rates
from moeyard.testing import disagreement_error

_LARGEST = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8, torch.float32: 2.0**-12}
"""How far a row may be from another provider's, relative to its own root mean square: both round in between."""
_LARGEST_OF_CODES = 2.0**-3
"""Of quantised experts: two right answers round activations to other codes. Rows that nobody wrote differ by more."""
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
    """The machine with its rates, and what takes part."""
    rates = timing.rates(device)
    return {"machine": results.machine(device, rates), "rates": asdict(rates), "peers": peers.versions(device)}


def answers(case: Case, device: torch.device, request: dict[str, Any]) -> list[Provider]:
    """Who takes part: peers first, since the first right answer is what the others are compared with.

    Of our implementations it is the one that "auto" chooses; with `all`, all but torch's. `variants`,
    "module:function", gives (label, run) pairs for a case that stand in their place. `others`, as well, gives more
    peers as (name, version, run) for a case. `grid` leaves out what the
    comparison with vLLM does not need; `providers` names the wanted ones.
    """
    everyone = operators()[case.op].providers(case, device)
    found = [p for p in everyone if p.name != "moeyard"]
    if request.get("others"):
        found += [Provider(*one) for one in _named(request["others"])(case)]
    if request.get("variants"):
        found += [Provider("moeyard", label, run) for label, run in _named(request["variants"])(case)]
    else:
        able = moeyard.explain(case.op, device, case.dtype).able
        if "scheme" in dict(case.sizes):  # what takes its weights
            able = tuple(p.impl.split()[0] for p in everyone if p.name == "moeyard")
        taken = set(able) - {"torch"} if request.get("all") else set(able[:1])
        found += [p for p in everyone if p.name == "moeyard" and p.impl.split()[0] in taken]
    if request.get("grid"):
        found = [p for p in found if p.name in ("moeyard", "vllm")]
    wanted = request.get("providers")
    found = [p for p in found if not wanted or p.name in wanted or p.label in wanted]
    return sorted(found, key=lambda p: _PEERS_FIRST.get(p.name, 0))


def _named(where: str) -> Callable[[Case], Any]:
    """The function "module:function"."""
    module, _, function = where.partition(":")
    found: Callable[[Case], Any] = getattr(importlib.import_module(module), function)
    return found


def compile_case(case: Case, device: torch.device, request: dict[str, Any], say: Say) -> dict[str, Any]:
    """Calls every provider once, so that its kernels are in the caches on disk."""
    inputs = operators()[case.op].inputs(case, device, torch.Generator().manual_seed(0))
    failed = {}
    for provider in answers(case, device, request):
        if provider.label in request["without"]:
            continue
        say({"at": provider.label})
        wrong = _failure(case, provider, inputs, device)[1]
        if wrong is not None:
            failed[provider.label] = wrong
    return {"failed": failed}


def time_case(case: Case, device: torch.device, request: dict[str, Any], say: Say) -> list[dict[str, Any]]:
    """Rows of a case: answers checked, then timed in turn as replays of graphs (on a CPU: as calls)."""
    operator, generator = operators()[case.op], torch.Generator().manual_seed(request["seed"])
    if operator.sets is not None:
        inputs = operator.sets(case, device, generator)
    else:
        inputs = [operator.inputs(case, device, generator) for _ in range(2)]
    limits = limits_of(operator, case, inputs, Rates(**request["rates"]))
    mode = "graph" if device.type == "cuda" else "cpu"
    rows, right, first = [], [], None
    for provider in answers(case, device, request):
        say({"at": provider.label})
        wrong = request["without"].get(provider.label)
        if wrong is None:
            got, wrong = _failure(case, provider, inputs[0], device)
            if wrong is None:
                wrong, first = _judge(operator, case, provider, inputs[0], got, first)
            del got
        if wrong is None:
            right.append((provider, mode, provider.run, operator.beside(case, provider.run, inputs[0])))
        else:
            rows.append({**row_of(case, provider, mode, None, limits), "wrong": wrong})
    if mode == "graph" and case["num_tokens"] <= _PDL_TOKENS and torch.cuda.get_device_capability(device) >= (9, 0):
        ours = [entry for entry in right if entry[0].name == "moeyard" and entry[0].impl.startswith("cuda")]
        right += [(provider, "graph_pdl", programmatically(run), {}) for provider, _, run, _ in ours]
    first = None
    return [*_timed(case, device, right, inputs, limits, request, say), *rows] if right else rows


def _timed(
    case: Case, device: torch.device, right: list[Any], inputs: list[Any], limits: Any, request: Any, say: Say
) -> list[dict[str, Any]]:
    runs = [run for _, _, run, _ in right]
    calls = 1
    if device.type == "cuda":
        calls = operators()[case.op].calls_of_graph(case)
        times = timing.time_graphs_within(
            runs, inputs, calls=calls, seconds=request["seconds"], seed=request["seed"],
            captured=lambda i: say({"at": right[i][0].label}),
            most_rounds=request.get("rounds", timing.MOST_ROUNDS),
        )  # fmt: skip
    else:
        times = timing.time_in_turn(
            runs, inputs[:2], rounds=7, sample_us=1e3, finish=_nothing, after_round=_nothing, seed=request["seed"]
        )
    theirs = {p.name: time for (p, _, _, _), time in zip(right, times, strict=True) if p.name != "moeyard"}
    rows = []
    for (provider, mode, _, beside), time in zip(right, times, strict=True):
        row = {**row_of(case, provider, mode, time, limits), **beside}
        if provider.name == "moeyard" and theirs:
            ratios = {name: timing.ratio_interval(time, peer) for name, peer in theirs.items()}
            row["ratio_to"] = {name: [round(value, 4) for value in ratio] for name, ratio in ratios.items()}
        rows.append({**row, "calls": calls, "rounds": len(time.samples)})
    return rows


def _failure(case: Case, provider: Provider, inputs: Any, device: torch.device) -> tuple[Any, str | None]:
    """(answer, None), or (None, what was raised); memory that a call gets holds NaN before."""
    try:
        if device.type == "cuda":
            _poison(case, device)
        got = provider.run(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as problem:  # whatever a peer raises is a finding, not the end of the run
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises again where the process cannot go on
        return None, f"{type(problem).__name__}: {str(problem)[:300]}"
    return got, None


def _poison(case: Case, device: torch.device) -> None:
    """Fills blocks of the sizes that experts need with NaN and frees them: the allocator hands them out next."""
    tokens, hidden, size = case["num_tokens"], case["hidden_size"], case["intermediate_size"]
    routes = tokens * case["top_k"]
    for count in (tokens * hidden, routes * 2 * size, routes * size, routes * hidden):
        torch.full((count,), torch.nan, dtype=case.dtype, device=device)


def _judge(
    operator: Operator, case: Case, provider: Provider, inputs: Any, got: Any, first: Any
) -> tuple[str | None, Any]:
    """(what is wrong with an answer, the first right one): some rows against float64, all against that one's."""
    wrong = operator.error(case, provider, inputs, got)
    rows = operator.rows(provider, inputs, got)
    if wrong is None and first is None:
        return None, rows.clone()  # some answer into memory that they use again
    if wrong is None:
        largest = _LARGEST_OF_CODES if "scheme" in dict(case.sizes) else _LARGEST[rows.dtype]
        wrong = disagreement_error(first, rows, largest)
    return wrong, first


def _nothing() -> None:
    pass


def main() -> int:
    """Answers requests until the input ends.

    A request has `do` (facts, compile, time), for the last two `case`, and what `answers`, `compile_case` and
    `time_case` read. An answer is a line with `done`; before it come lines with `at`, the provider that is in hand, so
    that the waiting process knows which one hung or ended this one; the first of all says that imports are done. `lost`
    means that this process cannot go on.
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
