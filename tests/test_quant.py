"""Quantised experts, the specification: what schemes mean, by hand, and what is refused in words."""

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard import ExpertWeights, Routing, reference
from moeyard.quant import (
    CODES,
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR,
    FP8_TENSOR_STATIC,
    INT8_CHANNEL,
    MXFP4,
    NVFP4,
    ExpertScales,
    QuantScheme,
    blocks_of,
    int4_scheme,
    scale_shapes,
    scheme_of,
)
from moeyard.reference.quant import dequantised, quantise_rows
from moeyard.testing import CPU, draw_quantised, draw_routing, impls_on, same_bits
from moeyard.testing.quantised import SCHEMES

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def e4m3_by_hand(byte: int) -> float:
    sign, exponent, mantissa = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def scale_by_hand(scales: Tensor, *at: int) -> float:
    if scales.dtype == torch.float8_e8m0fnu:
        byte = int(scales.view(torch.uint8)[at])
        return math.nan if byte == 255 else 2.0 ** (byte - 127)
    if scales.dtype == torch.float8_e4m3fn:
        return e4m3_by_hand(int(scales.view(torch.uint8)[at]))
    return float(scales[at])


def weight_by_hand(weights: ExpertWeights, which: str, expert: int, row: int, column: int) -> float:
    """One weight, from bytes and the words of `QuantScheme`."""
    scheme, scales = weights.scheme, weights.scales
    assert scheme is not None and scales is not None
    stored = getattr(weights, which).view(torch.uint8)[expert, row]
    if scheme.per_byte == 2:
        byte = int(stored[column // 2])
        code = byte >> 4 if column % 2 else byte & 15
    else:
        code = int(stored[column])
    half, inside = divmod(row, weights.intermediate_size) if which == "w13" else (0, row)
    row_start, column_start = (scales.block_start, 0) if which == "w13" else (0, scales.block_start)
    rows, columns = scheme.block
    block_row = (inside + row_start % rows) // rows if rows else 0
    block_row += half * blocks_of(weights.intermediate_size, rows, row_start)
    block_column = (column + column_start % columns) // columns if columns else 0
    at = (expert, block_row, block_column)
    if scheme.weights == "e4m3":
        value = e4m3_by_hand(code)
    elif scheme.weights == "int8":
        value = float(code - 256 if code > 127 else code)
    elif scheme.weights == "int4":
        zero_points = getattr(scales, f"{which}_zero_points")
        value = float(code - (8 if zero_points is None else int(zero_points[at])))
    else:
        value = E2M1[code & 7] * (-1 if code & 8 else 1)
    more = getattr(scales, f"{which}_global")
    return value * scale_by_hand(getattr(scales, which), *at) * (1 if more is None else float(more[expert, half]))


@pytest.mark.parametrize("start", [0, 2, 30])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_mean_what_their_bytes_say(scheme: QuantScheme, start: int) -> None:
    for gated in (True, False):
        weights = draw_quantised(2, 40, 36, scheme, gated=gated, block_start=start % scheme.period)
        for which, values in zip(("w13", "w2"), dequantised(weights), strict=True):
            for expert, row, column in ((0, 0, 0), (1, 1, 1), (1, 35, 2), (0, 25, 33), (1, values.shape[1] - 1, 35)):
                wanted = weight_by_hand(weights, which, expert, row, column)
                assert float(values[expert, row, column]) == pytest.approx(wanted, rel=1e-15), (which, row, column)
            assert values.shape[2] == (40 if which == "w13" else 36)


def codes_of(activations: str) -> list[float]:
    """The values of all codes that a rounding may give, in ascending order."""
    if activations == "int8":
        return [float(i) for i in range(-127, 128)]
    return sorted({value for byte in range(256) if not math.isnan(value := e4m3_by_hand(byte))})


def nearest_by_hand(value: float, activations: str) -> float:
    """The nearest code; of two the one whose last bit is 0."""
    known = codes_of(activations)
    best = min(abs(v - value) for v in known)
    near = [v for v in known if abs(v - value) == best]
    if len(near) == 1:
        return near[0]
    if activations == "int8":
        return next(v for v in near if v % 2 == 0)
    bits = {e4m3_by_hand(byte): byte for byte in range(127)}
    return next(v for v in near if bits[abs(v)] % 2 == 0)


def rows_by_hand(row: list[float], scheme: QuantScheme, static: float | None, start: int) -> list[float]:
    """code * scale of a row of float32 values, one by one."""
    largest = 448.0 if scheme.activations == "e4m3" else 127.0
    size = scheme.activation_group
    group = [0 if not size else (start % size + i) // size for i in range(len(row))]

    def float32(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float64).float())

    result = []
    for i, value in enumerate(row):
        amax = max(abs(v) for v, g in zip(row, group, strict=True) if g == group[i])
        scale = float32(max(amax, float32(1e-10)) / largest) if static is None else static
        quotient = float32(value / scale)  # of float32 numbers: float64's quotient rounds to the same
        result.append(nearest_by_hand(min(max(quotient, -largest), largest), scheme.activations) * scale)
    return result


QUANTISING = [scheme for scheme in SCHEMES if scheme.activations != "none"]


@pytest.mark.parametrize("scheme", QUANTISING, ids=str)
def test_rows_are_rounded_to_the_nearest_code(scheme: QuantScheme) -> None:
    rows = torch.randn(3, 45) * torch.tensor([[1.0], [1e-3], [300.0]])
    rows[0, :8] = torch.tensor([0.0, -0.0, 1e-30, 448, -448, 447.9, 2**-9, 2**-10])
    for start in (0, 7):
        static = torch.tensor(0.03) if scheme.static else None
        got = quantise_rows(rows, scheme, static, start)
        for row, values in zip(rows, got.values, strict=True):
            wanted = rows_by_hand(row.tolist(), scheme, None if static is None else float(static), start)
            assert values.tolist() == wanted


def test_trap_09_ties_go_to_even_and_large_values_saturate() -> None:
    e4m3 = QuantScheme("e4m3", activations="e4m3", static=True)
    int8 = QuantScheme("int8", activations="int8", static=True)
    rows = torch.tensor([[17.0, 19.0, 432.0, 464.0, 1e9, -1e9, 2**-10, 3 * 2**-10, -(2.0**-10)]])
    got = quantise_rows(rows, e4m3, torch.tensor(1.0)).codes.float()
    assert got.tolist() == [[16, 20, 448, 448, 448, -448, 0, 2**-8, 0]]
    rows = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.4, 128, -1e9]])
    got = quantise_rows(rows, int8, torch.tensor(1.0)).codes
    assert got.tolist() == [[0, 2, 2, 0, -2, 126, 127, 127, -127]]


def test_trap_09_a_division_is_no_product_with_the_reciprocal() -> None:
    """Some codes differ between the two; ours are those of the quotient."""
    rows = torch.randn(2000, 64).bfloat16()
    rows[:, 0] = 7.0 * torch.rand(2000).bfloat16() + 4
    got = quantise_rows(rows, FP8_CHANNEL)
    quotients = rows.double() / got.scales.double()
    by_reciprocal = (rows.float() * (1 / got.scales)).clamp(-448, 448).to(torch.float8_e4m3fn)
    layout = moeyard.moe_align_block_size(torch.arange(2000).int().view(-1, 1), num_experts=2000, block_size=1)
    assert same_bits(moeyard.permute_to_fp8(rows, layout, impl="reference").rows, got.codes)
    assert same_bits(quotients.float().clamp(-448, 448).to(torch.float8_e4m3fn), got.codes)
    assert not same_bits(by_reciprocal, got.codes)


@pytest.mark.parametrize("group", [None, 128])
def test_rows_are_quantised_as_permute_to_fp8_does(group: int | None) -> None:
    rows = torch.randn(40, 256).bfloat16() * torch.exp(3 * torch.randn(40, 1)).bfloat16()
    rows[3] = 0
    layout = moeyard.moe_align_block_size(torch.arange(40).int().view(-1, 1), num_experts=40, block_size=1)
    scheme = FP8_CHANNEL if group is None else FP8_BLOCK
    got = quantise_rows(rows, scheme)
    for impl in impls_on("permute_to_fp8", CPU, torch.bfloat16):
        moved = moeyard.permute_to_fp8(rows, layout, group_size=group, impl=impl)
        assert same_bits(moved.rows, got.codes) and moved.scales is not None
        assert same_bits(moved.scales.view(40, -1), got.scales)


def test_trap_02_zeros_infinities_and_nan_stay_in_their_row_or_group() -> None:
    rows = torch.randn(5, 256)
    rows[0], rows[1, 3], rows[2, 200], rows[3, 7] = 0, torch.inf, torch.nan, -torch.inf
    for scheme in (FP8_CHANNEL, INT8_CHANNEL):
        values = quantise_rows(rows, scheme).values
        assert bool((values[0] == 0).all()) and bool(values[1:4].isnan().all()) and bool(values[4].isfinite().all())
    values = quantise_rows(rows, FP8_BLOCK).values
    assert values.isnan().view(5, 2, 128).all(2).tolist() == [
        [False] * 2,
        [True, False],
        [False, True],
        [True, False],
        [False] * 2,
    ]
    assert int(values.isnan().sum()) == 3 * 128
    one = torch.tensor(0.01)
    values = quantise_rows(rows, FP8_TENSOR_STATIC, one).values
    assert values.isnan().nonzero().tolist() == [[2, 200]] and float(values[1, 3]) == pytest.approx(4.48)
    values = quantise_rows(rows, QuantScheme("int8", activations="int8", static=True), one).values
    assert values.isnan().all(1).tolist() == [False, False, True, False, False] and float(
        values[3, 7]
    ) == pytest.approx(-1.27)


def layer_by_hand(hidden: Tensor, routing: Routing, weights: ExpertWeights, on_input: bool) -> list[list[float]]:
    """A gated silu layer, one number after the other."""
    scheme, scales, size = weights.scheme, weights.scales, weights.intermediate_size
    assert scheme is not None and scales is not None and weights.w13_bias is not None and weights.w2_bias is not None

    def rounded(values: list[float]) -> list[float]:
        return [float(v) for v in torch.tensor(values, dtype=torch.float64).to(hidden.dtype)]

    def operand(values: list[float], static: Tensor | None, expert: int, start: int) -> list[float]:
        if scheme.activations == "none":
            return values
        return rows_by_hand(values, scheme, None if static is None else float(static[expert]), start)

    result = []
    for token, row in enumerate(hidden.double().tolist()):
        total = [0.0] * len(row)
        for k, expert in enumerate(routing.topk_ids[token].tolist()):
            factor = float(routing.topk_weights[token, k])
            x = rounded([float(torch.tensor(v) * torch.tensor(factor)) for v in row]) if on_input else row
            x = operand(x, scales.w13_input, expert, 0)
            before = [
                sum(weight_by_hand(weights, "w13", expert, i, j) * v for j, v in enumerate(x))
                + float(weights.w13_bias[expert, i])
                for i in range(2 * size)
            ]
            h = rounded([g / (1 + math.exp(-g)) * u for g, u in zip(before[:size], before[size:], strict=True)])
            h = operand(h, scales.w2_input, expert, scales.block_start)
            for i in range(len(row)):
                value = sum(weight_by_hand(weights, "w2", expert, i, j) * v for j, v in enumerate(h))
                total[i] += (value + float(weights.w2_bias[expert, i])) * (1 if on_input else factor)
        result.append(total)
    return result


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_reference_is_the_layer_by_hand(scheme: QuantScheme, on_input: bool) -> None:
    for start in {0, 4 % scheme.period}:
        weights = draw_quantised(2, 10, 6, scheme, bias=True, block_start=start)
        hidden, routing = torch.randn(2, 10).bfloat16(), Routing(torch.rand(2, 2), torch.tensor([[1, 0], [0, 0]]).int())
        got = reference.fused_experts(hidden, routing, weights, apply_router_weight_on_input=on_input)
        wanted = torch.tensor(layer_by_hand(hidden, routing, weights, on_input), dtype=torch.float64)
        assert torch.allclose(got.double(), wanted, rtol=2**-8, atol=1e-9), scheme
        wide = dataclasses.replace(
            weights,
            w13_bias=weights.w13_bias.float(),
            w2_bias=weights.w2_bias.float(),  # type: ignore[union-attr]
        )
        got = reference.fused_experts(hidden.float(), routing, wide, apply_router_weight_on_input=on_input)
        wanted = torch.tensor(layer_by_hand(hidden.float(), routing, wide, on_input), dtype=torch.float64)
        assert torch.allclose(got.double(), wanted, rtol=2e-7, atol=1e-9), scheme


def test_schemes_have_words() -> None:
    for scheme in SCHEMES:
        assert scheme_of(str(scheme)) == scheme
    assert str(FP8_BLOCK) == "e4m3 128x128, e4m3 per 128" and str(NVFP4) == "e2m1 1x16 e4m3 scales global scales"
    for words in ("e4m3", "e4m3 1x", "e4m3 *x*, e4m3 per token", "e4m3 *x* none", ""):
        with pytest.raises(ValueError, match="scheme: expected"):
            scheme_of(words)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "fp3"}, f"weights: expected one of {tuple(CODES)}, got 'fp3'"),
        ({"scales": "e5m2"}, "scales: expected one of"),
        ({"activations": "e2m1"}, "activations: expected one of ('none', 'e4m3', 'int8'), got 'e2m1'"),
        ({"block": (1, -1)}, "block: expected (rows, columns) of 0 and above, got (1, -1)"),
        ({"block": 128}, "block: expected (rows, columns)"),
        ({"weights": "int4", "block": (1, 33)}, "block: expected an even number of columns for int4, got (1, 33)"),
        ({"zero_points": True}, "zero_points: expected False for e4m3 (int4 alone has them), got True"),
        ({"activation_group": -1}, "activation_group: expected 0 or more columns, got -1"),
        ({"activation_group": 128}, "activations: expected a code beside activation_group or static, got 'none'"),
        ({"static": True}, "activations: expected a code beside"),
        ({"activations": "e4m3", "static": True, "activation_group": 8}, "activation_group: expected 0 for static"),
    ],
    ids=str,
)
def test_what_means_nothing_is_no_scheme(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        QuantScheme(**{"weights": "e4m3", **options})


def test_trap_11_slices_of_larger_matrices_touch_whole_blocks() -> None:
    assert [blocks_of(192, 128, start) for start in (0, 64, 127)] == [2, 2, 3] and blocks_of(5, 0) == 1
    assert scale_shapes(FP8_BLOCK, 300, 192, True, 64) == ((4, 3), (3, 2))
    assert scale_shapes(MXFP4, 64, 48, True, 16) == ((96, 2), (64, 2))  # a row is a block: its place does not matter
    assert QuantScheme("e4m3", (128, 64), activations="e4m3", activation_group=96).period == 384
    assert FP8_TENSOR.period == 1 and MXFP4.period == 32


def broken(weights: ExpertWeights, **changes: Any) -> ExpertWeights:
    """The weights with other scales."""
    assert weights.scales is not None
    return dataclasses.replace(weights, scales=dataclasses.replace(weights.scales, **changes))


CASES: dict[str, tuple[QuantScheme, dict[str, Any], str]] = {
    "transposed": (FP8_BLOCK, {"w13": torch.ones(2, 3, 4)}, r"w13: expected shape \(2, 4, 3\)"),
    "of a tensor": (FP8_CHANNEL, {"w2": torch.ones(2, 1, 1)}, r"w2: expected shape \(2, 300, 1\)"),
    "flat": (FP8_CHANNEL, {"w2": torch.ones(2, 300)}, "w2: expected a 3-D tensor"),
    "dtype": (MXFP4, {"w13": torch.ones(2, 384, 10)}, "w13: expected dtype float8_e8m0fnu, got float32"),
    "two dtypes": (FP8_CHANNEL, {"w2": torch.ones(2, 300, 1).half()}, "w2: expected dtype float32, got float16"),
    "doubles": (FP8_CHANNEL, {"w13": torch.ones(2, 384, 1).double()}, "w13: expected dtype float32 or bfloat16"),
    "no zero points": (int4_scheme(32, zero_points=True), {"w2_zero_points": None}, "w2_zero_points: expected a torch"),
    "zero points": (int4_scheme(32), {"w13_zero_points": torch.zeros(2, 384, 10, dtype=torch.uint8)}, "expected None"),
    "no global": (NVFP4, {"w13_global": None}, "w13_global: expected a torch.Tensor, got NoneType"),
    "one global": (NVFP4, {"w13_global": torch.ones(2, 1)}, r"w13_global: expected shape \(2, 2\)"),
    "global": (MXFP4, {"w2_global": torch.ones(2, 1)}, "w2_global: expected None for e2m1 1x32"),
    "no input": (FP8_TENSOR_STATIC, {"w2_input": None}, "w2_input: expected a torch.Tensor, got NoneType"),
    "input": (FP8_TENSOR, {"w13_input": torch.ones(2)}, "w13_input: expected None"),
    "input of all": (FP8_TENSOR_STATIC, {"w13_input": torch.ones(1)}, r"w13_input: expected shape \(2,\)"),
    "start": (FP8_BLOCK, {"block_start": 128}, r"block_start: expected an integer in \[0, 127\], got 128"),
    "odd start": (MXFP4, {"block_start": 3}, "block_start: expected an even number for e2m1 1x32 e8m0 scales, got 3"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_scales_are_named(case: str) -> None:
    scheme, changes, said = CASES[case]
    weights = broken(draw_quantised(2, 300 if scheme.per_byte == 1 else 320, 192, scheme), **changes)
    if case == "of a tensor":
        said = said.replace("300", str(weights.hidden_size))
    hidden = torch.randn(3, weights.hidden_size).bfloat16()
    with pytest.raises((TypeError, ValueError), match=f"weights.scales.{said}" if ":" in said else said):
        moeyard.fused_experts(hidden, draw_routing(3, 2, 2), weights)


def test_values_that_do_not_go_together_are_named() -> None:
    weights, routing = draw_quantised(2, 32, 16, MXFP4), draw_routing(3, 2, 2)
    hidden = torch.randn(3, 32).bfloat16()
    for other, rows, said in (
        (dataclasses.replace(weights, scales=None), hidden, "weights.scales: expected ExpertScales beside a scheme"),
        (dataclasses.replace(weights, scheme=None), hidden, "weights.w13: expected dtype bfloat16, got uint8"),
        (dataclasses.replace(weights, scheme=FP8_CHANNEL), hidden, "weights.w13: expected dtype float8_e4m3fn, got"),
        (weights, hidden.double(), "hidden_states: expected dtype float32 or bfloat16 or float16, got float64"),
        (weights, hidden[:, :16], "hidden_states: expected 32 columns"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            moeyard.fused_experts(rows, routing, other)
    plain = ExpertWeights(torch.randn(2, 32, 32), torch.randn(2, 32, 16), scales=weights.scales)
    with pytest.raises(ValueError, match=r"weights.scheme: expected the QuantScheme of weights.scales, got None"):
        moeyard.fused_experts(torch.randn(3, 32), routing, plain)


def test_trap_08_every_byte_of_e4m3_means_what_the_format_says() -> None:
    """Two bytes are NaN, none is infinite; the other variant of e4m3 (with bias 8) is another dtype and is refused."""
    stored = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 16, 16)
    scales = ExpertScales(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    weights = ExpertWeights(stored, stored, gated=False, scheme=QuantScheme("e4m3"), scales=scales)
    wanted = torch.tensor([e4m3_by_hand(byte) for byte in range(256)], dtype=torch.float64)
    assert torch.equal(dequantised(weights)[0].flatten().nan_to_num(9e9), wanted.nan_to_num(9e9))
    assert int(wanted.isnan().sum()) == 2 and CODES["e4m3"].dtype == torch.float8_e4m3fn
    other = dataclasses.replace(weights, w13=stored.view(torch.float8_e4m3fnuz), w2=stored.view(torch.float8_e4m3fnuz))
    with pytest.raises(TypeError, match=r"weights.w13: expected dtype float8_e4m3fn, got float8_e4m3fnuz"):
        moeyard.fused_experts(torch.randn(1, 16), draw_routing(1, 1, 1), other)


def test_trap_07_scales_of_8_bits_may_be_any_byte() -> None:
    """e8m0: 0 is 2^-127, 254 is 2^127, 255 is NaN. e4m3: negative, zero and NaN scales."""
    stored = torch.full((1, 2, 1), 0x22, dtype=torch.uint8)  # ones
    bytes_ = torch.tensor([[[0], [254]]], dtype=torch.uint8)
    scales = ExpertScales(bytes_.view(torch.float8_e8m0fnu), bytes_.view(torch.float8_e8m0fnu))
    weights = ExpertWeights(stored, stored, gated=False, scheme=MXFP4, scales=scales)
    assert dequantised(weights)[0].tolist() == [[[2.0**-127] * 2, [2.0**127] * 2]]
    bytes_ = torch.tensor([[[255], [127]]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = dequantised(broken(weights, w13=bytes_))[0]
    assert bool(values[0, 0].isnan().all()) and values[0, 1].tolist() == [1.0, 1.0]
    nv = torch.tensor([[[-2.0], [0.0]]]).to(torch.float8_e4m3fn)
    ones = torch.ones(1, 1)
    weights = dataclasses.replace(weights, scheme=NVFP4, scales=ExpertScales(nv, nv, w13_global=ones, w2_global=ones))
    assert dequantised(weights)[0].tolist() == [[[-2.0, -2.0], [0.0, 0.0]]]


def test_trap_15_every_position_of_a_byte_is_its_own_column() -> None:
    """A one-hot weight at every column: the low four bits are the even column."""
    for scheme, one, zero in ((MXFP4, 2, 0), (int4_scheme(32), 9, 8)):
        scales = ExpertScales(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
        if scheme is MXFP4:
            scales = scales.moved(lambda t: t.to(torch.float8_e8m0fnu))
        for column in range(32):
            codes = [one if i == column else zero for i in range(32)]
            packed = torch.tensor([a | b << 4 for a, b in zip(codes[::2], codes[1::2], strict=True)], dtype=torch.uint8)
            w2 = torch.full((1, 32, 1), zero * 17, dtype=torch.uint8)
            scales = dataclasses.replace(scales, w2=scales.w13.expand(1, 32, 1))
            weights = ExpertWeights(packed.view(1, 1, 16).expand(1, 2, 16), w2, gated=False, scheme=scheme,
                                    scales=dataclasses.replace(scales, w13=scales.w13.expand(1, 2, 1)))  # fmt: skip
            values = dequantised(weights)[0][0, 0]
            assert values.nonzero().tolist() == [[column]] and values[column] == 1


def test_trap_16_zero_points_are_those_of_their_block() -> None:
    """One per row and group of columns, subtracted from the code before the scale; 0 and 15 are zero points, too."""
    stored = torch.full((1, 2, 4), 0x77, dtype=torch.uint8)
    zero_points = torch.tensor([[[0, 15], [7, 8]]], dtype=torch.uint8)
    w2 = torch.zeros(1, 8, 1, dtype=torch.uint8)
    scales = ExpertScales(
        torch.tensor([[[1.0, 2.0], [4.0, 8.0]]]),
        torch.ones(1, 8, 1),
        zero_points,
        torch.zeros(1, 8, 1, dtype=torch.uint8),
    )
    scheme = int4_scheme(4, zero_points=True)
    values = dequantised(ExpertWeights(stored, w2, gated=False, scheme=scheme, scales=scales))[0]
    assert values.tolist() == [[[7.0] * 4 + [-16.0] * 4, [0.0] * 4 + [-8.0] * 4]]
