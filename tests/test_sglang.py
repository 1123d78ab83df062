"""SGLang's names: shifted ids, what is written and what is kept, sums and choices."""

from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard.integrations import sglang
from moeyard.testing import same_bits


def aligned(ids: Tensor, experts: int, block: int, *, ignore: bool) -> tuple[list[int], list[int]]:
    """(slots, expert of each block) as SGLang defines them: a bucket per expert, that of -1 first."""
    flat, n = ids.flatten().tolist(), ids.numel()
    slots: list[int] = []
    blocks: list[int] = []
    for expert in range(0 if ignore else -1, experts):
        mine = [route for route, chosen in enumerate(flat) if chosen == expert]
        padded = -(-len(mine) // block) * block
        slots += mine + [n] * (padded - len(mine))
        blocks += [expert] * (padded // block)
    return slots, blocks


@pytest.mark.parametrize("tokens", [0, 1, 5, 70])
@pytest.mark.parametrize("block", [1, 16, 32])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_alignment(tokens: int, block: int, ignore: bool, kind: torch.dtype) -> None:
    experts = 9
    ids = torch.randint(-1, experts, (tokens, 3), dtype=kind)
    ids[ids == 4] = 11  # beyond the experts: dropped
    slots, blocks = aligned(ids, experts, block, ignore=ignore)
    n = ids.numel()
    made = sglang.align_block_size(ids, block, experts, ignore)
    length = n * block if n < experts + 1 else n + (experts + 1) * (block - 1)
    assert made[0].shape == (length,) and made[1].shape == (-(-length // block),)
    assert made[0].tolist() == slots + [n] * (length - len(slots))
    assert made[1].tolist() == blocks + [-1] * (made[1].numel() - len(blocks))
    assert made[2].tolist() == [len(slots)] and all(t.dtype == torch.int32 for t in made)
    for pad in (False, True):
        held = torch.full((length + 7,), 1234, dtype=torch.int32)
        of_block, total = torch.full((length // block + 1,), 77, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
        cumsum = torch.full((experts + 2,), 5, dtype=torch.int32)
        sglang.moe_align_block_size(ids, experts + 1, block, held, of_block, total, cumsum, pad, ignore)
        assert total.tolist() == [len(slots)]
        assert of_block.tolist() == blocks + [77] * (of_block.numel() - len(blocks))  # unused blocks keep theirs
        rest = [n] * (length + 7 - len(slots)) if pad else [1234] * (length + 7 - len(slots))
        wanted = slots if pad else [1234 if slot == n else slot for slot in slots]
        assert held.tolist() == wanted + rest


def test_alignment_needs_room() -> None:
    ids, total = torch.zeros(4, 2, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    for slots, blocks, name in ((47, 3, "sorted_token_ids"), (48, 2, "experts_ids")):
        room = [torch.empty(size, dtype=torch.int32) for size in (slots, blocks)]
        with pytest.raises(ValueError, match=f"{name}: expected at least"):
            sglang.moe_align_block_size(ids, 3, 16, *room, total)
    with pytest.raises(ValueError, match="num_experts: expected an integer in"):
        sglang.moe_align_block_size(ids, 1, 16, *room, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices(dtype: torch.dtype) -> None:
    logits, bias = torch.randn(9, 16).to(dtype), torch.randn(16)
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({}, logits.double()),
        ({"moe_softcapping": 0.7}, 0.7 * torch.tanh(logits.double() / 0.7)),
        ({"correction_bias": bias}, logits.double() + bias),
        ({"moe_softcapping": 2.0, "correction_bias": bias}, 2 * torch.tanh(logits.double() / 2) + bias),
    ]
    for given, wide in cases:
        for renormalize in (False, True):
            weights, ids = torch.full((9, 3), torch.nan), torch.full((9, 3), 99, dtype=torch.int32)
            sglang.topk_softmax(weights, ids, logits, renormalize, **given)
            scores = torch.softmax(wide, 1).gather(1, ids.long())
            if "moe_softcapping" not in given and dtype == torch.float32:
                assert torch.equal(ids.long(), wide.topk(3, 1).indices)
            assert bool((scores.diff(dim=1) <= 1e-6).all())
            wanted = scores / scores.sum(1, keepdim=True) if renormalize else scores
            assert torch.allclose(weights.double(), wanted, rtol=1e-5)
    sglang.topk_sigmoid(weights, ids, logits, True, bias, 2.5)
    options = {"scoring": "sigmoid", "renormalize": True, "selection_bias": bias, "routed_scaling_factor": 2.5}
    wanted_two = moeyard.route(logits, top_k=3, **options)
    assert same_bits(weights, wanted_two.topk_weights) and same_bits(ids, wanted_two.topk_ids)
    with pytest.raises(ValueError, match=r"num_fused_shared_experts: expected an integer in \[0, 0\]"):
        sglang.topk_sigmoid(weights, ids, logits, num_fused_shared_experts=1)
    with pytest.raises(TypeError, match="correction_bias: expected dtype float32"):
        sglang.topk_softmax(weights, ids, logits, correction_bias=bias.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 9])
def test_sums(dtype: torch.dtype, top_k: int) -> None:
    rows, out = torch.randn(7, top_k, 33).to(dtype), torch.full((7, 33), torch.nan).to(dtype)
    sglang.moe_sum(rows, out)
    bound = torch.finfo(dtype).eps
    assert torch.allclose(out.double(), rows.double().sum(1), rtol=bound, atol=1e-5)
    for factor in (0.5, 2.75):
        sglang.moe_sum_reduce(rows, out, factor)
        assert torch.allclose(out.double(), factor * rows.double().sum(1), rtol=bound, atol=1e-5)
    sglang.moe_sum_reduce(rows, out)
    assert not out.any()
