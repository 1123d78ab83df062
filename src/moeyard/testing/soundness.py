"""Questions drawn from a seed and a number, each asked by one caller; the same two give the same question again."""

import time
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch

import moeyard
from moeyard.testing.asking import CALLERS, NEED_OUTPUTS, Drawn, asks
from moeyard.testing.callers import OPERATORS, Question, question, weights_of
from moeyard.testing.implementations import impls_on
from moeyard.testing.lies import LIES, lies_of
from moeyard.testing.thresholds import Threshold, collect, draw_sizes


class Range(NamedTuple):
    """What is drawn from."""

    device: str = "cpu"
    most: int = 1 << 22
    """What the sizes of a question may cost (`thresholds.cost`)."""
    operators: tuple[str, ...] = tuple(OPERATORS)
    callers: tuple[str, ...] = tuple(CALLERS)


def check(seed: int, number: int, known: Sequence[Threshold], drawn_from: Range = Range()) -> str:  # noqa: B008
    """Draws question `number` of a seed and asks it; returns what was asked, and raises AssertionError with it.

    Numbers go through all operators and callers in turn; all else is drawn.
    """
    device, most, operators, callers = drawn_from
    rng = Random(f"{seed}/{number}")
    torch.manual_seed(rng.randrange(2**31))
    name = operators[number % len(operators)]
    sizes, near = draw_sizes(name, rng, known, most)
    asked = question(name, sizes, rng, device)
    lying = {key: rng.choice(lies_of(t)) if rng.random() < 0.5 else "dense" for key, t in asked.tensors.items()}
    given = {key: LIES[lying[key]](t) for key, t in asked.tensors.items()}
    impl = rng.choice(_impls(asked))
    caller = CALLERS[callers[number // len(operators) % len(callers)]]
    if caller in NEED_OUTPUTS and not OPERATORS[name].takes_out:
        caller = asks
    places = {key: lie for key, lie in lying.items() if lie != "dense"}
    said = f"{name} by {impl}, {caller.__name__}, {near}: {sizes}, {places}"
    try:
        caller(Drawn(asked, given, impl, rng))
    except Exception as problem:
        if not _unfit(problem, device):
            raise AssertionError(f"{said}: {type(problem).__name__}: {problem}") from problem
    return said


def check_for(
    seconds: float,
    seed: int,
    drawn_from: Range = Range(),  # noqa: B008
    repeat: str = "",
    most: float = float("inf"),
) -> int:
    """Asks questions 0, 1, 2, ... of a seed for some seconds, and at least one of each operator by each caller.

    `most` questions are asked at most, so that a quick machine asks what others do. Returns how many were asked.
    AssertionError names the environment in which the command `repeat` asks that question alone.
    """
    known, begin, number = collect(), time.monotonic(), 0
    least = len(drawn_from.operators) * len(drawn_from.callers)
    while number < least or (number < most and time.monotonic() - begin < seconds):
        try:
            check(seed, number, known, drawn_from)
        except AssertionError as wrong:
            where = f"MOEYARD_CALLERS_SEED={seed} MOEYARD_CALLERS_CASE={number}"
            raise AssertionError(f"{where} {repeat}: {wrong}") from wrong
        number += 1
    return number


def _impls(asked: Question) -> list[str]:
    """The implementations that meet a question, and "auto"; the reference, which goes row by row, for small ones."""
    first = next(iter(asked.tensors.values()))
    found = [name for name in impls_on(asked.operator.op, first.device, first.dtype) if name != "reference"]
    if asked.name == "quantised experts":
        options = asked.options
        weights = weights_of(asked.tensors, options["gated"], options["scheme"], options["block_start"])
        takes = moeyard.explain("fused_experts", first.device, first.dtype, weights=weights).able
        found = [name for name in found if name in takes]
    if asked.name == "route_and_align":
        found = [name for name in found if name in impls_on("moe_align_block_size", first.device)]
    small = asked.sizes.tokens * asked.sizes.top_k <= 64 and asked.name != "moe_layer"
    return ["auto", *found, *(["reference"] if small else [])]


def _unfit(problem: Exception, device: str) -> bool:
    """Whether an implementation asked for by name has refused sizes that it is not written for, which GPU ones may."""
    return device == "cuda" and isinstance(problem, ValueError) and "refuses" in str(problem)
