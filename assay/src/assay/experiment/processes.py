"""One run of a command in an arm: a process of its own for every sample."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import IO

from assay.arms.process import MOST_FROZEN_S, Running
from assay.arms.trees import Trees
from assay.contract import traces
from assay.contract.errors import ArmError
from assay.contract.workload import Plan
from assay.experiment.samples import Sample, reached
from assay.machine import gpu

_MOST_WORDS = 1 << 16
_LATE_S = 0.1
"""How long what a command has left behind is looked at: whether it works."""
_STARVED_S = 5.0
"""How long at most, where it would work and other processes of the machine leave it no processor."""


def command_sample(arm: str, plan: Plan, trees: Trees, hash_seed: int, prefix: Sequence[str] = ()) -> Sample:
    """One run of the command, a process of its own. Raises ArmError if it fails or is too late.

    `prefix`: a program that starts it, with its arguments; what both have printed is then kept.
    """
    if plan.workload.prepare:
        _run(arm, plan, plan.workload.prepare, trees, hash_seed, "--prepare ")
    found, printed = _run(arm, plan, [*prefix, *plan.workload.command], trees, hash_seed)
    return replace(found, printed=printed if prefix else "")


def _run(
    arm: str, plan: Plan, command: Sequence[str], trees: Trees, hash_seed: int, what: str = ""
) -> tuple[Sample, str]:
    """A process of its own, and what it printed."""
    place, environment = trees.place(arm), trees.environment(arm, hash_seed)
    with tempfile.TemporaryFile() as log:
        running = Running(
            arm,
            command,
            trees.trees[arm],
            place,
            environment,
            log=log.fileno(),
            namespaces=trees.namespaces,
            wrap=trees.wrap(arm),
            limits=trees.limits(arm),
            weighs=plan.primary == "memory",
        )
        try:
            start = running.release()
            ended = running.wait(plan.timeout_s)
            seconds = time.perf_counter() - start
            running.watch(now=True)
            peak_kib = max(ended.rss_kib, running.peak_kib())
            escapes = ["a process went on working after the end"] if ended.left and _works(running) else []
        finally:
            running.end()
        if ended.status:
            words = traces.brief(_printed(log)[-_MOST_WORDS:]).strip()[-2000:]
            raise ArmError(arm, f"{what}ended with status {ended.status}: {words}")
        printed = _printed(log)
    figures = {"wall": seconds, "memory": float(peak_kib), "processors": ended.cpu_s / seconds}
    return Sample(figures, ended.cpu_s, ended.left, escapes=escapes, gpus=gpu.states(reached(trees))), printed


def _printed(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


def _works(running: Running) -> bool:
    """Whether what a command has left behind uses the processor; a helper that waits, or is about to end, does not."""
    used, begun, looked = running.cpu_seconds(), time.monotonic(), 0.0
    while looked < _LATE_S or (looked < _STARVED_S and running.runnable()):
        time.sleep(_LATE_S / 20)  # a look in the end would not see what has ended by then
        if running.cpu_seconds() - used > MOST_FROZEN_S:
            return True
        looked = time.monotonic() - begun
    return False
