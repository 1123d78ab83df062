"""Triton's experts of 8-bit codes without a GPU: plans and kernels compiled for three cards."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard import Activation
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR_STATIC, FP8_WEIGHTS, INT8_CHANNEL, QuantScheme

pytest.importorskip("triton")

from moeyard.testing.compiled_triton import built
from moeyard.triton import coded
from moeyard.triton.plan import Card

H200, A100, L4 = Card((9, 0), 132, 232448), Card((8, 0), 108, 166912), Card((8, 9), 58, 101376)
MODELS = {  # hidden, size, experts, top_k
    "Mixtral": (4096, 14336, 8, 2),
    "Qwen3-30B": (2048, 768, 128, 8),
    "uneven": (1072, 1040, 8, 4),
}


def plan_of(
    monkeypatch: pytest.MonkeyPatch, card: Card, tokens: int, model: str, scheme: QuantScheme,
    dtype: torch.dtype = torch.bfloat16,
) -> Any:  # fmt: skip
    hidden, size, count, top_k = MODELS[model]
    monkeypatch.setattr(coded, "card", lambda _: card)
    monkeypatch.setattr(coded, "programmatic_on", lambda _: card.capability >= (9, 0))
    monkeypatch.setattr(coded, "multiplies_e4m3", lambda _: card.capability >= (8, 9))
    rows, columns = scheme.block
    blocks = [
        (halves * (-(-size_ // rows) if rows else 1), -(-other // columns) if columns else 1)
        for halves, size_, other in ((2, size, hidden), (1, hidden, size))
    ]
    strides = coded._Strides(hidden, (2 * size * hidden, hidden), (hidden * size, size), 0, 0, tuple(blocks))
    return coded._plan.__wrapped__(
        torch.device("cpu"), dtype, torch.int32, tokens, top_k, (count, hidden, size), count, Activation(),
        True, False, scheme, 0, strides,
    )  # fmt: skip


@pytest.mark.parametrize("card", [H200, A100, L4], ids=str)
@pytest.mark.parametrize("scheme", [FP8_CHANNEL, FP8_BLOCK, FP8_WEIGHTS, INT8_CHANNEL], ids=str)
@pytest.mark.parametrize(("tokens", "model"), [(1, "Qwen3-30B"), (4096, "Mixtral"), (64, "uneven")])
def test_products_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: Card, scheme: QuantScheme, tokens: int, model: str
) -> None:
    plan = plan_of(monkeypatch, card, tokens, model, scheme)
    integer, scale, kind = torch.int32, torch.float32, torch.bfloat16
    codes = torch.int8 if scheme.weights == "int8" else torch.float8_e4m3fn if plan.native else torch.uint8
    rows, row_scales = (kind, None) if scheme.activations == "none" else (codes, scale)
    assert plan.native == (scheme.activations == "int8" or (scheme.activations == "e4m3" and card is not A100))
    for step, routes in ((plan.gate_up, integer), (plan.down, None)):
        seen = built(step, (rows, codes, None, None, routes, integer, row_scales, scale, kind), card, tmp_path)
        assert seen["shared"] <= card.shared_bytes
        assert seen["spilled"] == 0
        of_codes = ".e4m3.e4m3" in seen["ptx"] or ".s8.s8" in seen["ptx"]
        widened = (
            card is H200 and scheme.weights == "e4m3" and not seen["wgmma"]
        )  # Triton's mma.sync there is of float16
        assert of_codes == (plan.native and not widened), "codes meet codes in matrix instructions where they can"
        assert seen["wgmma"] + seen["mma"] > 0
    for step in (plan.first_codes, plan.second_codes):
        if step is not None:
            seen = built(
                step, (kind, None, None, None, codes if codes == torch.int8 else torch.uint8, scale), card, tmp_path
            )
            assert seen["spilled"] == 0


WEIGHTS_IN_BLOCKS = QuantScheme("e4m3", block=(128, 128))


@pytest.mark.parametrize("card", [H200, pytest.param(L4, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("scheme", [WEIGHTS_IN_BLOCKS, pytest.param(FP8_WEIGHTS, marks=pytest.mark.full)], ids=str)
def test_float32_rows_beside_codes_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: Card, scheme: QuantScheme
) -> None:
    """Rows of four bytes fill shared memory and registers four times as fast as codes."""
    plan = plan_of(monkeypatch, card, 1500, "uneven", scheme, torch.float32)
    codes, wide, integer = torch.float8_e4m3fn if plan.native else torch.uint8, torch.float32, torch.int32
    for step, routes in ((plan.gate_up, integer), (plan.down, None)):
        seen = built(step, (wide, codes, None, None, routes, integer, None, wide, wide), card, tmp_path)
        assert seen["shared"] <= card.shared_bytes and seen["spilled"] < 4096


def test_static_scales_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = plan_of(monkeypatch, L4, 64, "Qwen3-30B", FP8_TENSOR_STATIC)
    integer, scale, kind = torch.int32, torch.float32, torch.bfloat16
    for step, routes in ((plan.first_codes, integer), (plan.second_codes, None)):
        assert built(step, (kind, scale, routes, integer, torch.uint8, scale), L4, tmp_path)["spilled"] == 0


@pytest.mark.parametrize("which", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_under_the_interpreter(which: str) -> None:
    """The tests of interpreted_triton_coded.py, with Triton's interpreter on the CPU."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "moeyard.testing.interpreted", "-W", "ignore::RuntimeWarning",
         "-m", which, str(here / "interpreted_triton_coded.py")],
        capture_output=True, text=True, check=False, cwd=here.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "src"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 10
