"""After `moeyard.warmup(weights)` no call compiles: of 16-bit weights and of codes, batch-invariant or not."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
from moeyard import ExpertWeights
from moeyard.dispatch.schemes import TAKES
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR_STATIC, FP8_WEIGHTS, INT8_CHANNEL, QuantScheme
from moeyard.testing import draw_quantised, draw_routing, draw_weights, impls_on
from moeyard.testing.quantised import moved_to

CUDA = torch.device("cuda")
IMPLS = [name for name in impls_on("fused_experts", CUDA) if name in ("cuda", "triton")]
MOST = 1500
SCHEMES = (None, FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL, FP8_TENSOR_STATIC, FP8_WEIGHTS)


def draw(scheme: QuantScheme | None, hidden: int) -> ExpertWeights:
    if scheme is None:
        return draw_weights(16, hidden, 256, torch.bfloat16, device=CUDA)
    return moved_to(draw_quantised(16, hidden, 256, scheme), CUDA)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What either compiler is asked for from now on."""
    from moeyard.cuda.runtime import compile as building
    from moeyard.triton.launch import Step

    seen: list[str] = []
    compile_source, compile_step = building.compile_source, Step.compile

    def by_nvrtc(*given: Any, **options: Any) -> Any:
        seen.append(str(given[0]))
        return compile_source(*given, **options)

    def by_triton(step: Step, *dtypes: Any) -> Any:
        seen.append(step.asked(*dtypes).kernel)
        return compile_step(step, *dtypes)

    monkeypatch.setattr(building, "compile_source", by_nvrtc)
    monkeypatch.setattr(Step, "compile", by_triton)
    return seen


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
@pytest.mark.parametrize("invariant", [False, True], ids=["default", "batch-invariant"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_call_compiles(scheme: QuantScheme | None, invariant: bool, impl: str, compiled: list[str]) -> None:
    """The hidden size of each case is its own: kernels of a few tokens are compiled for it."""
    if impl == "cuda" and scheme is not None and (scheme.static or not TAKES["cuda (products)"](scheme)):
        pytest.skip("the products of cuda do not take the scheme")
    hidden = 512 + 16 * (SCHEMES.index(scheme) * 6 + 3 * invariant + [*IMPLS, "auto"].index(impl))
    weights = draw(scheme, hidden)
    moeyard.warmup(weights, impl=impl, top_k=4, max_tokens=MOST, batch_invariant=invariant)
    compiled.clear()
    rows, router = torch.randn(MOST, hidden, device=CUDA).bfloat16(), torch.randn(16, hidden, device=CUDA).bfloat16()
    routing = draw_routing(MOST, 16, 4, device=CUDA)
    for tokens in (1, 2, 3, 7, 16, 30, 64, 65, 100, 200, 333, 777, 1200, MOST):
        taken = moeyard.Routing(routing.topk_weights[:tokens], routing.topk_ids[:tokens])
        moeyard.fused_experts(rows[:tokens], taken, weights, batch_invariant=invariant, impl=impl)
        assert not compiled, (tokens, compiled)
        if invariant:
            moeyard.moe_layer(rows[:tokens], router, weights, top_k=4, batch_invariant=True, impl=impl)
            assert not compiled, (tokens, compiled)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_call_that_compiles_is_seen(
    impl: str, compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of sizes that nothing else here has."""
    monkeypatch.setenv("MOEYARD_CACHE", str(tmp_path))
    weights = draw_weights(7, 1040, 176, torch.float16, device=CUDA)
    rows = torch.randn(3, 1040, device=CUDA).half()
    moeyard.fused_experts(rows, draw_routing(3, 7, 3, device=CUDA), weights, impl=impl)
    assert compiled
