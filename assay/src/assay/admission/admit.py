"""From a task with a reference to an admission: what speaks against it without running anything, then measurements.

The order is that of cost. Once something measured speaks against a task, the rest is not tried, and the record says so.
"""

import contextlib
import datetime
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from assay import __version__
from assay.admission import candidates, leak, reach, record, static
from assay.admission.record import Checks, Key
from assay.contract.admission import Admission, Leak, Reason
from assay.contract.errors import TaskError
from assay.contract.frozen import FILE, Frozen
from assay.contract.outcome import DECIDED, INFRA, Outcome
from assay.contract.positions import line_of
from assay.contract.task import Read
from assay.contract.verdict import TaskName
from assay.judgement import freeze
from assay.judgement.attempt import VERDICT, judge
from assay.judgement.decision import read as read_verdict
from assay.judgement.guards import Source
from assay.machine import identity
from assay.mining.prompt import Prompt
from assay.repository.lines import parsed
from assay.statistics.looks import LOOKS

Told = Callable[[dict[str, Any]], None]
_APART = "the intervals of the two measurements do not meet"
_LONGEST = 200
_WRONG = (Outcome.INCORRECT, "tests_failed", Outcome.TAMPERED)
"""How a candidate is rejected for what it returns."""


@dataclass(frozen=True)
class Options:
    """How a task is admitted."""

    sandboxed: bool = True
    patch: Path | None = None
    """The reference, where the task names none."""
    prompt: Path | None = None
    most_leak: str = "L3"
    days: int = record.DAYS
    measures: bool = True
    """Whether anything is run at all."""


def source_of(read: Read, patch: Path | None) -> Source:
    """The reference as something that is judged. TaskError if there is none, ValueError for a patch that is no file."""
    if patch is not None:
        if not patch.is_file():
            raise ValueError(f"--patch: expected a file, got {patch}")
        return Source("patch", str(patch))
    if not read.reference:
        at = line_of(read.text, ("repository", "reference"))
        words = "repository.reference: expected a commit that is known to be better, or --patch FILE, got neither"
        raise TaskError(f"{read.file}:{at}: {words}")
    return Source("commit", read.reference)


def key_of(read: Read, source: Source) -> Key:
    """What an admission of a task on this machine is valid for."""
    patch = record.digest(Path(source.value).read_text(errors="replace")) if source.kind == "patch" else source.value
    return Key(read.digest, patch, record.digest(identity.machine()))


def admit(read: Read, store: Path, options: Options, told: Told = lambda _: None) -> tuple[dict[str, Any], Path]:
    """The admission (contract/admission.py) and its file. Raises as `judge` does, and as `source_of`.

    After a kill at any point the same call goes on behind the last check that was done.
    """
    source = source_of(read, options.patch)
    key = key_of(read, source)

    def waiting(name: str) -> None:
        told({"kind": "waiting", "name": name})

    with record.locked(store, key, waiting) as folder:
        one = _Admitting(read, source, store, folder, options, told)
        reasons = one.reasons()
        now = datetime.datetime.now(datetime.UTC)
        outcome = decided(reasons) if options.measures else _static(reasons)
        content = Admission(
            assay=__version__,
            outcome=outcome,  # type: ignore[arg-type]
            task=TaskName(read.task.name, read.digest, read.task.delta),
            reference=key.reference,
            reasons=reasons,
            leak=one.leak,
            machine=identity.machine() if options.measures else {},
            sandboxed=options.sandboxed,
            made=record.stamp(now),
            expires=record.stamp(now + datetime.timedelta(days=options.days)) if outcome == "admitted" else "",
        )
        return asdict(content), record.finish(folder, asdict(content))


def of_prompt(prompt: Prompt, repository: Path | None, commit: str) -> dict[str, Any]:
    """What is said of a rendered prompt as it stands: nothing is run, so it is never admitted."""
    reasons, given = static.of_prompt(prompt, repository, commit)
    return asdict(
        Admission(
            assay=__version__,
            outcome=_static(reasons),  # type: ignore[arg-type]
            task=TaskName(prompt.file.name, given.prompt, 0.02),
            reference=commit,
            reasons=reasons,
            leak=given,
            machine={},
            sandboxed=True,
            made=record.stamp(datetime.datetime.now(datetime.UTC)),
            expires="",
        )
    )


def decided(reasons: Sequence[Reason]) -> str:
    """Rejected by anything against it, undecided by anything open, admitted only if every measurement speaks for it."""
    if any(one.finding == "against" for one in reasons):
        return "rejected"
    spoken = {one.name for one in reasons if one.kind == "measured" and one.finding == "for"}
    if any(one.finding == "open" for one in reasons) or not spoken >= set(MEASURED):
        return "undecided"
    return "admitted"


def _static(reasons: Sequence[Reason]) -> str:
    return "rejected" if any(one.finding == "against" for one in reasons) else "undecided"


MEASURED = ("runs", "faster", "again", reach.NAME, candidates.ZEROS, candidates.CACHED, candidates.NULL, "host")
"""Reasons that an admission must have; `static` ones are never enough."""


class _Admitting:
    """One admission, check by check."""

    def __init__(self, read: Read, source: Source, store: Path, folder: Path, options: Options, told: Told) -> None:
        self.read = replace(read, reference="")  # no fourth arm: the reference is what is judged
        self.reference, self.source, self.store, self.options, self.told = read.reference, source, store, options, told
        text = options.prompt.read_text(errors="replace") if options.prompt else None
        self.text = text
        self.leak: Leak | None = None
        how = {"sandboxed": options.sandboxed, "most_leak": options.most_leak, "measures": options.measures}
        self.checks = Checks(folder, {**how, "prompt": leak.digest(text) if text is not None else ""})

    def reasons(self) -> list[Reason]:
        """All that is known in the end."""
        found = self.checks.once("static", self._static)
        if self.text is not None:
            self.leak = leak.audit(self.text, self._reference())
            assert self.options.prompt is not None
            found = [*found, static.leaked(self.leak, self.options.most_leak, self.options.prompt.name)]
        if not self.options.measures:
            return found
        steps: list[tuple[str, Callable[[], Iterable[Reason]]]] = [
            ("faster", partial(self._faster, "faster")),
            (candidates.ZEROS, partial(self._wrong, candidates.ZEROS)),
            (candidates.CACHED, partial(self._wrong, candidates.CACHED)),
            (candidates.NULL, self._null),
            ("again", partial(self._faster, "again")),
        ]
        for name, step in steps:
            if any(one.finding == "against" for one in found):
                words = "not tried, as something speaks against the task already"
                found = [*found, Reason(name, "measured", "open", words, str(self.read.file.name))]
                continue
            self.told({"kind": "stage", "name": f"admit: {name}"})
            found = [*found, *self.checks.once(name, lambda step=step: list(step()))]  # type: ignore[misc]
        return self._agree(found)

    def _static(self) -> list[Reason]:
        if self.source.kind == "commit":
            return list(static.of_commit(self.read.repository, self.reference))
        text = Path(self.source.value).read_text(errors="replace")
        return list(static.of_lines(parsed(text), Path(self.source.value).name))

    def _reference(self) -> leak.Reference:
        if self.source.kind == "commit":
            return leak.Reference.of_commit(self.read.repository, self.reference)
        return leak.Reference.of(parsed(Path(self.source.value).read_text(errors="replace")))

    def _judged(self, source: Source) -> tuple[dict[str, Any], Frozen, str]:
        """A verdict, its plan, and its name as a source."""
        found, folder = judge(self.read, source, self.store, sandboxed=self.options.sandboxed, told=self.told)
        return found, Frozen.read(folder / FILE), f"attempts/{found['attempt']['id']}"

    def _faster(self, name: str) -> Iterable[Reason]:
        """Base and reference run, and the reference is faster; the first time also: its code runs."""
        found, frozen, source = self._judged(self.source)
        outcome, words = found["outcome"], _why(found)
        ran = outcome in (*DECIDED, Outcome.VOID)
        if name == "faster":
            if ran or outcome.startswith(INFRA) or outcome == Outcome.NOT_EVALUATED:
                finding = "for" if outcome in DECIDED else "open"
                yield Reason("runs", "measured", finding, f"base and reference are built and run: {outcome}", source)  # type: ignore[arg-type]
            else:
                yield Reason("runs", "measured", "against", f"the reference is {outcome}: {words}", source)
                return
            if ran or outcome == Outcome.NOT_EVALUATED:
                yield from reach.found(frozen, found["gates"], sandboxed=self.options.sandboxed, source=source)
        effects = "; ".join(_effect(one) for one in found["workloads"])
        finding = "for" if outcome == Outcome.FASTER else "against" if outcome in DECIDED[1:3] else "open"
        yield Reason(name, "measured", finding, f"the reference is {outcome}: {effects or words}", source)  # type: ignore[arg-type]

    def _candidate(self, write: Callable[[Any, str, Path], str]) -> tuple[str, dict[str, Any], str]:
        """Writes a candidate and judges it: what it is, the verdict, and its source; no verdict if there is none."""
        place = self.checks.file.parent / "candidate"
        with _emptied(place):
            handed = freeze.handed_in(self.read, self.source, place)
            words = write(handed, handed.base, place / "tree")
            if not words:
                return "", {}, ""
            found, _, source = self._judged(Source("tree", str(place / "tree")))
            return words, found, source

    def _wrong(self, kind: str) -> Iterable[Reason]:
        """A candidate that returns what it has returned, or zeros, must be rejected for what it returns."""

        def write(handed: freeze.Handed, base: str, folder: Path) -> str:
            changed = parsed(handed.judged.patch.decode(errors="replace"))
            places = candidates.places(self.read, handed.store, base, handed.judged.tree, changed)
            if places:
                candidates.wrapped(handed.store, base, kind, places, folder)
            return ", ".join(place.name for place in places)

        names, found, source = self._candidate(write)
        if not found:
            words = f"no function of Python to return {kind} answers from: none is named by a workload or changed"
            yield Reason(kind, "measured", "open", words, self.read.file.name)
            return
        outcome = found["outcome"]
        finding = "for" if outcome in _WRONG else "against" if outcome in DECIDED else "open"
        words = f"{kind} answers of {names} are {outcome}: {_why(found)}"
        yield Reason(kind, "measured", finding, words, source)  # type: ignore[arg-type]

    def _null(self) -> Iterable[Reason]:
        """A comment must not be faster; its blocks say what this host can show."""

        def write(handed: freeze.Handed, base: str, folder: Path) -> str:
            return candidates.null(handed.store, base, handed.judged.changed, folder)

        path, found, source = self._candidate(write)
        if not found:
            words = "no changed file of base takes a comment that is known here"
            yield Reason(candidates.NULL, "measured", "open", words, self.read.file.name)
            return
        outcome = found["outcome"]
        finding = "against" if outcome == Outcome.FASTER else "for" if outcome in DECIDED else "open"
        words = f"a comment in {path} is {outcome}: {_why(found)}"
        yield Reason(candidates.NULL, "measured", finding, words, source)  # type: ignore[arg-type]
        yield self._host(found, source)

    def _host(self, found: dict[str, Any], source: str) -> Reason:
        half, last = math.log1p(self.read.task.delta) / 2, LOOKS[-1].blocks
        whole = [one for one in found["workloads"] if one["blocks"] == last and one["detectable"] is not None]
        if len(whole) < len(self.read.task.workload):
            words = f"no {last} blocks without a change: {found['outcome']}"
            return Reason("host", "measured", "open", words, source)
        widest = max(one["detectable"] for one in whole)
        words = f"95 % intervals of ± {math.expm1(widest):.2%} after {last} blocks, of ± {math.expm1(half):.2%} wanted"
        return Reason("host", "measured", "for" if widest <= half else "open", words, source)

    def _agree(self, found: list[Reason]) -> list[Reason]:
        """Two measurements of one thing must not contradict each other."""
        intervals = []
        for name in ("faster", "again"):
            one = next(
                (reason for reason in found if reason.name == name and reason.source.startswith("attempts/")), None
            )
            if one is None or one.finding != "for":
                return found
            intervals.append(_intervals(self.store / one.source))
        first, second = intervals
        apart = [
            name for name, (low, high) in first.items() if not (low <= second[name][1] and second[name][0] <= high)
        ]
        if not apart:
            return found
        return [*found, Reason("again", "measured", "open", f"{', '.join(apart)}: {_APART}", "faster, again")]


def _why(found: dict[str, Any]) -> str:
    """The first line of a verdict's words."""
    return str(next(iter(found["words"]), "")).split("\n")[0][:_LONGEST]


def _effect(one: dict[str, Any]) -> str:
    """A workload's change in words."""
    if one["estimate"] is None:
        return f"{one['name']} {one['verdict']}"
    low, high = (f"{math.expm1(end):+.1%}" if end is not None else "unbounded" for end in one["interval"])
    return f"{one['name']} {math.expm1(one['estimate']):+.1%} [{low}, {high}]"


def _intervals(folder: Path) -> dict[str, tuple[float, float]]:
    """A verdict's intervals by workload."""
    found = read_verdict(folder / VERDICT)
    return {
        one["name"]: tuple(
            end if end is not None else sign * math.inf for end, sign in zip(one["interval"], (-1, 1), strict=True)
        )  # type: ignore[misc]
        for one in found["workloads"]
    }


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """A folder that holds nothing before and is gone after; what a killed process left is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
