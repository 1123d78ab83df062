"""What a patched worker could gain beside its copies: hidden arguments, links left out, work left for later."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.arms.inside.wire import decode, encode
from assay.arms.stranger import Stranger
from assay.arms.trees import Trees
from assay.contract.errors import ArmError
from assay.contract.workload import Plan, Workload
from assay.experiment import pacing, samples
from assay.experiment.blocks import Blocks
from assay.experiment.elsewhere import differs

ECHOES = "def work(*given, **named): return [given, named]\n"
LOOKS = """
import os, sys
def work(x):
    frames, frame = [], sys._getframe()
    while frame:
        frames.append(frame)
        frame = frame.f_back
    names = {name for one in frames for name in [*one.f_globals, *one.f_locals]}
    assay = [name for name in sys.modules if name.startswith(("assay", "wire", "worker"))]
    return [sorted(names & {"wire", "encode", "decode", "HEAD", "mark", "letter", "Workload"}), assay]
"""


def body(value: Any) -> bytes:
    return b"".join(bytes(part) for part in encode(value))


def trees(folder: Path, **texts: str) -> Trees:
    (folder / "places").mkdir()
    for arm, text in texts.items():
        (folder / arm).mkdir()
        (folder / arm / "work.py").write_text(text)
    return Trees.at({arm: folder / arm for arm in texts}, folder / "places")


def called(folder: Path, text: str, values: list[Any], target: str = "work:work") -> list[tuple[Any, Any]]:
    stranger = Stranger(
        "base", Workload("call", target=target), trees(folder, base=text), 0, 30, list(map(body, values))
    )
    try:
        return [(decode(output), decode(given)) for output, given in stranger.answers()]
    finally:
        stranger.end()


@pytest.mark.parametrize("target", ["work:work", "work.py:work"])
def test_the_program_shows_what_a_function_does(target: str, tmp_path: Path) -> None:
    plain = (1.5, math.nan, -math.inf, -0.0, None, True, "é\n'{x}", b"ab", [1, (2,)], {"a": [1], 3: (None,)}, 1 << 80)
    arrays = (np.arange(6.0).reshape(2, 3), np.zeros((0, 2), np.int8), np.float32(2), [np.ones(1, bool)])
    found = called(tmp_path, ECHOES, [plain, arrays, 7, "x"], target)
    assert [str(given) for _, given in found] == [str(decode(body(one))) for one in (plain, arrays, (7,), ("x",))]
    assert [str(output[0]) for output, _ in found] == [str(given) for _, given in found]


def test_keywords_are_keywords(tmp_path: Path) -> None:
    assert called(tmp_path, ECHOES, [{"a": [1], "b": 2}]) == [([(), {"a": [1], "b": 2}], {"a": [1], "b": 2})]


def test_arguments_are_asked_for_when_all_calls_are_over(tmp_path: Path) -> None:
    text = "kept = []\ndef work(x):\n    kept.append(x)\n    kept[0].append(len(kept))\n    return [len(x)]\n"
    assert called(tmp_path, text, [([5],), ([6],)]) == [([2], ([5, 1, 2],)), ([1], ([6],))]


def test_nothing_in_the_program_can_be_known(tmp_path: Path) -> None:
    assert called(tmp_path, LOOKS, [1]) == [([[], []], (1,))]


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        ("def work(x): return [sum(x)]\n", ""),
        ("def work(x):\n    found = [sum(x)]\n    x.clear()\n    return found\n", "arguments after the calls: [0]: "),
        ("def work(x): return [sum(x) + 1]\n", "output[0]: expected 6, got 7"),
        ("import os\ndef work(x): os._exit(3)\n", "ended with status 3"),
        ("import sys\nsys._getframe(9)\n", "ValueError: call stack is not deep enough"),
    ],
)
def test_a_function_that_does_something_else(candidate: str, words: str, tmp_path: Path) -> None:
    plan = Plan(Workload("call", target="work:work")).checked()
    arms = trees(tmp_path, base="def work(x): return [sum(x)]\n", candidate=candidate)
    found = differs(plan, arms, [body(([1, 2, 3],))] * 2, 0)
    assert words in found and bool(found) is bool(words), found


def test_a_base_that_fails_is_nobodys_fault(tmp_path: Path) -> None:
    arms = trees(tmp_path, base="def work(x): raise ValueError\n", candidate=ECHOES)
    with pytest.raises(ArmError) as seen:
        differs(Plan(Workload("call", target="work:work")).checked(), arms, [body(1)], 0)
    assert seen.value.outcome == "infra.run"


def test_a_block_says_that_it_is_incorrect() -> None:
    blocks = Blocks()
    blocks.add({"differing": [], "reasons": ["busy"], "elsewhere": "output: expected 1, got 2"})
    found = blocks.decision(0.02)
    assert found is not None and found.verdict == "incorrect"
    assert found.reason == "called by another program than assay's worker: output: expected 1, got 2"


def test_a_turn_ends_with_a_call_that_follows_at_once() -> None:
    workload, ended, followed = Workload("call", target="work:work", rounds=4), 0, 0
    for seed in range(200):
        turns = samples._turns(workload, random.Random(seed), [b""] * 13, [b"1", b"2", b"3", b"4"])
        assert [len(turn.inputs) for turn in turns] == [1, 3, 3, 3, 3] and turns[0].more is None
        more = [turn.more for turn in turns[1:] if turn.more]
        assert more and more == [b"1", b"2", b"3", b"4"][: len(more)]
        assert not any(turn.questions[-1] for turn in turns if turn.more)
        ended += len(more)
        followed += sum(not asked for turn in turns[1:] for asked in turn.questions[:-1])
    assert 0.55 < ended / 800 < 0.7 and 0.45 < followed / 1600 < 0.55
    assert all(turn.more is None for turn in samples._turns(workload, random.Random(0), [b""] * 13, []))


def test_what_is_left_for_later_is_no_gain() -> None:
    """The other half of a call is done where nobody looks: its calls take 1 instead of 2, from answer to answer 2."""
    assert pacing.late([2.0, 2.2, 2.1], [2.0, 2.2, 2.1], (2.0, 1.0)) == pytest.approx(1.0)
    assert pacing.late([2.0, 2.0], [1.0, 1.0], (2.0, 1.0)) == pytest.approx(0.0)
    assert pacing.late([], [], (2.0, 1.0)) == 0.0
    for late, verdict in ((1.0, "undecided"), (0.0, "faster")):
        blocks, words = Blocks(), []
        for i in range(40):
            noise = 0.01 * math.sin(i * 7)
            primary = {"base": 2.0, "candidate": math.exp(noise), "control": 2 * math.exp(-noise / 9)}
            blocks.add({"differing": [], "reasons": [], "primary": primary, "late_s": late + noise})
            found = blocks.decision(0.02)
            words += [found.verdict] if found else []
        assert words[-1] == verdict, words
