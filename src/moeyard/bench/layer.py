"""Cases of routers, experts and whole layers of named models: inputs, who answers, and whether the answer is right."""

import ctypes
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

import moeyard
from moeyard import impls
from moeyard.bench.routing import ROUTINGS
from moeyard.bench.verify import routing_error, rows_of_experts
from moeyard.bench.workloads import Case
from moeyard.values import Activation, ExpertWeights, Routing

OPS = ("route", "fused_experts", "moe_layer")
_CHECKED_TOKENS = 32
_COPIED_BYTES = 1 << 30  # providers that copy weights for every route take part up to here
_ERRORS = {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}
"""Root-mean-square errors that are let through, in units of eps times that of the answer."""


def takes(case: Case) -> bool:
    """Whether a case belongs here: routes do if they are a named model's."""
    return case.op in OPS and (case.op != "route" or bool(case.model))


@dataclass(frozen=True)
class LayerInputs:
    """What a case hands to every provider."""

    case: Case
    logits: Tensor
    hidden_states: Tensor
    routing: Routing
    weights: ExpertWeights
    router_weight: Tensor
    shared: ExpertWeights | None
    shared_gate: Tensor | None

    @cached_property
    def checked(self) -> tuple[Tensor, Tensor]:
        """(some tokens, what the op gives for them in float64)."""
        tokens = torch.arange(0, self.hidden_states.shape[0], max(1, self.hidden_states.shape[0] // _CHECKED_TOKENS))
        rows, act = self.hidden_states[tokens], activation(self.case)
        routing = Routing(self.routing.topk_weights[tokens], self.routing.topk_ids[tokens])
        if self.case.op == "moe_layer":
            routing = moeyard.route(self.logits_of(rows), impl="reference", **router_options(self.case))
        wide = rows_of_experts(rows, routing, self.weights, act)
        if self.case.op == "moe_layer" and self.shared is not None:
            factor = torch.ones(len(rows), 1)
            if self.shared_gate is not None:
                factor = torch.sigmoid(rows.double() @ self.shared_gate.double().t()).float()
            everyone = Routing(factor, torch.zeros(len(rows), 1, dtype=torch.int32))
            wide = wide + rows_of_experts(rows, everyone, self.shared, act)
        return tokens, wide

    def logits_of(self, rows: Tensor) -> Tensor:
        """The router's product, as the layer computes it."""
        return functional.linear(rows.to(self.router_weight.dtype), self.router_weight)


def activation(case: Case) -> Activation:
    """The activation of a case's model."""
    return moeyard.GPT_OSS_ACTIVATION if case.model.get("activation") == "gpt-oss" else Activation()


def router_options(case: Case) -> dict[str, Any]:
    """The keyword arguments of `route` for a case's model; the bias is a fixed random one."""
    keys = ("scoring", "renormalize", "num_groups", "top_k_groups", "routed_scaling_factor")
    options = {key: case.model[key] for key in keys if key in case.model}
    if case.model.get("selection_bias"):
        options["selection_bias"] = torch.randn(case["num_experts"], generator=Generator().manual_seed(7)) * 0.05
    return {"top_k": case["top_k"], **options}


@lru_cache(maxsize=1)
def _weights(experts: int, hidden_size: int, size: int, dtype: torch.dtype, bias: bool) -> ExpertWeights:
    """Random weights of the size that keeps rows near 1; one set is kept, since making it takes longest."""
    generator = Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype).uniform_(-1, 1, generator=generator).mul_((3 / shape[-1]) ** 0.5)

    biases = (draw(experts, 2 * size), draw(experts, hidden_size)) if bias else (None, None)
    return ExpertWeights(draw(experts, 2 * size, hidden_size), draw(experts, hidden_size, size), *biases)


def make_inputs(case: Case, device: torch.device, generator: Generator) -> LayerInputs:
    """Fresh tokens on the weights of the case's sizes."""
    tokens, experts, top_k = case["num_tokens"], case["num_experts"], case["top_k"]
    dtype = getattr(torch, case["dtype"])
    logits = torch.randn(tokens, experts, generator=generator).to(dtype)
    ids = ROUTINGS[case.routing](tokens, experts, top_k, generator)
    factors = torch.rand(ids.shape, generator=generator)
    routing = Routing(factors / factors.sum(1, keepdim=True), ids)
    hidden_size, size = (1, 1) if case.op == "route" else (case["hidden_size"], case["intermediate_size"])
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    weights = _weights(1 if case.op == "route" else experts, hidden_size, size, dtype, bool(case.model.get("bias")))
    router = torch.randn(experts, hidden_size, generator=generator) / hidden_size**0.5
    shared, gate = None, None
    if case.op == "moe_layer" and case.model.get("shared_size"):
        wide = _weights.__wrapped__(1, hidden_size, case.model["shared_size"], dtype, False)
        shared = wide
        gate = torch.randn(1, hidden_size, generator=generator).to(dtype) if case.model.get("shared_gate") else None
    if device.type != "cpu":
        raise ValueError(f"device: expected cpu for {case.op} (GPU providers are to come), got {device}")
    return LayerInputs(case, logits, hidden, routing, weights, router.to(dtype), shared, gate)


def providers(case: Case, device: torch.device) -> list[tuple[str, str, Callable[[Any], Any]]]:
    """(name, impl, run) of everyone who can answer a case."""
    found: list[tuple[str, str, Callable[[Any], Any]]] = []
    op = "fused_experts" if case.op == "moe_layer" else case.op
    reasons = impls.explain(op, device, getattr(torch, case["dtype"])).reasons
    for impl in impls.impl_names(op):
        if impl != "reference" and (reasons[impl] == "chosen" or reasons[impl].startswith("comes after")):
            found.append(("moeyard", impl, _moeyard(case, impl)))
    options, act = router_options(case), activation(case)
    if case.op == "route":
        found.append(("torch", "plain", lambda x: _plain_route(x.logits, **options)))
        found.append(("torch", "topk alone", lambda x: torch.topk(x.logits, case["top_k"], dim=1)))
    elif case.op == "fused_experts":
        found.append(("torch", "plain", lambda x: _plain_experts(x.hidden_states, x.routing, x.weights, act)))
        found += _transformers(case)
    return found


def error(case: Case, impl: str, inputs: LayerInputs, got: Any) -> str | None:
    """What is wrong with an answer; None if it is right."""
    if case.op == "route":
        return None if impl == "topk alone" else routing_error(inputs.logits, got, **_gate_options(case))
    rms, largest, scale = errors(inputs, got)
    allowed = _ERRORS[got.dtype] * torch.finfo(got.dtype).eps * scale
    if not rms <= allowed:  # NaN fails too
        return f"root-mean-square error {rms:.2e} where {allowed:.2e} is allowed; largest {largest:.2e}"
    return None


def errors(inputs: LayerInputs, got: Tensor) -> tuple[float, float, float]:
    """(root-mean-square and largest error against float64, root mean square of the answer) over some tokens."""
    tokens, wide = inputs.checked
    off = got[tokens].double() - wide
    return float(off.square().mean().sqrt()), float(off.abs().max()), float(wide.square().mean().sqrt())


def bytes_moved(case: Case) -> int:
    """The bytes that any answer must read and write; weights of the experts that are expected to be touched."""
    width = getattr(torch, case["dtype"]).itemsize
    tokens, experts, top_k = case["num_tokens"], case["num_experts"], case["top_k"]
    if case.op == "route":
        return int(tokens * (experts * width + top_k * 8))
    touched = experts * (1 - (1 - top_k / experts) ** tokens)
    return int((touched * 3 * case["intermediate_size"] + 2 * tokens) * case["hidden_size"] * width)


def needed_bytes(case: Case) -> int:
    """What the intermediates of a computation stage by stage take: both products and the activation, a row a route."""
    row = 3 * case["intermediate_size"] + case["hidden_size"]
    return int(case["num_tokens"] * case["top_k"] * row * getattr(torch, case["dtype"]).itemsize)


def peak_extra_bytes(run: Callable[[Any], Any], inputs: Any) -> int | None:
    """How far the resident memory of this process rises during a call, its result included; None where unknown."""
    if sys.platform != "linux":
        return None
    run(inputs)
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    result = run(inputs)
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def _gate_options(case: Case) -> dict[str, Any]:
    return {key: value for key, value in router_options(case).items() if key != "top_k"}


def _moeyard(case: Case, impl: str) -> Callable[[Any], Any]:
    options, act = router_options(case), activation(case)
    if case.op == "route":
        return lambda x: moeyard.route(x.logits, impl=impl, **options)
    if case.op == "fused_experts":
        return lambda x: moeyard.fused_experts(x.hidden_states, x.routing, x.weights, activation=act, impl=impl)
    return lambda x: moeyard.moe_layer(
        x.hidden_states, x.router_weight, x.weights, activation=act, shared=x.shared, shared_gate=x.shared_gate,
        impl=impl, **options,
    )  # fmt: skip


def _plain_route(
    logits: Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = False,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    routed_scaling_factor: float = 1.0,
) -> Routing:
    """As model files write it."""
    scores = torch.softmax(logits.float(), 1) if scoring == "softmax" else torch.sigmoid(logits.float())
    keys = scores if selection_bias is None else scores + selection_bias
    if num_groups > 1:
        grouped = keys.view(len(keys), num_groups, -1)
        best = grouped.amax(2) if selection_bias is None else grouped.topk(2, 2).values.sum(2)
        kept = torch.zeros_like(best).scatter_(1, best.topk(top_k_groups, 1, sorted=False).indices, 1).bool()
        keys = keys.masked_fill(~kept.repeat_interleave(grouped.shape[2], 1), -torch.inf)
    ids = keys.topk(top_k, 1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    return Routing(weights * routed_scaling_factor, ids.int())


def _plain_experts(hidden: Tensor, routing: Routing, weights: ExpertWeights, act: Activation) -> Tensor:
    """A loop over experts, at the dtype of the rows."""
    result = torch.zeros_like(hidden)
    for expert in range(weights.num_local_experts):
        token, k = torch.where(routing.topk_ids == expert)
        if not len(token):
            continue
        b13, b2 = (None if b is None else b[expert] for b in (weights.w13_bias, weights.w2_bias))
        gate, up = functional.linear(hidden[token], weights.w13[expert], b13).chunk(2, 1)
        if act.limit is not None:
            gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
        rows = functional.linear(gate * torch.sigmoid(act.alpha * gate) * (up + act.beta), weights.w2[expert], b2)
        result.index_add_(0, token, (rows * routing.topk_weights[token, k, None]).to(rows.dtype))
    return result


def _transformers(case: Case) -> list[tuple[str, str, Callable[[Any], Any]]]:
    """The experts of the model's own class in transformers, in each of its implementations; none if not installed."""
    where = case.model.get("transformers")
    if where is None or not impls.installed("transformers"):
        return []
    module, _, name = where.partition(":")
    kind = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    experts: dict[int, Any] = {}

    def make(weights: ExpertWeights) -> Any:
        if id(weights) not in experts:
            experts.clear()
            experts[id(weights)] = _module(kind, weights)
        return experts[id(weights)]

    def run(implementation: str) -> Callable[[Any], Any]:
        def call(x: Any) -> Tensor:
            made = make(x.weights)
            made.config._experts_implementation = implementation
            with torch.no_grad():
                result: Tensor = made(x.hidden_states, x.routing.topk_ids.long(), x.routing.topk_weights.to(x.logits))
            return result

        return call

    found = [("transformers", name, run(name)) for name in ("eager", "grouped_mm")]
    copied = case["num_tokens"] * case["top_k"] * 2 * case["intermediate_size"] * case["hidden_size"]
    if copied * getattr(torch, case["dtype"]).itemsize <= _COPIED_BYTES:
        found.append(("transformers", "batched_mm", run("batched_mm")))
    return found


def _module(kind: Any, weights: ExpertWeights) -> Any:
    """transformers' experts module around our weights, without copying where its order is ours."""
    experts, hidden_size, size = weights.w2.shape
    config = SimpleNamespace(
        num_experts=experts, num_local_experts=experts, n_routed_experts=experts, hidden_size=hidden_size,
        intermediate_size=size, moe_intermediate_size=size, hidden_act="silu", swiglu_alpha=1.702, swiglu_limit=7.0,
        _experts_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        made = kind(config)

    def parameter(tensor: Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(tensor, requires_grad=False)

    if weights.w13_bias is None or weights.w2_bias is None:
        made.gate_up_proj, made.down_proj = parameter(weights.w13), parameter(weights.w2)
        return made
    mixed = torch.stack(weights.w13.chunk(2, 1), 2).flatten(1, 2)  # gate and up in turn
    made.gate_up_proj = parameter(mixed.transpose(1, 2).contiguous())
    made.gate_up_proj_bias = parameter(torch.stack(weights.w13_bias.chunk(2, 1), 2).flatten(1, 2))
    made.down_proj, made.down_proj_bias = parameter(weights.w2.transpose(1, 2).contiguous()), parameter(weights.w2_bias)
    return made
