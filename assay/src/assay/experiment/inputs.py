"""What calls are given, made in the base tree."""

import marshal
from collections.abc import Iterator, Sequence
from pathlib import Path

from assay.arms.handle import Worker, started
from assay.arms.inside.wire import decode
from assay.arms.trees import Trees
from assay.contract.errors import InputsAlikeError
from assay.contract.workload import Plan
from assay.experiment.exchange import NOTHING

_DRAWS = 16


class Inputs:
    """Makes inputs in the base tree, in a worker of its own that is frozen while arms run."""

    def __init__(self, plan: Plan, trees: Trees) -> None:
        """Starts the worker if the workload has inputs at all."""
        self.worker: Worker | None = None
        self.benchmark = plan.workload.kind in ("asv", "pyperf", "pytest")
        if plan.workload.inputs:
            file = Path(plan.workload.inputs.partition(":")[0])
            trees = trees.reading("base", file) if file.is_absolute() else trees
            self.worker = started("base", plan.workload, trees, 0, plan.timeout_s, makes_inputs=True)
            self.worker.running.freeze()

    def fresh(self, seeds: Iterator[int], wanted: int) -> list[bytes]:
        """Inputs of which no two are alike; seeds are drawn until there are enough of them.

        Raises InputsAlikeError if too many seeds give what another one gave: a worker would be asked again what it has
        answered before. Benchmarks of asv, pyperf and pytest have no inputs, and say so by their kind.
        """
        if self.benchmark:
            return self.make([next(seeds)]) * wanted
        found: dict[bytes, None] = {}
        for _ in range(_DRAWS):
            found |= dict.fromkeys(self.make([next(seeds) for _ in range(wanted - len(found))]))
            if len(found) == wanted:
                return list(found)
        raise InputsAlikeError(
            f"inputs: expected {wanted} that are not alike, one per call, got {len(found)} in {_DRAWS} draws of those "
            f"that were missing; constant = true (--constant) says that all calls have one input"
        )

    def sealed(self, seeds: Iterator[int], loops: int, wanted: int) -> tuple[list[bytes], float]:
        """So many requests, each for a loop of so many calls, and how many guesses one of base's outputs takes.

        Raises InputsAlikeError as `fresh` does, and ArmError in the worker's words for what cannot be sealed.
        """
        assert self.worker is not None
        drawn: list[int] = []
        missing = all_ = loops * wanted
        self.worker.running.thaw()
        try:
            for _ in range(_DRAWS):
                drawn += [next(seeds) for _ in range(missing)]
                made = decode(self.worker.ask(b"b", 0.0, [marshal.dumps((drawn, loops, wanted))]).body)
                if not isinstance(made, int):
                    requests, guesses = made
                    return requests, guesses
                missing = all_ - made
        finally:
            self.worker.running.freeze()
        raise InputsAlikeError(
            f"inputs: expected {all_} that are not alike, one per call of a loop, got {all_ - missing} in {_DRAWS} "
            f"draws of those that were missing; constant = true (--constant) says that all calls have one input"
        )

    def make(self, seeds: Sequence[int]) -> list[bytes]:
        """An encoded input per seed."""
        if self.worker is None:
            return [NOTHING] * len(seeds)
        self.worker.running.thaw()
        made = [bytes(self.worker.ask(b"m", seed).body) for seed in seeds]
        self.worker.running.freeze()
        return made

    def end(self) -> None:
        """Ends the worker."""
        if self.worker is not None:
            self.worker.end()
