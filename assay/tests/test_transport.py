"""What sending takes is nobody's gain: it is taken out as base's worker echoes it, and bounds what is called faster."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from assay.__main__ import main
from assay.experiment.blocks import Blocks
from assay.experiment.samples import Sample, transport, without

SENDS = """
def work(x):
    total = 0.0
    for _ in range({passes}):
        for one in x: total += one * one
    return [int(one * 1000) for one in x]

def make(seed):
    import random
    drawn = random.Random(seed)
    return ([drawn.random() for _ in range(600)],)
"""
QUICK = '''
import sys
frame = sys._getframe()
while frame and "wire" not in frame.f_locals: frame = frame.f_back
wire = frame.f_locals["wire"] if frame else sys
encode = getattr(wire, "encode", None)
def quick(value):
    """What a list of integers encodes to, without a tree that json would have to walk."""
    if type(value) is not list: return encode(value)
    tree = ('{"!":"list","of":' + str(value).replace(" ", "") + "}").encode()
    return [b"%d\\n" % len(tree), tree]
wire.encode = quick
'''
ANY_LOAD = ["--most-foreign", "1e9"]


def run(folder: Path, base: str, candidate: str, raw: str = "raw") -> dict[str, Any]:
    """The last row of RAW for two modules, and the blocks before it."""
    for name, text in (("a", base), ("b", candidate)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "work.py").write_text(text)
    given = ["ab", str(folder / "a"), str(folder / "b"), "--call", "work:work", "--inputs", "work:make", *ANY_LOAD]
    main([*given, "--out", str(folder / raw), "--rounds", "8", "--calls", "24"])
    rows = [json.loads(line) for line in (folder / raw).read_text().splitlines()]
    return {"verdict": rows[-1], "blocks": [row for row in rows if row["kind"] == "block"]}


def test_base_alone_says_what_sending_takes() -> None:
    base, candidate = Sample({}, 0.0, echoes=[2.0, 1.0, 3.0]), Sample({}, 0.0, echoes=[90.0])
    assert transport({"candidate": candidate, "base": base}, "candidate") == 2.0
    assert transport({"nothing": candidate}, "nothing") == 90.0
    assert without(5.0, 2.0) == 3.0 and without(5.0, 9.0) == 0.5


@pytest.mark.parametrize(
    ("gain", "sent", "verdict"), [(0.05, 0.0, "faster"), (0.05, 0.01, "faster"), (0.05, 0.08, "undecided")]
)
def test_faster_is_more_than_sending_could_explain(gain: float, sent: float, verdict: str) -> None:
    blocks, seen = Blocks(), None
    for i in range(40):
        noise = 0.01 * math.sin(i * 7)
        primary = {"base": 1.0, "candidate": math.exp(noise - gain), "control": math.exp(-noise / 9)}
        blocks.add({"differing": [], "reasons": [], "primary": primary, "transport_s": sent})
        now = blocks.decision(0.02)
        seen = seen if seen and seen.verdict == "faster" else now or seen
    assert seen is not None and seen.verdict == verdict, seen


@pytest.mark.full
def test_a_call_alone_is_what_the_interval_is_of(tmp_path: Path) -> None:
    """Where sending is a tenth of a call, five times less work is five times faster, and not four."""
    found = run(tmp_path, SENDS.format(passes=300), SENDS.format(passes=60))
    verdict, blocks = found["verdict"], found["blocks"]
    assert verdict["verdict"] == "faster" and all(block["transport_s"] > 0 for block in blocks)
    raw = [sorted(block["calls"][arm])[12] for block in blocks for arm in ("base", "candidate")]
    with_sending = sum(math.log(raw[i] / raw[i + 1]) for i in range(0, len(raw), 2)) / len(blocks)
    assert verdict["estimate"] > with_sending and verdict["interval"][0] < math.log(5) * 1.05, (verdict, with_sending)
    figures = blocks[0]["figures"]
    assert (
        figures["base"]["transport"]
        == figures["candidate"]["transport"]
        == pytest.approx(blocks[0]["transport_s"], 1e-4)
    )


@pytest.mark.full
@pytest.mark.parametrize("runs", [40])
def test_a_no_op_that_speeds_up_sending_is_never_faster(runs: int, tmp_path: Path) -> None:
    text = SENDS.format(passes=320)
    words = [run(tmp_path, text, text + QUICK, f"raw{i}")["verdict"]["verdict"] for i in range(runs)]
    print(words)
    assert "faster" not in words and "incorrect" not in words


@pytest.mark.full
def test_without_the_bound_it_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blocks, "bounded", lambda blocks: blocks.seconds["candidate"])
    text = SENDS.format(passes=320)
    words: list[str] = []
    while "faster" not in words and len(words) < 3:
        words.append(run(tmp_path, text, text + QUICK, f"raw{len(words)}")["verdict"]["verdict"])
    assert "faster" in words
