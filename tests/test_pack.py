"""Experts of 4 bits in tiles of 16 rows: every bit is kept, and lies where kernels look for it."""

from dataclasses import replace

import pytest
import torch

from moeyard import ExpertWeights, dequantize_experts, explain, pack_experts, unpack_experts
from moeyard.quant import FP8_WEIGHTS, MXFP4, MXFP4_FP8, NVFP4, QuantScheme, int4_scheme, scheme_of
from moeyard.testing.quantised import draw_quantised

SCHEMES = (
    MXFP4, NVFP4, int4_scheme(), int4_scheme(32), int4_scheme(64, zero_points=True), int4_scheme(0, zero_points=True),
    MXFP4_FP8,
)  # fmt: skip


def bits(weights: ExpertWeights) -> list[torch.Tensor]:
    assert weights.scales is not None
    held = (weights.w13, weights.w2, *weights.scales.tensors)
    return [tensor.view(torch.uint8).clone() for tensor in held if tensor is not None]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, left, right))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_packing_keeps_every_bit(scheme: QuantScheme, gated: bool) -> None:
    weights = draw_quantised(3, 192, 64, scheme, torch.bfloat16, gated=gated, bias=True)
    before = bits(weights)
    packed = pack_experts(weights)
    assert packed.scheme == replace(scheme, tiled=True) and scheme_of(str(packed.scheme)) == packed.scheme
    assert same(bits(weights), before) and not same(bits(packed), before)
    assert packed.w13.shape == weights.w13.shape and packed.w13_bias is weights.w13_bias
    assert same(bits(unpack_experts(packed)), before)
    moved = pack_experts(weights, in_place=True)
    assert moved.w13.data_ptr() == weights.w13.data_ptr() and same(bits(moved), bits(packed))
    assert same(bits(unpack_experts(moved, in_place=True)), before)


def place_of(row: int, column: int, columns: int, halves: int, rows: int) -> tuple[int, int, int]:
    """Byte of a lane's word, and s, of a code: from the words of the layout alone."""
    if halves == 2:
        tile, h, g = row % (rows // 2) // 8, row // (rows // 2), row % 8
    else:
        tile, h, g = row // 16, row % 16 // 8, row % 8
    block, s, t, p = column // 64, column % 64 // 16, column % 16 // 4, column % 4
    lane = 4 * g + t
    return (tile * (columns // 64) + block) * 512 + 16 * lane + 8 * h + 2 * p, s, g * 2 + h


@pytest.mark.parametrize("scheme", [MXFP4, int4_scheme(64, zero_points=True)], ids=str)
def test_one_code_at_every_place_of_a_word(scheme: QuantScheme) -> None:
    hidden, size = 128, 64
    weights = draw_quantised(1, hidden, size, scheme, torch.bfloat16)
    weights.w13.zero_(), weights.w2.zero_()
    for matrix, name, halves in ((weights.w13, "w13", 2), (weights.w2, "w2", 1)):
        _, rows, stored = matrix.shape
        for row in (0, 7, 8, rows // 2, rows // 2 + 3, rows - 1):
            for column in range(2 * stored):
                code = 1 + (7 * row + column) % 15
                matrix[0, row, column // 2] = code << 4 * (column % 2)
                found = getattr(pack_experts(weights), name).flatten()
                matrix[0, row, column // 2] = 0
                at, s, _ = place_of(row, column, 2 * stored, halves, rows)
                word = int(found[at]) | int(found[at + 1]) << 8
                found[at : at + 2] = 0
                assert not found.any(), "nothing lies elsewhere"
                if scheme.weights == "int4":
                    assert word == code << 4 * s
                else:
                    shifted = (word << (0, 3, 6, 9)[s] & 0x0E00) | (word << (0, 3, 1, 2)[s] & 0x8000)
                    assert shifted == (code & 7) << 9 | (code >> 3) << 15
                    half = torch.tensor(shifted - (shifted & 0x8000) * 2, dtype=torch.int16).view(torch.float16)
                    magnitude = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)[code & 7]
                    assert float(half) * 2**14 == (-magnitude if code & 8 else magnitude)


@pytest.mark.parametrize("scheme", [NVFP4, int4_scheme(32, zero_points=True)], ids=str)
def test_scales_lie_by_groups(scheme: QuantScheme) -> None:
    weights = draw_quantised(2, 128, 64, scheme, torch.bfloat16)
    packed = pack_experts(weights)
    assert weights.scales is not None and packed.scales is not None
    for name, halves in (("w13", 2), ("w2", 1)):
        for kind in ("", "_zero_points") if scheme.zero_points else ("",):
            scales = (getattr(scales, name + kind) for scales in (weights.scales, packed.scales))
            given, found = (tensor.view(torch.uint8).unflatten(2, (-1, tensor.itemsize)) for tensor in scales)
            _, rows, groups, _ = given.shape
            for row in range(rows):
                for group in range(groups):
                    at, _, pair = place_of(row, 0, 64, halves, rows)
                    place = (at // 512 * groups + group) * 16 + pair
                    assert torch.equal(given[1, row, group], found[1].flatten(0, 1)[place])


def test_what_cannot_be_packed_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match=r"weights: expected ExpertWeights, got int"):
        pack_experts(3)  # type: ignore[arg-type]
    weights = draw_quantised(1, 128, 64, MXFP4, torch.bfloat16)
    packed = pack_experts(weights)
    with pytest.raises(ValueError, match=r"weights.scheme: expected one in rows, got e2m1 1x32 e8m0 scales tiled"):
        pack_experts(packed)
    with pytest.raises(ValueError, match=r"weights.scheme: expected one in tiles, got e2m1 1x32 e8m0 scales"):
        unpack_experts(weights)
    with pytest.raises(
        ValueError, match=r"weights.scheme: expected weights of 4 bits, and rows as they are or .*, got e4m3 1x"
    ):
        pack_experts(draw_quantised(1, 128, 64, FP8_WEIGHTS, torch.bfloat16))
    with pytest.raises(ValueError, match=r"weights: expected hidden_size a multiple of 64 for e2m1 1x32 e8m0 scales"):
        pack_experts(draw_quantised(1, 96, 64, MXFP4, torch.bfloat16))
    with pytest.raises(ValueError, match=r"weights.scales.block_start: expected 0 for e2m1 1x32 e8m0 scales, got 16"):
        pack_experts(draw_quantised(1, 64, 64, MXFP4, torch.bfloat16, block_start=16))
    with pytest.raises(ValueError, match=r"weights.scheme: expected one scale per row and 16, 32, 64"):
        pack_experts(draw_quantised(1, 64, 64, QuantScheme("int4", (1, 8)), torch.bfloat16))
    with pytest.raises(ValueError, match=r"tiled: expected False but for weights of 4 bits with"):
        QuantScheme("e4m3", (1, 0), tiled=True)
    grouped = QuantScheme("int4", (1, 32), activations="e4m3", activation_group=128)
    for odd in (grouped, QuantScheme("int4", (1, 32), activations="int8"), replace(MXFP4_FP8, static=True)):
        with pytest.raises(
            ValueError, match=r"weights of 4 bits, and rows as they are or of e4m3 with one dynamic scale"
        ):
            pack_experts(draw_quantised(1, 128, 64, odd, torch.bfloat16))
    for impl, reason in explain("fused_experts", weights=packed, num_tokens=1).reasons.items():
        takes = ("cuda (few tokens of 4 bits)", "cuda (many tokens of 4 bits)", "triton")
        assert impl in takes or "takes no weights of scheme" in reason
    with pytest.raises(ValueError, match=r"weights.scheme: expected one in rows \(unpack_experts comes first\)"):
        dequantize_experts(packed, torch.float32)
