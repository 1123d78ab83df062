"""The script that runs transformers' own test of experts implementations puts moeyard into it."""

import importlib
from pathlib import Path

import pytest

from moeyard.testing import python

pytest.importorskip("transformers", minversion="5.24")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "transformers_tests.py"
COMMON = """
from unittest.mock import Mock, patch
from transformers.integrations.moe import grouped_mm_experts_forward


def _test_eager_matches_batched_and_grouped_inference(self, name, dtype):
    implementations = ["eager", "grouped_mm"]
    mocks = {"grouped_mm": Mock(wraps=grouped_mm_experts_forward)}
    self.check(implementations, mocks)
"""
MODEL = """
import unittest
from ...test_modeling_common import _test_eager_matches_batched_and_grouped_inference as common


class Test(unittest.TestCase):
    def check(self, implementations, mocks):
        print("ran with", implementations, sorted(mocks), mocks[implementations[-1]]._mock_wraps.__name__)

    def test_eager_matches_batched_and_grouped_inference(self):
        common(self, "fp32", "fp32")

    def test_something_else(self):
        raise AssertionError
"""


def checkout_of(folder: Path, common: str) -> Path:
    """A folder as transformers' checkout has it."""
    (folder / "src" / "transformers" / "models" / "some").mkdir(parents=True)
    (folder / "src" / "transformers" / "models" / "some" / "modeling_some.py").write_text("@use_experts_implementation")
    tests = folder / "tests" / "models" / "some"
    tests.mkdir(parents=True)
    for package in (tests, tests.parent, tests.parents[1]):
        (package / "__init__.py").touch()
    (folder / "tests" / "test_modeling_common.py").write_text(common)
    (tests / "test_modeling_some.py").write_text(MODEL)
    return folder


@pytest.mark.parametrize("baseline", [False, pytest.param(True, marks=pytest.mark.full)])
def test_moeyard_is_one_of_the_implementations(tmp_path: Path, baseline: bool) -> None:
    checkout = checkout_of(tmp_path, COMMON)
    done = python(str(SCRIPT), str(checkout), *(["--baseline"] if baseline else []), "--", "-s")
    assert done.returncode == 0, done.stdout + done.stderr
    ours = "ran with ['eager', 'grouped_mm', 'moeyard'] ['grouped_mm', 'moeyard'] experts_forward"
    theirs = "ran with ['eager', 'grouped_mm'] ['grouped_mm'] grouped_mm_experts_forward"
    assert (theirs if baseline else ours) in done.stdout and "1 passed, 1 deselected" in done.stdout


def test_what_is_no_such_checkout_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module("transformers_tests")
    assert script.main([str(tmp_path)]) == 2
    assert "error: CHECKOUT: expected tests/models/*/test_modeling_*.py of models" in capsys.readouterr().err
    checkout = checkout_of(tmp_path, COMMON.replace("mocks", "others"))
    assert script.main([str(checkout), "--models", "some"]) == 2
    assert "a dictionary `mocks`, got ['implementations']" in capsys.readouterr().err
