"""What calls are given, made in the base tree."""

from collections.abc import Sequence
from pathlib import Path

from assay.arms.handle import Worker, started
from assay.arms.inside import wire
from assay.arms.trees import Trees
from assay.contract.workload import Plan


class Inputs:
    """Makes inputs in the base tree, in a worker of its own that is frozen while arms run."""

    def __init__(self, plan: Plan, trees: Trees) -> None:
        """Starts the worker if the workload has inputs at all."""
        self.worker: Worker | None = None
        if plan.workload.inputs:
            file = Path(plan.workload.inputs.partition(":")[0])
            trees = trees.reading("base", file) if file.is_absolute() else trees
            self.worker = started("base", plan.workload, trees, 0, plan.timeout_s, makes_inputs=True)
            self.worker.running.freeze()

    def make(self, seeds: Sequence[int]) -> list[bytes]:
        """An encoded input a seed."""
        if self.worker is None:
            return [b"".join(bytes(part) for part in wire.encode(()))] * len(seeds)
        self.worker.running.thaw()
        made = [bytes(self.worker.ask(b"m", seed).body) for seed in seeds]
        self.worker.running.freeze()
        return made

    def end(self) -> None:
        """Ends the worker."""
        if self.worker is not None:
            self.worker.end()


def inputs_of_nothing() -> list[bytes]:
    """An empty input, as often as calibration needs."""
    return [b"".join(bytes(part) for part in wire.encode(()))] * 8
