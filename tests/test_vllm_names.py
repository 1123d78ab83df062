"""vLLM's import paths, helpers and parameters: each name in its place, each difference done, refused or listed."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard.integrations import vllm
from moeyard.integrations.launch import CUSTOM_OPS, PROVIDED
from moeyard.integrations.vllm import _custom_ops
from moeyard.testing import plain_activation, python, same_bits, wide_scores

TOKENS, EXPERTS, HIDDEN, SIZE, TOP_K = 7, 4, 16, 12, 2


def layer(gated: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden_states, w1, w2, topk_weights, topk_ids in bfloat16."""
    w1 = torch.randn(EXPERTS, SIZE * (1 + gated), HIDDEN).bfloat16()
    w2 = torch.randn(EXPERTS, HIDDEN, SIZE).bfloat16()
    weights, ids = torch.rand(TOKENS, TOP_K), torch.randint(0, EXPERTS, (TOKENS, TOP_K), dtype=torch.int32)
    return torch.randn(TOKENS, HIDDEN).bfloat16(), w1, w2, weights, ids


def test_every_path_of_vllm_has_its_module_here() -> None:
    for place, names in PROVIDED.items():
        for name in names:
            assert name in vllm.__all__, name
        if place not in ("", "layer"):  # the package itself; a place that vLLM has given up
            module = importlib.import_module(f"moeyard.integrations.vllm.{place}")
            assert all(getattr(module, name) is getattr(vllm, name) for name in names), place
    assert all(callable(getattr(_custom_ops, name)) for name in CUSTOM_OPS)
    assert callable(vllm.moe_align_block_size), "the function, not the module of its name"
    for name in vllm.__all__:
        assert getattr(vllm, name).__doc__, name


ABSENT = """
import importlib.util
import vllm, vllm.model_executor.layers.fused_moe.router.fused_topk_router as router
assert not hasattr(vllm, "LLM") and importlib.util.find_spec("vllm") is not None
for statement in ("from vllm import LLM", "import vllm.engine", "from vllm.config import VllmConfig"):
    try:
        exec(statement)
    except ImportError as problem:
        assert "vLLM is not installed" in str(problem), problem
    else:
        raise AssertionError(statement)
try:
    import vllm_that_nobody_wrote
except ModuleNotFoundError as problem:
    assert "not installed" not in str(problem)
print(router.fused_topk.__module__)
"""


def test_what_is_not_provided_is_refused_in_words(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ABSENT)
    done = python("-m", "moeyard.integrations.vllm", str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "moeyard.integrations.vllm.router.fused_topk_router\n"


# parameters of activations


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("silu", {"gemm1_clamp_limit": 0.5}, moeyard.Activation("silu", limit=0.5)),
        ("silu", {"gemm1_alpha": 1.0, "gemm1_beta": 0.0}, moeyard.Activation("silu")),
        ("swigluoai_uninterleave", {}, moeyard.GPT_OSS_ACTIVATION),
        ("swigluoai_uninterleave", {"gemm1_clamp_limit": 3.0}, moeyard.Activation("silu", limit=3.0)),
        (
            "swigluoai_uninterleave",
            {"gemm1_alpha": 1.5, "gemm1_beta": 1.0, "gemm1_clamp_limit": 2.0},
            moeyard.Activation("silu", 1.5, 1.0, 2.0),
        ),
    ],
)
def test_parameters_of_activations_count(name: str, given: dict[str, float], meant: moeyard.Activation) -> None:
    hidden, w1, w2, weights, ids = layer()
    config = vllm.biased_moe_quant_config(None, None, **given)
    got = vllm.fused_experts(hidden, w1, w2, weights, ids, vllm.MoEActivation(name), quant_config=config)
    routing = moeyard.Routing(weights, ids)
    wanted = moeyard.fused_experts(hidden, routing, moeyard.ExpertWeights(w1, w2), activation=meant)
    assert same_bits(got, wanted)
    assert (given == {}) or name == "silu" or not same_bits(got, vllm.fused_experts(hidden, w1, w2, weights, ids, name))


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("silu", {"gemm1_alpha": 1.7}, "quant_config.gemm1_alpha: expected 1.0 beside activation 'silu', got 1.7"),
        ("silu", {"gemm1_beta": 1.0}, "quant_config.gemm1_beta: expected 0.0 beside activation 'silu', got 1.0"),
        ("gelu", {"gemm1_clamp_limit": 7.0}, "quant_config.gemm1_clamp_limit: expected None beside activation 'gelu'"),
        ("swigluoai_uninterleave", {"gemm1_beta": 1.0}, "quant_config.gemm1_clamp_limit: expected a number beside"),
        ("swiglustep", {}, "activation: expected one of"),
    ],
)
def test_parameters_that_an_activation_does_not_have_are_refused(
    name: str, given: dict[str, float], words: str
) -> None:
    config = vllm.FusedMoEQuantConfig(**given)
    with pytest.raises(ValueError, match=words):
        vllm.fused_experts(*layer(), name, quant_config=config)


def test_activations() -> None:
    names = [member.value for member in vllm.MoEActivation]
    assert vllm.MoEActivation.from_str("gelu_pytorch_tanh") is vllm.MoEActivation.GELU_TANH
    assert vllm.activation_without_mul("silu") == "silu_no_mul" and vllm.activation_without_mul("situ") == "situ"
    assert [n for n in names if not vllm.MoEActivation(n).is_gated] == [n for n in names if n.endswith("_no_mul")]
    with pytest.raises(ValueError, match="s: expected one of"):
        vllm.MoEActivation.from_str("relu")
    rows = torch.randn(5, 24)
    for name in names:
        gated = vllm.MoEActivation(name).is_gated
        out = torch.full((5, 24 // (1 + gated)), torch.nan)
        if not vllm.apply_moe_activation_supported(vllm.MoEActivation(name)):
            with pytest.raises(ValueError, match="activation: expected one of"):
                vllm.apply_moe_activation(vllm.MoEActivation(name), out, rows)
            continue
        act = moeyard.GPT_OSS_ACTIVATION if "oai" in name else moeyard.Activation(name.removesuffix("_no_mul"))
        assert vllm.apply_moe_activation(vllm.MoEActivation(name), out, rows) is out
        assert torch.allclose(out.double(), plain_activation(rows.double(), act, gated), atol=1e-6)
    clamped = vllm.ApplyMoEActivationConfig(clamp_limit=0.1)
    vllm.apply_moe_activation(vllm.MoEActivation.SILU, out := torch.empty(5, 12), rows, activation_config=clamped)
    assert torch.allclose(out, moeyard.activate(rows, moeyard.Activation("silu", limit=0.1)))


# experts


def test_fewer_global_experts_than_weights_drop_nothing() -> None:
    """vLLM aligns over as many experts as w1 has, where there is no map."""
    call = layer()
    whole = vllm.fused_experts(*call)
    assert same_bits(vllm.fused_experts(*call, global_num_experts=2), whole)
    mapping = torch.arange(EXPERTS, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expert_map: expected shape \(2,\)"):
        vllm.fused_experts(*call, global_num_experts=2, expert_map=mapping)


def test_wide_biases_are_rounded_to_the_rows() -> None:
    hidden, w1, w2, weights, ids = layer()
    first, second = torch.randn(EXPERTS, 2 * SIZE), torch.randn(EXPERTS, HIDDEN)
    wide = vllm.biased_moe_quant_config(first, second)
    narrow = vllm.biased_moe_quant_config(first.bfloat16(), second.bfloat16())
    got = vllm.fused_experts(hidden, w1, w2, weights, ids, quant_config=wide)
    assert same_bits(got, vllm.fused_experts(hidden, w1, w2, weights, ids, quant_config=narrow))
    with pytest.raises(TypeError, match="w13_bias: expected dtype float32, got bfloat16"):
        vllm.fused_experts(hidden.float(), w1.float(), w2.float(), weights, ids, quant_config=narrow)


def test_triton_experts_apply() -> None:
    hidden, w1, w2, weights, ids = layer()
    experts = vllm.TritonExperts(None, vllm.FUSED_MOE_UNQUANTIZED_CONFIG)
    shapes = experts.workspace_shapes(TOKENS, 2 * SIZE, HIDDEN, TOP_K, EXPERTS, EXPERTS, None, "silu")
    output = torch.empty(shapes[2]).bfloat16()
    rest = (vllm.MoEActivation.SILU, -1, None, None, None, None, None, None)
    experts.apply(output, hidden, w1, w2, weights, ids, *rest, False)
    assert same_bits(output, vllm.fused_experts(hidden, w1, w2, weights, ids))
    experts.apply(output, hidden, w1, w2, weights, ids, *rest, True)  # rows are weighted already
    assert same_bits(output, vllm.fused_experts(hidden, w1, w2, torch.ones_like(weights), ids))


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_triton_product(block: int, weighted: bool) -> None:
    """Two calls with vLLM's arguments and a sum are the layer."""
    hidden, w1, w2, weights, ids = layer()
    hidden, w1, w2 = hidden.float(), w1.float(), w2.float()
    mapping = torch.tensor([1, -1, 0, 2], dtype=torch.int32)
    config = vllm.try_get_optimal_moe_config(tuple(w1.shape), tuple(w2.shape), TOP_K, None, TOKENS)
    assert config == {"BLOCK_SIZE_M": 16}
    if block:
        sorted_ids, experts, total = vllm.moe_align_block_size(ids, block, EXPERTS, mapping)
    else:
        sorted_ids, experts, total = None, mapping[ids.long()].view(-1), torch.tensor([TOKENS * TOP_K * 16])
    first, third = torch.full((TOKENS, TOP_K, 2 * SIZE), torch.nan), torch.full((TOKENS, TOP_K, HIDDEN), torch.nan)
    bias = torch.randn(EXPERTS, 2 * SIZE)
    placed = (sorted_ids, experts, total)
    vllm.invoke_fused_moe_triton_kernel(hidden, w1, first, None, None, None, *placed, False, TOP_K, config, B_bias=bias)
    local = mapping[ids.long()].long()
    wide = (hidden.double().unsqueeze(1).unsqueeze(1) @ w1.double()[local.clamp(min=0)].transpose(2, 3)).squeeze(2)
    wide = torch.where((local >= 0).unsqueeze(2), wide + bias.double()[local.clamp(min=0)], 0)
    assert torch.allclose(first.double(), wide, atol=1e-5)
    middle = torch.empty(TOKENS * TOP_K, SIZE)
    vllm.apply_moe_activation(vllm.MoEActivation.SILU, middle, first.view(-1, 2 * SIZE))
    given = weights if weighted else None
    vllm.invoke_fused_moe_triton_kernel(middle, w2, third, None, None, given, *placed, weighted, 1, config)
    out = torch.empty(TOKENS, HIDDEN)
    if weighted:
        vllm.moe_sum(third, out)
    else:
        assert vllm.moe_fused_mul_sum(third, weights, out, ids, mapping) is out
    options = {"expert_map": mapping, "quant_config": vllm.biased_moe_quant_config(bias, None)}
    assert torch.allclose(out, vllm.fused_experts(hidden, w1, w2, weights, ids, **options), atol=1e-4)
    with pytest.raises(ValueError, match="use_fp8_w8a8: expected none"):
        vllm.invoke_fused_moe_triton_kernel(
            hidden, w1, first, None, None, None, *placed, False, TOP_K, config, use_fp8_w8a8=True
        )


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_expert_maps(strategy: str) -> None:
    for ranks, experts in ((1, 5), (2, 8), (3, 10), (8, 8)):
        seen = []
        for rank in range(ranks):
            count, mapping, mask = vllm.determine_expert_map(ranks, rank, experts, strategy)
            assert mask is None and (mapping is None) == (ranks == 1)
            mine = list(range(experts)) if mapping is None else (mapping >= 0).nonzero().view(-1).tolist()
            assert len(mine) == count and count in (experts // ranks, -(-experts // ranks))
            if mapping is not None:
                assert mapping[mine].tolist() == list(range(count)) and mapping.dtype == torch.int32
                step = 1 if strategy == "linear" else ranks
                assert mine == list(range(mine[0], mine[0] + step * count, step))
            seen += mine
        assert sorted(seen) == list(range(experts))
    with pytest.raises(ValueError, match="expert_placement_strategy: expected one of"):
        vllm.determine_expert_map(2, 0, 8, "random")
    with pytest.raises(ValueError, match="return_expert_mask: expected False"):
        vllm.determine_expert_map(2, 0, 8, return_expert_mask=True)


def test_counts() -> None:
    ids = torch.tensor([[0, 3], [3, -1], [9, 2]])
    assert vllm.count_expert_num_tokens(ids, 4, None).tolist() == [1, 0, 1, 2]
    mapping = torch.tensor([-1, 0, 1, 0], dtype=torch.int32)
    counts = vllm.count_expert_num_tokens(ids, 2, mapping)
    assert counts.tolist() == [2, 1] and counts.dtype == torch.int32


# scratch


def test_scratch_holds_the_rows() -> None:
    rows, ids = torch.randn(5, 8), torch.randint(0, 4, (5, 2), dtype=torch.int32)
    scratch = vllm.MoEPermuteScratch(4, 4, "cpu")
    first = vllm.moe_permute(rows, None, ids, 4, scratch=scratch)
    again = vllm.moe_permute(rows[:3] + 1, None, ids[:3], 4, scratch=scratch)
    assert again[0].data_ptr() == first[0].data_ptr() and again[0].shape == (6, 8)
    plain = vllm.moe_permute(rows[:3] + 1, None, ids[:3], 4)
    assert all(same_bits(a, b) for a, b in zip((again[0], *again[2:]), (plain[0], *plain[2:]), strict=True))
    larger = vllm.moe_permute(torch.randn(9, 8), None, ids.repeat(2, 1)[:9], 4, scratch=scratch)
    assert larger[0].shape == (18, 8)
    own = torch.empty(10, 8)
    assert vllm.moe_permute(rows, None, ids, 4, permuted_hidden_states=own, scratch=scratch)[0] is own
    with pytest.raises(ValueError, match=r"scratch.num_experts: expected 5 \(n_expert\), got 4"):
        vllm.moe_permute(rows, None, ids, 5, scratch=scratch)
    with pytest.raises(ValueError, match=r"scratch.num_local_experts: expected 2 \(n_local_expert\), got 4"):
        vllm.moe_permute(rows, None, ids, 4, 2, torch.tensor([0, 1, -1, -1], dtype=torch.int32), scratch=scratch)


# routers


def test_routers_with_a_bias() -> None:
    logits, bias = torch.randn(9, 16), torch.randn(16).half()
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus"):
        weights, ids = vllm.fused_topk_bias(logits, logits, scoring, bias, 3, True, torch.int64, None, None, 2.5)
        options = {"scoring": scoring, "selection_bias": bias.float(), "renormalize": True}
        wanted = moeyard.route(logits, top_k=3, routed_scaling_factor=2.5, **options)
        assert same_bits(weights, wanted.topk_weights) and ids.dtype == torch.int64
        assert torch.equal(ids.int(), wanted.topk_ids)
        table, tokens = torch.stack([torch.randperm(16)[:3] for _ in range(50)]), torch.randint(0, 50, (9,))
        weights, ids = vllm.fused_topk_bias(logits, logits, scoring, None, 3, True, None, tokens, table, 2.5)
        assert torch.equal(ids.long(), table[tokens]) and ids.dtype == torch.int32
        wide = wide_scores(logits.double(), scoring).gather(1, table[tokens])
        assert torch.allclose(weights.double(), 2.5 * wide / wide.sum(1, keepdim=True), rtol=1e-5)
    got = vllm.fused_grouped_topk(logits, logits, 4, True, bias, 4, 2, "sigmoid", 2.5)
    wanted_two = vllm.grouped_topk(logits, logits, 4, True, 4, 2, "sigmoid", 2.5, bias)
    assert all(same_bits(a, b) for a, b in zip(got, wanted_two, strict=True))


def test_routers_differ_from_vllm_as_listed() -> None:
    """docs/notes/vllm.md: what vLLM clamps, renormalises to 1/k or rounds to 16 bits."""
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[inf, 1.0, 2.0, 0.0], [nan] * 4])
    weights, ids, _ = vllm.fused_topk(logits, logits, 2, True, scoring_func="sigmoid")
    assert ids[0].tolist() == [0, 2] and weights[0, 0] > weights[0, 1]  # +inf is the best expert, its score 1
    zeros = torch.zeros(4)
    weights, ids = vllm.fused_grouped_topk(logits, logits, 2, True, zeros, 1, 1, "sigmoid")
    assert ids.tolist() == [[0, 2], [0, 1]] and weights[0, 0] > weights[0, 1] and not weights[1].any()
    weights, ids, _ = vllm.fused_topk(logits, logits, 2, True)
    assert ids[1].tolist() == [0, 1] and weights[1].tolist() == [0.0, 0.0]
    narrow = torch.randn(30, 8).bfloat16()
    weights, ids, _ = vllm.fused_topk(narrow, narrow, 2, False)
    wide = torch.softmax(narrow.double(), 1).gather(1, ids.long())
    assert torch.allclose(weights.double(), wide, rtol=1e-6)  # a score that was rounded to bfloat16 is off by 2^-9


# operators that write into the caller's tensors


def filled(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.full(shape, 77, dtype=dtype)


def test_alignment_into_tensors() -> None:
    ids = torch.randint(-1, 9, (13, 2), dtype=torch.int32)
    mapping = torch.tensor([0, -1, 1, 2, -1, 3, 4, 5], dtype=torch.int32)
    for expert_map in (None, mapping):
        wanted = vllm.moe_align_block_size(ids, 16, 8, expert_map, ignore_invalid_experts=True, return_scatter_idx=True)
        length, blocks = wanted[0].shape[0], wanted[1].shape[0]
        slots, experts, total, scatter = filled(length + 5), filled(blocks + 2), filled(1), filled(26, 1)
        _custom_ops.moe_align_block_size(ids, 8, 16, slots, experts, total, expert_map, scatter)
        assert same_bits(slots[:length], wanted[0]) and slots[length:].tolist() == [26] * 5
        assert same_bits(experts[:blocks], wanted[1]) and experts[blocks:].tolist() == [-1] * 2
        assert same_bits(total, wanted[2]) and same_bits(scatter, wanted[3])
    with pytest.raises(ValueError, match=f"sorted_token_ids: expected at least {length} elements, got 3"):
        _custom_ops.moe_align_block_size(ids, 8, 16, filled(3), experts, total)
    counts = torch.tensor([3, 0, 5], dtype=torch.int32)
    slots, experts, total = filled(3 * 8), filled(6), filled(1)
    _custom_ops.batched_moe_align_block_size(6, 4, counts, slots, experts, total)
    made = vllm.batched_moe_align_block_size(6, 4, counts)
    assert all(same_bits(a, b) for a, b in zip((slots, experts, total), made, strict=True))


def test_alignment_of_adapters_into_tensors() -> None:
    ids = torch.randint(0, 4, (6, 2), dtype=torch.int32)
    adapters = torch.tensor([0, 1, -1, 2, 1, 0], dtype=torch.int32)
    enabled, present = torch.tensor([1, 1, 0], dtype=torch.int32), torch.tensor([-1, 0, 1, 2], dtype=torch.int32)
    slots, experts, total = filled(3 * 30), filled(3 * 8), filled(3)
    _custom_ops.moe_lora_align_block_size(ids, adapters, 4, 4, 3, 30, 8, slots, experts, total, enabled, present)
    for adapter in range(3):
        mine = (adapters == adapter) & (enabled[adapter] != 0)
        wanted = moeyard.moe_align_block_size(torch.where(mine.unsqueeze(1), ids, -1), num_experts=4, block_size=4)
        length = min(12 + 4 * 3, 30)
        assert total[adapter : adapter + 1].tolist() == wanted.num_tokens_post_padded.tolist()
        assert slots.view(3, -1)[adapter, :length].tolist() == wanted.sorted_token_ids[:length].tolist()
        assert experts.view(3, -1)[adapter].tolist()[:6] == wanted.expert_ids[:6].tolist()


@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.uint32])
def test_choice_into_tensors(kind: torch.dtype) -> None:
    logits, bias, padding = torch.randn(9, 16), torch.randn(16), torch.rand(9) < 0.4
    calls: list[tuple[Any, dict[str, Any], str, float]] = [
        (_custom_ops.topk_softmax, {}, "softmax", 1.0),
        (_custom_ops.topk_sigmoid, {"routed_scaling_factor": 2.5}, "sigmoid", 2.5),
        (_custom_ops.topk_hash_softplus_sqrt, {"routed_scaling_factor": 1.5}, "sqrtsoftplus", 1.5),
    ]
    for function, given, scoring, factor in calls:
        weights, ids, own = torch.full((9, 3), torch.nan), torch.empty(9, 3, dtype=kind), filled(9, 3)
        function(weights, ids, own, logits, True, e_score_correction_bias=bias, is_padding=padding, **given)
        options = {"selection_bias": bias, "is_padding": padding, "routed_scaling_factor": factor}
        wanted = moeyard.route(logits, top_k=3, scoring=scoring, renormalize=True, **options)
        assert same_bits(weights, wanted.topk_weights)
        signed = ids.view(torch.int32) if kind == torch.uint32 else ids
        assert torch.equal(signed.int(), wanted.topk_ids)
        assert own.tolist() == [[k * 9 + t for k in range(3)] for t in range(9)]
    table, tokens = torch.stack([torch.randperm(16)[:3] for _ in range(50)]), torch.randint(0, 50, (9,))
    _custom_ops.topk_hash_softplus_sqrt(weights, ids, own, logits, True, 1.5, None, tokens, table, is_padding=padding)
    signed = (ids.view(torch.int32) if kind == torch.uint32 else ids).long()
    assert torch.equal(signed[~padding], table[tokens][~padding]) and signed[padding].eq(-1).all()
    got = _custom_ops.grouped_topk(logits, 4, 2, 4, True, 2.5, bias, 1)
    wanted_two = vllm.grouped_topk(logits, logits, 4, True, 4, 2, "sigmoid", 2.5, bias)
    assert all(same_bits(a, b) for a, b in zip(got, wanted_two, strict=True))
    with pytest.raises(ValueError, match="scoring_func: expected 1"):
        _custom_ops.grouped_topk(logits, 4, 2, 4, True, 2.5, bias)
