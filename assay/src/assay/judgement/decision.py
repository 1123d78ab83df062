"""The last command: from a plan and its RAW to a typed outcome. Pure arithmetic, so it can be done again at any time.

Several workloads: each one's looks were at levels divided by their number; Holm's procedure over their p-values then
finds what that missed. The p-value of a sequence of looks is the smallest of theirs, each divided by its share of the
level: a weighted Bonferroni correction, valid however early a workload stopped.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from assay import __version__
from assay.contract import verdict as contract
from assay.contract.errors import Status
from assay.contract.frozen import FILE, Frozen
from assay.contract.outcome import DECIDED, INFRA, REJECTED, Outcome
from assay.contract.plan import PatchFacts
from assay.contract.workload import Plan
from assay.experiment import beside
from assay.experiment.blocks import Blocks
from assay.experiment.raw import verdict_row, whole_rows
from assay.gates import notes, table
from assay.gates.gate import NOT_ASKED, SKIPPED
from assay.report import instructions
from assay.report.advice import advice
from assay.statistics.looks import LOOKS
from assay.statistics.signed_rank import exact_interval, hodges_lehmann, holm, p_value, walsh_averages

FAMILY = sum(look.alpha for look in LOOKS)
_UNCOMPARED = 'no output was compared; outputs = "unchecked" in the task would allow for it'
_RESAMPLED, _SEED = 2000, 20240501


def decide(raw: Path) -> dict[str, Any]:
    """The verdict (contract/verdict.py) that a folder of RAW leads to. ValueError if measuring is not finished."""
    frozen = Frozen.read(raw / FILE)
    noted = notes.noted(frozen, raw)
    gates = notes.complete(frozen, noted)
    if not all(one.passed for one in noted.values()):
        return verdict(frozen, gates)
    found, headers = [], []
    for name in frozen.plans():
        rows = whole_rows(raw / f"{name}.jsonl")
        if not rows or rows[-1]["kind"] not in ("verdict", "failed"):
            raise ValueError(f"RAW: expected all workloads to be measured, {name} is not: `assay measure` goes on")
        found.append(_workload(name, frozen, rows))
        headers += [row for row in rows if row["kind"] == "header"]
    _holm(found)
    return verdict(frozen, gates, found, headers)


def verdict(
    frozen: Frozen,
    gates: Sequence[Mapping[str, str]],
    workloads: Sequence[dict[str, Any]] = (),
    headers: Sequence[Mapping[str, Any]] = (),
    host: str = "",
) -> dict[str, Any]:
    """The verdict of a plan whose gates and workloads gave this; no workloads if it was rejected before.

    `gates`: {"name", "outcome", "words"} each. The first that rejects is the verdict. One that is `not_evaluated` takes
    away what would speak for the patch or nothing; what speaks against it stands. `host`: how this machine failed.
    """
    plan = frozen.content
    rejected = [gate for gate in gates if gate["outcome"] not in ("", SKIPPED, NOT_ASKED, Outcome.NOT_EVALUATED)]
    open_ = [gate["words"] for gate in gates if gate["outcome"] == Outcome.NOT_EVALUATED]
    open_ += [f"{one['name']}: {_UNCOMPARED}" for one in workloads if one["outputs"] == "not compared"]
    open_ += [f"{one['name']}: {one['start']}" for one in workloads if one["start"]]
    margin, require = math.log1p(plan["task"]["delta"]), plan["task"]["require"]
    if host:
        outcome, words = f"{INFRA}host", [host]
    elif plan["outcome"]:
        outcome, words = plan["outcome"], list(plan["words"])
    elif rejected:
        outcome, words = rejected[0]["outcome"], [rejected[0]["words"]]
    else:
        outcome, reason = together(workloads, margin) if workloads else (Outcome.NOT_EVALUATED, "")
        words = [reason]
        against = status(outcome, require, workloads, margin) not in (Status.SHOWN, Status.OPEN)
        if open_ and (outcome == Outcome.FASTER or not against):
            outcome, words = Outcome.NOT_EVALUATED, open_
    names = ("digest", "bytes", "changed", "restored", "left")
    return asdict(
        contract.Verdict(
            assay=__version__,
            outcome=str(outcome),
            words=words,
            require=require,
            status=int(status(outcome, require, workloads, margin)),
            task=contract.TaskName(*(plan["task"][name] for name in ("name", "digest", "delta"))),
            patch=PatchFacts(*(plan["patch"][name] for name in names)),
            protocol=plan["protocol"],
            attempt=contract.AttemptCount(**plan["attempt"], of_patch=plan["attempt"]["number"]),
            gates=[contract.GateFound(**gate) for gate in gates],
            workloads=[_shown(one) for one in workloads],
            joint=joint([one["ratios"] for one in workloads]) if outcome in DECIDED and len(workloads) > 1 else None,
            trust=_trust(frozen, headers, workloads),
        )
    )


def _shown(one: Mapping[str, Any]) -> contract.WorkloadFound:
    """A workload without its ratios, which lie in RAW."""
    reference = None if one["reference"] is None else contract.Change(**one["reference"])
    own = ("ratios", "reference", "outputs", "start", "worse")
    facts = {name: value for name, value in one.items() if name not in own}
    return contract.WorkloadFound(**facts, reference=reference, worse=[contract.Worse(**each) for each in one["worse"]])


def _workload(name: str, frozen: Frozen, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    plan = frozen.plans()[name]
    nothing: dict[str, Any] = {"p": 1.0, "holm": False, "reference": None, "ratios": [], "outputs": "", "start": ""}
    nothing["worse"] = []
    if rows[-1]["kind"] == "failed":
        failed = {"verdict": rows[-1]["outcome"], "reason": rows[-1]["words"], "interval": [None, None]}
        unmeasured = {"estimate": None, "blocks": 0, "alpha": 1.0, "material": False, "detectable": None}
        return {"name": name, **failed, **unmeasured, **nothing}
    blocks = Blocks(plan.workloads, plan.workload.rounds)
    p, seen = 1.0, None
    for row in rows:
        if row["kind"] == "block" and (seen is None or seen.verdict == "continue"):
            blocks.add(row)
            seen = blocks.decision(plan.delta)
            p = min(p, _p_at(blocks, seen.blocks) if seen is not None and math.isfinite(seen.estimate) else 1.0)
    if seen is None or seen.verdict == "continue":
        raise ValueError(f"RAW: expected blocks of {name} up to a look that decides")
    row = {key: value for key, value in verdict_row(seen).items() if key != "kind"}
    counts = instructions.found(rows)
    row["instructions"] = None if counts is None else contract.Instructions(**counts)
    row["advice"] = advice(seen.verdict, rows)
    outputs = "" if blocks.compared else "unchecked" if plan.unchecked else "not compared"
    ratios = _ratios(blocks, "candidate", seen.blocks) if math.isfinite(seen.estimate) else []
    more = {"p": p, "reference": _reference(blocks), "ratios": ratios, "outputs": outputs, "start": _start(plan, rows)}
    worse = beside.worse(rows, plan.primary, math.log1p(plan.delta))
    return {"name": name, **row, **nothing, **more, "worse": worse}


def _start(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> str:
    """How much longer the candidate takes to start than base, in words, if that is more than it may."""
    if not plan.workload.worker or plan.primary in ("import", "first"):
        return ""
    clean = [row["figures"] for row in rows if row["kind"] == "block" and not row["reasons"] and "figures" in row]
    if not clean:
        return ""
    base, candidate = (
        float(np.median([figures[arm]["import"] + figures[arm]["first"] for figures in clean]))
        for arm in ("base", "candidate")
    )
    if candidate <= max(2 * base, base + plan.most_start_s):
        return ""
    return (
        f"import and first call take {candidate:.3g} s, base's {base:.3g} s: what was moved there is not faster; "
        f"most_start_s of the task's budget would allow for it"
    )


def _ratios(blocks: Blocks, arm: str, n: int) -> list[float]:
    times = (np.log(np.asarray(blocks.seconds[name][:n], float)) for name in ("base", arm))
    base, other = times
    ratios: list[float] = (base - other).tolist()
    return ratios


def _p_at(blocks: Blocks, n: int) -> float:
    alpha = next(look.alpha for look in LOOKS if look.blocks == n)
    ratios = _ratios(blocks, "candidate", n)
    p = p_value(ratios)
    if hodges_lehmann(ratios) > 0:  # as far as a patched worker could not explain it
        for figures in (blocks.bounded(), blocks.followed()):
            bounded = np.log(blocks.seconds["base"][:n]) - np.log(figures[:n])
            p = max(p, p_value(bounded) if hodges_lehmann(bounded) > 0 else 1.0)
    return min(1.0, p * FAMILY / alpha)


def _reference(blocks: Blocks) -> dict[str, Any] | None:
    """How the reference compares with base, with a 95 % interval; shown, and never part of the verdict."""
    if "reference" not in blocks.seconds or len(blocks.seconds["reference"]) < LOOKS[0].blocks:
        return None
    ratios = _ratios(blocks, "reference", len(blocks.seconds["base"]))
    interval = exact_interval(ratios, 0.05)
    return {"estimate": hodges_lehmann(ratios), "interval": [interval.low, interval.high], "alpha": 0.05}


def _holm(found: Sequence[dict[str, Any]]) -> None:
    """Calls what Holm's procedure rejects beyond the looks themselves."""
    judged = [one for one in found if one["verdict"] in DECIDED]
    for one, rejected in zip(judged, holm([one["p"] for one in judged], FAMILY), strict=True):
        if rejected and one["verdict"] in ("equivalent", "undecided"):
            one["verdict"] = "faster" if one["estimate"] > 0 else "slower"
            one["reason"], one["holm"] = "Holm's procedure over all workloads rejects no change", True


def together(workloads: Sequence[Mapping[str, Any]], margin: float) -> tuple[str, str]:
    """One outcome of several workloads, and why."""
    by = {
        name: [one["name"] for one in workloads if one["verdict"] == name]
        for one in workloads
        for name in [one["verdict"]]
    }
    infra = [name for name in by if name.startswith(INFRA)]
    for name in ("tampered", "incorrect", "task_invalid", *infra, "slower", "void"):
        if name in by:
            return name, _because(workloads, name)
    if "faster" in by:
        worse = [one["name"] for one in workloads if not _bounded(one, margin)]
        if worse:
            return "undecided", f"{', '.join(by['faster'])}: faster; {', '.join(worse)}: may be worse by the margin"
        return "faster", _because(workloads, "faster")
    if "undecided" in by:
        return "undecided", _because(workloads, "undecided")
    return "equivalent", _because(workloads, "equivalent")


def _because(workloads: Sequence[Mapping[str, Any]], verdict: str) -> str:
    found = [one for one in workloads if one["verdict"] == verdict]
    return "; ".join(f"{one['name']}: {one['reason']}" if len(workloads) > 1 else str(one["reason"]) for one in found)


def _bounded(one: Mapping[str, Any], margin: float) -> bool:
    """Whether it was shown that a workload is not worse than the margin."""
    if one["verdict"] in ("faster", "equivalent"):
        return True
    low = one["interval"][0]
    return low is not None and low > -margin


def status(outcome: str, require: str, workloads: Sequence[Mapping[str, Any]], margin: float) -> Status:
    """The exit status of an outcome, with what the task requires."""
    if outcome.startswith(INFRA) or outcome == Outcome.VOID:
        return Status.INFRASTRUCTURE
    if outcome == Outcome.TASK_INVALID:
        return Status.INVALID
    if outcome == Outcome.FASTER and require == "material":
        return _material(workloads, margin)
    if outcome == Outcome.FASTER or (require == "any" and outcome in DECIDED):
        return Status.SHOWN
    if outcome in (*REJECTED, *table.REJECTIONS):
        return Status.REFUTED
    if outcome == Outcome.EQUIVALENT:
        return Status.SHOWN if require == "not_slower" else Status.REFUTED
    if outcome == Outcome.UNDECIDED and require == "not_slower" and all(_bounded(one, margin) for one in workloads):
        return Status.SHOWN
    return Status.OPEN


def _material(workloads: Sequence[Mapping[str, Any]], margin: float) -> Status:
    """What is faster: by more than the margin, by less, or neither was shown."""
    faster = [one for one in workloads if one["verdict"] == "faster"]
    if any(one["material"] for one in faster):
        return Status.SHOWN
    ends = [one["interval"][1] for one in faster]
    return Status.REFUTED if all(high is not None and high <= margin for high in ends) else Status.OPEN


def joint(ratios: Sequence[Sequence[float]]) -> contract.Change:
    """The geometric mean of the workloads' ratios, and a 95 % bootstrap interval over their blocks (log-ratios)."""
    generator = np.random.default_rng(_SEED)
    means = np.zeros(_RESAMPLED)
    for one in ratios:
        values = np.asarray(one, float)
        drawn = values[generator.integers(0, len(values), (_RESAMPLED, len(values)))]
        means += np.median(walsh_averages(drawn), axis=1) / len(ratios)
    low, high = np.quantile(means, [0.025, 0.975])
    estimate = float(np.mean([hodges_lehmann(one) for one in ratios]))
    return contract.Change(estimate, [float(low), float(high)], 0.05)


def _trust(frozen: Frozen, headers: Sequence[Mapping[str, Any]], workloads: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the verdict's trust rests on, in words."""
    isolations = {header["isolation"] for header in headers}
    inside = frozen.content["sandbox"]["wanted"] and isolations <= {"sandbox"}
    found = ["sandboxed" if inside else "unsandboxed"]
    if skipped := notes.left_out(frozen):
        found.append(f"left out on request: {', '.join(skipped)}")
    if unchecked := [one["name"] for one in workloads if one["outputs"]]:
        found.append(f"outputs not compared: {', '.join(unchecked)}")
    if trusted := [name for name, plan in frozen.plans().items() if plan.trusted]:
        found.append(f"workers trusted: {', '.join(trusted)}")
    if any(header["clock"] == "cooperative" for header in headers):
        found.append("clock: cooperative; no tamper resistance is claimed")
    if frozen.content["patch"]["restored"]:
        found.append(f"restored from base: {', '.join(frozen.content['patch']['restored'])}")
    return found


def replayed(folder: Path) -> tuple[dict[str, Any], Path]:
    """Decides again, from an attempt's folder or from a folder of RAW; and where RAW lies.

    What was rejected before anything was measured has no RAW: its verdict is taken as it is.
    """
    raw = folder / "raw" if (folder / "raw").is_dir() else folder
    earlier = read(folder / "verdict.json") if (folder / "verdict.json").exists() else None
    if earlier is not None and not earlier["workloads"]:
        return earlier, raw
    found = decide(raw)
    if earlier is not None:
        found |= {name: earlier[name] for name in ("attempt", "environment") if name in earlier}
    return found, raw


def read(file: Path) -> dict[str, Any]:
    """A verdict from its file. ValueError if it is none of this version."""
    found = json.loads(file.read_text())
    if not isinstance(found, dict) or (found.get("kind"), found.get("schema")) != ("verdict", contract.VERSION):
        raise ValueError(f"VERDICT: expected a verdict of schema {contract.VERSION}, got {file}")
    return found
