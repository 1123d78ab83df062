"""The first command: from a task and what was handed in to a frozen plan, or to a reason why nothing is measured."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import assay
from assay.arms import sandbox
from assay.arms.process import PREFIX, PYTHON
from assay.contract import plan, seeds
from assay.contract.errors import TaskError
from assay.contract.frozen import FILE, OWN, Frozen, of_folder, written
from assay.contract.positions import line_of
from assay.contract.task import Read, Timed, functions_of
from assay.contract.workload import NAMED, Plan
from assay.gates import provenance, table
from assay.judgement.guards import CACHES, Judged, Source, judged
from assay.judgement.ledger import Attempt, Key
from assay.report.verdict import PATCH
from assay.repository.store import Store

_API_S = 120.0
_UNREAD = hashlib.sha256(b"unread").hexdigest()[:16]
"""In place of the digest of a patch that could not be read, since this machine failed."""


@dataclass(frozen=True)
class Handed:
    """The guarded patch, in a store of its own."""

    store: Store
    base: str
    """Name of base's tree in the store."""
    judged: Judged


def handed_in(read: Read, source: Source, folder: Path, ours: Path | None = None) -> Handed:
    """Guards a patch in an empty folder. TaskError and ValueError say what is wrong with the task or the source.

    `ours`: the store's folder, which is no part of a tree that it lies in.
    """
    repository = read.repository if read.base else None
    store = Store(folder / "git", repository)
    if source.kind == "commit" and repository is None:
        raise ValueError(f"--commit: expected a task with a base commit, got {read.file.name}, which has a directory")
    if repository is not None:
        base = store.tree_of(read.base)
    else:
        content = store.take(read.repository, CACHES)
        if content.refused:
            raise TaskError(f"{read.file}: repository.path: {content.refused[0]}")
        base = content.tree
    entries = store.entries(base)
    for place, name, _ in functions_of(read.task):
        path = name.partition(":")[0]
        if path.endswith(".py") and read.own(name) is None and path not in entries:
            words = f"expected a file of the task or of base, got {path}"
            raise TaskError(f"{read.file}:{line_of(read.text, place)}: {words}")
    store.write(base, folder / "base")
    scope = read.task.scope
    return Handed(store, base, judged(store, base, folder / "base", scope, source, read.repository, ours))


def protocol(read: Read, skipped: Sequence[str]) -> str:
    """Identity of how everything is judged: plans without their seeds, gates that are left out, assay's version."""
    plans = [read.plan(timed, 0).digest() for timed in read.task.workload]
    return _digest([assay.__version__, plan.VERSION, read.task.require, plans, list(skipped)])


def key(read: Read, handed: Handed | None, where: Any, skipped: Sequence[str]) -> Key:
    """The key of an attempt; `where` is the environment, or a word if it is not known yet."""
    return Key(read.digest, handed.judged.digest if handed else _UNREAD, _digest(where), protocol(read, skipped))


def known(
    read: Read, found: Judged | None, attempt: Attempt, *, sandboxed: bool, skipped: Sequence[str]
) -> dict[str, Any]:
    """The parts of a plan that stand before anything is written. Without `found` the patch could not be read."""
    task = read.task
    patch = plan.PatchFacts(_UNREAD, 0, [], [], [])
    if found is not None:
        changes = (list(found.changed), list(found.restored), list(found.left))
        patch = plan.PatchFacts(found.digest, len(found.patch), *changes)
    return {
        "assay": assay.__version__,
        "attempt": plan.AttemptName(attempt.id, attempt.number),
        "task": plan.TaskFacts(task.name, read.digest, task.delta, task.require),
        "patch": patch,
        "protocol": protocol(read, skipped),
        "gates": plan.GatesAsked(asked(read, found) if found else [], list(skipped)),
        "sandbox": plan.SandboxFacts(
            wanted=sandboxed,
            readable=[str((read.file.parent / path).resolve()) for path in task.sandbox.readable],
            devices=list(task.sandbox.devices),
            environment=task.sandbox.environment,
            device=task.sandbox.device,
            memory_bytes=task.budget.memory_bytes,
            processes=task.budget.processes,
            disk_bytes=task.budget.disk_bytes,
        ),
    }


def unfrozen(read: Read, found: Judged | None, attempt: Attempt, *, sandboxed: bool, skipped: Sequence[str]) -> Frozen:
    """What a verdict needs where there is no plan, since this machine failed before."""
    parts = known(read, found, attempt, sandboxed=sandboxed, skipped=skipped)
    content = {name: part if isinstance(part, str) else asdict(part) for name, part in parts.items()}
    nothing: dict[str, Any] = {"outcome": "", "words": [], "workloads": {}}
    return Frozen(attempt.folder, content | nothing)


def freeze(read: Read, handed: Handed, attempt: Attempt, *, sandboxed: bool, skipped: Sequence[str]) -> Frozen:
    """Writes an attempt's folder: trees, the task's own files, the patch and, at last, plan.json.

    `skipped`: gates that are left out on request.
    """
    folder, task = attempt.folder, read.task
    for name in ("git", "trees", "drivers", "private", "cache", provenance.AHEAD):
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.move(handed.store.folder, folder / "git")
    store = Store(folder / "git")
    commits = {"base": handed.base, "candidate": handed.judged.tree, "control": handed.base}
    if read.reference:
        commits["reference"] = store.tree_of(read.reference)
    write_trees(store, commits, folder / "trees")
    for name in OWN:
        (folder / name).mkdir()
    (folder / PATCH).write_bytes(handed.judged.patch)
    result = handed.judged
    workloads = {timed.name: _frozen(read, timed, folder) for timed in task.workload}
    content = asdict(
        plan.PlanFile(
            **known(read, result, attempt, sandboxed=sandboxed, skipped=skipped),
            outcome=result.outcome,
            words=list(result.words),
            commits=commits,
            trees={arm: of_folder(folder / "trees" / arm) for arm in commits},
            drivers=of_folder(folder / "drivers"),
            private=of_folder(folder / "private"),
            commands=plan.CommandsFacts(
                [list(one) for one in task.commands.setup],
                [list(one) for one in task.commands.build],
                task.commands.timeout_s,
                task.commands.where,
            ),
            budget_s=task.budget.seconds,
            workloads=workloads,
        )
    )
    content = json.loads(json.dumps(content))
    if not result.outcome:
        try:
            breaks = api_breaks(read, Frozen(folder, content), sandboxed=sandboxed)
            content |= {"outcome": "api_break" if breaks else "", "words": breaks}
        except TaskError as problem:
            content |= {"outcome": "task_invalid", "words": [str(problem)]}
    written(folder / FILE, json.dumps(content, indent=1) + "\n")
    return Frozen(folder, content)


def asked(read: Read, found: Judged) -> list[str]:
    """The gates, of those that may be left out, that the task or the patch makes necessary."""
    return [gate.name for gate in table.GATES if gate.asked is not None and gate.asked(read.task, found.changed)]


def write_trees(store: Store, trees: dict[str, str], folder: Path) -> None:
    """Every arm's files, as they are in the store."""
    shutil.rmtree(folder, ignore_errors=True)
    for arm, tree in trees.items():
        store.write(tree, folder / arm)


def _frozen(read: Read, timed: Timed, folder: Path) -> Plan:
    """A workload's plan, with a fresh seed; the task's own files are copied beside the plan.

    What makes inputs, or says what of outputs counts, goes to `private`. No arm sees it but the maker of inputs.
    """
    run = timed.run
    for field in NAMED:
        name = getattr(run, field)
        own = read.own(name)
        if own is not None:
            kind = "private" if field in ("inputs", "canonical") else "drivers"
            place = folder / kind / hashlib.sha256(str(own.parent).encode()).hexdigest()[:8]
            place.mkdir(exist_ok=True)
            shutil.copyfile(own, place / own.name)
            called = name.partition(":")[2]
            run = replace(run, **{field: f"{kind}/{place.name}/{own.name}:{called}"})  # type: ignore[arg-type]
    return replace(read.plan(timed, seeds.secret()), workload=run)


def api_breaks(read: Read, frozen: Frozen, *, sandboxed: bool) -> list[str]:
    """What callers can no longer do. TaskError if base itself lacks what the task names."""
    wanted = read.task.api
    if not wanted.packages and not wanted.native:
        return []
    stdin = json.dumps(asdict(wanted)).encode()
    command = [PYTHON, "-m", "assay.judgement.api"]
    if sandboxed:
        package = Path(assay.__file__).parent
        box = frozen.box("base")
        source = () if package.is_relative_to(PREFIX) else (package.parent,)
        box = replace(box, readable=(*box.readable, *source, frozen.tree("candidate")), memory_bytes=4 << 30)
        box = replace(box, environment={**box.environment, "PYTHONPATH": str(package.parent)})
        command += [str(sandbox.PLACE), str(frozen.tree("candidate"))]
        done = sandbox.run(box, command, timeout_s=_API_S, stdin=stdin)
        status, text = done.status, done.output
    else:
        command += [str(frozen.tree("base")), str(frozen.tree("candidate"))]
        path = {"PYTHONPATH": str(Path(assay.__file__).parents[1]), "PATH": ""}
        try:
            ended = subprocess.run(command, input=stdin, capture_output=True, timeout=_API_S, check=False, env=path)
            status, text = ended.returncode, ended.stdout or ended.stderr
        except subprocess.TimeoutExpired:
            status, text = -9, f"it took more than {_API_S:.0f} s".encode()
    try:
        found = json.loads(text.splitlines()[-1]) if not status else {}
    except (ValueError, IndexError):
        found = {}
    if "error" in found:
        raise TaskError(f"{read.file}:{line_of(read.text, ('api', 'packages'))}: {found['error']}")
    if "broken" not in found:
        return [f"the public API cannot be read: {text[-300:].decode(errors='replace').strip()}"]
    return [str(words) for words in found["broken"]]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
