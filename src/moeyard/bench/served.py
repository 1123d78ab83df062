"""Layers of models by name or by config.json, as `moeyard.warmup` takes them: sizes on the meta device, no weights."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from moeyard.bench import workloads
from moeyard.bench.layers import activation
from moeyard.bench.routers import router_options
from moeyard.checkpoints.config import read_model
from moeyard.values import GPT_OSS_ACTIVATION, Activation, ExpertWeights, RouterOptions


class Served(NamedTuple):
    """A layer, and how its calls are made."""

    weights: ExpertWeights
    shared: ExpertWeights | None
    activation: Activation
    router: RouterOptions


def models() -> list[str]:
    """The workloads that describe a layer of a model."""
    return [name for name in workloads.names() if any(case.op == "moe_layer" for case in workloads.load(name))]


def served(model: str) -> Served:
    """The layer of a workload or of a configuration. ValueError says what it lacks."""
    if model.endswith(".json"):
        return _of_config(Path(model))
    if model not in models():
        raise ValueError(f"model: expected one of {', '.join(models())} or the path of a config.json, got {model!r}")
    case = next(case for case in workloads.load(model) if case.op == "moe_layer" and case.dtype == torch.bfloat16)
    sizes = (case["num_experts"], case["hidden_size"], case["intermediate_size"])
    size = int(case.model.get("shared_size", 0))
    shared = _weights(1, case["hidden_size"], size) if size else None
    biased = bool(case.model.get("bias"))
    return Served(_weights(*sizes, biased=biased), shared, activation(case), router_options(case, "meta"))


def _weights(experts: int, hidden_size: int, size: int, biased: bool = False) -> ExpertWeights:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    biases = (empty(experts, 2 * size), empty(experts, hidden_size)) if biased else (None, None)
    return ExpertWeights(empty(experts, 2 * size, hidden_size), empty(experts, hidden_size, size), *biases)


def _of_config(path: Path) -> Served:
    """What transformers' configurations of Mixture-of-Experts models say. Other activations than silu are refused."""
    if not path.is_file():
        raise ValueError(f"model: expected the path of a config.json, got {path}")
    model = read_model(path)
    config, experts = model.text, model.num_experts()

    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if type(value) is int and value > 0:
                return value
        if default is None:
            raise ValueError(f"{path}: expected a positive integer for {' or '.join(names)}, got none")
        return default

    if experts is None:
        raise ValueError(f"{path}: expected a number of experts, got none")
    oss = config.get("model_type") == "gpt_oss"
    if not oss and config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act: expected silu, got {config['hidden_act']!r}")
    hidden_size, size = number("hidden_size"), number("moe_intermediate_size", "intermediate_size")
    sigmoid = config.get("scoring_func") == "sigmoid" or config.get("topk_method") == "noaux_tc"
    factor = config.get("routed_scaling_factor")
    router: RouterOptions = {
        "top_k": number("num_experts_per_tok", "num_experts_per_token", "moe_top_k"),
        "scoring": "sigmoid" if sigmoid else "softmax",
        "renormalize": bool(config.get("norm_topk_prob", True)),
        "num_groups": number("n_group", default=1),
        "top_k_groups": number("topk_group", default=1),
        "routed_scaling_factor": float(factor) if isinstance(factor, int | float) else 1.0,
    }
    if sigmoid:
        router["selection_bias"] = torch.empty(experts, device="meta")
    shared_size = number("shared_expert_intermediate_size", default=0) or size * number("n_shared_experts", default=0)
    shared = _weights(1, hidden_size, shared_size) if shared_size else None
    weights = _weights(experts, hidden_size, size, biased=oss)
    return Served(weights, shared, GPT_OSS_ACTIVATION if oss else Activation(), router)


def options_of(layer: Served) -> dict[str, Any]:
    """The keyword arguments of `moeyard.warmup` for a layer."""
    return {"shared": layer.shared, "activation": layer.activation, **layer.router}
