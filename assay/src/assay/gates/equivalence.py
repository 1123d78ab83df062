"""Does a candidate still do the same? Inputs that hypothesis draws, to base and candidate, each as it runs elsewhere.

Strategies are the task's own and run in the judge; callables run in workers, and what comes back is decoded, never run.
Base is looked at first: it must agree with itself, and its distance from a wider type is what a candidate may have.
Arguments that a call writes to are filled with NaN or 0x7f before it. All others must come back as they were sent;
outputs must stay what they were when later calls are made and when the caller overwrites its arguments.
"""

import hashlib
import importlib.util
import random
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assay.arms import commands
from assay.arms.handle import started
from assay.arms.inside import wire
from assay.arms.trees import Trees
from assay.contract import seeds
from assay.contract.errors import ArmError, OverBudgetError
from assay.contract.workload import Workload
from assay.experiment.exchange import Exchange, asked
from assay.experiment.outputs import UNREADABLE, brief_arguments, difference
from assay.gates.gate import Found, Gate, Given, Where
from assay.gates.tolerance import Rounding, positions

if TYPE_CHECKING:
    import hypothesis
    from hypothesis.strategies import SearchStrategy

    from assay.contract.task import Property, Read

_MOST_UNASKED = 4
SHRINKING_S = 30.0
"""How long a smaller example is looked for."""


@dataclass(frozen=True)
class Equivalence:
    """What was found. `outcome`: "", "incorrect", "tampered", "task_invalid", "infra.equivalence"; `words` say why."""

    outcome: str
    words: str
    examples: int
    """How many inputs the candidate was given."""
    tolerances: Mapping[str, Any] = field(default_factory=dict)
    """By property: base's own distance from the wide result."""


class _FoundError(Exception):
    """A verdict on one example. `outcome` as in Equivalence."""

    def __init__(self, outcome: str, words: str) -> None:
        super().__init__(words)
        self.outcome, self.words = outcome, words


class _Enough(BaseException):
    """Looked long enough for a smaller example."""


def equivalent(given: Given) -> Found:
    """The task's properties."""
    assert given.read is not None
    frozen = given.frozen
    seed = seeds.property_(next(iter(frozen.plans().values())).seed, frozen.digest)
    trees = commands.placed(frozen, sandboxed=given.sandboxed, more=given.environment)
    found = check(given.read, trees, seed=seed, most=given.most)
    return Found(found.outcome, found.words or f"{found.examples} examples")


def check(
    read: "Read", trees: Trees, *, seed: int, most: Callable[[float], float] = lambda seconds: seconds
) -> Equivalence:
    """Every property of a task, until one fails; `trees` has base and candidate, in sandboxes or not."""
    examples = 0
    tolerances = {}
    for one in read.task.property:
        drawn = _Drawn(read, one, trees, seed, most)
        try:
            found = drawn.check()
        finally:
            drawn.end()
        examples += drawn.given
        tolerances[one.name] = drawn.rounding.summary()
        if found is not None:
            return Equivalence(found.outcome, f"{one.name}: {found.words}", examples, tolerances)
    return Equivalence("", "", examples, tolerances)


class _Drawn:
    """One property: the same inputs first to base, then to base and candidate."""

    def __init__(self, read: "Read", one: "Property", trees: Trees, seed: int, most: Callable[[float], float]) -> None:
        self.one, self.seed = one, int(hashlib.sha256(f"{seed}:{one.name}".encode()).hexdigest()[:8], 16)
        self.strategy = str(read.own(one.strategy)), one.strategy.partition(":")[2]
        timeout_s, hash_seed = most(read.task.budget.timeout_s), secrets.randbits(32)
        self.base = _Side("base", read, one.target, trees, timeout_s, hash_seed)
        self.candidate = _Side("candidate", read, one.target, trees, timeout_s, hash_seed)
        self.wide = _Side("base", read, one.wide, trees, timeout_s, hash_seed) if one.wide else None
        self.order = random.Random(secrets.randbits(64))
        self.rounding, self.most = Rounding(), most
        self.given = 0
        self.shares = False
        """Whether base's own outputs change with its arguments or in later calls."""

    def end(self) -> None:
        for side in (self.base, self.candidate, self.wide):
            if side is not None:
                side.end()

    def check(self) -> _FoundError | None:
        return self._draw(self._base_alone) or self._draw(self._both)

    def _draw(self, look: Callable[[Any], None]) -> _FoundError | None:
        """Looks at as many inputs as the property wants; what is found with the smallest of them."""
        import hypothesis
        from hypothesis.errors import HypothesisException

        smallest: list[tuple[int, _FoundError]] = []
        since: list[float] = []
        over: list[OverBudgetError] = []

        def tried(arguments: Any) -> None:
            if since and time.monotonic() - since[0] > SHRINKING_S:
                raise _Enough
            try:
                self.most(1)
                look(arguments)
            except _FoundError as found:
                since.append(time.monotonic())
                size = len(brief_arguments(arguments)) + sum(len(part) for part in wire.encode(arguments))
                smallest.append((size, found))
                raise
            except OverBudgetError as problem:
                over.append(problem)
                raise _Enough from None
            except ArmError as problem:
                since.append(time.monotonic())
                own = problem.tampered and problem.arm == "candidate"
                smallest.append((0, _FoundError("tampered" if own else "infra.equivalence", str(problem))))
                raise _Enough from None

        try:
            strategy = _strategy(*self.strategy)
            hypothesis.seed(self.seed)(_settings(self.one.examples)(hypothesis.given(strategy)(tried)))()
        except (_FoundError, _Enough, BaseExceptionGroup):
            pass
        except HypothesisException as problem:
            return smallest[0][1] if smallest else _FoundError("task_invalid", f"strategy: {_last_line(problem)}")
        except Exception as problem:
            return _FoundError("task_invalid", f"strategy: {type(problem).__name__}: {problem}")
        if over and not smallest:
            raise over[0]
        return min(smallest, key=lambda pair: pair[0])[1] if smallest else None

    def _base_alone(self, arguments: Any) -> None:
        """Whether base can be compared with at all."""
        words = brief_arguments(arguments)
        sent = self._poisoned(arguments)
        answered = self.base.call(sent)
        again = self.base.call(sent)
        for answer in (answered, again):
            if isinstance(answer, str):
                raise _FoundError("task_invalid", f"base{words} {answer}")
        assert isinstance(answered, _Answer) and isinstance(again, _Answer)
        if changed := self._changed(sent, answered):
            raise _FoundError("task_invalid", f"base{words} {changed}; `writes` or `updates` would allow for it")
        self.shares = self.shares or not again.lasts or not answered.lasts
        if self.wide is not None:
            wide = self.wide.call(sent)
            if isinstance(wide, str):
                raise _FoundError("task_invalid", f"wide{words} {wide}")
            if problem := self.rounding.learn(self._outputs(wide), self._outputs(answered), self._outputs(again)):
                raise _FoundError("task_invalid", f"{words}: {problem}")
        elif problem := difference(self._outputs(answered), self._outputs(again), self.one.rtol, self.one.atol):
            raise _FoundError("task_invalid", f"base{words}: expected base to agree with itself, got {problem}")

    def _both(self, arguments: Any) -> None:
        words = brief_arguments(arguments)
        self.given += 1
        sent = self._poisoned(arguments)
        wanted, wide = self.base.call(sent), self.wide.call(sent) if self.wide is not None else None
        if isinstance(wanted, str) or isinstance(wide, str):
            raise _FoundError("task_invalid", f"base{words} {wanted if isinstance(wanted, str) else wide}")
        answered = self.candidate.call(sent, self._unasked(), len(wanted.body))
        if isinstance(answered, str):
            self.most(1)  # else it was not late, but cut short
            raise _FoundError("incorrect", f"{words}: the candidate {answered}")
        try:
            self._compared(words, sent, wanted, wide, answered)
        except _FoundError:
            raise
        except Exception as problem:  # whatever it is, it comes from what the candidate sent
            found = f"sent what cannot be compared: {type(problem).__name__}: {problem}"
            raise _FoundError("incorrect", f"{words}: the candidate {found}") from None

    def _compared(self, words: str, sent: Any, wanted: "_Answer", wide: "_Answer | None", answered: "_Answer") -> None:
        """Raises if the candidate's answer is not base's."""
        if changed := self._changed(sent, answered):
            raise _FoundError("incorrect", f"{words}: the candidate {changed}")
        problem = ""
        for one in (*(replace(answered, body=body) for body in answered.before), answered):
            before, after, tolerance = self._outputs(wanted), self._outputs(one), (self.one.rtol, self.one.atol)
            if wide is not None:
                problem = problem or self.rounding.judged(self._outputs(wide), before, after, *tolerance)
            else:
                problem = problem or difference(before, after, *tolerance)
        dtypes = [wire.dtypes(one) for one in (wanted.body, answered.body)]
        if not problem and dtypes[0] != dtypes[1]:
            problem = f"expected dtypes {dtypes[0]}, got {dtypes[1]}"
        if problem:
            raise _FoundError("incorrect", f"{words}: {problem}")
        if not self.shares and not answered.lasts:
            raise _FoundError(
                "incorrect",
                f"{words}: the candidate's output is not its own: it changes when an argument is overwritten or in a "
                f"later call, and base's does not",
            )

    def _unasked(self) -> int:
        """How many calls go before one after which it is asked: as many as where half of all calls are such."""
        count = 0
        while not asked(self.order):
            count += 1
        return min(count, _MOST_UNASKED)

    def _poisoned(self, arguments: Any) -> Any:
        """The arguments, those that are written to filled with NaN or 0x7f."""
        if not self.one.writes:
            return arguments
        where = positions(arguments)
        if missing := [name for name in self.one.writes if name not in where]:
            raise _FoundError("task_invalid", f"writes: expected arguments out of {where}, got {missing}")
        filled = {name: _poison(one) if name in self.one.writes else one for name, one in _named(arguments).items()}
        return filled if isinstance(arguments, dict) else tuple(filled.values())

    def _changed(self, sent: Any, answer: "_Answer") -> str:
        """Which argument came back other than it was sent, and may not."""
        before, after = _named(sent), _named(answer.arguments)
        if list(before) != list(after):
            return "did not send its arguments back"
        for name, one in before.items():
            # Through the wire and back, as the answer was.
            same = wire.decode(_encoded(one))
            if name not in (*self.one.writes, *self.one.updates) and difference(same, after[name], 0.0, 0.0):
                return f"writes to argument {name!r}"
        return ""

    def _outputs(self, answer: "_Answer") -> Any:
        """What a call returned, and what it left in the arguments that it writes to."""
        written = (*self.one.writes, *self.one.updates)
        arguments = _named(answer.arguments)
        return (answer.output, *(arguments[name] for name in written)) if written else answer.output


@dataclass(frozen=True)
class _Answer:
    body: bytes
    arguments: Any
    """As they are after the call."""
    lasts: bool
    """Whether this output stayed as it was, and so did the one before it."""
    before: tuple[bytes, ...] = ()
    """Outputs of calls with the same arguments, after which nothing was asked."""

    @property
    def output(self) -> Any:
        return wire.decode(self.body)


class _Side:
    """A callable in an arm's tree. Its worker is started when it is needed, and again after it has died.

    It is started, asked, frozen and thawed as one that is timed.
    """

    def __init__(self, arm: str, read: "Read", target: str, trees: Trees, timeout_s: float, hash_seed: int) -> None:
        own = read.own(target)
        if own is not None:
            target = f"{own}:{target.partition(':')[2]}"
            trees = trees.reading(arm, own)
        self.arm, self.trees, self.timeout_s, self.hash_seed = arm, trees, timeout_s, hash_seed
        self.workload = Workload("call", target=target)
        self.exchange: Exchange | None = None

    def call(self, arguments: Any, unasked: int = 0, expected: int | None = None) -> _Answer | str:
        """The answer, or in words why there is none. ArmError if that is nobody's fault, or no mistake.

        `unasked`: calls before it, after which nothing is asked. `expected`: bytes of base's output.
        """
        try:
            if self.exchange is None:
                self.exchange = Exchange(started(self.arm, self.workload, self.trees, self.hash_seed, self.timeout_s))
            else:
                self.exchange.worker.running.thaw()
                self.exchange.worker.ask(b"p")
            self.exchange.expect(expected)
            given = _encoded(arguments)
            before = tuple(bytes(self.exchange.call(given).body) for _ in range(unasked))
            body = bytes(self.exchange.call(given).body)
            after = self.exchange.after()
            self.exchange.echo(given)  # as after a turn that is timed
            self.exchange.spared()
            for one in (body, *before):
                wire.decode(one)
            answer = _Answer(body, wire.decode(after.arguments), after.lasts, before)
            self.exchange.worker.running.freeze()
            return answer
        except ArmError as problem:
            self.end()
            if problem.infra or problem.tampered:
                raise
            return f"failed: {problem.words.splitlines()[-1] if problem.words else problem}"
        except UNREADABLE as problem:
            self.end()
            return f"sent what is no value: {type(problem).__name__}: {problem}"

    def end(self) -> None:
        if self.exchange is not None:
            self.exchange.worker.end()
            self.exchange = None


def _strategy(file: str, function: str) -> "SearchStrategy[Any]":
    """The task's strategy, from its file."""
    from hypothesis.strategies import SearchStrategy

    spec = importlib.util.spec_from_file_location(f"assay_task_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, function)()
    if not isinstance(made, SearchStrategy):
        raise TypeError(f"{function}: expected a hypothesis strategy, got {type(made).__name__}")
    return made


def _settings(examples: int) -> "hypothesis.settings":
    import hypothesis

    return hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=(hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large),
    )


def _poison(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise _FoundError("task_invalid", f"writes: expected arrays, got {type(value).__name__}")
    filled = np.empty_like(value)
    filled.reshape(-1).view(np.uint8)[:] = 0x7F
    if value.dtype.kind in "fc":
        filled[...] = np.nan
    return filled


def _named(arguments: Any) -> dict[Any, Any]:
    """Arguments by name or position."""
    if isinstance(arguments, dict):
        return arguments
    return dict(enumerate(arguments if isinstance(arguments, tuple) else (arguments,)))


def _encoded(value: Any) -> bytes:
    return b"".join(bytes(part) for part in wire.encode(value))


def _last_line(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[-1]


GATE = Gate(
    "equivalence",
    equivalent,
    Where.PREPARED,
    asked=lambda task, _: bool(task.property),
    otherwise="the task has no properties",
    installs=("hypothesis",),
)
