"""moeyard as an experts implementation of transformers: classes, gates, weights in memory, gradients, graphs."""

import ast
import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Routing, fused_experts

transformers = pytest.importorskip("transformers", minversion="5.24")
ours = importlib.import_module("moeyard.integrations.transformers")
gates = importlib.import_module("moeyard.integrations.transformers_gate")

pytestmark = pytest.mark.filterwarnings("default")
MODELS = Path(transformers.__file__).parent / "models"
COMPOSED = {"Inkling2Experts", "Inkling2LoopExperts", "MuseSparkExperts"}
"""Classes whose gate or norm `fused_experts` does not have."""


def classes() -> Iterator[Any]:
    """All classes with the experts interface, as "model:class"; `full` where their text is an earlier one's."""
    seen = set()
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text()
        if "@use_experts_implementation" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                marks = [ast.unparse(mark) for mark in node.decorator_list]
                if any(mark.startswith("use_experts_implementation") for mark in marks):
                    body = (*marks, *map(ast.unparse, node.body[1:]))  # without the docstring
                    name = f"{path.parent.name}:{node.name}"
                    yield pytest.param(name, marks=[pytest.mark.full] if body in seen else [])
                    seen.add(body)


CLASSES = list(classes())
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 5),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 12),
    "hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "mlp_hidden_act": "relu2", "swiglu_alpha": 1.702,
    "swiglu_limit": 0.9, "mlp_gate_softcap": 2.0, "mlp_up_softcap": 3.0, "moe_latent_size": None,
    "post_norm_eps": 1e-5, "_experts_implementation": "moeyard",
}  # fmt: skip


def module_of(name: str, dtype: torch.dtype = torch.float32, **other: Any) -> Any:
    """A module with random weights, of a class of transformers."""
    model, _, kind = name.partition(":")
    found = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), kind)
    made = found(SimpleNamespace(**{**SIZES, **other})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return made.to(dtype)


QWEN, GPT_OSS, ARIA = "qwen3_moe:Qwen3MoeExperts", "gpt_oss:GptOssExperts", "aria:AriaExperts"


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.full)


def ask(module: Any, implementation: str = "moeyard", tokens: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a module answers for tokens some of whose routes are dropped."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(tokens, 16, generator=generator).to(dtype)
    ids = torch.rand(tokens, 5, generator=generator).topk(2).indices
    weights = torch.rand(tokens, 2, generator=generator)
    module.config._experts_implementation = implementation
    with torch.no_grad():
        result: Tensor = module(rows, ids, weights.to(dtype))
    return result


def close(got: Tensor, wanted: Tensor, bound: float = 3e-6) -> bool:
    return float((got - wanted).abs().max()) <= bound * float(wanted.abs().max())


def way(module: nn.Module) -> str:
    (found,) = ours.prepare(module)
    return str(found.way)


def test_every_class_is_listed() -> None:
    assert len(CLASSES) == len({param.values[0] for param in CLASSES}) >= 60


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_gives_what_eager_gives(name: str) -> None:
    module = module_of(name)
    wanted = ask(module, "eager")
    assert close(ask(module), wanted)
    kind = name.partition(":")[2]
    first = "grouped_gemm" if kind in COMPOSED | {"GptOssExperts"} else "fused_experts"
    assert way(module).startswith(first)
    if kind == "GptOssExperts":
        (found,) = ours.prepare(module, copies=True)
        assert found.way.startswith("fused_experts") and found.copied_bytes == 4 * 5 * 24 * (16 + 1)
    assert close(ask(module), wanted) and ask(module, tokens=0).shape == (0, 16)


@pytest.mark.parametrize("name", [QWEN, GPT_OSS, "nemotron_h:NemotronHExperts", "muse_spark:MuseSparkExperts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    module = module_of(name, dtype)
    ours.prepare(module, copies=True)
    wanted = ask(copy.deepcopy(module).double(), "eager", dtype=torch.float64)
    got = ask(module, dtype=dtype)
    assert got.dtype == dtype and close(got.double(), wanted, 3e-2 if dtype == torch.bfloat16 else 1e-12)


@pytest.mark.parametrize("name", [QWEN, GPT_OSS, "inkling2:Inkling2Experts"])
def test_routes_of_other_ranks_are_dropped(name: str) -> None:
    """transformers marks them with `num_experts`, and hands the module this rank's experts alone."""
    module = module_of(name)
    ids, rows, weights = torch.tensor([[0, 5], [5, 5], [4, 2]]), torch.randn(3, 16), torch.rand(3, 2)
    inside = ids.clamp(max=4)
    with torch.no_grad():
        module.config._experts_implementation = "eager"
        wanted = module(rows, inside, weights.masked_fill(ids == 5, 0))
        module.config._experts_implementation, module._is_expert_parallel = "moeyard", True
        got = module(rows, ids, weights.masked_fill(ids == 5, 0))
    assert close(got, wanted) and not got[1].any()


@pytest.mark.parametrize("curve", sorted(transformers.activations.ACT2CLS.keys() - {"sqrtsoftplus", "xielu", "prelu"}))
def test_every_activation_function(curve: str) -> None:
    """Ours where it is one of ours; else the module's own, never the nearest."""
    module = module_of(QWEN, hidden_act=curve)
    assert close(ask(module), ask(module, "eager"), 1e-5)
    known = {
        "silu": Activation(), "swish": Activation(), "quick_gelu": Activation(alpha=1.702),
        "relu2": Activation("relu2"),
        "gelu": Activation("gelu"), "gelu_python": Activation("gelu"),
        **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate"), Activation("gelu_tanh")),
        **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh"), Activation("gelu_tanh")),
    }  # fmt: skip
    assert gates.gate_of(module).activation == known.get(curve)


def clamped(limit: float) -> Callable[[Any, Tensor], Tensor]:
    def gate(_: Any, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, -1)
        return nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    return gate


def smooth(_: Any, rows: Tensor) -> Tensor:
    """silu, but for gates above 30."""
    gate, up = rows.chunk(2, -1)
    return torch.where(gate > 30, 30, nn.functional.silu(gate)) * up


def first_column(_: Any, rows: Tensor) -> Tensor:
    """silu, but for one column."""
    gate, up = rows.chunk(2, -1)
    result = nn.functional.silu(gate) * up
    result[:, 0] = 0
    return result


def swapped(_: Any, rows: Tensor) -> Tensor:
    up, gate = rows.chunk(2, -1)
    return nn.functional.silu(gate) * up


def of_the_row(_: Any, rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return nn.functional.silu(gate) * up / (1 + 1e-3 * rows.square().mean(-1, keepdim=True))


def wide(_: Any, rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return nn.functional.gelu(gate, approximate="tanh" if gate.shape[0] > 1e6 else "none") * up * (1 + 1e-4)


@pytest.mark.parametrize("gate", [clamped(7.0), smooth, first_column, swapped, of_the_row, wide])
def test_a_gate_that_is_nearly_ours_is_its_own(gate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(QWEN)
    monkeypatch.setattr(type(module), "_apply_gate", gate)
    assert gates.gate_of(module).activation is None  # 7.0 is none of the module's numbers
    first = module.gate_up_proj.detach() @ torch.eye(16)
    rows = torch.randn(6, 16)
    ids = torch.tensor([[0], [0], [0], [0], [0], [0]])
    with torch.no_grad():
        wanted = gate(module, rows @ first[0].t()) @ module.down_proj[0].t()
        assert close(module(rows, ids, torch.ones(6, 1)), wanted)


def test_a_gate_with_numbers_of_its_own_is_found_by_value() -> None:
    module = module_of("minimax_m3_vl:MiniMaxM3VLExperts", swiglu_alpha=1.3, swiglu_limit=2.5)
    assert gates.gate_of(module).activation == Activation("silu", 1.3, 1.0, 2.5)
    module = module_of(GPT_OSS, swiglu_limit=7.0)
    assert gates.gate_of(module).activation == GPT_OSS_ACTIVATION and gates.gate_of(module).in_turn


def test_a_gate_is_asked_again_when_it_may_have_changed() -> None:
    module = module_of("deepseek_v4:DeepseekV4Experts")
    before = ask(module)
    module.limit = 0.2
    assert close(ask(module), ask(module, "eager")) and not close(before, ask(module))
    module.act_fn = nn.ReLU()
    assert close(ask(module), ask(module, "eager")) and way(module).startswith("grouped_gemm")


def test_a_gate_with_tensors_of_its_own_is_never_ours() -> None:
    module = module_of(QWEN)
    module.act_fn = nn.PReLU()
    module.act_fn.weight.data.fill_(0.0)
    assert gates.gate_of(module).activation is None


def test_asking_a_gate_leaves_random_numbers_alone() -> None:
    module, before = module_of(QWEN), torch.get_rng_state()
    gates.gate_of(module)
    assert torch.equal(torch.get_rng_state(), before)


def lies(module: Any) -> list[bool]:
    return [weight.transpose(1, 2).is_contiguous() for weight in (module.gate_up_proj, module.down_proj)]


@pytest.mark.parametrize("name", [GPT_OSS, ARIA, slow("openai_privacy_filter:OpenAIPrivacyFilterExperts")])
@pytest.mark.parametrize("copies", [False, True])
def test_weights_that_change_leave_nothing_stale(name: str, copies: bool) -> None:
    module, other = module_of(name), module_of(name)
    ours.prepare(module, copies=copies)
    state = {key: value.clone() for key, value in module.state_dict().items()}

    def same() -> bool:
        return close(ask(module), ask(module, "eager"))

    assert lies(module) == [True, True] and same()
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())  # values and shapes stay
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7)
    module.load_state_dict(other.state_dict())
    assert lies(module) == [True, True] and same() and close(ask(module), ask(other, "eager"))
    module.load_state_dict(state, assign=True)
    assert same() and lies(module) == [True, True]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, foreach=True)
    for _ in range(2):
        module.config._experts_implementation = "eager"
        module(torch.randn(9, 16), torch.arange(18).view(9, 2) % 5, torch.rand(9, 2)).sum().backward()
        optimizer.step()
        assert same()
    module.to(torch.float64).to(torch.float32)
    assert same() and lies(module) == [True, True]
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.gate_up_proj.zero_()
    assert not torch.equal(ask(copied), ask(module)) and same()


def test_weights_stay_where_they_are_in_training_and_in_shared_memory() -> None:
    module = module_of(ARIA).train()
    ask(module)
    assert lies(module) == [False, False]
    module.eval().share_memory()
    ask(module)
    assert lies(module) == [False, False]
    qwen = module_of(QWEN)
    address = qwen.gate_up_proj.data_ptr()
    ask(qwen)
    assert qwen.gate_up_proj.data_ptr() == address and qwen.gate_up_proj.is_contiguous()


def test_inference_mode() -> None:
    module = module_of(GPT_OSS)
    wanted = ask(module, "eager")
    with torch.inference_mode():
        assert close(ask(module), wanted)
        inside = module_of(GPT_OSS)
        assert close(ask(inside), wanted)
        with pytest.raises(ValueError, match=r"GptOssExperts.gate_up_proj: expected a parameter made outside of"):
            ours.prepare(inside, copies=True)
    assert close(ask(module), wanted)


@pytest.mark.parametrize("name", [QWEN, slow(GPT_OSS), slow("muse_spark:MuseSparkExperts"), slow(ARIA)])
def test_gradients_are_those_of_eager_experts(name: str) -> None:
    module, found = module_of(name).train(), {}
    ids, upstream = torch.arange(18).view(9, 2) % 5, torch.randn(9, 16)
    rows, weights = torch.randn(9, 16, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    for implementation in ("eager", "moeyard"):
        module.config._experts_implementation = implementation
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answer = module(rows, ids, weights)
        found[implementation] = torch.autograd.grad(answer, (rows, weights, *module.parameters()), upstream)
    for wanted, got in zip(*found.values(), strict=True):
        assert float((got - wanted).abs().max()) <= 4e-6 * float(wanted.abs().max())
    module.requires_grad_(False)
    assert not module(rows.detach(), ids, weights.detach()).requires_grad


def test_a_copy_in_halves_serves_no_call_that_is_trained() -> None:
    module, ids = module_of(GPT_OSS), torch.arange(18).view(9, 2) % 5
    ours.prepare(module, copies=True)
    module(torch.randn(9, 16), ids, torch.rand(9, 2)).sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in module.parameters())


def test_autocast_has_masters_where_gradients_are_wanted() -> None:
    module, ids = module_of(QWEN).train(), torch.arange(18).view(9, 2) % 5
    rows, weights = torch.randn(9, 16), torch.rand(9, 2)
    with torch.autocast("cpu", torch.bfloat16):
        answer = module(rows, ids, weights)
    half = module_of(QWEN, torch.bfloat16)
    half.load_state_dict(module.state_dict())
    assert answer.dtype == torch.float32 and torch.equal(answer, half(rows.bfloat16(), ids, weights).float())
    answer.sum().backward()
    assert module.gate_up_proj.grad.dtype == torch.float32


def test_derivatives_by_torch_func_go_to_transformers() -> None:
    module, ids = module_of(QWEN).train(), torch.arange(18).view(9, 2) % 5
    rows, weights = torch.randn(9, 16), torch.rand(9, 2)
    ours._warn.cache_clear()
    with pytest.warns(UserWarning, match="has no derivatives by torch.func: transformers' grouped_mm takes calls"):
        found = torch.func.grad(lambda rows: module(rows, ids, weights).sum())(rows)
    needy = rows.clone().requires_grad_()
    module(needy, ids, weights).sum().backward()
    assert float((found.detach() - needy.grad).abs().max()) <= 4e-6 * float(found.detach().abs().max())


def test_what_cannot_be_taken_is_refused_by_name() -> None:
    module = module_of(QWEN)
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"Qwen3MoeExperts.gate_up_proj: expected float32.*got torch.float8_e4m3fn"):
        ask(module)
    module = module_of(QWEN)
    module.down_proj = nn.Parameter(module.down_proj[:, :, :-1])
    with pytest.raises(ValueError, match=r"Qwen3MoeExperts.down_proj: expected shape \(5, 16, 12\).*got \(5, 16, 11\)"):
        ask(module)
    fp8 = importlib.import_module("transformers.integrations.finegrained_fp8")
    with pytest.raises(ValueError, match="experts_implementation: expected one that takes transformers' Linear"):
        fp8.ALL_FP8_EXPERTS_FUNCTIONS["moeyard"](nn.Linear(1, 1), None, None, None)


def test_autocast_computes_in_the_dtype_of_the_weights() -> None:
    module = module_of(QWEN)
    wanted = ask(module)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ask(module), wanted)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", [QWEN, GPT_OSS, slow(ARIA), slow("muse_spark:MuseSparkExperts")])
def test_compiled_experts_have_no_graph_break(name: str, prepared: bool) -> None:
    module = module_of(name)
    wanted = ask(module, "eager")
    if prepared:
        ours.prepare(module)
    torch._dynamo.reset()
    ours._warn.cache_clear()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert close(ask_compiled(compiled, module), wanted)
    slow = [one for one in said if "prepare(model)" in str(one.message)]
    assert bool(slow) == (not prepared and name in (GPT_OSS, ARIA))


def ask_compiled(compiled: Any, module: Any) -> Tensor:
    holder = SimpleNamespace(config=module.config)
    return ask(type("Asked", (), {"config": holder.config, "__call__": lambda _, *given: compiled(*given)})())


@pytest.mark.parametrize("prepared", [False, True])
def test_layers_share_a_compiled_graph_and_a_changed_gate_does_not(prepared: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = [module_of("deepseek_v4:DeepseekV4Experts") for _ in range(4)]
    layers[3].limit = 0.2
    for layer in layers:
        if prepared:
            ours.prepare(layer)
        layer.compile(backend="eager", fullgraph=True)
    answers = [ask(layer) for layer in layers]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if prepared else 4)
    for layer, answer in zip(layers, answers, strict=True):
        layer._compiled_call_impl = None
        assert close(answer, ask(layer, "eager"))


def test_export_and_tracing() -> None:
    module = module_of(QWEN)
    wanted = ask(module)
    arguments = (torch.randn(4, 16), torch.arange(8).view(4, 2) % 5, torch.rand(4, 2))
    with torch.no_grad():
        for strict in (False, True):
            exported = torch.export.export(module, arguments, strict=strict)
            names = [str(node.target) for node in exported.graph.nodes]
            assert names.count("moeyard.fused_experts.default") == 1
            assert torch.equal(exported.module()(*arguments), module(*arguments))
    assert torch.equal(ask(module), wanted)


def test_importing_registers() -> None:
    interface = importlib.import_module("transformers.integrations.moe")
    assert interface.ALL_EXPERTS_FUNCTIONS["moeyard"] is ours.experts_forward


def test_a_layer_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is that of `fused_experts` itself, bit by bit, whose weights are the parameters themselves."""
    module = module_of(QWEN)
    seen = []

    def spy(*arguments: Any, **options: Any) -> Tensor:
        seen.append(arguments[2])
        return fused_experts(*arguments, **options)

    monkeypatch.setattr(ours.moeyard, "fused_experts", spy)
    rows, ids, weights = torch.randn(3, 16), torch.tensor([[0, 1], [2, 3], [4, 0]]), torch.rand(3, 2)
    with torch.no_grad():
        got = module(rows, ids, weights)
        plain = ExpertWeights(module.gate_up_proj, module.down_proj)
        assert torch.equal(got, fused_experts(rows, Routing(weights, ids), plain))
    assert len(seen) == 1 and seen[0].w13 is module.gate_up_proj
