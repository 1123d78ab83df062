"""What a timed call whose output differs was given, what base and candidate returned, and where that differs."""

from collections.abc import Mapping, Sequence

from assay.arms.inside import wire
from assay.contract.rows import Mismatch
from assay.contract.workload import Workload
from assay.experiment.canonical import canonical
from assay.experiment.outputs import UNREADABLE, brief_arguments, described, difference
from assay.experiment.samples import Sample


def first(
    workload: Workload, given: Sequence[bytes], samples: Mapping[str, Sample], differing: Sequence[int]
) -> Mismatch | None:
    """The first call of a block that differs, in words; None if none does.

    Args:
        given: the encoded input of every call; of a chain, that of its first link.
        differing: calls whose outputs differ, or the arguments that they left.

    What the candidate sent is decoded, never run, and may say anything: its words are escaped where they are shown.
    """
    if not differing:
        return None
    call = differing[0]
    bodies = [samples[arm].bodies.get(call) for arm in ("base", "candidate")]
    shown = [_shown(body) for body in bodies]
    return Mismatch(call, _input(given[call]), shown[0], shown[1], _where(workload, bodies, samples, call))


def _input(body: bytes) -> str:
    try:
        return brief_arguments(wire.decode(body))
    except UNREADABLE:
        return "a loop of sealed inputs"


def _shown(body: bytes | None) -> str:
    if body is None:
        return "too long to be kept"
    try:
        return described(wire.decode(body))
    except UNREADABLE as problem:
        return f"no value: {type(problem).__name__}: {problem}"


def _where(workload: Workload, bodies: Sequence[bytes | None], samples: Mapping[str, Sample], call: int) -> str:
    base, candidate = bodies
    if base is None or candidate is None:
        return "digests of the outputs differ"
    if base != candidate:
        base, candidate = (canonical(workload.canonical, body) for body in (base, candidate))
        try:
            dtypes = [wire.dtypes(one) for one in (base, candidate)]
            words = difference(wire.decode(base), wire.decode(candidate), workload.rtol, workload.atol)
        except UNREADABLE as problem:
            return f"the candidate sent what is no value: {type(problem).__name__}: {problem}"
        if words or dtypes[0] != dtypes[1]:
            return words or f"expected dtypes {dtypes[0]}, got {dtypes[1]}"
    before, after = (samples[arm].after.get(call) for arm in ("base", "candidate"))
    if before and after and before.lasts and not after.lasts:
        return "the output changes in a later call, or when the arguments are overwritten, and base's does not"
    return "the arguments are not what base's call leaves"
