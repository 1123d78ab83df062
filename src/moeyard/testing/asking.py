"""Every operator asked in every way: each function here is a caller, and raises for a wrong answer."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from io import BytesIO
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from moeyard.testing.callers import Question, rebuilt, tensors
from moeyard.testing.draws import Tensors
from moeyard.testing.formulas import FORMULAS, layer_by_steps
from moeyard.testing.lies import LIES, dense
from moeyard.testing.outputs import guard_broken, poisoned
from moeyard.testing.verdicts import difference, error

_GAP = 64
"""Bytes between tensors of one workspace, and what their addresses are multiples of."""
_MOST_WOVEN = 1 << 24
"""Bytes of an input with room for outputs after every row."""


class Drawn(NamedTuple):
    """A question, how its tensors lie, who answers and who asks."""

    question: Question
    given: Tensors
    impl: str
    rng: Random

    def ask(self, given: Tensors | None = None, **more: Any) -> Any:
        """The answer, for these tensors or others of the same shapes."""
        return self.question.ask(self.impl, self.given if given is None else given, **more)

    def judge(self, answer: Any, given: Tensors | None = None) -> None:
        """Raises AssertionError for a wrong answer to these tensors."""
        wrong = error(self.question, self.given if given is None else given, self.impl, answer)
        assert wrong is None, wrong

    def same(self, answer: Any, wanted: Any) -> None:
        """Raises AssertionError where two answers have other bits."""
        wrong = difference(self.question.defined(answer, self.plain), self.question.defined(wanted, self.plain), "it")
        assert wrong is None, wrong

    @property
    def plain(self) -> Tensors:
        """Dense tensors of the same values."""
        return {name: dense(t.resolve_neg().resolve_conj().detach()) for name, t in self.given.items()}

    @property
    def floats(self) -> list[str]:
        """The tensors that might need a gradient."""
        return [name for name, t in self.given.items() if t.is_floating_point() and t.dtype.itemsize > 1]


def _refused(call: Callable[[], Any], *words: str) -> None:
    """Raises AssertionError unless a call raises ValueError with all words."""
    try:
        call()
    except ValueError as refusal:
        assert all(word in str(refusal) for word in words), f"refused in other words: {refusal}"
        return
    raise AssertionError(f"not refused: expected ValueError with {words}")


# Callers


def asks(drawn: Drawn) -> None:
    """A plain call; it leaves its inputs as they were."""
    before = drawn.plain
    drawn.judge(drawn.ask())
    wrong = difference(list(drawn.plain.values()), list(before.values()), "what it was before the call")
    assert wrong is None, f"an input changed: {wrong}"


def asks_in_inference_mode(drawn: Drawn) -> None:
    """Under torch.inference_mode, where tensors have no versions."""
    with torch.inference_mode():
        given = {name: LIES["dense"](t) if drawn.rng.random() < 0.5 else t for name, t in drawn.given.items()}
        answer = drawn.ask(given)
        if drawn.question.operator.takes_out:
            drawn.same(drawn.ask(given, out=rebuilt(answer, torch.empty_like)), answer)
    drawn.judge(answer, given)


def asks_under_settings(drawn: Drawn) -> None:
    """Autocast, another default dtype, deterministic algorithms: the bits of the plain call."""
    plain = drawn.ask()
    device = next(iter(drawn.given.values())).device.type
    with torch.autocast(device, torch.bfloat16):
        drawn.same(drawn.ask(), plain)
    default, algorithms = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_default_dtype(torch.float64)
        drawn.same(drawn.ask(), plain)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(True)
        drawn.same(drawn.ask(), plain)
    finally:
        torch.set_default_dtype(default)
        torch.use_deterministic_algorithms(algorithms)
    drawn.judge(plain)


def asks_with_more_threads(drawn: Drawn) -> None:
    """Parts on several threads, and several Python threads at once: the bits of one."""
    count = torch.get_num_threads()
    answers: list[Any] = []
    problems: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(drawn.ask())
        except BaseException as problem:
            problems.append(problem)

    try:
        torch.set_num_threads(1)
        wanted = drawn.ask()
        torch.set_num_threads(drawn.rng.choice([3, 4]))
        drawn.judge(drawn.ask())
        helpers = [threading.Thread(target=work) for _ in range(3)]
        for helper in helpers:
            helper.start()
        for helper in helpers:
            helper.join()
    finally:
        torch.set_num_threads(count)
    if problems:
        raise problems[0]
    for answer in answers:
        if drawn.impl in ("cpu", "cuda") and drawn.question.name != "moe_layer":
            drawn.same(answer, wanted)
        drawn.judge(answer)


def asks_with_outputs(drawn: Drawn) -> None:
    """`out=` of poisoned tensors: each is filled, not overrun, and has another version."""
    out = rebuilt(drawn.ask(), lambda t: poisoned(tuple(t.shape), t.dtype, t.device))
    versions = [t._version for t in tensors(out)]
    for _ in range(2):  # the second call of a layout goes another way
        answer = drawn.ask(out=out)
        assert answer is out, "another answer than out"
        assert not any(guard_broken(t) for t in tensors(out)), "written behind the end of out"
        drawn.judge(out)
        bumped = [t._version for t in tensors(out)]
        assert all(a < b for a, b in zip(versions, bumped, strict=True)), "the version of out is as before the call"
        versions = bumped


def asks_for_saved_outputs(drawn: Drawn) -> None:
    """A tensor that autograd saved and `out=` overwrites makes its backward raise."""
    out = rebuilt(drawn.ask(), lambda t: torch.zeros(t.shape, dtype=t.dtype, device=t.device))
    saved = next((t for t in tensors(out) if t.dtype in (torch.float32, torch.float64)), None)
    if saved is None:
        return
    loss = (torch.ones_like(saved, requires_grad=True) * saved).sum()
    drawn.ask(out=out)
    try:
        loss.backward()
    except RuntimeError as problem:
        assert "modified by an inplace operation" in str(problem), problem
        return
    raise AssertionError("backward used a tensor that out= had overwritten")


def asks_from_a_workspace(drawn: Drawn) -> None:
    """Inputs and outputs in slices of one allocation, in any order."""
    name = drawn.rng.choice(sorted(drawn.given))
    likes = tensors(drawn.ask())
    order = list(range(len(likes) + 1))
    drawn.rng.shuffle(order)
    of_all = [*likes, drawn.plain[name]]
    views = _laid(of_all, order)
    views[-1].copy_(of_all[-1])
    parts = iter(views)
    out = rebuilt(drawn.ask(), lambda _: next(parts))
    given = {**drawn.given, name: views[-1]}
    drawn.judge(drawn.ask(given, out=out), given)


def asks_between_the_rows_of_an_input(drawn: Drawn) -> None:
    """An output that lies between two rows of an input, touching neither, is taken."""
    likes = tensors(drawn.ask())
    name = drawn.rng.choice(sorted(drawn.given))
    plain = drawn.plain[name]
    width, gap = plain[:1].nbytes, -(-sum(-(-t.nbytes // _GAP) * _GAP for t in likes) // _GAP) * _GAP
    pitch = -(-width // _GAP) * _GAP + gap
    if not plain.numel() or not gap or plain.shape[0] * pitch > _MOST_WOVEN:
        return
    room = torch.full((plain.shape[0] * pitch,), 0x7F, dtype=torch.uint8, device=plain.device)
    strides = (pitch // plain.element_size(), *plain.stride()[1:])
    woven = room.view(plain.dtype).as_strided(plain.shape, strides).copy_(plain)
    start = pitch * drawn.rng.randrange(plain.shape[0]) + pitch - gap
    places = []
    for t in likes:
        places.append(_view(room[start:], t))
        start += -(-t.nbytes // _GAP) * _GAP
    parts = iter(places)
    out = rebuilt(drawn.ask(), lambda _: next(parts))
    given = {**drawn.given, name: woven}
    drawn.judge(drawn.ask(given, out=out), given)


def asks_for_the_memory_of_an_input(drawn: Drawn) -> None:
    """An output that shares memory with an input, or with another output, is refused."""
    likes = tensors(drawn.ask())
    at = drawn.rng.randrange(len(likes))
    dead = _dead_inputs(drawn)
    others: list[tuple[str | int, Tensor]] = [(k, t) for k, t in drawn.plain.items() if k not in dead]
    others += [(i, t) for i, t in enumerate(likes) if i != at]
    others = [(key, t) for key, t in others if t.numel()]
    if not likes[at].numel() or not others:
        return
    key, other = drawn.rng.choice(sorted(others, key=lambda one: str(one[0])))
    room = torch.zeros(likes[at].nbytes + other.nbytes + _GAP, dtype=torch.uint8, device=other.device)
    last = max(0, other.nbytes - 8) // 8 * 8
    output = _view(room[drawn.rng.choice([0, last, last // 16 * 8]) :], likes[at])
    second = _view(room, other).copy_(other)
    made: dict[int, Tensor] = {at: output}
    given = dict(drawn.given)
    if isinstance(key, str):
        given[key] = second
    else:
        made[key] = second
    numbers = iter(range(len(likes)))
    out = rebuilt(drawn.ask(), lambda t: made.get(next(numbers), torch.empty_like(t)))
    _refused(lambda: drawn.ask(given, out=out), "expected memory apart from")


def _dead_inputs(drawn: Drawn) -> set[str]:
    """Inputs that a call reads before it makes an output: their values are taken first, so overlaps harm nobody."""
    return {"expert_offsets", "expert_num_tokens"} if drawn.question.operator.op == "grouped_gemm" else set()


def _laid(likes: list[Tensor], order: list[int]) -> list[Tensor]:
    """Tensors of the shapes of others, one after the other in one allocation."""
    sizes = [-(-t.nbytes // _GAP) * _GAP + _GAP for t in likes]
    room = torch.full((sum(sizes),), 0x7F, dtype=torch.uint8, device=likes[0].device)
    starts, start = {}, 0
    for i in order:
        starts[i] = start
        start += sizes[i]
    return [_view(room[starts[i] :], t) for i, t in enumerate(likes)]


def _view(room: Tensor, like: Tensor) -> Tensor:
    """The first bytes of memory as a dense tensor of the shape and dtype of another."""
    return room[: like.nbytes].view(like.dtype).view(like.shape)


def asks_with_gradients(drawn: Drawn) -> None:
    """Inputs that need gradients: refused by name where an operator has none, else right."""
    kept = {name: t.clone() if t.is_inference() else t for name, t in drawn.given.items()}  # autograd saves no others
    for name in drawn.floats:
        needy = drawn.plain[name].requires_grad_()
        given = {**kept, name: needy}
        if name not in drawn.question.operator.differentiable:
            _refused(lambda: drawn.ask(given), "expected a tensor that needs no gradient")  # noqa: B023
            with torch.no_grad():
                drawn.judge(drawn.ask(given), given)
            continue
        _gradient_is_right(drawn, given, name, needy)


def _gradient_is_right(drawn: Drawn, given: Tensors, name: str, needy: Tensor) -> None:
    """The gradient is that of the operator in plain torch, in float64."""
    answer = drawn.ask(given)
    if drawn.question.name == "experts at a scheme":  # gradients jump where codes do (tests/test_straight_through.py)
        assert answer.requires_grad
        drawn.judge(answer.detach(), given)
        return
    parts = [t for t in drawn.question.defined(answer, drawn.plain) if t.requires_grad]
    if not needy.numel() * sum(t.numel() for t in parts):
        return
    if drawn.question.name == "moe_layer":  # torch's products decide near ties of its router
        wide, formula = needy, layer_by_steps(given, drawn.question, drawn.impl).double()
    else:
        wide = needy.detach().double().requires_grad_()
        plain = {k: t.double() if t.is_floating_point() else t for k, t in drawn.plain.items()} | {name: wide}
        formula = FORMULAS[drawn.question.name](plain, drawn.question, tensors(answer))
    weights = torch.randn(parts[0].shape, device=needy.device).to(parts[0].dtype).double()  # nothing is rounded
    (got,) = torch.autograd.grad((parts[0].double() * weights).sum(), needy)
    (wanted,) = torch.autograd.grad((formula * weights).sum() + 0 * wide.sum(), wide)  # all may be dropped
    assert (got.dtype, got.shape) == (needy.dtype, needy.shape)
    between = drawn.question.operator.op in ("grouped_gemm", "fused_experts")  # what is in between is rounded, too
    eps = max(2.0**-24, torch.finfo(needy.dtype).eps, torch.finfo(parts[0].dtype).eps if between else 0.0)
    slack = 64 * eps * float(wanted.abs().max()) + 1e-6
    off = float((got.double() - wanted).abs().max())
    assert off <= slack, f"gradient of {name}: off by {off:.1e} where {slack:.1e} is allowed"


def asks_with_tangents(drawn: Drawn) -> None:
    """Forward mode and torch.func are refused in words: operators have no such derivatives."""
    if not drawn.floats:
        return
    name = drawn.rng.choice(drawn.floats)
    plain = drawn.plain

    def loss(t: Tensor) -> Tensor:
        parts = tensors(drawn.ask({**plain, name: t}))
        return sum((part.sum() for part in parts if part.is_floating_point()), torch.zeros(()))

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(plain[name], torch.ones_like(plain[name]))
        _refused(lambda: drawn.ask({**plain, name: dual}), "expected a tensor without a tangent")
    _refused(lambda: torch.func.jvp(loss, (plain[name],), (torch.ones_like(plain[name]),)), ": expected a")
    _refused(lambda: torch.func.grad(loss)(plain[name]), ": expected a")


def asks_without_memory(drawn: Drawn) -> None:
    """Meta and fake tensors: the shapes, dtypes and strides of the plain answer, or a refusal in words."""
    real = drawn.ask()
    with FakeTensorMode() as mode:
        fake: Tensors = {name: mode.from_tensor(t) for name, t in drawn.given.items()}
        asked = drawn.question.moved(mode.from_tensor)
        _same_shapes(real, asked.ask(drawn.impl, fake), True)
    given = {name: t.detach().to("meta") for name, t in drawn.given.items()}
    try:
        answer = drawn.question.moved(lambda t: t.to("meta")).ask("auto", given)
    except ValueError as refusal:
        assert ": expected" in str(refusal) or "refuses" in str(refusal), refusal
        return
    _same_shapes(real, answer, False)


def _same_shapes(real: Any, other: Any, devices: bool) -> None:
    for a, b in zip(tensors(real), tensors(other), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), f"{a.shape} and {b.shape}"
        assert not devices or a.device == b.device


def asks_and_keeps_answers(drawn: Drawn) -> None:
    """What is saved and read again, or copied, has the bits of the answer."""
    answer, file = drawn.ask(), BytesIO()
    torch.save(answer, file)
    file.seek(0)
    drawn.same(torch.load(file, weights_only=False), answer)
    drawn.same(deepcopy(answer), answer)


def asks_and_is_interrupted(drawn: Drawn) -> None:
    """Ctrl-C during a call: nobody writes what is freed, and the next call is right."""
    if threading.current_thread() is not threading.main_thread():
        return
    wanted, size = drawn.ask(), sum(t.numel() for t in drawn.given.values()) + 1024
    for _ in range(3):
        _interrupted(drawn.ask, 1e-5 + drawn.rng.random() * 2e-3)
        guard = torch.full((min(size, 1 << 20),), 7, dtype=torch.int32)  # takes the memory that the call had
        time.sleep(2e-4)
        assert bool((guard == 7).all()), "written after the call had ended"
    drawn.same(drawn.ask(), wanted)
    drawn.judge(wanted)


def _interrupted(call: Callable[[], Any], after_s: float) -> None:
    """Raises KeyboardInterrupt in a call after some seconds, and every 300 us from then on; it ends here."""

    def ring(*_: object) -> None:
        raise KeyboardInterrupt

    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None  # one that strikes in a finaliser is said there, and lost
    signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, after_s, 3e-4)
        call()
    except KeyboardInterrupt:
        pass
    finally:
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, signal.SIG_IGN)  # the last one may arrive late
                break
            except KeyboardInterrupt:
                pass
        sys.unraisablehook = hook


NEED_OUTPUTS = (
    asks_with_outputs, asks_for_saved_outputs, asks_from_a_workspace, asks_between_the_rows_of_an_input,
    asks_for_the_memory_of_an_input,
)  # fmt: skip
"""Callers that give `out=`."""
_CALLERS = (
    asks, asks_in_inference_mode, asks_under_settings, asks_with_more_threads, *NEED_OUTPUTS, asks_with_gradients,
    asks_with_tangents, asks_without_memory, asks_and_keeps_answers, asks_and_is_interrupted,
)  # fmt: skip
CALLERS: dict[str, Callable[[Drawn], None]] = {caller.__name__: caller for caller in _CALLERS}
"""By name."""
