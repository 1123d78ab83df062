"""Values arrive as they were sent, and decoding runs nobody's code."""

import json
import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.arms.inside.wire import decode, encode
from assay.experiment.outputs import same

torch = pytest.importorskip("torch", reason="torch is not installed")


def sent(value: object, *, tensors: bool = False) -> object:
    return decode(b"".join(bytes(part) for part in encode(value)), tensors=tensors)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.integers(), st.text(), st.booleans()), inner),
    ),
    max_leaves=20,
)


@given(VALUES)
def test_plain_values(value: object) -> None:
    assert sent(value) == value and type(sent(value)) is type(value)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8", "uint16", "int64", "bool", "complex64"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_arrays(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    for value in (array, array.T, array[..., ::-1] if shape else array):
        back = sent({"a": [0, value]})["a"][1]
        assert isinstance(back, np.ndarray) and back.dtype == array.dtype and back.shape == value.shape
        assert np.array_equal(back, value)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e4m3fn", "int32", "bool"])
def test_tensors(name: str) -> None:
    tensor = torch.randn(3, 5).mul(4).to(getattr(torch, name)).t()
    back = sent((tensor, 1), tensors=True)[0]
    assert back.dtype == tensor.dtype and back.shape == tensor.shape
    assert torch.equal(back.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    seen = sent(tensor)
    assert isinstance(seen, np.ndarray)
    if name == "bfloat16":
        assert np.array_equal(seen, tensor.float().numpy())


def test_dataclasses_and_refusals() -> None:
    @dataclass(frozen=True, slots=True)
    class Pair:
        left: int
        right: list[float]

    assert sent(Pair(1, [math.inf])) == {"left": 1, "right": [math.inf]}
    with pytest.raises(TypeError, match="expected numbers, text"):
        encode({"a": object()})
    with pytest.raises(TypeError, match="expected arrays of numbers"):
        encode(np.array([object()]))


@pytest.mark.parametrize("body", [pickle.dumps(print), b"", b"5\n", b"2\n{}", b'40\n{"!":"array"}', b"x" * 100])
def test_what_is_no_value_is_refused_or_differs(body: bytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        decode(body)
    assert not same(b"4\nnull", body, 1.0, 1.0)


def test_an_array_that_is_cut_off() -> None:
    body = b"".join(bytes(part) for part in encode(np.arange(10)))
    with pytest.raises(ValueError, match="more bytes"):
        decode(body[:-1])


def test_comparison() -> None:
    def bodies(*values: object) -> list[bytes]:
        return [b"".join(bytes(part) for part in encode(value)) for value in values]

    one = {"x": np.array([1.0, np.nan]), "y": 3}
    for other, tolerance, expected in (
        ({"x": np.array([1.0 + 1e-9, np.nan]), "y": 3}, 1e-6, True),
        ({"x": np.array([1.0 + 1e-3, np.nan]), "y": 3}, 1e-6, False),
        ({"x": np.array([np.nan, 1.0]), "y": 3}, 1e-6, False),
        ({"x": np.array([1.0, np.nan], np.float32), "y": 3}, 1e-6, False),
        ({"x": np.array([1.0, np.nan]), "y": 4}, 9.0, False),
        ({"y": 3, "x": np.array([1.0, np.nan])}, 9.0, False),
        ({"x": np.array([[1.0, np.nan]]), "y": 3}, 9.0, False),
    ):
        assert same(*bodies(one, other), tolerance, tolerance) is expected
    halves = bodies(torch.ones(3, dtype=torch.bfloat16), torch.ones(3))
    assert not same(*halves, 1.0, 1.0)  # another dtype is another result
    assert json.loads(halves[0].split(b"\n", 1)[1][:-6])["dtype"] == "bfloat16"
