"""The examples run, and show what they say."""

import importlib.util
from pathlib import Path

import pytest

from moeyard import impls
from support import python

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.skipif(not impls.installed("transformers"), reason="transformers is not installed")
@pytest.mark.filterwarnings("ignore")
def test_qwen3_moe_gives_the_same_logits() -> None:
    spec = importlib.util.spec_from_file_location("qwen3_moe", EXAMPLES / "qwen3_moe.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = {(dtype, experts): (largest, rms) for dtype, experts, largest, rms, _ in example.compare(96, 2)}
    assert len(rows) == 4
    for dtype, scale in (("float32", 1e-4), ("bfloat16", 0.5)):
        theirs, ours = rows[dtype, "eager"], rows[dtype, "moeyard"]
        assert 0 < ours[1] <= 1.1 * theirs[1] and ours[0] < scale


def test_examples_say_how_they_are_used() -> None:
    if not impls.installed("transformers"):
        pytest.skip("transformers is not installed")
    done = python(str(EXAMPLES / "qwen3_moe.py"), "--help")
    assert done.returncode == 0 and "--tokens" in done.stdout, done.stderr
