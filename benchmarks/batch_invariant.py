"""Batch-invariant experts on a GPU: `python benchmarks/batch_invariant.py --out FILE [--seconds N] [--models A,B]`.

- batches: random sub-batches of a batch of tokens, with the option and, as a control, without it. How many of each hold
  a token whose bits differ from its bits in the whole batch; of experts, and of layers with their routers.
- times: CUDA graphs of default and batch-invariant calls over rotating inputs, in turn, in random order: medians,
  10 % and 90 %, and the ratio with an interval of 95 %.

The file is written after every cell, as `moeyard.bench.results` has it, with the batches beside its rows. The script
ends with 1 if a token differs with the option, and with 2 if nothing differs without it: then the batches show nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

import moeyard
from moeyard import Routing
from moeyard.bench import experts_cells, layers, results, timing
from moeyard.bench.operators import Case, Provider, operators
from moeyard.bench.routers import router_options
from moeyard.bench.run import limits_of, row_of
from moeyard.testing import differing, sub_batches

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-120b")
KINDS = ("bfloat16", "float16")
TOKENS = tuple(2**i for i in range(15))
WHOLE = 4096
"""Tokens of the batch that sub-batches are drawn from."""


@dataclass
class Found:
    """What a run has found, and when it has to end."""

    out: Path | None
    end: float
    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def left(self) -> float:
        return self.end - time.monotonic()

    def save(self) -> None:
        if self.out is not None:
            content = {**results.document([], self.machine, {}), "batches": self.batches, "left_out": self.left_out}
            del content["rows"]  # which are written last
            results.write(self.out, {**content, "rows": self.rows})


def say(words: str) -> None:
    print(words, flush=True)


def case_of(model: str, tokens: int, kind: str, scale: int) -> Case:
    """The experts of a model with its own activation, of 16-bit floats or of a scheme in bfloat16."""
    part = "biased" if model == "gpt-oss-120b" else "grid"
    case = next(experts_cells.cells(part, (model,), (tokens,), scale))
    changed = {"dtype": kind} if kind in KINDS else {"scheme": kind}
    return replace(case, sizes=tuple({**dict(case.sizes), **changed}.items()))


def experts(case: Case, device: torch.device, impl: str) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
    """The tokens of a batch, and (invariant) -> the experts of some of them."""
    drawn = layers.draw_layer(case, device, torch.Generator().manual_seed(1))

    def with_option(invariant: bool) -> Callable[..., Tensor]:
        return lambda rows, factors, ids: moeyard.fused_experts(
            rows, Routing(factors, ids), drawn.weights, activation=layers.activation(case), batch_invariant=invariant,
            impl=impl,
        )  # fmt: skip

    return (drawn.hidden_states, drawn.routing.topk_weights, drawn.routing.topk_ids), with_option


def layer(case: Case, device: torch.device, impl: str) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
    """The same of whole layers, shared experts included."""
    drawn = layers.draw_layer(replace(case, op="moe_layer"), device, torch.Generator().manual_seed(1))
    options = {"shared": drawn.shared, "shared_gate": drawn.shared_gate, **router_options(case, device)}

    def with_option(invariant: bool) -> Callable[..., Tensor]:
        return lambda rows: moeyard.moe_layer(
            rows, drawn.router_weight, drawn.weights, activation=layers.activation(case), batch_invariant=invariant,
            impl=impl, **options,
        )  # fmt: skip

    return (drawn.hidden_states,), with_option


def check_batches(found: Found, case: Case, device: torch.device, op: str, impl: str, number: int, seed: int) -> None:
    """A row of `batches`: with the option, then without."""
    tensors, with_option = (experts if op == "fused_experts" else layer)(case, device, impl)
    row: dict[str, Any] = {"op": op, "workload": case.workload, "sizes": dict(case.sizes), "impl": impl}
    for name, invariant in (("invariant", True), ("default", False)):
        drawn = sub_batches(case["num_tokens"], number, Random(seed))
        count, wrong, first = differing(with_option(invariant), tensors, drawn, lambda: found.left() > 0)
        row[name] = {"batches": count, "differ": wrong, "first": first}
        say(f"{op} {case.workload} {kind_of(case)} {impl} {name}: {wrong} of {count} batches differ {first}")
    found.batches.append(row)


def kind_of(case: Case) -> str:
    return str(dict(case.sizes).get("scheme", case["dtype"]))


def time_cell(found: Found, case: Case, device: torch.device, impl: str, rates: timing.Rates, seconds: float) -> None:
    """Two rows: default and batch-invariant, the latter with its ratio."""
    operator = operators()[case.op]
    inputs = layers.draw_sets(case, device, torch.Generator().manual_seed(2))
    limits = limits_of(operator, case, inputs, rates)
    _, calls = layers.sets_and_calls(case)

    def run(invariant: bool) -> Callable[[layers.LayerInputs], Tensor]:
        return lambda x: moeyard.fused_experts(
            x.hidden_states, x.routing, x.weights, activation=layers.activation(case), batch_invariant=invariant,
            impl=impl,
        )  # fmt: skip

    providers = [Provider("moeyard", f"{impl}{suffix}", run(bool(suffix))) for suffix in ("", " batch-invariant")]
    wrongs = [layers.error(case, one, inputs[0], one.run(inputs[0])) for one in providers]
    times = timing.time_graphs_within(
        [one.run for one in providers], inputs, calls=calls, seconds=seconds, captured=lambda _: None
    )
    rows = [row_of(case, one, "graph", one_time, limits) for one, one_time in zip(providers, times, strict=True)]
    for row, wrong in zip(rows, wrongs, strict=True):
        if wrong is not None:
            row |= {"time_us": None, "time_us_p10": None, "time_us_p90": None, "correct": False, "wrong": wrong}
    ratio = timing.ratio_interval(times[1], times[0])
    rows[1]["ratio_to"] = {"default": [round(value, 4) for value in ratio]}
    found.rows += rows
    default, invariant = (f"{one.median:.1f} us" for one in times)
    middle, low, high = (f"{value:.3f}" for value in ratio)
    cell = f"{case.workload} {kind_of(case)} {impl} {case['num_tokens']} tokens"
    say(f"{cell}: {default}, batch-invariant {invariant}, ratio {middle} ({low} to {high}) {wrongs[1] or ''}")


def cells(
    given: argparse.Namespace, device: torch.device, rates: timing.Rates
) -> Iterator[tuple[str, Callable[[Found], None]]]:
    """What is to be found, by name: per model and kind, whose weights are kept, the batches first."""
    for model in given.models:
        for kind in given.kinds:
            whole = case_of(model, given.whole, kind, given.scale)
            for impl in given.impls:
                if given.warm:
                    most = max(given.whole, *given.tokens)
                    yield (
                        f"warm-up of {model} {kind} {impl}",
                        partial(warm, case=whole, device=device, impl=impl, most=most),
                    )
                for op in ("fused_experts", "moe_layer"):
                    if op in given.parts:
                        how = {"op": op, "impl": impl, "number": given.number, "seed": given.seed}
                        yield (
                            f"batches of {op} {model} {kind} {impl}",
                            partial(check_batches, case=whole, device=device, **how),
                        )
                for tokens in given.tokens if "times" in given.parts and kind == given.kinds[0] else ():
                    case = case_of(model, tokens, kind, given.scale)
                    how = {"impl": impl, "rates": rates, "seconds": given.cell_seconds}
                    yield (
                        f"times of {model} {kind} {impl} {tokens}", partial(time_cell, case=case, device=device, **how)
                    )  # fmt: skip


def warm(_: Found, case: Case, device: torch.device, impl: str, most: int) -> None:
    """Compiles in processes what calls of both kinds need for up to so many tokens."""
    weights = layers.weights_of_case(case, device)
    for invariant in (False, True):
        moeyard.warmup(
            weights, impl=impl, max_tokens=most, activation=layers.activation(case), dtype=case.dtype,
            batch_invariant=invariant, **router_options(case, device),
        )  # fmt: skip


def verdict(batches: list[dict[str, Any]]) -> tuple[int, str]:
    """How the script ends, and why."""
    wrong = sum(row["invariant"]["differ"] for row in batches)
    seen = sum(row["default"]["differ"] for row in batches)
    count = sum(row["invariant"]["batches"] for row in batches)
    if wrong:
        return 1, f"{wrong} of {count} batches differ"
    if batches and not seen:
        return 2, f"0 of {count} batches differ, but without the option, either: this shows nothing"
    return 0, f"0 of {count} batches differ; without the option {seen}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the cells for which there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def listed(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--seconds", type=float, default=540.0, help="no cell begins later, and batches end")
    parser.add_argument("--cell-seconds", type=float, default=0.8, help="of the rounds of a time")
    parser.add_argument("--models", type=listed, default=list(MODELS))
    parser.add_argument("--kinds", type=listed, default=list(KINDS), help="dtypes or schemes; the first one is timed")
    parser.add_argument("--impls", type=listed, default=["cuda"], help="of experts: cuda, triton")
    parser.add_argument("--parts", type=listed, default=["fused_experts", "moe_layer", "times"])
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in listed(text)], default=list(TOKENS))
    parser.add_argument("--number", type=int, default=500, help="sub-batches per cell")
    parser.add_argument("--whole", type=int, default=WHOLE, help="tokens that they are drawn from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=int, default=1, help="divides the sizes of models")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--no-warm-up", dest="warm", action="store_false", help="compile at first calls")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    end = time.monotonic() + given.seconds
    rates = timing.rates(device)
    found = Found(given.out, end, results.machine(device, rates))
    for name, run in cells(given, device, rates):
        if found.left() <= 0:
            found.left_out.append(name)
            continue
        start = time.monotonic()
        run(found)
        found.save()
        say(f"{name}: {time.monotonic() - start:.1f} s, {found.left():.0f} s left")
    if found.left_out:
        found.save()
        say(f"left out: {', '.join(found.left_out)}")
    code, why = verdict(found.batches)
    say(why)
    return code


if __name__ == "__main__":
    sys.exit(main())
