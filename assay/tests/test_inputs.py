"""Inputs of a worker are never alike, whatever a task's function makes of its seeds."""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from assay.arms.trees import Trees
from assay.contract.errors import InputsAlikeError
from assay.contract.workload import Plan, Workload
from assay.experiment.inputs import Inputs

WORK = "def work(n): return n\n"


@contextmanager
def making(folder: Path, make: str, kind: str = "call") -> Iterator[Inputs]:
    (folder / "work.py").write_text(WORK + make)
    workload = Workload(kind, target="work:work", inputs="work:make" if make else "")  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as places:
        inputs = Inputs(Plan(workload).checked(), Trees.at({"base": folder}, Path(places)))
        try:
            yield inputs
        finally:
            inputs.end()


@pytest.mark.parametrize("values", [1000, 100, 20])
def test_seeds_are_drawn_until_inputs_differ(values: int, tmp_path: Path) -> None:
    with making(tmp_path, f"def make(seed): return (seed * 7919 % {values},)\n") as inputs:
        found = inputs.fresh(itertools.count(), 9)
    assert len(set(found)) == len(found) == 9


@pytest.mark.parametrize("make", ["def make(seed): return (3,)\n", "def make(seed): return (seed % 8,)\n", ""])
def test_inputs_that_are_alike_are_refused(make: str, tmp_path: Path) -> None:
    with (
        making(tmp_path, make) as inputs,
        pytest.raises(InputsAlikeError, match="expected 9 that are not alike") as seen,
    ):
        inputs.fresh(itertools.count(), 9)
    assert seen.value.outcome == "task_invalid"


def test_a_benchmark_has_none(tmp_path: Path) -> None:
    with making(tmp_path, "", "asv") as inputs:
        assert len(inputs.fresh(itertools.count(), 9)) == 9
