"""Every implementation that takes CUDA tensors, against the reference on the CPU; graphs; no waiting for the device."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
from moeyard import Layout, Permuted, reference
from moeyard.testing import (
    ROUTINGS,
    guard_broken,
    impls_on,
    layout_difference,
    no_worse,
    poisoned,
    poisoned_layout,
    python,
    same_bits,
)

CUDA = torch.device("cuda")
SIZES = [(0, 2, 5, 16), (1, 8, 256, 16), (7, 3, 301, 5), (31, 2, 8192, 4), (256, 8, 64, 128), (4096, 2, 64, 128)]
SEED = """
import torch
import time
from vllm.model_executor.layers.fused_moe import moe_align_block_size
topk_ids = torch.randint(0, 64, (8192,), dtype=torch.int32, device='cuda')
torch.cuda.synchronize()
start = time.time()
sorted_ids, expert_ids, num_tokens_post_pad = moe_align_block_size(topk_ids, 64, 128, 2)
torch.cuda.synchronize()
print(f"Duration: {time.time() - start:.4f} seconds")
"""


def impls(op: str, dtype: torch.dtype | None = None) -> list[str]:
    return [name for name in impls_on(op, CUDA, dtype) if name != "reference"]


def draw(tokens: int, experts: int, top_k: int, routing: str) -> torch.Tensor:
    if not tokens:
        return torch.empty(0, top_k, dtype=torch.int32)
    return ROUTINGS[routing](tokens, experts, top_k, torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("impl", impls("moe_align_block_size"))
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("routing", sorted(ROUTINGS))
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("mapped", [False, True])
def test_layout(impl: str, size: tuple[int, int, int, int], routing: str, dtype: torch.dtype, mapped: bool) -> None:
    tokens, top_k, experts, block = size
    ids = draw(tokens, experts, top_k, routing).to(dtype)
    call: dict[str, Any] = {"num_experts": experts, "block_size": block}
    mapping = None
    if mapped:
        mapping = torch.where(torch.arange(experts) % 3 == 0, torch.arange(experts) // 3, -1).int()
        call["num_local_experts"] = (experts + 2) // 3
    wanted = reference.moe_align_block_size(ids, expert_map=mapping, **call)
    out = poisoned_layout(
        Layout.of([t.cuda() for t in wanted.tensors], (experts, call.get("num_local_experts", experts), block, top_k))
    )
    mapping = None if mapping is None else mapping.cuda()
    for value in (ids.cuda(), torch.stack([ids, ids], 2).cuda()[:, :, 0]):
        got = moeyard.moe_align_block_size(value, expert_map=mapping, out=out, impl=impl, **call)
        assert layout_difference(got, wanted) is None
        assert not any(guard_broken(tensor) for tensor in out.tensors)


@pytest.mark.parametrize("impl", impls("batched_moe_align_block_size"))
@pytest.mark.parametrize(
    ("counts", "rows"), [([2, 3, 0, 6, 8], 8), ([-3, 99, 4], 7), ([0], 0), ([5, 0] * 40, 512)], ids=str
)
def test_batched(impl: str, counts: list[int], rows: int) -> None:
    given = torch.tensor(counts, dtype=torch.int32)
    for block in (1, 16, 48):
        wanted = reference.batched_moe_align_block_size(given, max_num_tokens=rows, block_size=block)
        got = moeyard.batched_moe_align_block_size(given.cuda(), max_num_tokens=rows, block_size=block, impl=impl)
        assert layout_difference(got, wanted) is None


@pytest.mark.parametrize("impl", impls("permute"))
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8], ids=str
)
@pytest.mark.parametrize(
    "shape", [(0, 16, 4, 2, 1), (5, 8, 3, 2, 4), (33, 136, 9, 4, 16), (64, 2880, 8, 2, 1)], ids=str
)
def test_rows(impl: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    tokens, hidden, experts, top_k, block = shape
    layout = moeyard.moe_align_block_size(
        draw(tokens, experts, top_k, "dropped").cuda(), num_experts=experts, block_size=block
    )
    host = Layout.of([t.cpu() for t in layout.tensors], (experts, experts, block, top_k))
    rows = torch.randint(0, 120, (tokens, hidden), dtype=torch.uint8).to(dtype)
    scales = torch.rand(tokens, 3)
    wanted = reference.permute(rows, host, scales=scales)
    out = Permuted(
        poisoned((layout.capacity, hidden), dtype, CUDA), poisoned((layout.capacity, 3), torch.float32, CUDA)
    )
    got = moeyard.permute(rows.cuda(), layout, scales=scales.cuda(), out=out, impl=impl)
    held = host.sorted_token_ids < host.num_routes
    assert got.scales is not None and wanted.scales is not None
    assert same_bits(got.rows.cpu()[held], wanted.rows[held]) and same_bits(got.scales.cpu()[held], wanted.scales[held])
    assert not guard_broken(out.rows)
    where = torch.randint(-2, tokens + 2, (11,))
    assert same_bits(moeyard.shuffle_rows(rows.cuda(), where.cuda(), impl=impl), reference.shuffle_rows(rows, where))


@pytest.mark.parametrize("impl", impls("combine"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums(impl: str, dtype: torch.dtype) -> None:
    tokens, hidden, experts, top_k = 65, 136, 9, 4
    layout = moeyard.moe_align_block_size(
        draw(tokens, experts, top_k, "dropped").cuda(), num_experts=experts, block_size=16
    )
    rows = torch.randn(layout.capacity, hidden, device="cuda").to(dtype)
    rows[layout.sorted_token_ids == layout.num_routes] = float("nan")
    weights = torch.rand(tokens, top_k, device="cuda")
    host = Layout.of([t.cpu() for t in layout.tensors], (experts, experts, 16, top_k))
    wide = reference.combine(rows.cpu().double(), host, weights.cpu())
    out = poisoned((tokens, hidden), dtype, CUDA)
    got = moeyard.combine(rows, layout, weights, out=out, impl=impl)
    honest = moeyard.combine(rows.cpu(), host, weights.cpu(), impl="torch")
    assert no_worse(got.cpu(), honest, wide) and not guard_broken(out)
    assert all(same_bits(moeyard.combine(rows, layout, weights, impl=impl), got) for _ in range(5))
    stacked = torch.randn(tokens, top_k, hidden, device="cuda").to(dtype)
    ids = torch.randint(-1, 3, (tokens, top_k), device="cuda")
    taken = torch.where((ids >= 0).unsqueeze(2), stacked.double(), 0).sum(1).cpu()
    assert torch.allclose(
        moeyard.moe_sum(stacked, topk_ids=ids, impl=impl).cpu().double(), taken, rtol=2**-7, atol=2**-7
    )


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_graphs_replay_with_changed_ids_and_nothing_waits_for_the_device() -> None:
    ids = draw(512, 64, 4, "uniform").cuda()
    hidden, weights = torch.randn(512, 256, device="cuda").bfloat16(), torch.rand(512, 4, device="cuda")

    def layer() -> tuple[Layout, torch.Tensor]:
        layout = moeyard.moe_align_block_size(ids, num_experts=64, block_size=32)
        return layout, moeyard.combine(moeyard.permute(hidden, layout).rows, layout, weights)

    layer()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layout, total = layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for routing in ("zipf", "dropped", "one_hot"):
        ids.copy_(draw(512, 64, 4, routing))
        graph.replay()
        torch.cuda.synchronize()
        assert (
            layout_difference(layout, reference.moe_align_block_size(ids.cpu(), num_experts=64, block_size=32)) is None
        )
        again, fresh = layer()
        assert layout_difference(layout, again) is None and same_bits(total, fresh)


def test_the_seed_script_runs_on_the_gpu(tmp_path: Path) -> None:
    script = tmp_path / "seed.py"
    script.write_text(SEED)
    done = python("-m", "moeyard.integrations.vllm", str(script))
    assert done.returncode == 0 and done.stdout.startswith("Duration: 0."), done.stderr
