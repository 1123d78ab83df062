"""Every operator is sound under any caller: drawn questions, asked in every way, on both sides of every threshold.

MOEYARD_CALLERS_S is how long questions are drawn (60 s), MOEYARD_CALLERS_SEED which (0). With MOEYARD_CALLERS_CASE only
that question is asked: a failure says which.
"""

import os
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

from moeyard.dispatch import ids, memory, op
from moeyard.testing import same_bits, thresholds
from moeyard.testing.callers import OPERATORS, question, rebuilt, tensors
from moeyard.testing.draws import Sizes
from moeyard.testing.soundness import Range, check, check_for

SEED = int(os.environ.get("MOEYARD_CALLERS_SEED", "0"))
SECONDS = float(os.environ.get("MOEYARD_CALLERS_S", "60"))
CASE = os.environ.get("MOEYARD_CALLERS_CASE")
REPEAT = "python -m pytest tests/test_callers.py -k drawn"


MOST = 3000
"""Questions of a run that others repeat; more seconds or another seed ask more."""


def draw(seconds: float, drawn_from: Range, repeat: str, most: float = float("inf")) -> None:
    if CASE is not None:
        print(check(SEED, int(CASE), thresholds.collect(), drawn_from))
        return
    print(check_for(seconds, SEED, drawn_from, repeat, most), "questions")


def test_drawn_questions() -> None:
    draw(SECONDS, Range(), REPEAT, float("inf") if "MOEYARD_CALLERS_S" in os.environ else MOST)


@pytest.mark.full
def test_drawn_questions_of_large_sizes() -> None:
    draw(3600.0, Range(most=1 << 26), f"{REPEAT}_questions_of_large_sizes -m full")


def test_every_threshold_of_the_sources_has_sizes_or_a_reason() -> None:
    assert not thresholds.unknown(), "say in moeyard/testing/thresholds.py which sizes of which operator they become"
    assert not thresholds.gone(), "these are no longer in the sources"
    assert not {name for names, _ in thresholds.REACHES.values() for name in names} - OPERATORS.keys()


def test_a_new_threshold_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("cpu.layout:_LEAST_ROUTES", "cuda.align.plan:_candidates:4096", "cpu.layout:_APART")
    for name in names:
        known = thresholds.REACHES if name in thresholds.REACHES else thresholds.EXEMPT
        with monkeypatch.context() as patched:
            patched.delitem(known, name)
            assert thresholds.unknown() == [name]


@pytest.mark.parametrize("name", thresholds.REACHES)
def test_sizes_lie_on_both_sides_of_a_threshold(name: str) -> None:
    value = next(one.value for one in thresholds.collect() if one.name == name)
    operators, reach = thresholds.REACHES[name]
    small = Sizes(5, 2, 8, 16, 16, 4, OPERATORS[operators[0]].dtypes[0])
    assert len({reach(value, off, small) for off in (-1, 0, 1)}) == 3


COMPILED = Sizes(6, 2, 8, 16, 8, 1, torch.float32)


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_with_and_without_outputs(name: str) -> None:
    torch._dynamo.reset()
    dtype = OPERATORS[name].dtypes[0]
    asked = question(name, COMPILED._replace(dtype=dtype), Random(1))
    plain = asked.ask("auto")

    def call(given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return tensors(asked.ask("auto", given))

    def call_into(given: dict[str, torch.Tensor], out: Any) -> Any:
        return asked.ask("auto", given, out=out)

    got = torch.compile(call, backend="aot_eager", fullgraph=True)(asked.tensors)
    shapes = [(t.shape, t.dtype, t.stride()) for t in tensors(plain)]
    assert [(t.shape, t.dtype, t.stride()) for t in got] == shapes
    answers = [got]
    if OPERATORS[name].takes_out:
        out = rebuilt(plain, lambda t: torch.full_like(t, 77))
        versions = [t._version for t in tensors(out)]
        torch.compile(call_into, backend="aot_eager", fullgraph=True)(asked.tensors, out)
        assert all(t._version > before for t, before in zip(tensors(out), versions, strict=True))
        answers.append(tensors(out))
    for answer in answers:
        parts = iter(answer)
        again = asked.defined(rebuilt(plain, lambda _, parts=parts: next(parts)))  # type: ignore[misc]
        assert all(same_bits(a, b) for a, b in zip(again, asked.defined(plain), strict=True))


# What the drawn questions must find


def read_as_dense(patched: pytest.MonkeyPatch) -> None:
    """Ids are read from where they begin, whatever their strides."""
    whole = ids.narrow_ids
    patched.setattr("moeyard.layout.narrow_ids", lambda t: whole(t).as_strided(t.shape, dense_strides(t)))


def dense_strides(t: torch.Tensor) -> tuple[int, ...]:
    return (*[int(t.shape[-1])] * (t.dim() - 1), 1)


def unbumped(patched: pytest.MonkeyPatch) -> None:
    for module in ("moeyard.dispatch.op", "moeyard.layout"):
        patched.setattr(f"{module}.increment_version", lambda _: None)


def unchecked(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(op, "refuse_overlap", lambda *_: None)


def unchecked_between_strides(patched: pytest.MonkeyPatch) -> None:
    """Only outputs are held against each other."""
    whole = memory.refuse_overlap
    patched.setattr(op, "refuse_overlap", lambda outputs, inputs: whole(outputs, ()))


def negated_as_plain(patched: pytest.MonkeyPatch) -> None:
    """A view whose bit says that memory holds the negative values goes straight to kernels."""
    patched.setattr(torch.Tensor, "is_neg", lambda _: False)


def gradients_lost(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(op.Op, "_refuse_gradients", lambda *_: None)


def weights_ignored(patched: pytest.MonkeyPatch) -> None:
    """What is summed is not weighted."""
    whole = op.Op.__call__

    def call(self: op.Op, arguments: tuple[Any, ...], *rest: Any) -> Any:
        return whole(self, (*arguments[:2], None, *arguments[3:]) if self.name == "combine" else arguments, *rest)

    patched.setattr(op.Op, "__call__", call)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Range]] = {
    "read as dense": (read_as_dense, Range(operators=("align",), callers=("asks",))),
    "unbumped": (unbumped, Range(operators=("combine",), callers=("asks_with_outputs",))),
    "unchecked": (unchecked, Range(operators=("moe_sum",), callers=("asks_for_the_memory_of_an_input",))),
    "unchecked inputs": (
        unchecked_between_strides,
        Range(operators=("fused_experts",), callers=("asks_for_the_memory_of_an_input",)),
    ),
    "negated as plain": (negated_as_plain, Range(operators=("activate",), callers=("asks",))),
    "gradients lost": (gradients_lost, Range(operators=("fused_experts",), callers=("asks_with_gradients",))),
    "weights ignored": (weights_ignored, Range(operators=("combine",), callers=("asks",))),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, drawn_from = MUTANTS[name]
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="MOEYARD_CALLERS_SEED=0 MOEYARD_CALLERS_CASE="):
        check_for(20, 0, drawn_from)


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found_among_all_questions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name][0](monkeypatch)
    with pytest.raises(AssertionError, match="MOEYARD_CALLERS_SEED=0 MOEYARD_CALLERS_CASE="):
        check_for(60, 0)
