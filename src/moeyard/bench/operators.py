"""What is measured: cases, who answers them, and the table of operators; each module of bench/cases has one."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor

import moeyard
from moeyard.bench import cases

Run = Callable[[Any], Any]
"""A call to be timed: takes what `Operator.inputs` made and gives the answer."""
_LARGE_BYTES = 1 << 24  # cases that move more have shorter graphs


@dataclass(frozen=True)
class Case:
    """One op at one size under one routing."""

    workload: str
    op: str
    routing: str
    sizes: tuple[tuple[str, int | str], ...]
    model: dict[str, Any] = field(default_factory=dict)
    """How a model's router, activation and shared expert are; empty for ops without a model."""

    def __getitem__(self, name: str) -> Any:
        return dict(self.sizes)[name]

    def __str__(self) -> str:
        return f"{self.op} " + " ".join(f"{name}={value}" for name, value in self.sizes) + f" {self.routing}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows; that of ids where a case has no rows."""
        return getattr(torch, str(dict(self.sizes).get("dtype", "int32")))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Provider:
    """One way to answer a case."""

    name: str
    impl: str
    run: Run
    stable: bool = True
    """Whether routes of an expert come in order."""
    waits: bool = False
    """Whether it waits for the device, so that it cannot be captured in a graph."""
    eager: tuple[tuple[str, Run], ...] = ()
    """(mode, run) of other ways to call it from Python, which are timed on a GPU."""

    @property
    def label(self) -> str:
        """Its name for messages and options."""
        return f"{self.name}:{self.impl}"


def _nothing_computed(_: Case) -> int:
    return 0


def _nothing_beside(_: Case, __: Run, ___: Any) -> dict[str, Any]:
    return {}


def _answer_as_it_is(_: Provider, __: Any, answer: Tensor) -> Tensor:
    return answer


@dataclass(frozen=True)
class Operator:
    """How an operator is measured: `OPERATOR` of a module of bench/cases, whose name is the name of the op."""

    sizes: tuple[str, ...]
    """The keys that a workload's [sizes] or points need; num_tokens is one of them, what times are drawn over."""
    inputs: Callable[[Case, torch.device, Generator], Any]
    """Fresh inputs on a device."""
    providers: Callable[[Case, torch.device], list[Provider]]
    """Everyone who can answer a case on a device."""
    error: Callable[[Case, Provider, Any, Any], str | None]
    """(case, provider, inputs, answer) -> what is wrong with it, in words; None if it is right."""
    bytes_moved: Callable[[Case], int]
    """The bytes that any answer reads and writes."""
    operations: Callable[[Case], int] = _nothing_computed
    """Floating-point operations of the products that any answer computes."""
    optional: tuple[str, ...] = ()
    """Keys that a workload's sizes or points may have besides."""
    from_model: tuple[str, ...] = ()
    """Those of `sizes` that a workload with a [model] table has there instead."""
    values: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Key -> the values that it may have, for `sizes` that are not any integer of 1 and above."""
    sets: Callable[[Case, torch.device, Generator], list[Any]] | None = None
    """All inputs that calls on a GPU rotate over, where they depend on each other."""
    calls: Callable[[Case], int] | None = None
    """How many calls a graph has whose replays are timed."""
    bytes_of: Callable[[Any], int] | None = None
    """The bytes that any answer to these very inputs reads and writes."""
    beside: Callable[[Case, Run, Any], dict[str, Any]] = _nothing_beside
    """(case, run, inputs) -> what a row has besides times."""
    rows: Callable[[Provider, Any, Any], Tensor] = _answer_as_it_is
    """(provider, inputs, answer) -> the answer's rows in an order that all providers share."""

    def bytes_read_and_written(self, case: Case, inputs: list[Any]) -> float:
        """Bytes of an answer, the mean over inputs where it depends on them."""
        if self.bytes_of is None:
            return self.bytes_moved(case)
        return sum(map(self.bytes_of, inputs)) / len(inputs)

    def calls_of_graph(self, case: Case) -> int:
        """How many calls a graph has whose replays are timed."""
        if self.calls is not None:
            return self.calls(case)
        return 20 if case["num_tokens"] >= 32768 or self.bytes_moved(case) >= _LARGE_BYTES else 50

    def failure(self, case: Case, provider: Provider, inputs: Any, device: torch.device) -> str | None:
        """What is wrong with a provider's answer, or the exception it raised; None if it is right."""
        try:
            got = provider.run(inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as problem:  # whatever a peer raises is a finding, not the end of the run
            return f"{type(problem).__name__}: {problem}"
        return self.error(case, provider, inputs, got)


@cache
def operators() -> dict[str, Operator]:
    """Name -> operator, of every module of bench/cases."""
    names = sorted(module.name for module in pkgutil.iter_modules(cases.__path__))
    return {name: importlib.import_module(f"{cases.__name__}.{name}").OPERATOR for name in names}


def able(op: str, case: Case, device: torch.device, weights: moeyard.ExpertWeights | None = None) -> list[str]:
    """moeyard's implementations of an op that "auto" may choose for a case, the preferred one first.

    With `weights` of experts those that take them and the case's sizes.
    """
    if weights is None:
        return list(moeyard.explain(op, device, case.dtype).able)
    sizes = {"num_tokens": case["num_tokens"], "top_k": case["top_k"]}
    return list(moeyard.explain(op, device, case.dtype, weights=weights, **sizes).able)


def reusing(call: Callable[[Any, Any], Any]) -> Run:
    """A run that hands its last result to `call` as the output of the next one, None at first."""
    kept: list[Any] = []

    def run(inputs: Any) -> Any:
        kept[:] = [call(inputs, kept[0] if kept else None)]
        return kept[0]

    return run


def generator_on(device: torch.device, generator: Generator) -> Generator:
    """A generator for large values, seeded by another: on a GPU they are drawn where they are needed."""
    if device.type != "cuda":
        return generator
    return Generator(device).manual_seed(int(torch.randint(2**31, (), generator=generator)))
