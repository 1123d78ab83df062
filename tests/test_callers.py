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

import moeyard
from moeyard import training
from moeyard.dispatch import ids, memory, op
from moeyard.testing import exempt, same_bits, thresholds
from moeyard.testing.callers import OPERATORS, Question, question, rebuilt, tensors
from moeyard.testing.draws import Sizes
from moeyard.testing.soundness import Range, check, check_for

SEED = int(os.environ.get("MOEYARD_CALLERS_SEED", "0"))
SECONDS = float(os.environ.get("MOEYARD_CALLERS_S", "60"))
CASE = os.environ.get("MOEYARD_CALLERS_CASE")
REPEAT = "python -m pytest tests/test_callers.py -k drawn"


MOST = 1500
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
        known = thresholds.REACHES if name in thresholds.REACHES else exempt.EXEMPT
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


def of_a_slice(t: torch.Tensor) -> torch.Tensor:
    return t.new_zeros(t.numel() + 3)[1:-2].view(t.shape)


def of_a_stack(t: torch.Tensor) -> torch.Tensor:
    return t.new_zeros(3, *t.shape).unbind(0)[1]


def of_bytes(t: torch.Tensor) -> torch.Tensor:
    """A view of a workspace that is no whole number of elements."""
    return torch.zeros(t.nbytes + 64 + 1, dtype=torch.uint8)[64:-1].view(t.dtype).view(t.shape)


def of_one_workspace(answer: Any) -> Any:
    """All tensors in one allocation of bytes, an odd number of them."""
    likes = tensors(answer)
    starts = [sum(-(-t.nbytes // 16) * 16 for t in likes[:i]) for i in range(len(likes) + 1)]
    room = torch.zeros(starts[-1] + 1, dtype=torch.uint8)
    parts = (room[i : i + t.nbytes].view(t.dtype).view(t.shape) for i, t in zip(starts, likes, strict=False))
    return rebuilt(answer, lambda _: next(parts))


OUTPUTS: dict[str, Callable[[Any], Any]] = {
    "an answer of the operator": lambda answer: answer,
    "clones": lambda answer: rebuilt(answer, torch.clone),
    "slices": lambda answer: rebuilt(answer, of_a_slice),
    "parts of stacks": lambda answer: rebuilt(answer, of_a_stack),
    "views of bytes": lambda answer: rebuilt(answer, of_bytes),
    "one workspace": of_one_workspace,
}
"""Where outputs may lie: each function gives outputs like those of an answer."""


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_without_outputs(name: str) -> None:
    torch._dynamo.reset()
    asked = question(name, COMPILED._replace(dtype=OPERATORS[name].dtypes[0]), Random(1))
    plain = asked.ask("auto")

    def call(given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return tensors(asked.ask("auto", given))

    got = torch.compile(call, backend="aot_eager", fullgraph=True)(asked.tensors)
    assert [(t.shape, t.dtype, t.stride()) for t in got] == [(t.shape, t.dtype, t.stride()) for t in tensors(plain)]
    parts = iter(got)
    check_equal(asked, rebuilt(plain, lambda _: next(parts)), plain, name)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.full)], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if operator.takes_out])
def test_compiled_with_outputs(name: str, dynamic: bool) -> None:
    """All outputs are filled in one graph, since compiling takes most of the time."""
    torch._dynamo.reset()
    asked = question(name, COMPILED._replace(dtype=OPERATORS[name].dtypes[0]), Random(1))
    plain = asked.ask("auto")
    outs = {way: make(asked.ask("auto")) for way, make in OUTPUTS.items()}
    if len({t.itemsize for t in tensors(plain)}) > 1:
        outs["one workspace"] = rebuilt(outs["one workspace"], torch.clone)  # the next test has it as it is
    for out in outs.values():
        for t in tensors(out):
            t.fill_(77)
    versions = {way: [t._version for t in tensors(out)] for way, out in outs.items()}

    def call(given: dict[str, torch.Tensor], outs: list[Any]) -> Any:
        for out in outs:
            asked.ask("auto", given, out=out)
        inside = rebuilt(outs[0], of_a_slice)
        return asked.ask("auto", given, out=inside)

    made = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)(asked.tensors, [*outs.values()])
    check_equal(asked, made, plain, "slices made by the graph")
    for way, out in outs.items():
        check_equal(asked, out, plain, way)
        assert all(t._version > before for t, before in zip(tensors(out), versions[way], strict=True)), way


def test_a_workspace_of_two_item_sizes_is_refused_by_the_compiler() -> None:
    """torch mutates no such inputs; it says so. The docstring of `out` names what to pass in their place."""
    torch._dynamo.reset()
    asked = question("align", COMPILED._replace(dtype=torch.int32), Random(1))
    out = of_one_workspace(asked.ask("auto"))
    compiled = torch.compile(lambda given, out: asked.ask("auto", given, out=out), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="does not yet handle input mutations on views with different dtypes"):
        compiled(asked.tensors, out)
    mine = out.clone()
    assert compiled(asked.tensors, mine) is mine
    check_equal(asked, mine, asked.ask("auto"), "a clone")


@pytest.mark.parametrize("odd", [0, 1], ids=["whole elements", "odd bytes"])
def test_compiled_gradients_through_outputs(odd: int) -> None:
    """Where a compiler would fail without a word the error says what it needs."""
    torch._dynamo.reset()
    rows = torch.randn(4, 6, requires_grad=True)
    index = torch.tensor([3, 0, 0], dtype=torch.int32)
    out = torch.zeros(72 + 4 * 2 + odd, dtype=torch.uint8)[4:76].view(torch.float32).view(3, 6)

    def call(rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return moeyard.shuffle_rows(rows * 2, index, out=out).square().sum()

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    if odd:
        with pytest.raises(Exception, match="out: expected a storage of whole elements of 4 bytes"):
            compiled(rows, out)
        return
    compiled(rows, out).backward()
    assert rows.grad is not None
    assert torch.allclose(rows.grad, 8 * rows.detach() * torch.tensor([[2], [0], [0], [1]]))


def check_equal(asked: Question, answer: Any, plain: Any, what: str) -> None:
    assert all(same_bits(a, b) for a, b in zip(asked.defined(answer), asked.defined(plain), strict=True)), what


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


def factors_ignored(patched: pytest.MonkeyPatch) -> None:
    """The backward of experts takes all router weights for 1."""
    whole = training.finish_gradients

    def gradients(grad: torch.Tensor, operands: tuple[Any, ...], *rest: Any) -> Any:
        product, factors, *others = operands
        return whole(grad, (product, None if factors is None else torch.ones_like(factors), *others), *rest)

    patched.setattr(training, "finish_gradients", gradients)


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
    "gradients lost": (gradients_lost, Range(operators=("quantised experts",), callers=("asks_with_gradients",))),
    "factors ignored": (factors_ignored, Range(operators=("fused_experts",), callers=("asks_with_gradients",))),
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
