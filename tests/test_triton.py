"""The triton implementation without a GPU: plans, kernels compiled for three cards, their logic interpreted."""

import contextlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moeyard.testing.compiled_triton import built
from moeyard.triton import experts, launch
from moeyard.triton.plan import Card, Tile, most_row_tiles, product_tile
from moeyard.triton.steps import Lies
from moeyard.values import ExpertCall

H200, A100, L4 = Card((9, 0), 132, 232448), Card((8, 0), 108, 166912), Card((8, 9), 58, 101376)
MODELS = {  # hidden, size, experts, top_k
    "Mixtral": (4096, 14336, 8, 2),
    "Qwen3-30B": (2048, 768, 128, 8),
    "DeepSeek-V3": (7168, 2048, 256, 8),
    "gpt-oss-120b": (2880, 2880, 128, 4),
    "Qwen3-Next": (2048, 512, 512, 10),
    "Gemma4": (2816, 704, 128, 8),
    "shard": (2048, 96, 512, 10),
    "uneven": (1072, 1040, 8, 4),  # multiples of 16, of no step along the sum
}


def tiles_of(tokens: int, model: str, card: Card, itemsize: int = 2) -> tuple[Tile, Tile]:
    hidden, size, count, top_k = MODELS[model]
    sizes = (tokens * top_k, count)
    return (
        product_tile(*sizes, size, hidden, gated=True, itemsize=itemsize, card=card),
        product_tile(*sizes, hidden, size, gated=False, itemsize=itemsize, card=card),
    )


@pytest.mark.parametrize("card", [H200, A100, L4], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_and_keep_memory_busy(card: Card, itemsize: int) -> None:
    for model in MODELS:
        for tokens in (1, 2, 7, 8, 64, 256, 1000, 4096, 32768):
            first, second = tiles_of(tokens, model, card, itemsize)
            assert first.rows == second.rows, "one list of tiles serves both products"
            for tile, width in ((first, 2 * first.columns), (second, second.columns)):
                step = (tile.rows + width) * tile.depth * itemsize
                assert tile.stages * step <= card.shared_bytes - 1024
                assert not tile.swapped or (tile.columns >= 64 and card.capability[0] == 9 and itemsize == 2)
                together = card.shared_bytes // (tile.stages * step)
                if card is H200 and tile.rows <= 64:
                    assert together * (tile.stages - 2) * step >= 40_000, (model, tokens, tile)


def test_row_tiles_are_enough_and_not_more() -> None:
    for num_rows, count, rows in ((1, 8, 16), (40, 3, 16), (64, 128, 16), (500, 7, 64), (129, 1, 128), (33, 2, 16)):
        most = most_row_tiles(num_rows, count, rows)
        needed = 0
        for _ in range(300):  # few experts get many rows: random choices among a random few
            few = torch.randint(1, count + 1, ())
            held = Counter(torch.randint(0, int(few), (num_rows,)).tolist())
            needed = max(needed, sum(-(-c // rows) for c in held.values()))
        assert needed <= most
        worst = [1] * min(num_rows, count)  # one row each, the rest on one expert
        worst[0] += num_rows - len(worst)
        assert sum(-(-c // rows) for c in worst) == most


def plan_of(
    monkeypatch: pytest.MonkeyPatch, card: Card, tokens: int, model: str, dtype: torch.dtype = torch.bfloat16,
    activation: Activation | None = None,
) -> Any:  # fmt: skip
    hidden, size, count, top_k = MODELS[model]
    monkeypatch.setattr(experts, "card", lambda _: card)
    monkeypatch.setattr(experts, "programmatic_on", lambda _: card.capability >= (9, 0))
    return experts._experts_plan.__wrapped__(
        torch.device("cpu"), dtype, torch.int32, tokens, top_k, (count, hidden, size), count,
        activation or Activation(), True, True,
        hidden, Lies((2 * size * hidden, hidden), False), Lies((hidden * size, size), False), 2 * size, hidden,
    )  # fmt: skip


@pytest.mark.parametrize("card", [H200, A100, L4], ids=str)
@pytest.mark.parametrize("tokens", [1, 128, 1024, 4096])
def test_products_under_expert_parallelism_take_the_tiles_of_their_share(
    monkeypatch: pytest.MonkeyPatch, card: Card, tokens: int
) -> None:
    """Of 8 ranks; programs are for all routes, since all may come."""
    monkeypatch.setattr(experts, "card", lambda _: card)
    monkeypatch.setattr(experts, "programmatic_on", lambda _: False)
    hidden, size, count, top_k = MODELS["DeepSeek-V3"]
    routes, local = tokens * top_k, count // 8

    def plan(num_rows: int, num_experts: int) -> tuple[dict[str, Any], int]:
        _, product, most = experts._gemm_plan.__wrapped__(
            torch.device("cpu"), torch.bfloat16, num_rows, num_experts, local, size, hidden, hidden,
            Lies((size * hidden, hidden), False), 0, top_k,
        )  # fmt: skip
        return product.constants, most

    (constants, most), (alone, _) = plan(routes, count), plan(routes // 8, 0)
    assert constants == alone
    assert most == most_row_tiles(routes, local, constants["ROWS"])


@pytest.mark.parametrize("card", [H200, A100, L4], ids=str)
@pytest.mark.parametrize(
    ("tokens", "model"),
    [
        (1, "Qwen3-30B"),
        (8, "Mixtral"),
        (256, "Gemma4"),
        (1200, "gpt-oss-120b"),
        (4096, "Mixtral"),
        (4096, "uneven"),
        (2, "uneven"),
    ],
)
def test_products_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: Card, tokens: int, model: str) -> None:
    activation = GPT_OSS_ACTIVATION if "oss" in model else Activation()
    kind = torch.bfloat16
    bias = kind if "oss" in model else None
    plan = plan_of(monkeypatch, card, tokens, model, activation=activation)
    integer = torch.int32
    for step, dtypes in (
        (plan.gate_up, (kind, kind, bias, None, integer, integer, kind)),
        (plan.down, (kind, kind, bias, None, None, integer, kind)),
    ):
        seen = built(step, dtypes, card, tmp_path)
        assert seen["spilled"] == 0 and seen["shared"] <= card.shared_bytes
        assert seen["ptx"].count("cp.async.cg.shared.global") >= step.options["num_stages"], "16 bytes at a time"
        assert (seen["wgmma"] > 0) == (card is H200 and (step.constants["SWAPPED"] or step.constants["ROWS"] == 128))
        assert (seen["wgmma"] > 0) != (seen["mma"] > 0)
        assert ("griddepcontrol.wait" in seen["ptx"]) == (card is H200)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_products_of_other_dtypes_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype) -> None:
    for tokens in (1, 4096):
        plan = plan_of(monkeypatch, H200, tokens, "Qwen3-30B", dtype)
        seen = built(plan.gate_up, (dtype, dtype, None, None, torch.int32, torch.int32, dtype), H200, tmp_path)
        assert seen["spilled"] == 0 and seen["shared"] <= H200.shared_bytes
        assert dtype != torch.float32 or (seen["wgmma"] == seen["mma"] == 0), "float32 is never narrowed"


@pytest.mark.parametrize("card", [H200, A100], ids=str)
def test_the_rest_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: Card) -> None:
    integer, kind = torch.int32, torch.bfloat16
    for tokens in (1, 4096):
        plan = plan_of(monkeypatch, card, tokens, "Qwen3-Next")
        for ids in (torch.int32, torch.int64):
            for mapped in (None, integer):
                steps = [(plan.layout.align, (ids, mapped, integer, integer, integer))]
                if plan.layout.align is None:
                    steps = [
                        (plan.layout.count, (ids, mapped, integer)),
                        (plan.layout.place, (ids, mapped, integer, integer, integer, integer)),
                    ]
                for step, dtypes in steps:
                    assert built(step, dtypes, card, tmp_path)["spilled"] == 0
        others = [(plan.weigh, (kind, torch.float32, kind)), (plan.combine, (kind, torch.float32, integer, kind))]
        if plan.layout.align is None:
            others += [(plan.layout.scan, (integer, integer)), (plan.layout.first, (integer, integer))]
        for step, dtypes in others:
            assert built(step, dtypes, card, tmp_path)["spilled"] == 0
    cut, product, _ = experts._gemm_plan.__wrapped__(
        torch.device("cpu"), kind, 8192, 128, 128, 1536, 2048, 2048, Lies((1536 * 2048, 2048), False), 0, 8
    )
    assert built(cut, (torch.int64, integer, integer), card, tmp_path)["spilled"] == 0
    assert built(product, (kind, kind, None, torch.float32, integer, integer, kind), card, tmp_path)["spilled"] == 0
    for activation in (Activation("gelu"), Activation("gelu_tanh"), Activation("relu2", limit=2.0)):
        step = experts._activate_step.__wrapped__(torch.bfloat16, 300, 704, 1408, True, activation)
        assert built(step, (kind, kind), card, tmp_path)["spilled"] == 0


class _Driver:
    """What the launcher asks of Triton's driver before a kernel is loaded."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 7


def test_launches_pass_what_kernels_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A whole call, up to the compiled launchers: addresses, sizes and constants in their order, for their dtypes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # code names the files that it was compiled from
    monkeypatch.setattr(driver, "_active", _Driver())
    monkeypatch.setattr(launch, "current_stream", lambda _: 7)
    monkeypatch.setattr(launch, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "relaxed_capture", contextlib.nullcontext)
    monkeypatch.setattr(experts, "programmatic_on", lambda _: True)
    started: list[tuple[str, dict[str, Any]]] = []
    compile_step = launch.Step.compile

    def compiled(step: launch.Step, *dtypes: torch.dtype | None) -> Any:
        kernel = compile_step(step, *dtypes)
        assert kernel.metadata.launch_pdl and kernel.metadata.num_warps == step.options["num_warps"]
        other = built(step, dtypes, H200, tmp_path)
        assert kernel.asm["ptx"] == other["ptx"], "the tests of compiled kernels compile what is launched"

        def run(x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
            assert (x, y, z) == step.grid and stream == 7 and rest[:3] == (None, None, None)
            started.append((kernel.metadata.name, dict(zip(kernel.src.signature, rest[3:], strict=True))))

        kernel._run = run
        return kernel

    monkeypatch.setattr(launch.Step, "compile", compiled)
    hidden, size = 64, 96
    weights = ExpertWeights(torch.randn(8, 2 * size, hidden).bfloat16(), torch.randn(8, hidden, size).bfloat16())
    rows, ids, factors = torch.randn(4, hidden).bfloat16(), torch.zeros(4, 2, dtype=torch.int32), torch.rand(4, 2)
    out = torch.empty_like(rows)
    experts._experts_plan.cache_clear()
    for _ in range(2):
        experts.fused_experts_launch(rows, factors, ids, ExpertCall(weights, Activation(), 8), out=out)
    experts._experts_plan.cache_clear()
    assert [name for name, _ in started] == 2 * ["align_kernel", "product_kernel", "product_kernel", "combine_kernel"]
    align, first, second, combine = (arguments for _, arguments in started[:4])
    assert align["ids_ptr"] == ids.data_ptr() and align["map_ptr"] is None and align["num_routes"] == 8
    assert first["rows_ptr"] == rows.data_ptr() and first["weight_ptr"] == weights.w13.data_ptr()
    assert first["tiles_ptr"] == second["tiles_ptr"] == align["tiles_ptr"]
    assert first["routes_ptr"] == align["sorted_ptr"] and second["routes_ptr"] is None
    assert second["rows_ptr"] == first["out_ptr"] and second["weight_ptr"] == weights.w2.data_ptr()
    assert combine["rows_ptr"] == second["out_ptr"] and combine["out_ptr"] == out.data_ptr()
    assert (first["columns"], first["size"], second["columns"], second["size"]) == (size, hidden, hidden, size)


def test_under_the_interpreter() -> None:
    """The tests of every implementation, and those of interpreted_*.py, with Triton's interpreter on the CPU."""
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "src"}
    chosen = (
        "interpreted_triton or activations or batches or edges or in_every_way or (fused and not wide and not many)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "moeyard.testing.interpreted", "-k", chosen,
         "-m", "not full", "-W", "ignore::RuntimeWarning", str(here / "test_experts.py"),
         str(here / "interpreted_triton.py"), str(here / "interpreted_triton_gradients.py")],
        capture_output=True, text=True, check=False, cwd=here.parent, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 100
