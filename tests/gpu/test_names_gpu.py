"""vLLM's and SGLang's names on a GPU: what they write there is what they write on a CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard.bench import traces
from moeyard.dispatch import table
from moeyard.integrations import sglang, vllm
from moeyard.integrations.vllm import _custom_ops

REFUSAL = table.explain("moe_align_block_size", "cuda").reasons["cuda"]
pytestmark = pytest.mark.skipif(REFUSAL != "chosen", reason=f"cuda: {REFUSAL}")
EXPERTS, HIDDEN, SIZE, TOP_K = 16, 256, 128, 4


def cuda(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


def written(function: Any, outputs: list[Tensor], arguments: tuple[Any, ...], device: str) -> list[Tensor]:
    """Calls function(*outputs, *arguments) on a device; returns the outputs on the CPU."""
    mine = [output.clone().to(device) for output in outputs]
    function(*mine, *(arguments if device == "cpu" else map(cuda, arguments)))
    return [output.cpu() for output in mine]


@pytest.mark.parametrize("tokens", [1, 37, 3000])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_alignment_into_tensors(tokens: int, kind: torch.dtype) -> None:
    ids = torch.randint(-1, EXPERTS + 1, (tokens, TOP_K), dtype=kind)
    mapping = torch.randperm(EXPERTS).int().masked_fill(torch.rand(EXPERTS) < 0.3, -1)
    length = tokens * TOP_K + (EXPERTS + 1) * 63 + 11
    buffers = [torch.full((n,), 7, dtype=torch.int32) for n in (length, length // 64 + 2, 1)]

    def theirs(slots: Tensor, blocks: Tensor, total: Tensor, ids: Tensor, expert_map: Tensor | None) -> None:
        _custom_ops.moe_align_block_size(ids, EXPERTS, 64, slots, blocks, total, expert_map)

    for expert_map in (None, mapping):
        here = written(theirs, buffers, (ids, expert_map), "cpu")
        assert all(map(torch.equal, here, written(theirs, buffers, (ids, expert_map), "cuda")))
    for flags in ((False, False), (True, False), (True, True)):

        def shifted(slots: Tensor, blocks: Tensor, total: Tensor, ids: Tensor, flags: Any = flags) -> None:
            sglang.moe_align_block_size(ids, EXPERTS + 1, 64, slots, blocks, total, None, *flags)

        here = written(shifted, buffers, (ids,), "cpu")
        assert all(map(torch.equal, here, written(shifted, buffers, (ids,), "cuda")))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_choice_into_tensors(scoring: str) -> None:
    logits, bias = torch.randn(50, 64), torch.randn(64)
    function = {
        "softmax": _custom_ops.topk_softmax, "sigmoid": _custom_ops.topk_sigmoid,
        "sqrtsoftplus": _custom_ops.topk_hash_softplus_sqrt,
    }[scoring]  # fmt: skip
    outputs = [torch.empty(50, 6), torch.empty(50, 6, dtype=torch.int64), torch.empty(50, 6, dtype=torch.int32)]
    here = written(function, outputs, (logits, True), "cpu")
    there = written(function, outputs, (logits, True), "cuda")
    assert torch.equal(here[1], there[1]) and torch.equal(here[2], there[2])
    assert torch.allclose(here[0], there[0], rtol=1e-5)
    chosen = vllm.fused_topk_bias(logits.cuda(), logits.cuda(), scoring, bias.cuda(), 6, True)
    wanted = moeyard.route(logits, top_k=6, scoring=scoring, selection_bias=bias, renormalize=True, impl="reference")
    assert torch.allclose(chosen[0].cpu().sort(1).values, wanted.topk_weights.sort(1).values, rtol=1e-4)


@pytest.mark.parametrize("tokens", [3, 700])
def test_experts(tokens: int, tmp_path: Any) -> None:
    hidden = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    w1 = torch.randn(EXPERTS, 2 * SIZE, HIDDEN, device="cuda").bfloat16() / 16
    w2 = torch.randn(EXPERTS, HIDDEN, SIZE, device="cuda").bfloat16() / 11
    weights, ids, _ = vllm.fused_topk(hidden, torch.randn(tokens, EXPERTS, device="cuda"), TOP_K, True)
    call = (hidden, w1, w2, weights, ids)
    clamped = vllm.FusedMoEQuantConfig(gemm1_clamp_limit=0.5)
    with traces.record(tmp_path / "a.trace"):
        seen = vllm.fused_experts(*call, quant_config=clamped)
    assert torch.equal(seen, vllm.fused_experts(*call, quant_config=clamped))
    assert torch.equal(traces.read(tmp_path / "a.trace").calls[0].ids.int(), ids.cpu().int())
    output = torch.empty_like(hidden)
    rest = ("silu", -1, None, None, None, None, None, None, False)
    vllm.TritonExperts(None, clamped).apply(output, *call, *rest)
    assert torch.equal(output, seen)
    config = vllm.try_get_optimal_moe_config(tuple(w1.shape), tuple(w2.shape), TOP_K, None, tokens)
    placed = vllm.moe_align_block_size(ids, config["BLOCK_SIZE_M"], EXPERTS)
    first = torch.empty(tokens, TOP_K, 2 * SIZE, device="cuda").bfloat16()
    third, summed = torch.empty(tokens, TOP_K, HIDDEN, device="cuda").bfloat16(), torch.empty_like(hidden)
    middle = torch.empty(tokens * TOP_K, SIZE, device="cuda").bfloat16()
    vllm.invoke_fused_moe_triton_kernel(hidden, w1, first, None, None, None, *placed, False, TOP_K, config)
    vllm.apply_moe_activation("silu", middle, first.view(-1, 2 * SIZE))
    vllm.invoke_fused_moe_triton_kernel(middle, w2, third, None, None, None, *placed, False, 1, config)
    vllm.moe_fused_mul_sum(third, weights, summed)
    plain = vllm.fused_experts(*call)
    assert float((summed.float() - plain.float()).square().mean().sqrt() / plain.float().square().mean().sqrt()) < 0.02


def test_scratch_and_sums() -> None:
    scratch = vllm.MoEPermuteScratch(EXPERTS, EXPERTS, "cuda")
    for tokens in (40, 7, 90):
        rows = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        ids = torch.randint(0, EXPERTS, (tokens, TOP_K), dtype=torch.int32, device="cuda")
        with_it, without = (vllm.moe_permute(rows, None, ids, EXPERTS, scratch=one) for one in (scratch, None))
        assert all(
            torch.equal(a, b) for a, b in zip((with_it[0], *with_it[2:]), (without[0], *without[2:]), strict=True)
        )
        assert scratch.permuted_hidden_states is not None
        assert with_it[0].data_ptr() == scratch.permuted_hidden_states.data_ptr()
    rows, out = torch.randn(9, TOP_K, HIDDEN).half(), torch.empty(9, HIDDEN).half()
    sglang.moe_sum_reduce(rows, out, 0.5)
    there = torch.empty_like(out, device="cuda")
    sglang.moe_sum_reduce(rows.cuda(), there, 0.5)
    assert torch.allclose(out, there.cpu(), rtol=2**-9)
