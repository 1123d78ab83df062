"""Triton's backward without a GPU: plans, kernels compiled for three cards, all of it interpreted."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard import Activation

pytest.importorskip("triton")

from moeyard.testing.compiled_triton import built
from moeyard.triton import experts, gradients
from moeyard.triton.plan import Card, outer_tile
from moeyard.triton.steps import Lies

H200, A100, L4 = Card((9, 0), 132, 232448), Card((8, 0), 108, 166912), Card((8, 9), 58, 101376)
SUMS = {  # experts, columns, size, whether rows are gathered
    "Qwen3-30B's w13": (128, 1536, 2048, True),
    "Qwen3-30B's w2": (128, 2048, 768, True),
    "batches": (128, 2048, 768, False),
    "small": (8, 96, 40, True),
    "biases": (128, 1536, 1, True),
}


def of(monkeypatch: pytest.MonkeyPatch, card: Card) -> None:
    for room in (experts, gradients):
        monkeypatch.setattr(room, "card", lambda _: card)
        monkeypatch.setattr(room, "programmatic_on", lambda _: card.capability >= (9, 0))


def outer_step(name: str, dtype: torch.dtype) -> Any:
    count, columns, size, gathered = SUMS[name]
    return gradients._outer_step.__wrapped__(
        torch.device("cpu"), (dtype, dtype), (count, columns, size), columns, size, 1, 8, gathered
    )


@pytest.mark.parametrize("card", [H200, A100, L4], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_of_outer_sums_fit(card: Card, itemsize: int) -> None:
    for count, columns, size, _ in SUMS.values():
        direct, gathered = (
            outer_tile(count, columns, size, itemsize=itemsize, gathered=some, card=card) for some in (False, True)
        )
        assert gathered._replace(stages=direct.stages) == direct and gathered.stages == 2 * direct.stages - 1
        step = (direct.columns + direct.sizes) * direct.depth * itemsize
        assert direct.stages * step <= card.shared_bytes - 4096 and direct.stages >= 2
        assert direct.columns * direct.sizes <= 128 * 256
    assert outer_tile(128, 1536, 2048, itemsize=2, gathered=True, card=H200)[:3] == (128, 256, 64)
    assert outer_tile(1, 1536, 2048, itemsize=2, gathered=True, card=H200)[:3] == (128, 128, 64), "few programs"


@pytest.mark.parametrize(
    ("card", "name", "dtype"),
    [
        pytest.param(H200, "Qwen3-30B's w13", torch.bfloat16, marks=pytest.mark.full),
        pytest.param(A100, "Qwen3-30B's w13", torch.bfloat16, marks=pytest.mark.full),
        pytest.param(L4, "Qwen3-30B's w13", torch.bfloat16, marks=pytest.mark.full),
        *(pytest.param(H200, name, torch.bfloat16, marks=pytest.mark.full) for name in list(SUMS)[1:]),
        pytest.param(A100, "batches", torch.bfloat16, marks=pytest.mark.full),
        pytest.param(H200, "Qwen3-30B's w2", torch.float16, marks=pytest.mark.full),
        (H200, "Qwen3-30B's w2", torch.float32),
    ],
    ids=str,
)
def test_sums_of_outer_products_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: Card, name: str, dtype: torch.dtype
) -> None:
    """Both operands come 16 bytes at a time, and wgmma takes both as they lie: columns side by side."""
    of(monkeypatch, card)
    step, gathered = outer_step(name, dtype), SUMS[name][3]
    for result in (dtype, torch.float32):
        slots = torch.int32 if gathered else None
        seen = built(step, (dtype, dtype, slots, torch.int64, torch.int32, result), card, tmp_path)
        assert seen["spilled"] == 0 and seen["shared"] <= card.shared_bytes
        if dtype == torch.float32:
            assert seen["wgmma"] == seen["mma"] == 0, "float32 is never narrowed"
            return
        if name in ("small", "biases"):
            return
        assert (seen["wgmma"] > 0) == (card is H200) and (seen["wgmma"] > 0) != (seen["mma"] > 0)
        products = re.findall(r"wgmma\.mma_async[^;]*, 1, 1, (\d), (\d);", seen["ptx"])
        assert len(products) == seen["wgmma"] and all(one == ("1", "1") for one in products)
        constants = step.constants
        pieces = (
            (constants["COLUMNS"] + constants["SIZES"]) * constants["DEPTH"] // 8 // (32 * step.options["num_warps"])
        )
        assert seen["ptx"].count("cp.async.cg.shared.global") >= 2 * pieces, "rows of two steps are on their way"
        assert ("griddepcontrol.wait" in seen["ptx"]) == (card is H200)


@pytest.mark.parametrize(
    ("card", "rows"),
    [
        (H200, 128 * 2048),
        pytest.param(H200, 128 * 32, marks=pytest.mark.full),
        pytest.param(A100, 128 * 2048, marks=pytest.mark.full),
        pytest.param(L4, 128 * 32, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_products_of_transposed_weights_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: Card, rows: int
) -> None:
    of(monkeypatch, card)
    kind, integer = torch.bfloat16, torch.int32
    seen = {}
    for turned in (False, True):
        lies = Lies((1536 * 2048, 2048 if turned else 1536), turned)
        _, product, _ = experts._gemm_plan.__wrapped__(
            torch.device("cpu"), kind, rows, 128, 128, 2048, 1536, 1536, lies, 0, 1
        )
        seen[turned] = built(product, (kind, kind, None, None, integer, integer, kind), card, tmp_path)
        assert seen[turned]["spilled"] == 0 and seen[turned]["shared"] <= card.shared_bytes
    for counted in ("wgmma", "mma"):
        assert seen[True][counted] == seen[False][counted]
    copies = [one["ptx"].count("cp.async.cg.shared.global") for one in seen.values()]
    assert copies[0] == copies[1], "transposed weights come 16 bytes at a time, too"


@pytest.mark.full
@pytest.mark.parametrize("card", [H200, A100], ids=str)
def test_derivatives_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: Card) -> None:
    of(monkeypatch, card)
    kind, wide = torch.bfloat16, torch.float32
    for name in Activation.NAMES:
        step = gradients._backward_step.__wrapped__(
            torch.device("cpu"), (), 262144, 768, 1536, 768, True, Activation(name, limit=7.0)
        )
        for dtypes in ((kind, kind, wide, kind, kind, wide), (kind, kind, None, kind, None, None)):
            seen = built(step, dtypes, card, tmp_path)
            assert seen["spilled"] == 0
            assert re.search(r"ld\.global\S*\.v4\.b32", seen["ptx"]), "16 bytes at a time"


@pytest.mark.full
def test_the_longer_ones_under_the_interpreter() -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "src"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "moeyard.testing.interpreted", "-m", "full",
         "-W", "ignore::RuntimeWarning", str(here / "interpreted_triton_gradients.py")],
        capture_output=True, text=True, check=False, cwd=here.parent, env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]
