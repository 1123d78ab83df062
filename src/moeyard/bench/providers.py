"""Who answers a case: moeyard's implementations, plain torch, a bare counting sort, and vLLM where it is installed."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import moeyard
from moeyard import impls, tiles
from moeyard.bench import layer
from moeyard.bench.routing import ROUTINGS
from moeyard.bench.verify import layout_error, rows_error, sum_error
from moeyard.bench.workloads import Case
from moeyard.values import Layout


@dataclass(frozen=True)
class Inputs:
    """What a case hands to every provider: fresh random values."""

    topk_ids: Tensor
    layout: Layout | None = None
    hidden_states: Tensor | None = None
    rows: Tensor | None = None
    topk_weights: Tensor | None = None


@dataclass(frozen=True)
class Provider:
    """One way to answer a case."""

    name: str
    impl: str
    run: Callable[[Any], Any]
    stable: bool = True
    """Whether routes of an expert come in order."""
    waits: bool = False
    """Whether it waits for the device, so that it cannot be captured in a graph."""


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Any:
    """Fresh inputs of a case on a device."""
    if case.op in layer.OPS:
        return layer.make_inputs(case, device, generator)
    sizes: dict[str, Any] = dict(case.sizes)
    experts, top_k = sizes.get("num_experts", sizes["top_k"]), sizes["top_k"]
    ids = ROUTINGS[case.routing](sizes["num_tokens"], experts, top_k, generator).to(device)
    if case.op == "moe_align_block_size":
        return Inputs(ids)
    dtype = getattr(torch, sizes["dtype"])
    hidden = torch.randn(sizes["num_tokens"], sizes["hidden_size"], generator=generator).to(dtype).to(device)
    if case.op == "moe_sum":
        shape = (sizes["num_tokens"], top_k, sizes["hidden_size"])
        return Inputs(ids, rows=torch.randn(shape, generator=generator).to(dtype).to(device))
    layout = moeyard.moe_align_block_size(ids, num_experts=experts, block_size=sizes["block_size"])
    weights = torch.rand(ids.shape, generator=generator).to(device)
    rows = moeyard.permute(hidden, layout).rows if case.op == "combine" else None
    return Inputs(ids, layout, hidden, rows, weights)


def providers(case: Case, device: torch.device) -> list[Provider]:
    """Everyone who can answer a case on a device."""
    if case.op in layer.OPS:
        return [Provider(*answer, waits=True) for answer in layer.providers(case, device)]
    found = []
    for impl in impls.impl_names(case.op):
        dtype = torch.int32 if "dtype" not in dict(case.sizes) else getattr(torch, case["dtype"])
        reason = impls.explain(case.op, device, dtype).reasons[impl]
        if impl != "reference" and (reason == "chosen" or reason.startswith("comes after")):
            found.append(Provider("moeyard", impl, _moeyard(case, impl)))
    found.append(Provider("torch", "plain", _plain(case), waits=True))
    if case.op == "moe_align_block_size" and device.type == "cpu" and impls.installed("numba"):
        found.append(Provider("numba", "bare", _bare(case)))
    if case.op == "moe_align_block_size" and device.type == "cuda" and peer_version("vllm") != "":
        found.append(Provider("vllm", peer_version("vllm"), _vllm_align(case), stable=False))
    return found


@cache
def peer_version(package: str) -> str:
    """The version of an importable peer; "" if it is not there or does not load."""
    try:
        module = importlib.import_module(package)
    except ImportError:
        return ""
    return str(getattr(module, "__version__", "unknown"))


def error(case: Case, provider: Provider, inputs: Any, device: torch.device) -> str | None:
    """What is wrong with a provider's answer, or the exception it raised; None if it is right."""
    try:
        got = provider.run(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as problem:  # whatever a peer raises is a finding, not the end of the run
        return f"{type(problem).__name__}: {problem}"
    if case.op in layer.OPS:
        return layer.error(case, provider.impl, inputs, got)
    if case.op == "moe_align_block_size":
        return layout_error(
            inputs.topk_ids, case["num_experts"], case["block_size"], _named(got), stable=provider.stable
        )
    if case.op == "permute":
        assert inputs.hidden_states is not None and inputs.layout is not None
        return rows_error(inputs.hidden_states, inputs.layout, got)
    assert inputs.rows is not None
    if case.op == "moe_sum":
        return sum_error(inputs.rows.double().sum(1), got, case["top_k"])
    assert inputs.layout is not None and inputs.topk_weights is not None
    row = inputs.layout.route_rows.view(-1, case["top_k"])
    wide = torch.zeros(row.shape[0], inputs.rows.shape[1], dtype=torch.float64, device=device)
    for k in range(case["top_k"]):
        taken = inputs.rows[row[:, k].clamp(min=0)].double() * inputs.topk_weights[:, k : k + 1].double()
        wide += torch.where((row[:, k] >= 0).unsqueeze(1), taken, 0)
    return sum_error(wide, got, case["top_k"])


def bytes_moved(case: Case) -> int:
    """The bytes that any answer must read and write."""
    if case.op in layer.OPS:
        return layer.bytes_moved(case)
    sizes: dict[str, Any] = dict(case.sizes)
    routes = sizes["num_tokens"] * sizes["top_k"]
    if case.op == "moe_align_block_size":
        return int(12 * routes)  # ids read, sorted_token_ids and route_rows written; the rest is small or padding
    row = sizes["hidden_size"] * getattr(torch, sizes["dtype"]).itemsize
    return int((sizes["num_tokens"] + routes) * row)


def _named(answer: Any) -> dict[str, Tensor]:
    """A layout's tensors by name; peers answer with vLLM's triple."""
    if isinstance(answer, Layout):
        return dict(zip(Layout.TENSORS, answer.tensors, strict=True))
    return dict(zip(Layout.TENSORS[:3], answer, strict=True))


def _moeyard(case: Case, impl: str) -> Callable[[Any], Any]:
    """The public operator; rows go to a tensor that is there already, layouts to fresh ones."""
    if case.op == "moe_align_block_size":
        experts, block = case["num_experts"], case["block_size"]
        return lambda x: moeyard.moe_align_block_size(x.topk_ids, num_experts=experts, block_size=block, impl=impl)
    out: list[Any] = []

    def run(inputs: Any) -> Any:
        target = out[0] if out else None
        if case.op == "permute":
            result: Any = moeyard.permute(inputs.hidden_states, inputs.layout, out=target, impl=impl)
        elif case.op == "combine":
            result = moeyard.combine(inputs.rows, inputs.layout, inputs.topk_weights, out=target, impl=impl)
        else:
            result = moeyard.moe_sum(inputs.rows, out=target, impl=impl)
        if not out:
            out.append(result)
        return result.rows if case.op == "permute" else result

    return run


def align_into_given(case: Case) -> Callable[[Any], Any]:
    """moeyard's alignment into a layout that is there already."""
    run = _moeyard(case, "cuda")
    out: list[Layout] = []

    def align(inputs: Any) -> Layout:
        if not out:
            out.append(run(inputs))
        return moeyard.moe_align_block_size(
            inputs.topk_ids, num_experts=case["num_experts"], block_size=case["block_size"], out=out[0], impl="cuda"
        )

    return align


def align_triple(case: Case) -> Callable[[Any], Any]:
    """moeyard behind vLLM's signature: sorted_token_ids, expert_ids and num_tokens_post_pad alone."""
    from moeyard.integrations.vllm import moe_align_block_size

    return lambda x: moe_align_block_size(x.topk_ids, case["block_size"], case["num_experts"])


def _plain(case: Case) -> Callable[[Any], Any]:
    """What one writes in eager torch without a library."""
    if case.op == "moe_align_block_size":
        return lambda x: _plain_align(x.topk_ids, case["num_experts"], case["block_size"])
    if case.op == "permute":
        out: dict[str, Tensor] = {}

        def permute(x: Any) -> Tensor:
            tokens = torch.div(x.layout.sorted_token_ids, x.layout.top_k, rounding_mode="floor")
            tokens = tokens.clamp(max=x.hidden_states.shape[0] - 1)
            if not out:
                out["rows"] = torch.index_select(x.hidden_states, 0, tokens)
            return torch.index_select(x.hidden_states, 0, tokens, out=out["rows"])

        return permute
    if case.op == "combine":

        def combine(x: Any) -> Tensor:
            taken = x.rows[x.layout.route_rows.clamp(min=0)].view(*x.topk_weights.shape, -1)
            dropped = (x.layout.route_rows < 0).view(*x.topk_weights.shape, 1)
            weighted = (taken * x.topk_weights.unsqueeze(2)).masked_fill(dropped, 0)
            total: Tensor = weighted.sum(1).to(x.rows.dtype)
            return total

        return combine
    return lambda x: x.rows.sum(1)


def _plain_align(topk_ids: Tensor, num_experts: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = topk_ids.reshape(-1).long()
    n, device = ids.shape[0], ids.device
    keys = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    blocks = (counts + block_size - 1) // block_size
    ends = torch.cumsum(blocks * block_size, 0)
    order = torch.argsort(keys, stable=True)[: int(counts.sum())]
    shift = (ends - blocks * block_size) - (torch.cumsum(counts, 0) - counts)
    slots = torch.arange(order.shape[0], device=device) + shift.repeat_interleave(counts)
    capacity = tiles.layout_capacity(n, num_experts, block_size)
    sorted_token_ids = torch.full((capacity,), n, dtype=torch.int32, device=device)
    sorted_token_ids[slots] = order.int()
    expert_ids = torch.full((capacity // block_size,), -1, dtype=torch.int32, device=device)
    experts = torch.arange(num_experts, dtype=torch.int32, device=device).repeat_interleave(blocks)
    expert_ids[: experts.shape[0]] = experts
    return sorted_token_ids, expert_ids, ends[-1:].int()


def _bare(case: Case) -> Callable[[Any], Any]:
    """The floor of a call from Python: a counting sort into arrays that exist, nothing checked or allocated."""
    sort = importlib.import_module("moeyard.bench.bare").counting_sort
    n, experts, block = case["num_tokens"] * case["top_k"], case["num_experts"], case["block_size"]
    out = moeyard.empty_layout(n, num_experts=experts, block_size=block, top_k=case["top_k"])
    arrays = [tensor.numpy() for tensor in out.tensors]
    flat: dict[int, Any] = {}

    def run(inputs: Inputs) -> Layout:
        key = id(inputs)
        if key not in flat:
            flat[key] = inputs.topk_ids.numpy().reshape(-1)
        sort(flat[key], block, *arrays)
        return out

    return run


def _vllm_align(case: Case) -> Callable[[Any], Any]:
    path = "vllm.model_executor.layers.fused_moe.moe_align_block_size"
    align = importlib.import_module(path).moe_align_block_size
    return lambda x: align(x.topk_ids, case["block_size"], case["num_experts"])
