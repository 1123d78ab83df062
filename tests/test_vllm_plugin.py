"""The plugin and the launcher in an installed vLLM, for which a package of its module paths and signatures stands in.

vLLM itself does not install beside every torch. What the package has of vLLM 0.26 is where functions are, how they call
each other and what they are called with; each of its own results is marked, so that a test sees who answered.
"""

import os
import tomllib
from pathlib import Path

import pytest
import torch

from moeyard.dispatch import invariance
from moeyard.integrations.vllm import plugin
from moeyard.testing import python

ROOT = Path(__file__).parents[1]
OPS = """
def theirs(name):
    raise AssertionError(f"vLLM's own {name} ran")
def moe_sum(input, output, topk_ids=None, expert_map=None): theirs("moe_sum")
def shuffle_rows(input_tensor, dst2src_map): theirs("shuffle_rows")
def moe_align_block_size(topk_ids, num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad,
                         expert_map=None): theirs("moe_align_block_size")
def batched_moe_align_block_size(max_tokens_per_batch, block_size, expert_num_tokens, sorted_ids, expert_ids,
                                 num_tokens_post_pad): theirs("batched_moe_align_block_size")
def topk_softmax(topk_weights, topk_ids, token_expert_indices, gating_output, renormalize=False,
                 e_score_correction_bias=None, is_padding=None): theirs("topk_softmax")
def topk_sigmoid(topk_weights, topk_ids, token_expert_indices, gating_output, renormalize=False,
                 e_score_correction_bias=None, routed_scaling_factor=1.0, is_padding=None): theirs("topk_sigmoid")
def topk_hash_softplus_sqrt(topk_weights, topk_indices, token_expert_indices, gating_output, renormalize=False,
                            routed_scaling_factor=1.0, e_score_correction_bias=None, input_tokens=None,
                            hash_indices_table=None, is_padding=None): theirs("topk_hash_softplus_sqrt")
def untouched(): return "vLLM's"
"""
ALIGN = """
def moe_align_block_size(topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False,
                         ignore_invalid_experts=False): raise AssertionError("vLLM's own alignment ran")
def batched_moe_align_block_size(max_tokens_per_batch, block_size, expert_num_tokens):
    raise AssertionError("vLLM's own alignment ran")
"""
PERMUTE = """
def moe_permute(hidden_states, a1q_scale, topk_ids, n_expert, n_local_expert=-1, expert_map=None,
                permuted_hidden_states=None, scratch=None): raise AssertionError("vLLM's own moe_permute ran")
def moe_unpermute(out, permuted_hidden_states, topk_weights, inv_permuted_idx, expert_first_token_offset=None):
    raise AssertionError("vLLM's own moe_unpermute ran")
"""
ROUTER = """
import torch
import vllm._custom_ops as ops
PADDING = []
def fused_topk(hidden_states, gating_output, topk, renormalize, indices_type=None, scoring_func="softmax"):
    shape = (hidden_states.size(0), topk)
    weights, own = torch.empty(shape), torch.empty(shape, dtype=torch.int32)
    ids = torch.empty(shape, dtype=indices_type or torch.int32)
    function = ops.topk_softmax if scoring_func == "softmax" else ops.topk_sigmoid
    function(weights, ids, own, gating_output, renormalize, is_padding=PADDING[0] if PADDING else None)
    return weights, ids, own
"""
GROUPED = """
def fused_grouped_topk(hidden_states, gating_output, topk, renormalize, e_score_correction_bias, num_expert_group=0,
                       topk_group=0, scoring_func="softmax", routed_scaling_factor=1.0):
    raise AssertionError("vLLM's own fused_grouped_topk ran")
def grouped_topk(hidden_states, gating_output, topk, renormalize, num_expert_group=0, topk_group=0,
                 scoring_func="softmax", routed_scaling_factor=1.0, e_score_correction_bias=None):
    return fused_grouped_topk(hidden_states, gating_output, topk, renormalize, e_score_correction_bias,
                              num_expert_group, topk_group, scoring_func, routed_scaling_factor)
"""
EXPERTS = """
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, activation="theirs",
                  apply_router_weight_on_input=False, global_num_experts=-1, expert_map=None, quant_config=None,
                  of_a_later_release=None):
    return f"vLLM's {activation} {of_a_later_release}"
"""
TRITON = """
import torch
class TritonExperts:
    _lora_context = None
    def __init__(self, moe_config, quant_config):
        self.moe_config, self.quant_config, self.quantization_emulation = moe_config, quant_config, False
        self.activation_config = None
    @property
    def expects_unquantized_inputs(self): return False
    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
              a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input):
        output.fill_(77)
class TritonWNA16Experts(TritonExperts):
    pass
"""
LAYER = "from .moe_align_block_size import moe_align_block_size as align\n"


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    moe = tmp_path / "vllm/model_executor/layers/fused_moe"
    modules = {
        "moe_align_block_size.py": ALIGN, "moe_permute_unpermute.py": PERMUTE, "fused_moe.py": EXPERTS,
        "router/fused_topk_router.py": ROUTER, "router/grouped_topk_router.py": GROUPED, "layer.py": LAYER,
        "experts/triton_moe.py": TRITON,
        "__init__.py": "from .fused_moe import fused_experts\nfrom .experts.triton_moe import TritonExperts\n"
        "from . import layer\n",
    }  # fmt: skip
    for name, text in modules.items():
        (moe / name).parent.mkdir(parents=True, exist_ok=True)
        (moe / name).write_text(text)
    for folder in ("vllm", "vllm/model_executor", "vllm/model_executor/layers"):
        (tmp_path / folder / "__init__.py").write_text("")
    for folder in ("router", "experts"):
        (moe / folder / "__init__.py").write_text("")
    (tmp_path / "vllm/_custom_ops.py").write_text(OPS)
    return tmp_path


HEAD = """
import torch, logging
from types import SimpleNamespace
from moeyard.integrations import vllm as ours
from moeyard.testing import same_bits
def equal(got, wanted):
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))
hidden, w1, w2 = torch.randn(7, 16), torch.randn(4, 24, 16), torch.randn(4, 16, 12)
weights, ids, logits = torch.rand(7, 2), torch.randint(0, 4, (7, 2), dtype=torch.int32), torch.randn(7, 8)
call = (hidden, w1, w2, weights, ids)
"""
CHECKS = """
from vllm import _custom_ops as ops
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.fused_moe import layer
from vllm.model_executor.layers.fused_moe.moe_permute_unpermute import moe_permute, moe_unpermute
from vllm.model_executor.layers.fused_moe.router import fused_topk_router, grouped_topk_router
from vllm.model_executor.layers.fused_moe.experts import triton_moe

equal(layer.align(ids, 16, 4), ours.moe_align_block_size(ids, 16, 4))  # imported by name before
slots, blocks, total = (torch.empty(n, dtype=torch.int32) for n in (14 + 60, 5, 1))
ops.moe_align_block_size(ids, 4, 16, slots, blocks, total)
equal((slots, blocks, total), ours.moe_align_block_size(ids, 16, 4))
equal((moe_permute(hidden, None, ids, 4)[0],), (ours.moe_permute(hidden, None, ids, 4)[0],))
ops.moe_sum(torch.ones(7, 2, 16), out := torch.empty(7, 16)); assert (out == 2).all()
assert ops.untouched() == "vLLM's"

equal(fused_topk_router.fused_topk(hidden, logits, 2, True), ours.fused_topk(hidden, logits, 2, True))
fused_topk_router.PADDING.append(torch.arange(7) > 4)  # what vLLM's own router knows of padding counts
got = fused_topk_router.fused_topk(hidden, logits, 2, True, torch.int64, "sigmoid")
assert got[1][5:].eq(-1).all() and got[1][:5].ge(0).all() and got[1].dtype == torch.int64
bias = torch.randn(8)
equal(grouped_topk_router.grouped_topk(hidden, logits, 2, True, 4, 2, "sigmoid", 2.5, bias),
      ours.grouped_topk(hidden, logits, 2, True, 4, 2, "sigmoid", 2.5, bias))

equal((fused_moe.fused_experts(*call),), (ours.fused_experts(*call),))
kept = SimpleNamespace(w1_zp=torch.zeros(4))
assert fused_moe.fused_experts(*call, quant_config=kept) == "vLLM's theirs None"
assert fused_moe.fused_experts(*call, "swiglustep") == "vLLM's swiglustep None"
assert fused_moe.fused_experts(*call, of_a_later_release=1) == "vLLM's theirs 1"

moe_config = SimpleNamespace(moe_parallel_config=SimpleNamespace(use_all2all_kernels=False))
def applied(experts, *given):
    output = torch.empty(7, 16)
    experts.apply(output, *(given or call), "silu", 4, None, None, None, None, None, None, False)
    return output
plain = fused_moe.TritonExperts(moe_config, ours.FUSED_MOE_UNQUANTIZED_CONFIG)
equal((applied(plain),), (ours.fused_experts(*call),))
assert not plain.expects_unquantized_inputs
limited = fused_moe.TritonExperts(moe_config, ours.FUSED_MOE_UNQUANTIZED_CONFIG)
limited.activation_config = ours.ApplyMoEActivationConfig(clamp_limit=0.1)
clamp = ours.FusedMoEQuantConfig(gemm1_clamp_limit=0.1)
equal((applied(limited),), (ours.fused_experts(*call, quant_config=clamp),))
with_lora = fused_moe.TritonExperts(moe_config, ours.FUSED_MOE_UNQUANTIZED_CONFIG)
with_lora._lora_context = object()
other = triton_moe.TritonWNA16Experts(moe_config, ours.FUSED_MOE_UNQUANTIZED_CONFIG)
for experts in (with_lora, other):
    assert (applied(experts) == 77).all()
    assert (applied(fused_moe.TritonExperts(moe_config, kept)) == 77).all()

codes = [(w / w.abs().amax((1, 2), True) * 448).to(torch.float8_e4m3fn) for w in (w1, w2)]
scales = [w.abs().amax((1, 2), True) / 448 for w in (w1, w2)]
config = ours.fp8_w8a8_moe_quant_config(*scales)
coded = fused_moe.TritonExperts(moe_config, config)
assert coded.expects_unquantized_inputs  # rows come as they are, and are quantised here
equal((applied(coded, hidden, *codes, weights, ids),),
      (ours.fused_experts(hidden, *codes, weights, ids, quant_config=config),))
moe_config.moe_parallel_config.use_all2all_kernels = True
assert not coded.expects_unquantized_inputs  # ranks that send rows send codes
print("all there")
"""


def run(folder: Path, text: str, asked: str | None, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    if asked is None:
        monkeypatch.delenv(plugin.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(plugin.VARIABLE, asked)
    done = python("-c", text, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def entry_point() -> str:
    """What vLLM loads and calls, as code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["moeyard"].split(":")
    return (
        f"import vllm.model_executor.layers.fused_moe\nfrom {module} import {function} as register\n"
        + "register()\n" * 2
    )


def test_the_plugin_replaces_what_it_is_asked_for(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, said = run(stand_in, HEAD + entry_point() + CHECKS, "1", monkeypatch)
    assert out == "all there\n"
    for reason in ("quant_config.w1_zp: expected None", "activation: expected one of", "LoRA adapters"):
        assert said.count("moeyard leaves calls to vLLM: ") >= 4 and reason in said
    assert "TritonWNA16Experts has steps of its own" in said


PARTIAL = """
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.fused_moe import layer
equal(layer.align(ids, 16, 4), ours.moe_align_block_size(ids, 16, 4))
print(fused_moe.fused_experts(*call))
"""
OFF = "from vllm.model_executor.layers.fused_moe import layer, fused_experts\nprint(fused_experts(1, 2, 3, 4, 5))\n"


def test_parts_and_the_opt_in(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(stand_in, HEAD + entry_point() + PARTIAL, "align, sum", monkeypatch)[0] == "vLLM's theirs None\n"
    assert run(stand_in, entry_point() + OFF, None, monkeypatch)[0] == "vLLM's theirs None\n"
    for asked, parts in (
        ("", ()),
        ("0", ()),
        ("1", plugin.PARTS),
        ("all", plugin.PARTS),
        ("topk,sum", ("topk", "sum")),
    ):
        monkeypatch.setenv(plugin.VARIABLE, asked)
        assert plugin.parts_asked_for() == parts
    monkeypatch.setenv(plugin.VARIABLE, "align,everything")
    with pytest.raises(ValueError, match="MOEYARD_VLLM: expected 1, all or some of align,permute,"):
        plugin.register()


def test_doctor_says_what_is_active(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = "from moeyard.integrations.vllm import plugin\nprint('\\n'.join(plugin.describe()))\n"
    off = "plugin of vLLM: off (MOEYARD_VLLM=1, or some of align,permute,sum,topk,experts, turns it on)\n"
    assert run(stand_in, describe, None, monkeypatch)[0] == off
    monkeypatch.setenv(plugin.VARIABLE, "sum,experts")
    doctor = python("-m", "moeyard", "doctor", cwd=stand_in)
    assert doctor.returncode == 0, doctor.stderr
    assert "plugin of vLLM: sum,experts" in doctor.stdout
    assert "vllm._custom_ops.moe_sum: active" in doctor.stdout
    assert "moe_fused_mul_sum.moe_fused_mul_sum: this vLLM has no such module" in doctor.stdout
    assert "triton_moe.TritonExperts.apply: active" in doctor.stdout and "topk_softmax" not in doctor.stdout
    monkeypatch.setenv(plugin.VARIABLE, "everything")
    doctor = python("-m", "moeyard", "doctor", cwd=stand_in)
    assert doctor.returncode == 2 and "MOEYARD_VLLM: expected 1, all or some of" in doctor.stderr


LAUNCHED = """
from vllm.model_executor.layers.fused_moe.cutlass_moe import cutlass_moe_fp8
from vllm.model_executor.layers.fused_moe.utils import count_expert_num_tokens
from vllm.model_executor.layers.fused_moe import fused_topk
assert cutlass_moe_fp8 is ours.cutlass_moe_fp8 and fused_topk is ours.fused_topk
"""


def test_the_launcher_replaces_and_adds(stand_in: Path) -> None:
    (stand_in / "script.py").write_text(HEAD + CHECKS + LAUNCHED)
    done = python("-m", "moeyard.integrations.vllm", "script.py", cwd=stand_in)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all there\n" and os.environ.get("MOEYARD_VLLM") is None
    assert "operators are replaced by moeyard's: 15 of 17; added, as this vLLM has none: " in done.stderr
    assert "fused_moe.cutlass_moe.cutlass_moe_fp8" in done.stderr


def test_experts_stay_with_a_batch_invariant_vllm_unless_ours_are_too(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, rows = (torch.randn(4, 24, 16), torch.randn(4, 16, 12)), torch.randn(2, 16)

    def refusal() -> str | None:
        return plugin._refusal_of(*weights, None, rows, lambda: (None, True))

    assert refusal() is None
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert refusal() == "VLLM_BATCH_INVARIANT without MOEYARD_BATCH_INVARIANT=1"
    monkeypatch.setattr(invariance, "_DEFAULT", True)
    assert refusal() is None
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    assert refusal() is None
