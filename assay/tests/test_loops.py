"""Calls of microseconds: loops whose inputs are hidden until the output before is known, and how it is decided."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from assay.__main__ import main
from assay.arms.inside import sealed
from assay.arms.trees import Trees
from assay.contract.errors import TooShortError
from assay.contract.workload import Plan, Workload
from assay.experiment.calibration import calibrate
from assay.experiment.inputs import Inputs

MIX = "def work(n):\n    for i in range({rounds}): n = (n * 31 + i) & 0xffffffff\n    return {result}\n"
MAKE = "def make(seed): return (seed % 2**32,)\n"


def mix(n: int) -> int:
    for i in range(30):
        n = (n * 31 + i) & 0xFFFFFFFF
    return n


def tree(folder: Path, text: str = MIX, rounds: int = 30, result: str = "n", make: str = MAKE) -> Path:
    folder.mkdir()
    (folder / "work.py").write_text(text.replace("{rounds}", str(rounds)).replace("{result}", result) + make)
    return folder


def loop(many: int = 20) -> tuple[list[Any], bytes]:
    """Outputs, and the request of a loop."""
    (request,), _ = sealed.requests(lambda seed: (seed,), mix, list(range(many)), many, 1)
    return [mix(seed) for seed in range(many)], request


def test_a_loop_calls_with_each_input_in_turn() -> None:
    outputs, request = loop()
    assert sealed.walk(mix, request) == (outputs, (19,))
    sealed.again(outputs, request)


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda seed: {"n": seed, "more": [1.5, None]}, lambda n, more: [n, more, "x" * n]),
        (lambda seed: seed, lambda n: (n, {"a": -0.0})),
        (lambda seed: ("x" * 200 + str(seed), True), lambda text, flag: {text: flag}),
    ],
    ids=["keywords", "one value", "longer than a hash"],
)
def test_inputs_and_outputs_of_every_kind(make: Any, call: Any) -> None:
    (one, two), _ = sealed.requests(make, call, list(range(10)), 5, 2)
    given = [make(seed) for seed in range(10)]
    expected = [
        call(**one) if isinstance(one, dict) else call(*one if isinstance(one, tuple) else (one,)) for one in given
    ]
    assert [*sealed.walk(call, one)[0], *sealed.walk(call, two)[0]] == expected


def test_no_input_can_be_read_before_the_output_before_it() -> None:
    """Not even one byte of it: what is hidden, and a hash that nobody knows, are as good as random."""
    from marshal import dumps, loads

    _, request = loop(400)
    named, hidden = loads(request)
    assert not named and loads(hidden[0]) == (0,)
    plain = dumps((7,), 2)
    assert not any(one.startswith(plain[:2]) and one.endswith(b"good") for one in hidden[1:])
    assert len({one[:1] for one in hidden[1:]}) > 100 and len({one[-1:] for one in hidden[1:]}) > 100


@pytest.mark.parametrize("wrong", [lambda n: mix(n) + (n == 7), lambda n: mix(n) if n != 7 else True, lambda n: b"x"])
def test_a_wrong_output_ends_the_loop(wrong: Any) -> None:
    outputs, request = loop()
    found, _ = sealed.walk(wrong, request)
    assert len(found) == (8 if wrong(0) == mix(0) else 1) < len(outputs)


def test_an_output_counts_as_it_is_when_the_call_returns() -> None:
    """One that is filled later, with all others together, is wrong at its time."""
    (request,), _ = sealed.requests(lambda seed: (seed,), lambda n: [mix(n)], list(range(8)), 8, 1)
    owed: list[tuple[int, list[int]]] = []

    def batched(n: int) -> list[int]:
        owed.append((n, []))
        if len(owed) == 8:
            for given, output in owed:
                output.append(mix(given))
        return owed[-1][1]

    assert len(sealed.walk(batched, request)[0]) == 1


def test_what_can_be_sealed() -> None:
    import array

    class Number(int):
        pass

    for good in (None, True, 3, 2.5, "x", (1, [2, {"a": (None,)}]), {}):
        assert sealed.plain(good)
    for bad in (b"x", bytearray(b"x"), Number(3), {1}, [array.array("d", [1.0])], {"a": Number(1)}, object(), 1j):
        assert not sealed.plain(bad)
    with pytest.raises(ValueError, match="expected an input of numbers, texts and None"):
        sealed.requests(lambda _: (b"x",), lambda x: 1, [1, 2], 2, 1)
    with pytest.raises(ValueError, match=r"expected outputs of numbers, texts and None.*got bytes"):
        sealed.requests(lambda seed: (seed,), lambda x: b"x", [1, 2], 2, 1)
    assert sealed.requests(lambda seed: (seed // 2,), mix, [0, 1, 2, 3], 4, 1) == 2


def test_guesses() -> None:
    assert sealed.guesses([True] * 8) == 1.0 and sealed.guesses([True, False] * 8) == 1.5
    assert sealed.guesses(range(99)) == 50.0


def calibrated(folder: Path, **options: Any) -> tuple[int, dict[str, float]]:
    given = {"inputs": "" if options.get("constant") else "work:make", "rounds": 4, **options}
    plan = Plan(Workload("call", target="work:work", **given), seed=1).checked()
    trees = Trees.at({"base": folder}, folder.parent)
    inputs = Inputs(plan, trees)
    try:
        found = calibrate(plan, trees, inputs, random.randrange(2**32))
    finally:
        inputs.end()
    return found.loops, found.seconds


def test_how_many_calls_a_loop_has_is_decided_once(tmp_path: Path) -> None:
    """By the quickest of several calls, and a power of two: the machine's speed changes by half within seconds."""
    short, long = tree(tmp_path / "short"), tree(tmp_path / "long", rounds=60_000)
    found = [calibrated(short) for _ in range(5)]
    assert len({loops for loops, _ in found}) <= 2 and all(128 <= loops <= 2048 for loops, _ in found)
    assert all(seconds["call_s"] < 2e-5 for _, seconds in found)
    assert calibrated(long)[0] == 1
    assert calibrated(short, loops=64)[0] == 64
    assert calibrated(tree(tmp_path / "same", text=MIX.replace("work(n)", "work(n=3)")), constant=True)[0] >= 128


@pytest.mark.parametrize(
    ("options", "parts", "words"),
    [
        ({"loops": 1}, {}, "more than a tenth of it; --chain"),
        ({"atol": 0.1}, {}, "more than a tenth of it; --chain"),
        ({}, {"result": "n & 1"}, "whose outputs are guessed in .* tries: a candidate could read inputs ahead"),
        ({}, {"result": "n.to_bytes(4, 'big')"}, "no loop can be made of it: ValueError: expected outputs of"),
        ({}, {"result": "[n, hash(str(n))]"}, "no loop can be made of it: two processes gave different outputs"),
        ({}, {"rounds": 0}, "hide its input, more than two thirds"),
    ],
    ids=["not wanted", "tolerance", "guessed", "not plain", "not repeatable", "next to nothing"],
)
def test_where_no_loop_can_be_made(options: dict[str, Any], parts: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(TooShortError, match=f"^too_short: .*{words}"):
        calibrated(tree(tmp_path / "tree", **parts), **options)


def test_usage() -> None:
    with pytest.raises(ValueError, match="--loops: expected at least 0"):
        Workload("call", target="a:b", loops=-1).checked()
    with pytest.raises(ValueError, match="--loops: expected no --links, --rtol, --atol, --canonical or --clock cuda"):
        Workload("call", target="a:b", loops=2, atol=1.0).checked()


def ab(a: Path, b: Path, raw: Path, *options: str) -> int:
    given = ["--call", "work:work", "--inputs", "work:make", "--rounds", "2", "--most-foreign", "1e9", *options]
    return main(["ab", str(a), str(b), "--out", str(raw), *given])


@pytest.mark.full
@pytest.mark.parametrize("trusted", [False, True])
def test_a_slower_call_of_microseconds_is_found(
    trusted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the sealing takes could be spared by a patched worker alone: it bounds nothing where workers are trusted."""
    slow = MIX.replace("    return", "    for _ in range(3000): pass\n    return")
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b", text=slow)
    assert ab(a, b, tmp_path / "raw", "--calls", "2", *["--trusted"] * trusted) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("slower") and "calls in loops of " in shown
    rows = [json.loads(line) for line in (tmp_path / "raw").read_text().splitlines()]
    block = next(row for row in rows if row["kind"] == "block")
    assert rows[0]["loops"] >= 128 and 1 < block["compared"] - rows[0]["calls"] <= 1 + 8
    assert block["primary"]["base"] < 2e-5 < block["primary"]["candidate"]
    sealing = block["figures"]["base"]["transport"]
    assert block["transport_s"] == 0 < sealing < 2e-5
    assert block["spared_s"] == 0 if trusted else sealing < block["spared_s"] < 2e-5


def test_one_wrong_output_in_a_loop_is_incorrect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of some hundred, in the middle: the last one of each loop would be right."""
    wrong = "calls = 0\n" + MIX.replace("return", "global calls\n    calls += 1\n    return (calls == 600) +")
    assert ab(tree(tmp_path / "a"), tree(tmp_path / "b", text=wrong), tmp_path / "raw") == 1
    assert capsys.readouterr().out.startswith("incorrect: outputs of 1 of ")


def test_outputs_of_a_loop_over_one_input_have_to_be_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = MIX.replace("work(n)", "work(n=3)")
    wrong = "calls = 0\n" + same.replace("return", "global calls\n    calls += 1\n    return (calls == 600) +")
    a, b = tree(tmp_path / "a", text=same), tree(tmp_path / "b", text=wrong)
    given = ["--call", "work:work", "--rounds", "2", "--most-foreign", "1e9", "--out", str(tmp_path / "raw")]
    assert main(["ab", str(a), str(b), *given]) == 3
    assert "expected a loop over one input to give one output, got two that differ" in capsys.readouterr().err
