"""moeyard's experts under models of transformers on a GPU: logits, generated tokens, a compiler with CUDA graphs."""

import importlib
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")
ours = importlib.import_module("moeyard.integrations.transformers")

pytestmark = pytest.mark.filterwarnings("default")
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_experts_per_tok": 2, "initializer_range": 0.1,
}  # fmt: skip


def model_of(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    if kind == "gpt_oss":
        config = transformers.GptOssConfig(num_local_experts=8, **SIZES)
        made = transformers.GptOssForCausalLM(config)
    else:
        made = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(num_experts=8, **SIZES))
    return made.eval().to("cuda", dtype)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_layers_answer_as_eager_ones(kind: str, copies: bool, dtype: torch.dtype, bound: float) -> None:
    model = model_of(kind, dtype)
    ours.prepare(model, copies=copies)
    experts = model.model.layers[0].mlp.experts
    for tokens in (1, 7, 64, 700):
        rows = torch.randn(tokens, 256, device="cuda").to(dtype)
        ids = torch.rand(tokens, 8, device="cuda").topk(2).indices
        weights = torch.rand(tokens, 2, device="cuda")
        answers = {}
        for name in ("eager", "moeyard"):
            model.set_experts_implementation(name)
            with torch.no_grad():
                answers[name] = experts(rows, ids, weights.to(dtype)).float()
        error = (answers["moeyard"] - answers["eager"]).square().mean().sqrt()
        assert float(error) <= bound * float(answers["eager"].square().mean().sqrt()), tokens


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_generate_gives_the_same_tokens(kind: str, mode: str | None) -> None:
    model = model_of(kind, torch.float32)
    tokens = torch.randint(3, 256, (2, 9), device="cuda")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    model.set_experts_implementation("eager")
    wanted = model.generate(tokens, **options)
    model.set_experts_implementation("moeyard")
    ours.prepare(model)
    if mode is None:
        got = model.generate(tokens, **options)
    else:
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, mode=mode, fullgraph=True)
        got = model.generate(tokens, cache_implementation="static", **options)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_layer_is_captured_and_replayed_with_other_routes(kind: str) -> None:
    model = model_of(kind, torch.bfloat16)
    model.set_experts_implementation("moeyard")
    experts = model.model.layers[0].mlp.experts
    rows = torch.randn(33, 256, device="cuda", dtype=torch.bfloat16)
    ids = torch.rand(33, 8, device="cuda").topk(2).indices
    weights = torch.rand(33, 2, device="cuda")
    with torch.no_grad():
        experts(rows, ids, weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = experts(rows, ids, weights)
        for _ in range(3):
            ids.copy_(torch.rand(33, 8, device="cuda").topk(2).indices)
            rows.normal_()
            graph.replay()
            assert torch.equal(result, experts(rows, ids, weights))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_gradients_are_those_of_eager_experts(kind: str) -> None:
    model = model_of(kind, torch.float32).train()
    tokens = torch.randint(3, 256, (2, 40), device="cuda")
    found = {}
    for name in ("eager", "moeyard"):
        model.set_experts_implementation(name)
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        found[name] = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    for mine, theirs in zip(found["moeyard"], found["eager"], strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max()) + 1e-9
