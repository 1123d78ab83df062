"""From a task and a patch to a typed outcome: prepare, build, tests, equivalence, provenance, measure, decide.

Every stage is a row of the ledger when it is done. Whoever is interrupted begins that stage anew, and measuring goes on
behind the last whole block.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assay import building, devices, equivalence, gates, prepare, provenance, sandbox, verdict_report
from assay.arms import ArmError
from assay.decide import decide, not_run, verdict
from assay.frozen import FILE, Frozen
from assay.git import Store
from assay.guards import Source
from assay.ledger import Attempt, Ledger
from assay.measuring import measure, written
from assay.task import Read

Told = Callable[[dict[str, Any]], None]
RAW, VERDICT = "raw", "verdict.json"
_COMPARED = ("base", "candidate")


class NoSandboxError(RuntimeError):
    """A sandbox is wanted and cannot be had here."""


def judge(
    read: Read, source: Source, store: Path, *, sandboxed: bool = True, told: Told = lambda _: None
) -> tuple[dict[str, Any], Path]:
    """The verdict, and the attempt's folder, in which reports lie beside it.

    TaskError and ValueError say what is wrong with task or source; then there is no attempt at all.
    """
    if sandboxed and sandbox.refusal():
        raise NoSandboxError(f"{sandbox.refusal()}; --no-sandbox judges without, and says so everywhere")
    ledger = Ledger(store)
    try:
        with ledger.temporary() as folder:
            handed = prepare.handed_in(read, source, folder)
            where = prepare.environment()
            key = prepare.key(read, handed, where)
            facts = {"task": read.task.name, "source": source.kind, "changed": len(handed.judged.changed)}
            with ledger.attempt(key, sandboxed=sandboxed, facts=facts) as attempt:
                one = _Judging(ledger, attempt, read, sandboxed, told)
                found = one.stages(handed)
                found["environment"] = where
                found["attempt"]["of_patch"] = ledger.attempts(key.task, key.patch)
                one.close(found)
                return found, attempt.folder
    finally:
        ledger.close()


class _Judging:
    """One attempt, stage by stage."""

    def __init__(self, ledger: Ledger, attempt: Attempt, read: Read, sandboxed: bool, told: Told) -> None:
        self.ledger, self.attempt, self.read, self.sandboxed, self.told = ledger, attempt, read, sandboxed, told
        self.gates: list[dict[str, str]] = []
        for kind in ("tests", "poison", "places"):  # of a judge that was killed
            for old in attempt.folder.glob(f"{kind}-*"):
                shutil.rmtree(old, ignore_errors=True)

    def stages(self, handed: prepare.Handed) -> dict[str, Any]:
        """Runs what is not done yet, up to the first rejection; the verdict."""
        self.stage("prepare", lambda: self.prepare(handed))
        frozen = Frozen.read(self.attempt.folder / FILE)
        if not frozen.content["outcome"]:
            device = frozen.content["sandbox"]["device"]
            for name, step in (
                ("build", self.build),
                ("tests", self.tests),
                ("equivalence", self.equivalence),
                ("provenance", self.provenance),
            ):
                with devices.held(device, alone=False, waiting=self.waits):
                    found = self.stage(name, lambda step=step: step(frozen))  # type: ignore[misc]
                self.gates.append({"name": name, **found})
                if found["outcome"]:
                    break
            else:
                with devices.held(device, alone=True, waiting=self.waits) as environment:
                    self.stage("measure", lambda: self.measure(frozen, environment))
                return decide(self.attempt.folder / RAW, self.gates)
        return verdict(frozen, self.gates)

    def stage(self, name: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a stage gave, or gives now."""
        self.told({"kind": "stage", "name": name})
        found = self.ledger.begin(self.attempt, name)
        return found if found is not None else self.ledger.finish(self.attempt, name, step())

    def waits(self, name: str) -> None:
        """Says that another judge measures."""
        self.told({"kind": "waiting", "name": name})

    def prepare(self, handed: prepare.Handed) -> dict[str, Any]:
        """Freezes the plan: from here on nothing that was handed in is looked at again."""
        frozen = prepare.freeze(self.read, handed, self.attempt, sandboxed=self.sandboxed)
        return {"plan": frozen.digest, "outcome": frozen.content["outcome"]}

    def build(self, frozen: Frozen) -> dict[str, str]:
        """Every arm from clean trees."""
        prepare.write_trees(Store(frozen.folder / "git"), frozen.content["commits"], frozen.folder / "trees")
        (frozen.folder / "built.json").unlink(missing_ok=True)
        try:
            building.built(frozen, sandboxed=self.sandboxed)
        except building.BuildError as problem:
            outcome = "build_failed" if problem.arm == "candidate" else "task_invalid"
            return {"outcome": outcome, "words": str(problem)}
        except ArmError as problem:
            return {"outcome": "infra.sandbox", "words": str(problem)}
        return {"outcome": "", "words": f"{len(frozen.arms)} arms"}

    def tests(self, frozen: Frozen) -> dict[str, str]:
        """The tests gate, if the task has one."""
        wanted = self.read.task.tests
        if not wanted.command:
            return {"outcome": "", "words": "the task has none"}
        try:
            found = gates.tests(frozen, list(wanted.command), wanted.timeout_s, sandboxed=self.sandboxed)
        except ArmError as problem:
            return {"outcome": "infra.tests", "words": str(problem)}
        return found._asdict()

    def equivalence(self, frozen: Frozen) -> dict[str, str]:
        """The task's properties."""
        if not self.read.task.property:
            return {"outcome": "", "words": "the task has no properties; outputs of timed calls are compared"}
        seed, boxes = int(frozen.digest, 16) ^ next(iter(frozen.plans().values())).seed, map(frozen.box, _COMPARED)
        found = equivalence.check(self.read, *boxes, seed=seed, sandboxed=self.sandboxed)
        return {"outcome": found.outcome, "words": found.words or f"{found.examples} examples"}

    def provenance(self, frozen: Frozen) -> dict[str, str]:
        """Whether changed compiled sources are on the workloads' path."""
        changed = frozen.content["patch"]["changed"]
        sources = provenance.compiled(changed)
        if not self.sandboxed and sources:
            return not_run(frozen, "provenance", "without a sandbox")
        if not sources:
            return {"outcome": "", "words": "no compiled source was changed"}
        store, tree = Store(frozen.folder / "git"), frozen.content["commits"]["candidate"]
        found = provenance.check(frozen, changed, lambda folder: store.write(tree, folder))
        return {"outcome": found.outcome, "words": found.words}

    def measure(self, frozen: Frozen, environment: dict[str, str]) -> dict[str, Any]:
        """RAW, until every workload is decided."""
        raw = self.attempt.folder / RAW
        measure(frozen, raw, sandboxed=self.sandboxed, environment=environment, told=self.told)
        files = sorted(raw.glob("*.jsonl"))
        return {"raw": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}}

    def close(self, found: dict[str, Any]) -> None:
        """Writes verdict and reports, then the last row."""
        written(self.attempt.folder / VERDICT, json.dumps(found, indent=1) + "\n")
        verdict_report.write(self.attempt.folder, found)
        self.ledger.close_attempt(self.attempt, found)
