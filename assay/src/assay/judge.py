"""From a task and a patch to a typed outcome: prepare, build, tests, equivalence, provenance, measure, decide.

Where it is measured elsewhere, `prepared` tries what needs packages, tests and equivalence. Whoever measures builds
anew, and looks at compiled sources, which may need that machine's devices.

Every stage is a row of the ledger when it is done. Whoever is interrupted begins that stage anew, and measuring goes on
behind the last whole block.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from assay import building, devices, equivalence, gates, outcomes, prepare, provenance, sandbox, verdict_report
from assay.arms import ArmError
from assay.decide import decide, verdict
from assay.frozen import FILE, Frozen, written
from assay.git import Store
from assay.guards import Source
from assay.ledger import Attempt, Key, Ledger
from assay.measuring import measure
from assay.outcomes import Gate
from assay.task import Read

Told = Callable[[dict[str, Any]], None]
RAW, VERDICT = "raw", "verdict.json"


class NoSandboxError(RuntimeError):
    """A sandbox is wanted and cannot be had here."""


def judge(
    read: Read,
    source: Source,
    store: Path,
    *,
    sandboxed: bool = True,
    skipped: Sequence[str] = (),
    told: Told = lambda _: None,
) -> tuple[dict[str, Any], Path]:
    """The verdict, and the attempt's folder, in which reports lie beside it. `skipped` gates are left out.

    TaskError and ValueError say what is wrong with task or source; then there is no attempt at all.
    """
    where = prepare.environment()
    with _opened(read, source, store, where, sandboxed, skipped, told) as (one, handed):
        found = one.stages(handed)
        found["environment"] = where
        return one.close(found), one.attempt.folder


def prepared(
    read: Read,
    source: Source,
    store: Path,
    *,
    sandboxed: bool = True,
    skipped: Sequence[str] = (),
    told: Told = lambda _: None,
) -> tuple[Frozen, dict[str, Any] | None]:
    """A plan to be measured elsewhere, and the verdict if that is not needed. Raises as `judge` does."""
    with _opened(read, source, store, "measured elsewhere", sandboxed, skipped, told) as (one, handed):
        frozen = one.frozen(handed)
        passed = not frozen.content["outcome"] and one.apart(frozen)
        return frozen, None if passed else one.close(verdict(frozen, one.gates))


@contextlib.contextmanager
def _opened(
    read: Read, source: Source, store: Path, where: Any, sandboxed: bool, skipped: Sequence[str], told: Told
) -> Iterator[tuple["_Judging", prepare.Handed]]:
    """An attempt, locked, and the guarded patch. `where`: the environment, or a word if it is not known yet."""
    if sandboxed and sandbox.refusal():
        raise NoSandboxError(f"{sandbox.refusal()}; --no-sandbox does without, and says so everywhere")
    ledger = Ledger(store)
    try:
        with ledger.temporary() as folder:
            handed = prepare.handed_in(read, source, folder)
            key = prepare.key(read, handed, where, skipped)
            changed = len(handed.judged.changed)
            facts = {"task": read.task.name, "source": source.kind, "changed": changed, "skipped": list(skipped)}
            with ledger.attempt(key, sandboxed=sandboxed, facts=facts) as attempt:
                yield _Judging(ledger, attempt, key, read, sandboxed, skipped, told), handed
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
        sandboxed: bool,
        skipped: Sequence[str],
        told: Told,
    ) -> None:
        self.ledger, self.attempt, self.key, self.read = ledger, attempt, key, read
        self.sandboxed, self.skipped, self.told = sandboxed, skipped, told
        self.gates: list[dict[str, str]] = []
        for kind in ("tests", "poison", "places"):  # of a judge that was killed
            for old in attempt.folder.glob(f"{kind}-*"):
                shutil.rmtree(old, ignore_errors=True)

    def stages(self, handed: prepare.Handed) -> dict[str, Any]:
        """Runs what is not done yet, up to the first rejection; the verdict."""
        frozen = self.frozen(handed)
        if not frozen.content["outcome"] and self.passes(frozen, outcomes.GATES):
            device = frozen.content["sandbox"]["device"]
            with devices.held(device, alone=True, waiting=self.waits) as environment:
                self.stage("measure", lambda: self.measure(frozen, environment))
            return decide(self.attempt.folder / RAW)
        return verdict(frozen, self.gates)

    def apart(self, frozen: Frozen) -> bool:
        """Tries the gates that need packages, and leaves clean trees behind; whether all were passed."""
        wanted = [name for name in ("tests", "equivalence") if name in outcomes.wanted(frozen)]
        if not wanted:
            return True
        passed = self.passes(frozen, ["build", *wanted])
        self.stage("clean", lambda: self.clean(frozen))
        return passed

    def passes(self, frozen: Frozen, names: Sequence[str]) -> bool:
        """Tries gates up to the first that is not passed, and notes what they found; whether all were."""
        steps = {
            "build": self.build,
            "tests": self.tests,
            "equivalence": self.equivalence,
            "provenance": self.provenance,
        }
        for name in names:
            with devices.held(frozen.content["sandbox"]["device"], alone=False, waiting=self.waits):
                step = steps[name] if name not in outcomes.left_out(frozen) else lambda _: outcomes.LEFT_OUT
                found = Gate(**self.stage(name, lambda step=step: step(frozen)._asdict()))  # type: ignore[misc]
            self.gates.append({"name": name, **found._asdict()})
            if not outcomes.passed(outcomes.note(frozen, name, found)):
                return False
        return True

    def stage(self, name: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a stage gave, or gives now."""
        self.told({"kind": "stage", "name": name})
        found = self.ledger.begin(self.attempt, name)
        return found if found is not None else self.ledger.finish(self.attempt, name, step())

    def waits(self, name: str) -> None:
        """Says that another judge measures."""
        self.told({"kind": "waiting", "name": name})

    def frozen(self, handed: prepare.Handed) -> Frozen:
        """The plan: from here on nothing that was handed in is looked at again."""
        self.stage("prepare", lambda: self.prepare(handed))
        return Frozen.read(self.attempt.folder / FILE)

    def prepare(self, handed: prepare.Handed) -> dict[str, Any]:
        """Freezes the plan."""
        frozen = prepare.freeze(self.read, handed, self.attempt, sandboxed=self.sandboxed, skipped=self.skipped)
        return {"plan": frozen.digest, "outcome": frozen.content["outcome"]}

    def clean(self, frozen: Frozen) -> dict[str, Any]:
        """Trees as they were frozen, with nothing built in them."""
        (frozen.folder / "built.json").unlink(missing_ok=True)
        shutil.rmtree(frozen.folder / "cache", ignore_errors=True)
        prepare.write_trees(Store(frozen.folder / "git"), frozen.content["commits"], frozen.folder / "trees")
        return {}

    def build(self, frozen: Frozen) -> Gate:
        """Every arm from clean trees."""
        self.clean(frozen)
        try:
            building.built(frozen, sandboxed=self.sandboxed)
        except building.BuildError as problem:
            return Gate("build_failed" if problem.arm == "candidate" else "task_invalid", str(problem))
        except ArmError as problem:
            return Gate("infra.sandbox", str(problem))
        return Gate("", f"{len(frozen.arms)} arms")

    def tests(self, frozen: Frozen) -> Gate:
        """The tests gate, if the task has one."""
        wanted = self.read.task.tests
        if not wanted.command:
            return Gate("", "the task has none")
        try:
            return gates.tests(frozen, list(wanted.command), wanted.timeout_s, sandboxed=self.sandboxed)
        except ArmError as problem:
            return Gate("infra.tests", str(problem))

    def equivalence(self, frozen: Frozen) -> Gate:
        """The task's properties."""
        if not self.read.task.property:
            return Gate("", "the task has no properties; outputs of timed calls are compared")
        seed = int(frozen.digest, 16) ^ next(iter(frozen.plans().values())).seed
        with tempfile.TemporaryDirectory(prefix="places-", dir=frozen.folder) as folder:
            trees = building.placed(frozen, Path(folder), sandboxed=self.sandboxed)
            found = equivalence.check(self.read, trees, seed=seed)
        return Gate(found.outcome, found.words or f"{found.examples} examples")

    def provenance(self, frozen: Frozen) -> Gate:
        """Whether changed compiled sources are on the workloads' path."""
        store, tree = Store(frozen.folder / "git"), frozen.content["commits"]["candidate"]
        return provenance.gate(frozen, lambda folder: store.write(tree, folder), sandboxed=self.sandboxed)

    def measure(self, frozen: Frozen, environment: dict[str, str]) -> dict[str, Any]:
        """RAW, until every workload is decided."""
        raw = self.attempt.folder / RAW
        measure(frozen, raw, sandboxed=self.sandboxed, environment=environment, told=self.told)
        files = sorted(raw.glob("*.jsonl"))
        return {"raw": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}}

    def close(self, found: dict[str, Any]) -> dict[str, Any]:
        """Writes verdict and reports, then the last row; the verdict."""
        found["attempt"]["of_patch"] = self.ledger.attempts(self.key.task, self.key.patch)
        written(self.attempt.folder / VERDICT, json.dumps(found, indent=1) + "\n")
        verdict_report.write(self.attempt.folder, found)
        self.ledger.close_attempt(self.attempt, found)
        return found
