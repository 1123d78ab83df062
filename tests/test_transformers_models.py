"""Whole models of transformers with moeyard's experts: logits and generated tokens, with and without a compiler."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.24")
ours = importlib.import_module("moeyard.integrations.transformers")

pytestmark = pytest.mark.filterwarnings("default")
SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2,
    "top_k_experts": 2, "num_shared_experts": 1, "n_shared_experts": 1, "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "n_group": 1, "topk_group": 1, "num_expert_group": 1, "first_k_dense_replace": 0,
    "moe_layer_start_index": 0, "decoder_sparse_step": 1, "moe_layer_interval": 1, "expert_layer_period": 1,
    "expert_layer_offset": 0, "num_dense_layers": 0, "mlp_only_layers": [], "mlp_layer_types": ["sparse", "sparse"],
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_n_groups": 1, "n_groups": 1, "mamba_d_state": 8, "ssm_state_size": 8, "mamba_chunk_size": 8, "chunk_size": 8,
    "mamba_expand": 2, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16, "sliding_window": 16,
    "num_nextn_predict_layers": 0, "use_mamba_kernels": False, "attention_dropout": 0.0, "initializer_range": 0.2,
    "global_head_dim": 8, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 0, "enable_moe_block": True,
    "swiglu_limit": 7.0,
}  # fmt: skip
"""Sizes by the names that configurations have for them."""
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
OTHER: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"mlp_layer_types": None},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 16], "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
    "glm4v_moe": {
        "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0},
    },
    "glm5_next": {"qk_rope_head_dim": 0, "qk_head_dim": 8},
    "hy_v4_vl": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {"head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""What some architectures want instead."""
QUICK = {"qwen3_moe", "gpt_oss", "minimax_m3_vl", "muse_spark", "aria"}
MODELS = Path(transformers.__file__).parent / "models"
ARCHITECTURES = [
    pytest.param(path.parent.name, marks=[] if path.parent.name in QUICK else [pytest.mark.full])
    for path in sorted(MODELS.glob("*/modeling_*.py"))
    if "@use_experts_implementation" in path.read_text()
]


def model_of(architecture: str) -> Any:
    """The architecture's model of text, small, with random weights."""
    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    names = [name for name in module.__all__ if "PreTrained" not in name]
    ends = ("ForCausalLM", "TextModel", "Model")
    name = next(name for end in ends for name in names if name.endswith(end))
    kind = getattr(module, name)
    config = kind.config_class
    known = {*config().to_dict(), *config.attribute_map}
    torch.manual_seed(0)
    sizes = {**SMALL, **OTHER.get(architecture, {})}
    return kind(config(**{key: value for key, value in sizes.items() if key in known and value is not None})).eval()


def answer(model: Any, tokens: Tensor, implementation: str) -> Tensor:
    model.set_experts_implementation(implementation)
    assert implementation in model.get_experts_implementation().values()
    with torch.no_grad():
        output = model(tokens, use_cache=False)
    result: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_answer_as_with_eager_experts(architecture: str) -> None:
    model = model_of(architecture)
    ways = ours.prepare(model)
    assert ways, "no layer has experts"
    tokens = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(0))
    wanted = answer(model, tokens, "eager")
    got = answer(model, tokens, "moeyard")
    assert float((got - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("architecture", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.full)])
def test_models_have_the_gradients_of_eager_experts(architecture: str) -> None:
    model = model_of(architecture).train()
    tokens = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(0))
    found = {}
    for implementation in ("eager", "moeyard"):
        model.set_experts_implementation(implementation)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        found[implementation] = torch.autograd.grad(loss, [*model.parameters()])
    for wanted, got in zip(*found.values(), strict=True):
        assert float((got - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


def test_the_config_and_from_pretrained_take_the_name(tmp_path: Path) -> None:
    model_of("qwen3_moe").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moeyard")
    assert loaded.config._experts_implementation == "moeyard"
    made = transformers.Qwen3MoeConfig(experts_implementation="moeyard")
    assert made._experts_implementation == "moeyard"
    aria = model_of("aria")
    wanted = answer(aria, torch.arange(3, 9).view(1, 6), "moeyard")  # which moves its weights
    aria.save_pretrained(tmp_path / "moved")
    again = type(aria).from_pretrained(tmp_path / "moved")
    assert torch.equal(answer(again, torch.arange(3, 9).view(1, 6), "moeyard"), wanted)


@pytest.mark.parametrize("architecture", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("cache", "backend"),
    [
        ("dynamic", None),
        ("static", None),
        ("static", "aot_eager"),
        pytest.param("static", "inductor", marks=pytest.mark.full),
    ],
)
def test_generate_gives_the_same_tokens(architecture: str, cache: str, backend: str | None) -> None:
    model = model_of(architecture)
    tokens = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    model.set_experts_implementation("eager")
    wanted = model.generate(tokens, **options)
    model.set_experts_implementation("moeyard")
    torch._dynamo.reset()
    if backend is not None:
        model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    got = model.generate(tokens, cache_implementation=cache, **options)
    assert got.shape == (2, 15) and torch.equal(got, wanted)
