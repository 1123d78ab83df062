"""vLLM's names: argument orders, lengths and tuples, and the launcher for scripts that import vLLM."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
from moeyard.integrations import vllm
from moeyard.testing import ROUTINGS, layout_error, python, same_bits

NAMES = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")


def draw(tokens: int, experts: int, top_k: int, routing: str = "uniform") -> torch.Tensor:
    return ROUTINGS[routing](tokens, experts, top_k, torch.Generator().manual_seed(tokens + experts))


@pytest.mark.parametrize("tokens", [1, 3, 256, 2256])
@pytest.mark.parametrize("top_k", [1, 2, 16, 32])
@pytest.mark.parametrize("experts", [32, 160, 257])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("pad", [False, True])
def test_align_lengths_and_properties(tokens: int, top_k: int, experts: int, block: int, pad: bool) -> None:
    ids = draw(tokens, experts, top_k)
    got = vllm.moe_align_block_size(ids, block, experts, pad_sorted_ids=pad)
    n = ids.numel()
    length = n + experts * (block - 1)
    length = -(-length // block) * block if pad else length
    length = min(n * block, length) if n < experts else length
    assert [t.shape for t in got] == [(length,), (-(-length // block),), (1,)]
    assert all(t.dtype == torch.int32 for t in got)
    assert layout_error(ids, experts, block, dict(zip(NAMES, got, strict=True)), stable=True) is None
    total = int(got[2])
    assert total % block == 0 and total <= -(-length // block) * block
    used = got[0][: min(total, length)]
    assert sorted(used[used < n].tolist()) == list(range(n))
    active = got[1][: total // block]
    assert int(active.min()) >= 0 and int(active.max()) < experts and bool((got[1][total // block :] == -1).all())


@pytest.mark.parametrize("tokens", [16, 32, 2048])
@pytest.mark.parametrize("experts", [8, 64])
@pytest.mark.parametrize("ignore", [False, True])
def test_align_under_a_map(tokens: int, experts: int, ignore: bool) -> None:
    ids, block = draw(tokens, experts, 4), 64
    expert_map = torch.full((experts,), -1, dtype=torch.int32)
    expert_map[experts // 4 : experts // 2] = torch.arange(experts // 4, dtype=torch.int32)
    got = vllm.moe_align_block_size(ids, block, experts, expert_map, False, ignore)
    if ignore:  # sorted by local id, the others dropped
        local = torch.where(expert_map[ids] >= 0, expert_map[ids], -1)
        assert layout_error(local, experts, block, dict(zip(NAMES, got, strict=True)), stable=True) is None
    else:  # sorted by global id, then marked
        plain = vllm.moe_align_block_size(ids, block, experts)
        assert same_bits(got[0], plain[0]) and same_bits(got[2], plain[2])
        used = int(got[2]) // block
        assert torch.equal(got[1][:used], expert_map[plain[1][:used].long()])
        assert bool((got[1][used:] == -1).all())


@pytest.mark.parametrize(("experts", "tokens"), [(32, 8), (256, 8), (256, 1024)])
def test_scatter_idx(experts: int, tokens: int) -> None:
    ids = draw(tokens, experts, 2, "dropped")
    ids[0, 0] = experts
    *_, scatter = vllm.moe_align_block_size(ids, 16, experts, return_scatter_idx=True)
    own = torch.arange(ids.numel(), dtype=torch.int32).view(-1, 1)
    valid = ((ids >= 0) & (ids < experts)).view(-1, 1)
    assert same_bits(scatter, torch.where(valid, own, -1))
    expert_map = torch.arange(experts, dtype=torch.int32) - experts // 2
    *_, scatter = vllm.moe_align_block_size(
        ids, 16, experts, expert_map, ignore_invalid_experts=True, return_scatter_idx=True
    )
    local = valid & (ids.view(-1, 1) >= experts // 2)
    assert same_bits(scatter, torch.where(local, own, -1))
    with pytest.raises(ValueError, match="return_scatter_idx: expected ignore_invalid_experts=True"):
        vllm.moe_align_block_size(ids, 16, experts, expert_map, return_scatter_idx=True)


def test_the_seed_scripts_form() -> None:
    ids = torch.randint(0, 64, (8192,), dtype=torch.int32)
    seed = vllm.moe_align_block_size(ids, 64, 128, 2)
    usual = vllm.moe_align_block_size(ids.view(4096, 2), 128, 64)
    assert all(same_bits(a, b) for a, b in zip(seed, usual, strict=True))
    two = vllm.moe_align_block_size(ids.view(4096, 2), 64, 128, 2)
    assert all(same_bits(a, b) for a, b in zip(two, usual, strict=True))


@pytest.mark.parametrize(
    ("ids", "rest"),
    [
        (torch.zeros(8, dtype=torch.int32), (64, 128)),
        (torch.zeros(8, dtype=torch.int32), (64, 128, True)),
        (torch.zeros(8, dtype=torch.int32), (64, 128, 3)),
        (torch.zeros(8, dtype=torch.int32), (64, 128, 0)),
        (torch.zeros(4, 2, dtype=torch.int32), (64, 128, 4)),
        (torch.zeros(4, 2, 1, dtype=torch.int32), (64, 128)),
    ],
)
def test_ambiguous_calls_name_both_forms(ids: torch.Tensor, rest: tuple[Any, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"vLLM's form .*block_size, num_experts.* or the form .*num_experts, block_size"
    ):
        vllm.moe_align_block_size(ids, *rest)


@pytest.mark.parametrize("block", [8, 16, 32, 48, 64])
@pytest.mark.parametrize("counts", ["random", "alternating", "skewed"])
def test_batched(block: int, counts: str) -> None:
    for rows in (13, 16, 512):
        for experts in (8, 33):
            given = torch.randint(0, rows + 1, (experts,), dtype=torch.int32)
            if counts == "alternating":
                given[::2] = 0
            elif counts == "skewed":
                given[1:] = 0
            got = vllm.batched_moe_align_block_size(rows, block, given)
            assert got[0].shape == (experts * -(-rows // block) * block,)
            wanted, blocks = [], []
            for e, count in enumerate(given.tolist()):
                padded = -(-count // block) * block
                wanted += [e * rows + j for j in range(count)] + [experts * rows] * (padded - count)
                blocks += [e] * (padded // block)
            assert got[2].tolist() == [len(wanted)]
            assert got[0].tolist() == wanted + [experts * rows] * (got[0].numel() - len(wanted))
            assert got[1].tolist() == blocks + [-1] * (got[1].numel() - len(blocks))


def sorted_as_vllm(ids: torch.Tensor, experts: int, expert_map: torch.Tensor | None) -> tuple[Any, ...]:
    """Key of every route and the stable order of keys, as vLLM's permute defines them."""
    keys = []
    for expert in ids.flatten().tolist():
        local = int(expert_map[expert]) if expert_map is not None and 0 <= expert < experts else expert
        valid = 0 <= expert < experts
        keys.append(local if valid and local >= 0 else expert + experts if valid else experts)
    return keys, sorted(range(len(keys)), key=lambda route: keys[route])


@pytest.mark.parametrize("tokens", [0, 1, 33, 200])
@pytest.mark.parametrize("top_k", [2, 6])
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("scale", ["none", "tensor", "token", "groups"])
def test_permute_and_unpermute(tokens: int, top_k: int, ranks: int, scale: str) -> None:
    experts, hidden = 16, 64
    ids = draw(tokens, experts, top_k, "dropped") if tokens else torch.empty(0, top_k, dtype=torch.int32)
    local = experts // ranks
    expert_map = None
    if ranks > 1:
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        expert_map[local : 2 * local] = torch.arange(local, dtype=torch.int32)
    rows = torch.randn(tokens, hidden).bfloat16()
    scales = {"none": None, "tensor": torch.rand(1), "token": torch.rand(tokens, 1), "groups": torch.rand(tokens, 4)}
    given = scales[scale]
    permuted, moved, offsets, inverse, permuted_idx = vllm.moe_permute(rows, given, ids, experts, local, expert_map)
    keys, order = sorted_as_vllm(ids, experts, expert_map)
    n = tokens * top_k
    valid = sum(key < local for key in keys)
    assert permuted.shape == (n, hidden) and permuted.dtype == rows.dtype
    assert offsets.dtype == torch.int64
    assert offsets.tolist() == [sum(key < e for key in keys) for e in range(local + 1)]
    assert inverse.tolist() == [order.index(route) for route in range(n)] and inverse.dtype == torch.int32
    written = valid if expert_map is not None else n
    assert permuted_idx.tolist() == order[:written] + [n] * (n - written)
    tokens_of = torch.tensor(order[:written], dtype=torch.int64) // top_k
    assert same_bits(permuted[:written], rows[tokens_of])
    if scale in ("token", "groups"):
        assert moved is not None and given is not None and same_bits(moved[:written], given[tokens_of])
    else:
        assert moved is given
    target = torch.full((n, hidden), float("nan")).bfloat16()
    again = vllm.moe_permute(rows, given, ids, experts, local, expert_map, target)
    assert again[0] is target and same_bits(target[:written], permuted[:written])

    weights = torch.rand(tokens, top_k)
    permuted[valid:] = float("nan")  # rows of other ranks are skipped
    out = torch.full((tokens, hidden), float("nan")).bfloat16()
    vllm.moe_unpermute(out, permuted, weights, inverse, offsets)
    kept = torch.tensor(keys, dtype=torch.int64).view(tokens, top_k) < local
    wide = rows.double() * (weights * kept).double().sum(1, keepdim=True)
    assert torch.allclose(out.double(), wide, rtol=2**-8, atol=1e-6)
    if ranks == 1 and bool(kept.all()):
        vllm.moe_unpermute(out, permuted, weights, inverse.view(tokens, top_k))
        assert torch.allclose(out.double(), wide, rtol=2**-8, atol=1e-6)


def test_unpermute_ignores_entries_outside_the_rows() -> None:
    rows, out = torch.ones(3, 8), torch.empty(2, 8)
    where = torch.tensor([0, 99, -5, 2], dtype=torch.int32)
    vllm.moe_unpermute(out, rows, torch.ones(2, 2), where)
    assert out.tolist() == [[1.0] * 8, [1.0] * 8]


def test_sum_and_shuffle() -> None:
    rows, out = torch.randn(7, 3, 16), torch.empty(7, 16)
    assert vllm.moe_sum(rows, out) is None
    assert torch.allclose(out, rows.sum(1), atol=1e-6)
    ids = draw(7, 5, 3, "dropped")
    vllm.moe_sum(rows, out, ids, torch.tensor([0, -1, 1, 2, -1], dtype=torch.int32))
    kept = ((ids == 0) | (ids == 2) | (ids == 3)).unsqueeze(2)
    assert torch.allclose(out, torch.where(kept, rows, 0).sum(1), atol=1e-6)
    where = torch.tensor([1, -1, 7, 0], dtype=torch.int32)
    got = vllm.shuffle_rows(out, where)
    assert torch.equal(got[0], out[1]) and torch.equal(got[3], out[0]) and not got[1:3].any()


def test_routers() -> None:
    logits, hidden = torch.randn(9, 16), torch.randn(9, 8)
    weights, ids, own = vllm.fused_topk(hidden, logits, 3, True)
    wide = torch.softmax(logits.double(), 1).topk(3, 1)
    assert torch.equal(ids.long(), wide.indices) and ids.dtype == torch.int32
    assert torch.allclose(weights.double(), wide.values / wide.values.sum(1, keepdim=True), rtol=1e-6)
    assert own.dtype == torch.int32 and own.tolist() == [[k * 9 + t for k in range(3)] for t in range(9)]
    for kind in (torch.int32, torch.int64, torch.uint32):
        assert vllm.fused_topk(hidden, logits, 3, False, kind, "sigmoid")[1].dtype == kind
    bias = torch.randn(16).bfloat16()
    got = vllm.grouped_topk(hidden, logits, 4, True, 4, 2, "sigmoid", 2.5, bias)
    options = {"scoring": "sigmoid", "selection_bias": bias.float(), "num_groups": 4, "top_k_groups": 2}
    wanted = moeyard.route(logits, top_k=4, renormalize=True, routed_scaling_factor=2.5, **options)
    assert same_bits(got[0], wanted.topk_weights) and same_bits(got[1], wanted.topk_ids)
    assert torch.equal(vllm.grouped_topk(hidden, logits, 3, False)[1], ids)
    with pytest.raises(ValueError, match="gating_output: expected 8 rows"):
        vllm.fused_topk(hidden[:8], logits, 3, True)
    with pytest.raises(TypeError, match="indices_type: expected int32, int64 or uint32"):
        vllm.fused_topk(hidden, logits, 3, True, torch.int16)


class Enumerated:
    value = "swigluoai_uninterleave"


class Config:
    quant_dtype = None
    w1_bias = torch.randn(4, 24).bfloat16()
    w2_bias = torch.randn(4, 16).bfloat16()


def test_experts() -> None:
    hidden, w1, w2 = torch.randn(7, 16).bfloat16(), torch.randn(4, 24, 16).bfloat16(), torch.randn(4, 16, 12).bfloat16()
    weights, ids = torch.rand(7, 2), torch.randint(-1, 8, (7, 2))
    mapping = torch.tensor([-1, 0, 1, -1, 2, 3, -1, 9], dtype=torch.int32)
    routing = moeyard.Routing(weights, ids)
    got = vllm.fused_experts(hidden, w1, w2, weights, ids, Enumerated(), False, 8, mapping, Config())
    mine = moeyard.ExpertWeights(w1, w2, Config.w1_bias, Config.w2_bias)
    options = {"activation": moeyard.GPT_OSS_ACTIVATION, "num_experts": 8, "expert_map": mapping}
    assert same_bits(got, moeyard.fused_experts(hidden, routing, mine, **options))
    one = moeyard.Routing(torch.rand(7, 1), ids[:, :1])
    plain = moeyard.ExpertWeights(w1[:, :12], w2, gated=False)
    got = vllm.fused_experts(hidden, w1[:, :12], w2, one.topk_weights, one.topk_ids, "relu2_no_mul", True)
    act = moeyard.Activation("relu2")
    assert same_bits(got, moeyard.fused_experts(hidden, one, plain, activation=act, apply_router_weight_on_input=True))
    for name in ("swigluoai", "situ"):
        with pytest.raises(ValueError, match=f"activation: expected one of .*, got '{name}'"):
            vllm.fused_experts(hidden, w1, w2, weights, ids, name)


SEED_ON_CPU = """
import torch
import time
from vllm.model_executor.layers.fused_moe import moe_align_block_size

num_tokens, num_experts, topk, block_size = 4096, 64, 2, 128
topk_ids = torch.randint(0, num_experts, (num_tokens * topk,), dtype=torch.int32, device='cpu')
start = time.time()
sorted_ids, expert_ids, num_tokens_post_pad = moe_align_block_size(
    topk_ids, num_experts, block_size, topk
)
duration = time.time() - start
print(f"Duration: {duration:.4f} seconds")
"""
MORE = """
import sys
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.moe_align_block_size import (
    batched_moe_align_block_size, moe_align_block_size as function)
from vllm.model_executor.layers.fused_moe.moe_permute_unpermute import moe_permute, moe_unpermute
import vllm.model_executor.layers.fused_moe.moe_align_block_size as module
import moeyard.integrations.vllm as ours
assert function is ours.moe_align_block_size and module is moe_align_block_size
assert moe_permute is ours.moe_permute and ops.moe_sum is ours.moe_sum and sys.argv[1:] == ["--flag", "7"]
assert int(module(topk_ids.view(-1, 2), block_size, num_experts)[2]) == int(num_tokens_post_pad)
print("all there")
"""
LAYER = """
from vllm.model_executor.layers.fused_moe import fused_experts, fused_topk, grouped_topk
assert fused_experts is ours.fused_experts and fused_topk is ours.fused_topk and grouped_topk is ours.grouped_topk
from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
from vllm.model_executor.layers.fused_moe.cutlass_moe import cutlass_moe_fp8
from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import run_cutlass_moe_fp8
assert cutlass_moe_fp8 is ours.cutlass_moe_fp8 and run_cutlass_moe_fp8 is ours.run_cutlass_moe_fp8
assert fp8_w8a8_moe_quant_config is ours.fp8_w8a8_moe_quant_config
"""


def launch(script: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    return python("-m", "moeyard.integrations.vllm", str(script), *arguments, cwd=path)


def test_launcher_without_vllm(tmp_path: Path) -> None:
    script = tmp_path / "seed.py"
    script.write_text(SEED_ON_CPU + MORE + LAYER)
    done = launch(script, "--flag", "7")
    assert done.returncode == 0, done.stderr
    assert "vLLM is not installed" in done.stderr
    assert done.stdout.startswith("Duration: 0.0") and done.stdout.endswith("all there\n")


def test_launcher_replaces_the_operators_of_an_installed_vllm(tmp_path: Path) -> None:
    """A package of vLLM's shape stands in for vLLM, which does not install beside every torch."""
    moe = tmp_path / "vllm" / "model_executor" / "layers" / "fused_moe"
    moe.mkdir(parents=True)
    for folder in (tmp_path / "vllm", tmp_path / "vllm/model_executor", tmp_path / "vllm/model_executor/layers", moe):
        (folder / "__init__.py").write_text("")
    fail = "raise RuntimeError('the original ran')"
    (moe / "moe_align_block_size.py").write_text(
        f"def moe_align_block_size(*a, **k): {fail}\ndef batched_moe_align_block_size(*a): {fail}\n"
    )
    (moe / "moe_permute_unpermute.py").write_text(f"def moe_permute(*a): {fail}\ndef moe_unpermute(*a): {fail}\n")
    (tmp_path / "vllm" / "_custom_ops.py").write_text(
        f"def moe_sum(*a): {fail}\ndef shuffle_rows(*a): {fail}\nother = 1\n"
    )
    (moe / "layer.py").write_text("from .moe_align_block_size import moe_align_block_size as align\n")
    (moe / "__init__.py").write_text("from . import layer\n")
    script = tmp_path / "seed.py"
    script.write_text(
        SEED_ON_CPU + MORE + "from vllm.model_executor.layers.fused_moe.layer import align\n"
        "assert align is ours.moe_align_block_size and ops.other == 1\n"
    )
    done = launch(script, "--flag", "7", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "operators are replaced by moeyard's" in done.stderr and done.stdout.endswith("all there\n")


def test_launcher_says_how_it_is_used(tmp_path: Path) -> None:
    assert launch(tmp_path / "absent.py").returncode == 2
    assert "SCRIPT: expected a file" in launch(tmp_path / "absent.py").stderr
    shown = python("-m", "moeyard.integrations.vllm", "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: python -m moeyard.integrations.vllm SCRIPT")


def test_bad_input_names_the_argument() -> None:
    rows, ids = torch.zeros(3, 16), torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"permuted_hidden_states: expected shape \(6, 16\)"):
        vllm.moe_permute(rows, None, ids, 4, permuted_hidden_states=torch.zeros(5, 16))
    with pytest.raises(ValueError, match="n_local_expert: expected an integer in"):
        vllm.moe_permute(rows, None, ids, 4, 5)
    with pytest.raises(ValueError, match=r"expert_map: expected shape \(4,\)"):
        vllm.moe_permute(rows, None, ids, 4, 2, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"inv_permuted_idx: expected shape \(4,\)"):
        vllm.moe_unpermute(torch.zeros(2, 16), rows, torch.zeros(2, 2), torch.zeros(3, dtype=torch.int32))
    assert moeyard.__version__
