"""Candidates that do something else than base, each rejected for what it does; and honest ones that pass."""

import tempfile
from pathlib import Path

import pytest

from assay.arms.trees import Trees
from assay.contract import task
from assay.contract.box import Box
from assay.gates import equivalence

pytestmark = pytest.mark.sandbox

STRATEGY = """
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

def numbers():
    floats = st.floats(-100, 100, width=32)
    return st.tuples(hnp.arrays(np.float32, st.integers(1, 40), elements=floats))

def named():
    return st.builds(lambda x: {"x": x, "out": np.zeros_like(x)}, numbers().map(lambda t: t[0]))

def nothing():
    return st.nothing()

def none():
    return 3
"""
BASE = """
import numpy as np
def total(x): return np.float32(0) + np.cumsum(x, dtype=np.float32).astype(np.float32)
def wide(x): return np.cumsum(x.astype(np.float64))
def into(x, out): out[...] = x * 2
def same(x): return [x.tolist(), str(x.dtype), int(x.size), None, bytes(x), {"a": x * 2}]
"""
PROPERTIES = {
    "exact": 'target = "work:same"\nstrategy = "private.py:numbers"',
    "wide": 'target = "work:total"\nstrategy = "private.py:numbers"\nwide = "work:wide"',
    "out": 'target = "work:into"\nstrategy = "private.py:named"\nwrites = ["out"]',
}


def judged(
    folder: Path, candidate: str, *properties: str, base: str = BASE, examples: int = 15
) -> equivalence.Equivalence:
    for name, text in (("base", base), ("candidate", candidate)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "work.py").write_text(text)
    (folder / "private.py").write_text(STRATEGY)
    text = 'schema = 1\nname = "t"\nrepository = {path = "base"}\n'
    text += '[[workload]]\nname = "w"\nrun = {kind = "command", command = ["true"]}\n'
    for i, one in enumerate(properties):
        text += f'[[property]]\nname = "p{i}"\nexamples = {examples}\n{PROPERTIES.get(one, one)}\n'
    (folder / "task.toml").write_text(text)
    with tempfile.TemporaryDirectory(dir=folder) as places:
        boxes = {name: Box(folder / name) for name in ("base", "candidate")}
        return equivalence.check(task.read(folder / "task.toml"), Trees.boxed(boxes, Path(places)), seed=7)


def test_the_same_and_an_honest_reordering_pass(tmp_path: Path) -> None:
    reordered = BASE.replace(
        "np.cumsum(x, dtype=np.float32)", "np.array([x[:i + 1].sum() for i in range(len(x))], np.float32)"
    )
    assert reordered != BASE
    for candidate in (BASE, reordered):
        found = judged(tmp_path, candidate, "exact", "wide", "out")
        assert (found.outcome, found.words) == ("", "") and found.examples == 45, found
        assert 0 < found.tolerances["p1"]["output"]["largest"] < 1e-4


@pytest.mark.parametrize(
    ("one", "before", "after", "words"),
    [
        ("exact", "int(x.size)", "int(x.size) + (x.size > 20)", "output[2]: expected"),
        ("exact", "x.tolist()", "tuple(x.tolist())", "output[0]: expected ('list',"),
        ("exact", "x * 2}", "x.astype(np.float64) * 2}", "output[5]['a']: expected an array float32"),
        ("exact", "x * 2}", "x * 2, 'b': 1}", "output[5]: expected"),
        ("exact", "None", "os.abort()", "the candidate failed: name 'os' is not defined"),
        ("exact", "None", "__import__('os')._exit(0)", "the candidate failed: ended with status 0"),
        ("exact", "None", "x.__setitem__(0, 5)", "the candidate writes to argument 0"),
        ("exact", "bytes(x)", "type('X', (), {})()", "the candidate failed: TypeError"),
        ("wide", "np.float32(0) + np.cumsum(x, dtype=np.float32)", "np.zeros_like(x)", "of the wide result"),
        ("wide", "dtype=np.float32", "dtype=np.float16", "of the wide result"),
        ("wide", "np.float32(0) +", "np.float32(1e-3) +", "of the wide result"),
        ("wide", "np.float32(0) +", "np.float32('nan') +", "of the wide result"),
        ("out", "out[...] = x * 2", "out[1:] = x[1:] * 2", "nan"),
        ("out", "out[...] = x * 2", "x *= 2; out[...] = x", "the candidate writes to argument 'x'"),
    ],
)
def test_what_is_not_the_same(one: str, before: str, after: str, words: str, tmp_path: Path) -> None:
    assert before in BASE
    found = judged(tmp_path, BASE.replace(before, after), one)
    assert found.outcome == "incorrect" and words in found.words.replace("NameError: ", ""), found
    if "x.size > 20" in after:
        assert found.words.startswith("p0: ([0. ") and "[21]" in found.words  # the smallest example


KEPT = """
kept = np.zeros(50, np.float32)
def total(x):
    kept[: len(x)] = np.cumsum(x, dtype=np.float32)
    return kept[: len(x)]
"""
VIEW = "def view(x): return x.copy()\n"


def test_outputs_are_the_callers_own(tmp_path: Path) -> None:
    assert judged(tmp_path, BASE + KEPT, "wide").outcome == "incorrect"
    view = 'target = "work:view"\nstrategy = "private.py:numbers"'
    found = judged(tmp_path, BASE + VIEW.replace(".copy()", ""), view, base=BASE + VIEW)
    assert found.outcome == "incorrect" and "is not its own" in found.words
    # Where base's own output is shared, a candidate's may be.
    assert judged(tmp_path, BASE + VIEW, view, base=BASE + VIEW.replace(".copy()", "")).outcome == ""
    late = "import threading, time\ndef view(x):\n    y = np.zeros_like(x)\n"
    late += "    threading.Thread(target=lambda: (time.sleep(.02), np.copyto(y, x))).start(); return y\n"
    assert judged(tmp_path, BASE + late, view, base=BASE + VIEW).outcome == "incorrect"


@pytest.mark.parametrize(
    ("one", "base", "words"),
    [
        ("exact", BASE.replace("None", "x[99]"), "base([0.] float32 [1]) failed: IndexError"),
        ("exact", BASE.replace("None", "np.random.rand()"), "expected base to agree with itself"),
        ("out", BASE.replace("out[...] = x * 2", "out[...] = x * 2; x[0] = 1"), "writes to argument 'x'"),
        ("wide", BASE.replace("def wide(x): return ", "def wide(x): return 1, "), "the same containers"),
        ("wide", BASE.replace("def wide", "def other"), "has no attribute 'wide'"),
        ('target = "work:same"\nstrategy = "private.py:nothing"', BASE, "strategy: "),
        ('target = "work:same"\nstrategy = "private.py:none"', BASE, "expected a hypothesis strategy"),
        ('target = "work:same"\nstrategy = "private.py:no_such"', BASE, "no_such"),
        ('target = "work:into"\nstrategy = "private.py:named"\nwrites = ["y"]', BASE, "writes: expected arguments"),
    ],
)
def test_tasks_that_cannot_be_judged(one: str, base: str, words: str, tmp_path: Path) -> None:
    found = judged(tmp_path, base, one, base=base, examples=5)
    assert found.outcome == "task_invalid" and words in found.words, found
