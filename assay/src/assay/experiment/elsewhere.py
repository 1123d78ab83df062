"""What a candidate's function does where assay's worker does not stand around it: it must be what base's does."""

from collections.abc import Sequence

from assay.arms.inside import wire
from assay.arms.stranger import Stranger
from assay.arms.trees import Trees
from assay.contract.errors import ArmError
from assay.contract.workload import Plan, Workload
from assay.experiment.canonical import canonical
from assay.experiment.outputs import UNREADABLE, difference, digest

CALLS = 3
"""Of each arm, one after another in one process."""


def differs(plan: Plan, trees: Trees, given: Sequence[bytes], hash_seed: int) -> str:
    """How outputs or arguments of a stranger's calls differ between base and candidate, in words; "" if not at all.

    `given`: encoded inputs, new ones. ArmError if base fails, or what fails is nobody's fault.
    """
    called: dict[str, list[tuple[bytes, bytes]]] = {}
    for arm in ("base", "candidate"):
        stranger = Stranger(arm, plan.workload, trees, hash_seed, plan.timeout_s, given)
        try:
            called[arm] = stranger.answers()
        except ArmError as problem:
            if arm == "base" or problem.infra or problem.tampered:
                raise
            return problem.words
        finally:
            stranger.end()
    for base, candidate in zip(called["base"], called["candidate"], strict=True):
        if words := _unlike(plan.workload, base[0], candidate[0], output=True):
            return words
        if words := _unlike(plan.workload, base[1], candidate[1], output=False):
            return f"arguments after the calls: {words.removeprefix('output')}"
    return ""


def _unlike(workload: Workload, base: bytes, candidate: bytes, *, output: bool) -> str:
    """How one value differs, in words."""
    if output:
        base, candidate = (canonical(workload.canonical, body) for body in (base, candidate))
    try:
        if digest(base) == digest(candidate):
            return ""
        words = difference(wire.decode(base), wire.decode(candidate), workload.rtol, workload.atol)
    except UNREADABLE as problem:
        return f"what was sent is no value: {type(problem).__name__}: {problem}"
    exact = not (workload.rtol or workload.atol)
    return words or ("digests differ" if exact else "")
