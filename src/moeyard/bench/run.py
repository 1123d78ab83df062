"""A benchmark run: for every case make inputs, check answers, time in turn, and hand over rows."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from moeyard.bench.operators import Case, Operator, Provider, Run, operators
from moeyard.bench.timing import Rates, Times, ratio_interval, time_graphs_in_turn, time_in_turn

_SETS = 4  # input sets that calls rotate over
_SETS_BYTES = 1 << 28  # fewer sets when they would take more than this
_CHECKED_BYTES = 1 << 24  # above this one input set is checked instead of all
_NO_PEERS = ("moeyard", "torch", "numba")


def run_case(
    case: Case,
    device: torch.device,
    *,
    rates: Rates,
    rounds: int,
    wanted: Callable[[Provider], bool],
    seed: int,
    advance: Callable[[], None],
    others: Callable[[Case, torch.device], list[Provider]] = lambda *_: [],
) -> list[dict[str, Any]]:
    """Rows of one case: every provider in every mode of the device; wrong ones without times.

    Args:
        rates: of the machine, for what bytes and operations take.
        wanted: whether a provider takes part.
        advance: called `rounds` times per mode, for progress.
        others: more providers of a case; they take part, whatever `wanted` says.
    """
    operator = operators()[case.op]
    inputs = _inputs(operator, case, device, torch.Generator().manual_seed(seed))
    limits = limits_of(operator, case, inputs, rates)
    rows, right = [], []
    modes = ["graph", "eager"] if device.type == "cuda" else ["cpu"]
    for provider in [*filter(wanted, operator.providers(case, device)), *others(case, device)]:
        checked = inputs if operator.bytes_moved(case) < _CHECKED_BYTES else inputs[:1]
        wrong = next(filter(None, (operator.failure(case, provider, value, device) for value in checked)), None)
        if wrong is None:
            right.append(provider)
        else:
            rows += [row_of(case, provider, mode, None, limits) | {"wrong": wrong} for mode in modes]
    for mode in modes:
        timed = list(_timed(right, mode, device))
        runs = [run for _, _, run in timed]
        if mode == "graph":
            calls = operator.calls_of_graph(case)
            times = time_graphs_in_turn(runs, inputs, rounds=rounds, calls=calls, after_round=advance, seed=seed)
        else:
            finish = torch.cuda.synchronize if mode == "eager" else _nothing
            times = time_in_turn(
                runs, inputs, rounds=rounds, sample_us=1e4, finish=finish, after_round=advance, seed=seed
            )
        theirs = {_peer(p): time for (p, _, _), time in zip(timed, times, strict=True) if p.name not in _NO_PEERS}
        for (provider, label, _), time in zip(timed, times, strict=True):
            row = row_of(case, provider, label, time, limits) | operator.beside(case, provider.run, inputs[0])
            if provider.name == "moeyard" and theirs:
                row["ratio_to"] = {
                    name: [round(value, 4) for value in ratio_interval(time, peer)] for name, peer in theirs.items()
                }
            rows.append(row)
    return rows


def _inputs(operator: Operator, case: Case, device: torch.device, generator: torch.Generator) -> list[Any]:
    if device.type == "cuda" and operator.sets is not None:
        return operator.sets(case, device, generator)
    count = max(1, min(_SETS, _SETS_BYTES // max(1, operator.bytes_moved(case))))
    return [operator.inputs(case, device, generator) for _ in range(count)]


def limits_of(operator: Operator, case: Case, inputs: list[Any], rates: Rates) -> dict[str, float | None]:
    """What the bytes and operations of a case take at a machine's rates; see `Rates.times_us`."""
    moved = operator.bytes_read_and_written(case, inputs)
    return rates.times_us(moved, operator.operations(case), case.dtype)


def _peer(provider: Provider) -> str:
    """A peer by name; transformers has several ways."""
    return f"{provider.name} {provider.impl}" if provider.name == "transformers" else provider.name


def _timed(right: list[Provider], mode: str, device: torch.device) -> Iterator[tuple[Provider, str, Run]]:
    """(provider, mode of its row, what to time) of everything that is timed in turn."""
    for provider in right:
        if mode == "graph" and provider.waits:
            continue
        yield provider, mode, provider.run
        ours = provider.name == "moeyard" and provider.impl == "cuda"
        if mode == "graph" and ours and torch.cuda.get_device_capability(device) >= (9, 0):
            yield provider, "graph_pdl", programmatically(provider.run)
        if mode == "eager":
            for label, run in provider.eager:
                yield provider, label, run


def programmatically(run: Run) -> Run:
    """The same call with programmatic dependent launches."""
    from moeyard.cuda.runtime.launch import programmatic_launch

    def with_programmatic_launch(inputs: Any) -> Any:
        before = programmatic_launch()
        programmatic_launch(True)
        try:
            return run(inputs)
        finally:
            programmatic_launch(before)

    return with_programmatic_launch


def _nothing() -> None:
    pass


def row_of(
    case: Case, provider: Provider, mode: str, times: Times | None, limits: dict[str, float | None]
) -> dict[str, Any]:
    """A row of a result file; without times for a wrong answer, or where no run of it ended."""
    return {
        "op": case.op,
        "workload": case.workload,
        "routing": case.routing,
        "sizes": dict(case.sizes),
        "provider": provider.name,
        "impl": provider.impl,
        "mode": mode,
        "time_us": None if times is None else round(times.median, 3),
        "time_us_p10": None if times is None else round(times.p10, 3),
        "time_us_p90": None if times is None else round(times.p90, 3),
        **limits,
        "correct": times is not None,
    }
