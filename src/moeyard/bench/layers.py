"""Inputs of cases of experts and whole layers of named models, what is computed for them, and the check of answers."""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

import moeyard
from moeyard.bench import quantised
from moeyard.bench.memory import peak_extra_bytes
from moeyard.bench.operators import Case, Provider, Run, generator_on
from moeyard.bench.routers import router_options
from moeyard.testing import ROUTINGS, Judged, plain_experts
from moeyard.values import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Routing

SIZES = ("num_tokens", "num_experts", "top_k", "hidden_size", "intermediate_size", "dtype")
_CHECKED_TOKENS = 32
_CHECKED_ON_GPU = 8  # there a case has the sizes of a whole model
_LONG_CALL_S = 2e-3  # a graph of longer calls has few of them
_GPU_CALLS = 20
_EXPECTED = (4e12, 8e14)  # bytes and operations a second, of the same order as any card's that these cases are for
_ERRORS = {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}
"""Root-mean-square errors that are let through, in units of eps times that of the answer."""


def activation(case: Case) -> Activation:
    """The activation of a case's model."""
    return GPT_OSS_ACTIVATION if case.model.get("activation") == "gpt-oss" else Activation()


@dataclass(frozen=True)
class LayerInputs:
    """What a case hands to every provider."""

    case: Case
    hidden_states: Tensor
    """[num_tokens, hidden_size]"""
    routing: Routing
    weights: ExpertWeights
    router_weight: Tensor
    """[num_experts, hidden_size]"""
    shared: ExpertWeights | None
    """One expert that every token passes, of a moe_layer."""
    shared_gate: Tensor | None
    """[1, hidden_size]"""

    @cached_property
    def some(self) -> tuple[Tensor, Tensor, Routing]:
        """(the tokens for which answers are checked, their rows, their routing)."""
        count, device = self.hidden_states.shape[0], self.hidden_states.device
        wanted = _CHECKED_ON_GPU if device.type == "cuda" else _CHECKED_TOKENS
        tokens = torch.arange(0, count, max(1, count // wanted), device=device)
        routing = Routing(self.routing.topk_weights[tokens], self.routing.topk_ids[tokens])
        return tokens, self.hidden_states[tokens], routing

    @cached_property
    def judged(self) -> Judged:
        """What quantised experts give for these tokens, and how far from it an answer may be."""
        _, rows, routing = self.some
        return quantised.judged(rows, routing, self.weights, activation(self.case))

    @cached_property
    def checked(self) -> tuple[Tensor, Tensor]:
        """(some tokens, what the op gives for them in float64)."""
        (tokens, rows, routing), act, device = self.some, activation(self.case), self.hidden_states.device
        if self.weights.scheme is not None:
            return tokens, self.judged.wide
        if self.case.op == "moe_layer":
            routing = moeyard.route(self.logits_of(rows), impl="reference", **router_options(self.case, device))
        wide = plain_experts(rows, routing, self.weights, act, dtype=torch.float64)
        if self.case.op == "moe_layer" and self.shared is not None:
            factor = torch.ones(len(rows), 1, device=device)
            if self.shared_gate is not None:
                factor = torch.sigmoid(rows.double() @ self.shared_gate.double().t()).float()
            everyone = Routing(factor, torch.zeros(len(rows), 1, dtype=torch.int32, device=device))
            wide = wide + plain_experts(rows, everyone, self.shared, act, dtype=torch.float64)
        return tokens, wide

    def logits_of(self, rows: Tensor) -> Tensor:
        """The router's product, as the layer computes it."""
        return functional.linear(rows.to(self.router_weight.dtype), self.router_weight)


@lru_cache(maxsize=1)
def weights_of(
    experts: int, hidden_size: int, size: int, dtype: torch.dtype, bias: bool, device: torch.device
) -> ExpertWeights:
    """Random weights of the size that keeps rows near 1; one set is kept, since making it takes longest."""
    generator = Generator(device).manual_seed(11)

    def draw(*shape: int) -> Tensor:
        drawn = torch.empty(shape, dtype=dtype, device=device).uniform_(-1, 1, generator=generator)
        return drawn.mul_((3 / shape[-1]) ** 0.5)

    biases = (draw(experts, 2 * size), draw(experts, hidden_size)) if bias else (None, None)
    return ExpertWeights(draw(experts, 2 * size, hidden_size), draw(experts, hidden_size, size), *biases)


def weights_of_case(case: Case, device: torch.device) -> ExpertWeights:
    """The experts of a case, quantised where it has a scheme."""
    scheme, bias = quantised.scheme_of_case(case), bool(case.model.get("bias"))
    sizes = case["num_experts"], case["hidden_size"], case["intermediate_size"]
    if scheme is None:
        return weights_of(*sizes, case.dtype, bias, device)
    return quantised.weights_of(*sizes, scheme, case.dtype, bias, device)


def draw_layer(case: Case, device: torch.device, generator: Generator) -> LayerInputs:
    """Fresh tokens on the weights of the case's sizes."""
    tokens, experts, top_k = case["num_tokens"], case["num_experts"], case["top_k"]
    hidden_size, dtype = case["hidden_size"], case.dtype
    generator = generator_on(device, generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    ids = ROUTINGS[case.routing](tokens, experts, top_k, generator)
    factors = torch.rand(ids.shape, generator=generator, device=device)
    routing = Routing(factors / factors.sum(1, keepdim=True), ids)
    hidden = normal(tokens, hidden_size).to(dtype)
    weights = weights_of_case(case, device)
    router = (normal(experts, hidden_size) / hidden_size**0.5).to(dtype)
    shared, gate = None, None
    if case.op == "moe_layer" and case.model.get("shared_size"):
        shared = weights_of.__wrapped__(1, hidden_size, case.model["shared_size"], dtype, False, device)
        gate = normal(1, hidden_size).to(dtype) if case.model.get("shared_gate") else None
    return LayerInputs(case, hidden, routing, weights, router, shared, gate)


def draw_sets(case: Case, device: torch.device, generator: Generator) -> list[LayerInputs]:
    """The inputs that the calls of a graph rotate over (`sets_and_calls`).

    Single tokens of uniform routing go through all experts before any comes again, so that no call finds its weights
    in the cache.
    """
    sets, _ = sets_and_calls(case)
    made = [draw_layer(case, device, generator) for _ in range(sets)]
    if case["num_tokens"] > 1 or case.routing != "uniform" or sets == 1:
        return made
    order = torch.randperm(case["num_experts"], generator=generator).int().to(device)
    ids = order[: sets * case["top_k"]].view(sets, 1, -1)
    return [replace(x, routing=Routing(x.routing.topk_weights, ids[i])) for i, x in enumerate(made)]


def sets_and_calls(case: Case) -> tuple[int, int]:
    """(input sets, calls of a graph that rotate over them) of a case of experts on a GPU: at least 20 calls up to 256
    tokens; where calls are longer and their weights exceed any cache, what lasts about 2 ms.
    """
    if case["num_tokens"] == 1:
        sets = max(1, min(64, case["num_experts"] // case["top_k"]))
        return sets, sets * math.ceil(_GPU_CALLS / sets)
    if case["num_tokens"] <= 256:
        return _GPU_CALLS, _GPU_CALLS
    expected = max(bytes_moved(case) / _EXPECTED[0], operations(case) / _EXPECTED[1])
    return 2, max(2, min(_GPU_CALLS, round(_LONG_CALL_S / expected)))


def error(_: Case, __: Provider, inputs: LayerInputs, got: Tensor) -> str | None:
    """What is wrong with an answer, against float64 over some tokens; None if it is right.

    Quantised experts are held to the budget of `judged_experts`, row by row.
    """
    if inputs.weights.scheme is not None:
        return inputs.judged.error(got[inputs.some[0]])
    rms, largest, scale = errors(inputs, got)
    allowed = _ERRORS[got.dtype] * torch.finfo(got.dtype).eps * scale
    if not rms <= allowed:  # NaN fails too
        return f"root-mean-square error {rms:.2e} where {allowed:.2e} is allowed; largest {largest:.2e}"
    return None


def errors(inputs: LayerInputs, got: Tensor) -> tuple[float, float, float]:
    """(root-mean-square and largest error against float64, root mean square of the answer) over some tokens."""
    tokens, wide = inputs.checked
    off = got[tokens].to(wide.device).double() - wide
    return float(off.square().mean().sqrt()), float(off.abs().max()), float(wide.square().mean().sqrt())


def bytes_moved(case: Case) -> int:
    """The bytes that any answer must read and write; weights of the experts that are expected to be touched."""
    tokens, experts, top_k = case["num_tokens"], case["num_experts"], case["top_k"]
    touched = experts * (1 - (1 - top_k / experts) ** tokens)
    return _bytes(case, touched)


def _bytes(case: Case, touched: float) -> int:
    """Bytes of the weights of so many experts, and of all tokens twice."""
    scheme, width = quantised.scheme_of_case(case), case.dtype.itemsize
    per_weight = width if scheme is None else quantised.bytes_per_weight(scheme)
    values = touched * 3 * case["intermediate_size"] * per_weight + 2 * case["num_tokens"] * width
    return int(values * case["hidden_size"])


def bytes_of(inputs: LayerInputs) -> int:
    """The bytes that any answer must read and write; weights of the experts that these inputs touch."""
    case, ids = inputs.case, inputs.routing.topk_ids
    touched = len(torch.unique(ids[(ids >= 0) & (ids < case["num_experts"])]))
    return _bytes(case, touched)


def operations(case: Case) -> int:
    """Floating-point operations of the experts' products."""
    return int(6 * case["num_tokens"] * case["top_k"] * case["hidden_size"] * case["intermediate_size"])


def beside(case: Case, run: Run, inputs: LayerInputs) -> dict[str, Any]:
    """What a row has besides times: errors against float64 over some tokens, and memory.

    `extra_bytes` is how far a call raises memory, `needed_bytes` what both products and the activation take, one row
    per route each, in a computation stage by stage.
    """
    rms, largest, scale = errors(inputs, run(inputs))
    row = 3 * case["intermediate_size"] + case["hidden_size"]
    return {
        "error_rms": float(f"{rms:.4g}"),
        "error_max": float(f"{largest:.4g}"),
        "answer_rms": float(f"{scale:.4g}"),
        "extra_bytes": peak_extra_bytes(run, inputs, inputs.hidden_states.device),
        "needed_bytes": int(case["num_tokens"] * case["top_k"] * row * case.dtype.itemsize),
    }
