"""Cases of routers, experts and whole layers of named models: inputs, who answers, and whether the answer is right."""

import ctypes
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

import moeyard
from moeyard import impls
from moeyard.bench import layer_peers, vllm_peer
from moeyard.bench.layer_peers import activation
from moeyard.bench.results import peer_version
from moeyard.bench.workloads import Case
from moeyard.testing import ROUTINGS, plain_experts, routing_error
from moeyard.values import ExpertWeights, Routing

OPS = ("route", "fused_experts", "moe_layer")
_CHECKED_TOKENS = 32
_CHECKED_ON_GPU = 8  # there sizes are those of whole models
_LONG_CALL_S = 2e-3  # a graph of longer calls has few of them
_GPU_CALLS = 20
_EXPECTED = (4e12, 8e14)  # bytes and operations a second, of the same order as any card's that these cases are for
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
        count, device = self.hidden_states.shape[0], self.hidden_states.device
        wanted = _CHECKED_ON_GPU if device.type == "cuda" else _CHECKED_TOKENS
        tokens = torch.arange(0, count, max(1, count // wanted), device=device)
        rows, act = self.hidden_states[tokens], activation(self.case)
        routing = Routing(self.routing.topk_weights[tokens], self.routing.topk_ids[tokens])
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


def router_options(case: Case, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The keyword arguments of `route` for a case's model; the bias is a fixed random one."""
    keys = ("scoring", "renormalize", "num_groups", "top_k_groups", "routed_scaling_factor")
    options = {key: case.model[key] for key in keys if key in case.model}
    if case.model.get("selection_bias"):
        bias = torch.randn(case["num_experts"], generator=Generator().manual_seed(7)) * 0.05
        options["selection_bias"] = bias.to(device)
    return {"top_k": case["top_k"], **options}


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


def make_inputs(case: Case, device: torch.device, generator: Generator) -> LayerInputs:
    """Fresh tokens on the weights of the case's sizes."""
    tokens, experts, top_k = case["num_tokens"], case["num_experts"], case["top_k"]
    dtype = getattr(torch, case["dtype"])
    if device.type == "cuda":  # drawn where they are needed
        generator = Generator(device).manual_seed(int(torch.randint(2**31, (), generator=generator)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    logits = normal(tokens, experts).to(dtype)
    ids = ROUTINGS[case.routing](tokens, experts, top_k, generator)
    factors = torch.rand(ids.shape, generator=generator, device=device)
    routing = Routing(factors / factors.sum(1, keepdim=True), ids)
    hidden_size, size = (1, 1) if case.op == "route" else (case["hidden_size"], case["intermediate_size"])
    hidden = normal(tokens, hidden_size).to(dtype)
    bias = bool(case.model.get("bias"))
    weights = weights_of(1 if case.op == "route" else experts, hidden_size, size, dtype, bias, device)
    router = normal(experts, hidden_size) / hidden_size**0.5
    shared, gate = None, None
    if case.op == "moe_layer" and case.model.get("shared_size"):
        wide = weights_of.__wrapped__(1, hidden_size, case.model["shared_size"], dtype, False, device)
        shared = wide
        gate = normal(1, hidden_size).to(dtype) if case.model.get("shared_gate") else None
    return LayerInputs(case, logits, hidden, routing, weights, router.to(dtype), shared, gate)


def make_sets(case: Case, device: torch.device, generator: Generator) -> list[LayerInputs]:
    """The inputs that the calls of a graph rotate over (`sets_and_calls`).

    Single tokens of uniform routing go through all experts before any comes again, so that no call finds its weights
    in the cache.
    """
    sets, _ = sets_and_calls(case)
    made = [make_inputs(case, device, generator) for _ in range(sets)]
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


def providers(case: Case, device: torch.device) -> list[tuple[str, str, Callable[[Any], Any], bool]]:
    """(name, impl, run, whether it waits for the device) of everyone who can answer a case."""
    found: list[tuple[str, str, Callable[[Any], Any], bool]] = []
    op = "fused_experts" if case.op == "moe_layer" else case.op
    reasons = impls.explain(op, device, getattr(torch, case["dtype"])).reasons
    for impl in impls.impl_names(op):
        if impl != "reference" and (reasons[impl] == "chosen" or reasons[impl].startswith("comes after")):
            found.append(("moeyard", impl, _moeyard(case, impl, device), False))
    options, act = router_options(case, device), activation(case)
    on_gpu = device.type == "cuda"
    if case.op == "route":
        found.append(("torch", "plain", lambda x: layer_peers.plain_route(x.logits, **options), False))
        found.append(("torch", "topk alone", lambda x: torch.topk(x.logits, case["top_k"], dim=1), False))
    elif case.op == "fused_experts":
        if on_gpu and case["dtype"] == "bfloat16":
            found.append(("torch", "grouped_mm", layer_peers.grouped_experts(act), False))
        else:
            found.append(("torch", "plain", lambda x: plain_experts(x.hidden_states, x.routing, x.weights, act), True))
        if on_gpu and peer_version("vllm"):
            found.append(("vllm", peer_version("vllm"), vllm_peer.experts(act), False))
        if not on_gpu:
            found += [(*answer, False) for answer in layer_peers.transformers_experts(case)]
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


def bytes_read_and_written(inputs: LayerInputs) -> int:
    """The same for the experts that these inputs touch."""
    case, ids = inputs.case, inputs.routing.topk_ids
    touched = len(torch.unique(ids[(ids >= 0) & (ids < case["num_experts"])]))
    values = (touched * 3 * case["intermediate_size"] + 2 * case["num_tokens"]) * case["hidden_size"]
    return int(values * inputs.hidden_states.element_size())


def operations(case: Case) -> int:
    """Floating-point operations of the experts' products."""
    return int(6 * case["num_tokens"] * case["top_k"] * case["hidden_size"] * case["intermediate_size"])


def needed_bytes(case: Case) -> int:
    """What the intermediates of a computation stage by stage take: both products and the activation, a row a route."""
    row = 3 * case["intermediate_size"] + case["hidden_size"]
    return int(case["num_tokens"] * case["top_k"] * row * getattr(torch, case["dtype"]).itemsize)


def peak_extra_bytes(run: Callable[[Any], Any], inputs: Any) -> int | None:
    """How far memory rises during a call, its result included; None where unknown. Tensors of the GPU where the inputs
    are on one, otherwise the resident memory of this process.
    """
    if getattr(inputs, "hidden_states", None) is not None and inputs.hidden_states.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(inputs)
        return torch.cuda.max_memory_allocated() - before
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


def _moeyard(case: Case, impl: str, device: torch.device) -> Callable[[Any], Any]:
    options, act = router_options(case, device), activation(case)
    if case.op == "route":
        return lambda x: moeyard.route(x.logits, impl=impl, **options)
    if case.op == "fused_experts":
        return lambda x: moeyard.fused_experts(x.hidden_states, x.routing, x.weights, activation=act, impl=impl)
    return lambda x: moeyard.moe_layer(
        x.hidden_states, x.router_weight, x.weights, activation=act, shared=x.shared, shared_gate=x.shared_gate,
        impl=impl, **options,
    )  # fmt: skip
