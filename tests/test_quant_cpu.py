"""Quantised experts on the CPU: equal bits whatever comes with a token, every byte, odd scales, any strides."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard import ExpertWeights, Routing
from moeyard.dispatch import refusals
from moeyard.quant import FP8_BLOCK, FP8_WEIGHTS, INT8_CHANNEL, MXFP4, NVFP4, QuantScheme, int4_scheme
from moeyard.testing import draw_quantised, draw_routing, judged_experts, python, same_bits
from moeyard.testing.quantised import SCHEMES

pytestmark = pytest.mark.skipif(not refusals.installed("numba"), reason="numba is not installed")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_token_has_its_bits_whatever_comes_with_it(scheme: QuantScheme) -> None:
    """One row is multiplied in registers, several by a tile; threads share columns; sizes leave parts of steps."""
    for hidden_size, size in ((320, 192), (1130, 70)):
        weights = draw_quantised(3, hidden_size, size, scheme, bias=True, block_start=32 % scheme.period)
        hidden, routing = torch.randn(14, hidden_size).bfloat16(), draw_routing(14, 3, 2, "uniform")
        together = moeyard.fused_experts(hidden, routing, weights, impl="cpu")
        threads = torch.get_num_threads()
        for count in (1, 2, 5):
            for first in range(0, 14, count):
                part = slice(first, first + count)
                alone = Routing(routing.topk_weights[part], routing.topk_ids[part])
                try:
                    torch.set_num_threads(1 + first % 3)
                    got = moeyard.fused_experts(hidden[part], alone, weights, impl="cpu")
                finally:
                    torch.set_num_threads(threads)
                assert same_bits(got, together[part]), (count, first)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("code", ["e4m3", "int8", "int4", "e2m1"])
def test_every_byte_is_what_the_specification_says(code: str, rows: int) -> None:
    """Each byte alone in a row of weights, at several places of a step, in registers and in a tile."""
    columns = 64 if code in ("int4", "e2m1") else 32
    scheme = QuantScheme(code, (1, 0))
    for place in (0, 5, 16, 31):
        stored = torch.zeros(1, 256, 32, dtype=torch.uint8)
        stored[0, :, place] = torch.arange(256)
        w2 = torch.zeros(1, columns, 256 // scheme.per_byte, dtype=torch.uint8)
        w2[0, :, :] = 0x38 if code == "e4m3" else 1
        dtype = draw_quantised(1, 32, 32, scheme).w13.dtype
        scales = moeyard.ExpertScales(torch.rand(1, 256, 1) + 0.5, torch.rand(1, columns, 1))
        weights = ExpertWeights(stored.view(dtype), w2.view(dtype), gated=False, scheme=scheme, scales=scales)
        hidden, routing = torch.rand(rows, columns) + 0.5, Routing(torch.ones(rows, 1), torch.zeros(rows, 1).int())
        for nan in (True, False) if code == "e4m3" else (False,):
            if code == "e4m3" and not nan:
                stored[0, [127, 255]] = 0
            judged = judged_experts(hidden, routing, weights)
            got = moeyard.fused_experts(hidden, routing, weights, impl="cpu")
            assert judged.error(got) is None and bool(judged.wide.isnan().all()) == nan


def test_trap_07_scales_of_8_bits_may_be_any_byte() -> None:
    """Scales of 2^-127 and 2^125, negative and zero ones, each within its budget; one that is NaN makes its row NaN."""
    for scheme, bytes_ in ((MXFP4, (0, 1, 127, 252)), (NVFP4, (0, 1, 0xB8, 0x80, 0x7E))):
        for impl in ("cpu", "torch"):
            for byte in bytes_:
                weights = draw_quantised(1, 64, 64, scheme, torch.float32)
                assert weights.scales is not None
                weights.scales.w2.view(torch.uint8)[0, 7] = byte
                hidden, routing = torch.randn(2, 64) * 2.0**-20, Routing(torch.ones(2, 1), torch.zeros(2, 1).int())
                judged = judged_experts(hidden, routing, weights)
                got = moeyard.fused_experts(hidden, routing, weights, impl=impl)
                assert judged.error(got) is None, (impl, byte)
            weights.scales.w2.view(torch.uint8)[0, 7] = 255 if scheme is MXFP4 else 127
            got = moeyard.fused_experts(hidden, routing, weights, impl=impl)
            assert got.isnan().any(0).nonzero().tolist() == [[7]], impl


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_16_bits(dtype: torch.dtype) -> None:
    """Also those that are subnormal in float16."""
    for scheme in (int4_scheme(32), FP8_BLOCK, INT8_CHANNEL):
        weights = draw_quantised(2, 352, 192, scheme)
        assert weights.scales is not None
        first, second = (t.to(dtype) for t in (weights.scales.w13, weights.scales.w2))
        second[0, 0] = 2.0**-20
        weights = dataclasses.replace(weights, scales=dataclasses.replace(weights.scales, w13=first, w2=second))
        hidden, routing = torch.randn(5, 352).bfloat16(), draw_routing(5, 2, 2, "uniform")
        judged = judged_experts(hidden, routing, weights)
        for impl in ("cpu", "torch"):
            assert judged.error(moeyard.fused_experts(hidden, routing, weights, impl=impl)) is None, impl


@pytest.mark.parametrize("scheme", [FP8_BLOCK, NVFP4, int4_scheme(32, zero_points=True), SCHEMES[1]], ids=str)
def test_weights_and_scales_lie_anywhere(scheme: QuantScheme) -> None:
    def apart(tensor: Tensor) -> Tensor:
        """The same values with gaps between them."""
        wide = torch.zeros(*tensor.shape, 3, dtype=torch.uint8).repeat_interleave(tensor.element_size(), -1)
        wide = wide.view(tensor.dtype)
        wide[..., 1] = tensor
        return wide[..., 1]

    weights = draw_quantised(2, 96, 64, scheme, bias=True)
    assert weights.scales is not None
    hidden, routing = torch.randn(5, 96).bfloat16(), draw_routing(5, 2, 2, "uniform")
    loose = dataclasses.replace(
        weights, w13=apart(weights.w13), w2=apart(weights.w2), scales=weights.scales.moved(apart)
    )
    assert not loose.w13.is_contiguous()
    for impl in ("cpu", "torch", "reference"):
        wanted = moeyard.fused_experts(hidden, routing, weights, impl=impl)
        assert same_bits(moeyard.fused_experts(apart(hidden), routing, loose, impl=impl), wanted), impl


WITHOUT_AVX512 = """
from llvmlite import binding
features = binding.get_host_cpu_features()
features.update({name: False for name in features if name.startswith("avx512")})
binding.get_host_cpu_features = lambda: features
import torch, moeyard
from moeyard.cpu import dots
from moeyard.testing import draw_quantised, draw_routing, judged_experts
from moeyard.testing.quantised import SCHEMES
assert dots.LANES == 8
for scheme in SCHEMES:
    for rows in (1, 9):
        weights = draw_quantised(2, 330, 96, scheme)
        hidden, routing = torch.randn(rows, 330).bfloat16(), draw_routing(rows, 2, 2, "uniform")
        got = moeyard.fused_experts(hidden, routing, weights, impl="cpu")
        error = judged_experts(hidden, routing, weights).error(got)
        assert error is None, (str(scheme), error)
print("done")
"""


@pytest.mark.full
def test_without_vectors_of_512_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of 4 bits are computed where no register holds a table of 16 values."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    done = python("-c", WITHOUT_AVX512)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]


def test_many_rows_and_one_expert() -> None:
    """More rows than a chunk holds."""
    for scheme in (FP8_WEIGHTS, MXFP4):
        weights = draw_quantised(2, 128, 64, scheme)
        hidden, routing = torch.randn(101, 128).bfloat16(), Routing(torch.rand(101, 1), torch.ones(101, 1).int())
        judged = judged_experts(hidden, routing, weights)
        assert judged.error(moeyard.fused_experts(hidden, routing, weights, impl="cpu")) is None
