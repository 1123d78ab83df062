"""From a task and a patch to a typed outcome: prepare, build, tests, equivalence, provenance, measure, decide.

Where it is measured elsewhere, `prepared` tries what needs packages, tests and equivalence. `measure` builds anew, and
looks at compiled sources, which may need that machine's devices. A task may say that trees are built by `prepared`.

Every stage is a row of the ledger when it is done. Whoever is interrupted begins that stage anew, and measuring goes on
behind the last whole block.
"""

import contextlib
import hashlib
import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from assay.arms import sandbox
from assay.contract.errors import PATHS, HostError, NoSandboxError
from assay.contract.frozen import FILE, Frozen, written
from assay.contract.task import Read
from assay.gates import build, notes, table
from assay.gates.gate import LEFT_OUT, Found, Gate, Given, Where
from assay.judgement import freeze
from assay.judgement.decision import decide, verdict
from assay.judgement.guards import Source
from assay.judgement.ledger import Attempt, Key, Ledger
from assay.judgement.measurement import measure
from assay.machine import identity, locks
from assay.machine.conditions import Conditions
from assay.report import verdict as pages
from assay.repository.store import Store

Told = Callable[[dict[str, Any]], None]
RAW, VERDICT = "raw", "verdict.json"


def judge(
    read: Read,
    source: Source,
    store: Path,
    *,
    sandboxed: bool = True,
    skipped: Sequence[str] = (),
    build_jobs: int = 0,
    conditions: Conditions | None = None,
    told: Told = lambda _: None,
) -> tuple[dict[str, Any], Path]:
    """The verdict, and the attempt's folder, in which reports lie beside it. `skipped` gates are left out.

    `conditions` hold while times are measured. `build_jobs` trees are built beside each other; 0: as many as there are
    arms, at most one per two processors.

    TaskError and ValueError say what is wrong with task or source; then there is no attempt at all.
    """
    where = identity.environment()
    with _opened(read, source, store, where, sandboxed, skipped, build_jobs, told) as one:
        try:
            found = one.close(one.stages(conditions) | {"environment": where})
        except (OSError, sqlite3.Error) as problem:  # a full disk, a pipe that was closed: nobody's patch is to blame
            found = one.close_stopped(problem, where)
        return found, one.attempt.folder


def prepared(
    read: Read,
    source: Source,
    store: Path,
    *,
    sandboxed: bool = True,
    skipped: Sequence[str] = (),
    build_jobs: int = 0,
    told: Told = lambda _: None,
) -> tuple[Frozen, dict[str, Any] | None]:
    """A plan to be measured elsewhere, and the verdict if that is not needed. Raises as `judge` does."""
    with _opened(read, source, store, "measured elsewhere", sandboxed, skipped, build_jobs, told) as one:
        try:
            frozen = one.frozen()
            passed = not frozen.content["outcome"] and one.apart(frozen) and one.ahead(frozen)
            return frozen, None if passed else one.close(verdict(frozen, one.gates))
        except (OSError, sqlite3.Error) as problem:
            return one.plan(), one.close_stopped(problem, None)


@contextlib.contextmanager
def _opened(
    read: Read,
    source: Source,
    store: Path,
    where: Any,
    sandboxed: bool,
    skipped: Sequence[str],
    build_jobs: int,
    told: Told,
) -> Iterator["_Judging"]:
    """An attempt, locked, of the guarded patch. `where`: the environment, or a word if it is not known yet."""
    if sandboxed and sandbox.refusal():
        raise NoSandboxError(f"{sandbox.refusal()}; --no-sandbox does without, and says so everywhere")
    ledger = Ledger(store)
    try:
        with contextlib.ExitStack() as stack:
            handed: freeze.Handed | OSError
            try:
                handed = freeze.handed_in(read, source, stack.enter_context(ledger.temporary()), store.resolve())
            except OSError as problem:
                if isinstance(problem, PATHS):
                    raise
                handed = problem
                ledger.release()
            patch = None if isinstance(handed, OSError) else handed
            key = freeze.key(read, patch, where, skipped)
            changed = len(patch.judged.changed) if patch else 0
            facts = {"task": read.task.name, "source": source.kind, "changed": changed, "skipped": list(skipped)}
            attempt = stack.enter_context(ledger.attempt(key, sandboxed=sandboxed, facts=facts))
            yield _Judging(ledger, attempt, key, read, handed, sandboxed, skipped, build_jobs, told)
    finally:
        ledger.close()


class _Judging:
    """One attempt, stage by stage."""

    def __init__(
        self,
        ledger: Ledger,
        attempt: Attempt,
        key: Key,
        read: Read,
        handed: freeze.Handed | OSError,
        sandboxed: bool,
        skipped: Sequence[str],
        build_jobs: int,
        told: Told,
    ) -> None:
        """`handed`: the guarded patch, or why this machine could not read it."""
        self.ledger, self.attempt, self.key, self.read, self.handed = ledger, attempt, key, read, handed
        self.sandboxed, self.skipped, self.build_jobs, self.told = sandboxed, skipped, build_jobs, told
        self.gates: list[dict[str, str]] = []
        self.now = "read"
        for old in attempt.folder.glob("*-*"):  # of a judge that was killed: what is kept has no dash in its name
            shutil.rmtree(old, ignore_errors=True)

    def stages(self, conditions: Conditions | None) -> dict[str, Any]:
        """Runs what is not done yet, up to the first rejection; the verdict."""
        frozen = self.frozen()
        if not frozen.content["outcome"] and self.passes(frozen, table.GATES):
            device = frozen.content["sandbox"]["device"]
            with locks.held(device, alone=True, waiting=self.waits) as environment:
                self.stage("measure", lambda: self.measure(frozen, environment, conditions))
            return decide(self.attempt.folder / RAW)
        return verdict(frozen, self.gates)

    def close_stopped(self, problem: Exception, where: Any) -> dict[str, Any]:
        """The verdict where this machine failed, with its last row; reports only if they can be written.

        HostError if there is no place even for the row.
        """
        words = f"{self.now}: {type(problem).__name__}: {problem}"
        found = verdict(self.plan(), self.gates, host=words) | ({"environment": where} if where else {})
        try:
            self.ledger.release()
            with contextlib.suppress(OSError):
                self.write(found)
            self.ledger.close_attempt(self.attempt, found)
        except (OSError, sqlite3.Error):
            raise HostError(f"{found['outcome']}: {words}; and no last row could be written") from None
        return found

    def plan(self) -> Frozen:
        """The plan, or as much of it as is known."""
        try:
            return Frozen.read(self.attempt.folder / FILE)
        except ValueError:
            judged = None if isinstance(self.handed, OSError) else self.handed.judged
            options: dict[str, Any] = {"sandboxed": self.sandboxed, "skipped": self.skipped}
            return freeze.unfrozen(self.read, judged, self.attempt, **options)

    def apart(self, frozen: Frozen) -> bool:
        """Tries the gates that need packages, and leaves clean trees behind; whether all were passed."""
        wanted = [gate for gate in table.GATES if gate.where is Where.PREPARED and gate.name in notes.wanted(frozen)]
        if not wanted:
            return True
        passed = self.passes(frozen, [*(gate for gate in table.GATES if gate.where is Where.BOTH), *wanted])
        self.stage("clean", lambda: self.clean(frozen))
        return passed

    def ahead(self, frozen: Frozen) -> bool:
        """Builds what is measured elsewhere, where the task says so; whether that worked."""
        asked = ["build", *notes.wanted(frozen)] if frozen.ahead else []
        gates = [replace(gate, run=gate.ahead) for gate in table.GATES if gate.ahead and gate.name in asked]

        def tried(gate: Gate, environment: dict[str, str]) -> dict[str, str]:
            return gate.tried(self.given(frozen, frozen.content["budget_s"], environment))._asdict()

        for gate in gates:
            with locks.held(frozen.content["sandbox"]["device"], alone=False, waiting=self.waits) as environment:
                found = Found(**self.stage(f"{gate.name} ahead", partial(tried, gate, environment)))
            if not found.passed:
                self.gates.append({"name": gate.name, **found._asdict()})
                notes.note(frozen, gate.name, found)
                return False
        return True

    def given(self, frozen: Frozen, seconds: float, environment: dict[str, str]) -> Given:
        """What a gate may look at, with so much left of the budget."""
        store, tree = Store(frozen.folder / "git"), frozen.content["commits"]["candidate"]
        return Given(
            frozen,
            self.sandboxed,
            lambda folder: store.write(tree, folder),
            lambda: self.clean(frozen),
            seconds,
            environment,
            self.build_jobs,
            read=self.read,
        )

    def passes(self, frozen: Frozen, gates: Sequence[Gate]) -> bool:
        """Tries gates up to the first that is not passed, and notes what they found; whether all were."""
        spent = 0.0

        def tried(gate: Gate, environment: dict[str, str]) -> dict[str, str]:
            if gate.name in notes.left_out(frozen):
                return LEFT_OUT._asdict()
            return gate.tried(self.given(frozen, frozen.content["budget_s"] - spent, environment))._asdict()

        for gate in gates:
            with locks.held(frozen.content["sandbox"]["device"], alone=False, waiting=self.waits) as environment:
                begun = time.monotonic()
                found = Found(**self.stage(gate.name, partial(tried, gate, environment)))
                spent += time.monotonic() - begun
            self.gates.append({"name": gate.name, **found._asdict()})
            if not notes.note(frozen, gate.name, found).passed:
                return False
        return True

    def stage(self, name: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a stage gave, or gives now."""
        self.now = name
        self.told({"kind": "stage", "name": name})
        found = self.ledger.begin(self.attempt, name)
        return found if found is not None else self.ledger.finish(self.attempt, name, step())

    def waits(self, name: str) -> None:
        """Says that another judge measures."""
        self.told({"kind": "waiting", "name": name})

    def frozen(self) -> Frozen:
        """The plan: from here on nothing that was handed in is looked at again. OSError if that could not be read."""
        handed = self.handed
        if isinstance(handed, OSError):
            raise handed
        self.stage("prepare", lambda: self.prepare(handed))
        return Frozen.read(self.attempt.folder / FILE)

    def prepare(self, handed: freeze.Handed) -> dict[str, Any]:
        """Freezes the plan."""
        frozen = freeze.freeze(self.read, handed, self.attempt, sandboxed=self.sandboxed, skipped=self.skipped)
        return {"plan": frozen.digest, "outcome": frozen.content["outcome"]}

    def clean(self, frozen: Frozen) -> dict[str, Any]:
        """Trees as they were frozen, with nothing built in them."""
        (frozen.folder / build.MARK).unlink(missing_ok=True)
        shutil.rmtree(frozen.folder / "cache", ignore_errors=True)
        freeze.write_trees(Store(frozen.folder / "git"), frozen.content["commits"], frozen.folder / "trees")
        return {}

    def measure(self, frozen: Frozen, environment: dict[str, str], conditions: Conditions | None) -> dict[str, Any]:
        """RAW, until every workload is decided."""
        raw = self.attempt.folder / RAW
        options: dict[str, Any] = {"sandboxed": self.sandboxed, "environment": environment, "told": self.told}
        measure(frozen, raw, conditions=conditions, **options)
        files = sorted(raw.glob("*.jsonl"))
        return {"raw": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}}

    def close(self, found: dict[str, Any]) -> dict[str, Any]:
        """Writes verdict and reports, then the last row; the verdict."""
        self.write(found)
        self.ledger.close_attempt(self.attempt, found)
        return found

    def write(self, found: dict[str, Any]) -> None:
        """Verdict and reports, beside the plan."""
        found["attempt"]["of_patch"] = self.ledger.attempts(self.key.task, self.key.patch)
        written(self.attempt.folder / VERDICT, json.dumps(found, indent=1) + "\n")
        pages.write(self.attempt.folder, found)
