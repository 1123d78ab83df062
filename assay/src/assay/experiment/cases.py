"""The combinations of parameters that a benchmark has, as base's worker tells them."""

import tempfile
from pathlib import Path

from assay.arms.handle import started
from assay.arms.inside import wire
from assay.arms.trees import Trees
from assay.contract.workload import Workload


def cases(workload: Workload, tree: Path, isolation: str, timeout_s: float) -> list[str]:
    """A text per combination, in the order of their numbers; one empty text for a benchmark without parameters.

    The tree is trusted. ArmError if the benchmark cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="assay-") as folder:
        worker = started("base", workload, Trees.at({"base": tree}, Path(folder), isolation), 0, timeout_s)
        try:
            return [str(text) for text in wire.decode(worker.ask(b"t").body)]
        finally:
            worker.end()
