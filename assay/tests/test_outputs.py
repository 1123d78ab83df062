"""One rule says whether outputs are the same, for properties and for timed calls; numbers that are none are refused."""

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from assay import judge
from assay.__main__ import main
from assay.arms.inside.wire import decode, encode
from assay.contract.workload import Plan, Workload
from assay.experiment.outputs import difference, digest, same
from assay.gates.tolerance import SLACK, Rounding, usual

PAYLOAD = struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_0000_1234))[0]
FLOATS = st.one_of(st.sampled_from([0.0, -0.0, math.nan, PAYLOAD, math.inf, 1.0]), st.floats())
ARRAYS = hnp.arrays(st.sampled_from(["f2", "f4", "f8", "c8", "i4"]), st.integers(0, 4), elements=st.just(0)).flatmap(
    lambda array: st.lists(FLOATS, min_size=array.size, max_size=array.size).map(
        lambda values: np.array([0 if array.dtype.kind == "i" else value for value in values], array.dtype)
    )
)
VALUES = st.recursive(
    st.one_of(FLOATS, st.integers(-1, 1), st.booleans(), st.none(), st.binary(max_size=2), ARRAYS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab"), inner)),
    max_leaves=4,
)


def body(value: Any) -> bytes:
    return b"".join(bytes(part) for part in encode(value))


@given(VALUES, VALUES)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_properties_and_timed_calls_agree(one: Any, two: Any) -> None:
    """By digest, by body, by value: three ways to the same answer."""
    for other in (one, two):
        first, second = body(one), body(other)
        alike = not difference(decode(first), decode(second), 0.0, 0.0)
        assert alike == same(first, second, 0.0, 0.0) == (digest(first) == digest(second))
        assert alike or other is two


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x, 1], lambda x: np.array([x]), lambda x: np.array([x + 0j])])
def test_signs_of_zeros_and_payloads_of_nan(wrap: Any) -> None:
    zeros, nans = (body(wrap(0.0)), body(wrap(-0.0))), (body(wrap(math.nan)), body(wrap(PAYLOAD)))
    if not isinstance(wrap(0.0), np.ndarray) or wrap(0.0).dtype.kind == "f":
        assert not same(*zeros, 0.0, 0.0) and digest(zeros[0]) != digest(zeros[1])
    assert same(*zeros, 0.0, 1e-300)
    assert same(*nans, 0.0, 0.0) and digest(nans[0]) == digest(nans[1]) and same(*nans, 1.0, 1.0)


class Iterates(list[int]):
    def __iter__(self) -> Any:
        return iter([1, 2, 3])


class Named(dict[str, int]):
    def items(self) -> Any:
        return {"a": 1}.items()


class Plain(list[int]):
    """Adds something, and changes nothing of how it is read."""

    more = 1


def test_subclasses_that_are_read_in_another_way() -> None:
    for value in (Iterates(), Named(), np.ma.masked_array([1, 2], [0, 1]), np.arange(3).view(np.recarray)):
        with pytest.raises(TypeError, match="subclass"):
            encode([value])
    assert decode(body(Plain([1]))) == [1]


def test_one_ill_conditioned_example_widens_nothing() -> None:
    seen = Rounding()
    for error in [1e-16] * 19 + [0.5]:
        assert seen.learn([1.0], [1.0 + error], [1.0]) == ""
    assert usual(seen.largest["output[0]"]) < 1e-15
    assert seen.judged([1.0], [1.0], [1.0 + 1e-6], 0.0, 0.0).startswith("output[0]: expected within")
    assert seen.judged([1.0], [1.5], [1.0 - 0.5 * SLACK * 0.9], 0.0, 0.0) == ""  # but for where base is so far off
    assert seen.judged([1.0], [1.0], [1.0 + 4e-16], 0.0, 0.0) == ""
    assert usual([]) == usual([3.0]) == 0.0 and usual([1.0, 3.0]) == 1.0 and usual([*[1.0] * 18, 2.0, 3.0]) == 1.0


TIMES = [1.0 + 0.001 * i for i in range(12)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"delta": math.nan}, "delta: expected a positive fraction, got nan"),
        ({"delta": math.inf}, "delta: expected a positive fraction, got inf"),
        ({"contaminated": -1}, "contaminated: expected a number of blocks, got -1"),
        (
            {"candidate": TIMES * 4, "base": TIMES * 4},
            "base: expected at most 40 blocks, those of the last look, got 48",
        ),
    ],
)
def test_numbers_that_are_none_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        judge(**{"base": TIMES, "candidate": TIMES, **more})


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_options_and_plans(value: str, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    number = float(value)
    for name in ("delta", "timeout_s", "most_foreign"):
        with pytest.raises(ValueError, match="expected a positive, finite number"):
            Plan(Workload("command", ("true",)), **{name: number}).checked()
    for name in ("rtol", "atol"):
        with pytest.raises(ValueError, match="expected finite numbers"):
            Plan(Workload("call", target="a:b", **{name: number})).checked()
    if value != "inf":
        given = ["measure", str(tmp_path / "plan.json"), "--out", str(tmp_path / "raw"), f"--seconds={value}"]
        assert main(given) == 2 and "--seconds: expected a positive number" in capsys.readouterr().err
    assert main(["selftest", "--experiments=-1"]) == 2 and "expected at least 1" in capsys.readouterr().err
