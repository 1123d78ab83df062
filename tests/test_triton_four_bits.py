"""Triton's kernels of 4 bits: compiled for three cards, and run by its interpreter."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard import GPT_OSS_ACTIVATION
from moeyard.quant import MXFP4, MXFP4_FP8, NVFP4, QuantScheme, int4_scheme

pytest.importorskip("triton")

from moeyard.testing.compiled_triton import built
from moeyard.triton import four_bits
from moeyard.triton.plan import Card

H200, A100, L4 = Card((9, 0), 132, 232448), Card((8, 0), 108, 166912), Card((8, 9), 58, 101376)
MODELS = {  # hidden, size, experts, top_k
    "gpt-oss-120b": (2880, 2880, 128, 4),
    "Qwen3-30B": (2048, 768, 128, 8),
    "Mixtral": (4096, 14336, 8, 2),
}
SCALES = {"e8m0": torch.uint8, "e4m3": torch.uint8, "float": torch.bfloat16}


def plan_of(
    monkeypatch: pytest.MonkeyPatch, card: Card, tokens: int, model: str, scheme: QuantScheme, dtype: torch.dtype
) -> Any:
    hidden, size, count, top_k = MODELS[model]
    monkeypatch.setattr(four_bits, "card", lambda _: card)
    monkeypatch.setattr(four_bits, "programmatic_on", lambda _: card.capability >= (9, 0))
    monkeypatch.setattr(four_bits, "multiplies_e4m3", lambda _: card.capability >= (8, 9))
    return four_bits._plan.__wrapped__(
        torch.device("cpu"), dtype, torch.int32, tokens, top_k, count, hidden, size, count, GPT_OSS_ACTIVATION, True,
        False, replace(scheme, tiled=True), hidden, 2 * size, hidden,
    )  # fmt: skip


CASES = [
    (card, scheme, dtype, tokens, model)
    for card in (H200, A100, L4)
    for scheme, dtype in (
        (MXFP4, torch.bfloat16), (MXFP4, torch.float16), (NVFP4, torch.bfloat16), (int4_scheme(), torch.bfloat16),
        (int4_scheme(32, zero_points=True), torch.float16), (MXFP4_FP8, torch.bfloat16),
        (int4_scheme(activations="e4m3"), torch.bfloat16),
        (int4_scheme(32, zero_points=True, activations="e4m3"), torch.float16),
    )
    for tokens, model in ((8, "gpt-oss-120b"), (256, "Qwen3-30B"), (4096, "Mixtral"))
]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=pytest.mark.full) for one in CASES],
    ids=lambda case: f"{case[0].capability} {case[1]} {case[2]} {case[3:]}",
)
def test_products_compile(case: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card, scheme, kind, tokens, model = case
    plan = plan_of(monkeypatch, card, tokens, model, scheme, kind)
    integer, scale = torch.int32, SCALES[scheme.scales]
    zeros = torch.uint8 if scheme.zero_points else None
    wide = torch.float32 if scheme.global_scales else None
    rows, factors = plan.row_dtype, torch.float32 if plan.row_dtype != kind else None
    for step, routes in ((plan.gate_up, integer), (plan.down, None)):
        pointers = (rows, torch.int16, kind, None, routes, integer, factors, scale, zeros, wide, kind)
        seen = built(step, pointers, card, tmp_path)
        assert seen["shared"] <= card.shared_bytes
        assert seen["spilled"] == 0
        assert seen["wgmma"] + seen["mma"] > 0
        assert ("e4m3.e4m3" in seen["ptx"]) == (rows == torch.float8_e4m3fn)


@pytest.mark.parametrize("which", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_under_the_interpreter(which: str) -> None:
    """The tests of interpreted_triton_four_bits.py, with Triton's interpreter on the CPU."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "moeyard.testing.interpreted", "-W", "ignore::RuntimeWarning",
         "-m", which, str(here / "interpreted_triton_four_bits.py")],
        capture_output=True, text=True, check=False, cwd=here.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "src"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > (0 if which == "not full" else 20)
