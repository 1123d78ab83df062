"""Who answers a case: moeyard's implementations, plain torch, a bare counting sort, and vLLM where it is installed."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moeyard
from moeyard import impls
from moeyard.bench import layer, plain, products, vllm_peer
from moeyard.bench.results import peer_version
from moeyard.bench.workloads import Case
from moeyard.testing import ROUTINGS, fp8_error, layout_error, routing_error, rows_error, sum_error
from moeyard.values import Layout, RouterOptions

_LARGE_BYTES = 1 << 24  # cases that move more have shorter graphs


@dataclass(frozen=True)
class Inputs:
    """What a case hands to every provider: fresh random values."""

    topk_ids: Tensor
    layout: Layout | None = None
    hidden_states: Tensor | None = None
    rows: Tensor | None = None
    topk_weights: Tensor | None = None
    router_logits: Tensor | None = None
    options: RouterOptions | None = None


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
    if layer.takes(case):
        return layer.make_inputs(case, device, generator)
    if case.op == products.OP:
        return products.make_inputs(case, device, generator)
    sizes: dict[str, Any] = dict(case.sizes)
    experts, top_k = sizes.get("num_experts", sizes["top_k"]), sizes["top_k"]
    ids = ROUTINGS[case.routing](sizes["num_tokens"], experts, top_k, generator).to(device)
    if case.op == "moe_align_block_size":
        return Inputs(ids)
    dtype = getattr(torch, sizes["dtype"])
    if case.op in ("route", "route_and_align"):
        # of 8 bits, so that no two scores round to the same float32 where logits differ: peers rank by scores
        logits = torch.randn(sizes["num_tokens"], experts, generator=generator).bfloat16().to(dtype).to(device)
        return Inputs(ids, router_logits=logits, options=router_options(case, device, generator))
    if device.type == "cuda":  # hundreds of millions of values: drawn where they are needed
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**31, (), generator=generator)))
    if case.op == "moe_sum":
        shape = (sizes["num_tokens"], top_k, sizes["hidden_size"])
        return Inputs(ids, rows=torch.randn(shape, generator=generator, device=generator.device).to(dtype))
    hidden = torch.randn(sizes["num_tokens"], sizes["hidden_size"], generator=generator, device=generator.device)
    hidden = hidden.to(dtype)
    layout = moeyard.moe_align_block_size(ids, num_experts=experts, block_size=sizes["block_size"])
    weights = torch.rand(ids.shape, generator=generator, device=generator.device)
    rows = moeyard.permute(hidden, layout).rows if case.op == "combine" else None
    return Inputs(ids, layout, hidden, rows, weights)


def router_options(case: Case, device: torch.device, generator: torch.Generator) -> RouterOptions:
    """What a router is asked for: see `workloads.SIZES_OF`."""
    options: RouterOptions = {"top_k": case["top_k"], "renormalize": True}
    groups = dict(case.sizes).get("num_groups", 1)
    if groups == 1:
        return options
    bias = (0.1 * torch.randn(case["num_experts"], generator=generator)).to(device)
    return {
        **options, "scoring": "sigmoid", "selection_bias": bias, "num_groups": int(groups),
        "top_k_groups": int(groups) // 2, "routed_scaling_factor": 2.5,
    }  # fmt: skip


_OF_TABLE = {"ids_to_rows": "permute", "route_and_align": "route"}
"""Benchmarked ops that are two of the table together, by the one whose implementations are asked for."""


def providers(case: Case, device: torch.device) -> list[Provider]:
    """Everyone who can answer a case on a device."""
    if layer.takes(case):
        return [Provider(name, impl, run, waits=waits) for name, impl, run, waits in layer.providers(case, device)]
    if case.op == products.OP:
        return [Provider(*answer) for answer in products.providers(case, device)]
    found, op = [], _OF_TABLE.get(case.op, case.op)
    for impl in impls.impl_names(op):
        dtype = torch.int32 if "dtype" not in dict(case.sizes) else getattr(torch, case["dtype"])
        reason = impls.explain(op, device, dtype).reasons[impl]
        if impl != "reference" and (reason == "chosen" or reason.startswith("comes after")):
            found.append(Provider("moeyard", impl, _moeyard(case, impl)))
    if case.op == "route_and_align" and device.type == "cuda" and "cuda" in (p.impl for p in found):
        found.append(Provider("moeyard", "cuda-one-by-one", _one_by_one(case)))
    if case.op in plain.OPS:
        found.append(Provider("torch", "plain", plain.plain(case), waits=True))
    if case.op == "moe_align_block_size" and device.type == "cpu" and impls.installed("numba"):
        found.append(Provider("numba", "bare", _bare(case)))
    if case.op in vllm_peer.OPS and device.type == "cuda" and peer_version("vllm") != "":
        stable = case.op != "moe_align_block_size"
        found.append(Provider("vllm", peer_version("vllm"), vllm_peer.answer(case), stable=stable))
    return found


def error(case: Case, provider: Provider, inputs: Any, device: torch.device) -> str | None:
    """What is wrong with a provider's answer, or the exception it raised; None if it is right."""
    try:
        got = provider.run(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as problem:  # whatever a peer raises is a finding, not the end of the run
        return f"{type(problem).__name__}: {problem}"
    if layer.takes(case):
        return layer.error(case, provider.impl, inputs, got)
    if case.op == products.OP:
        return products.error(inputs, provider.impl, got)
    if case.op == "moe_align_block_size":
        return layout_error(
            inputs.topk_ids, case["num_experts"], case["block_size"], _named(got), stable=provider.stable
        )
    if case.op in ("route", "route_and_align"):
        assert inputs.router_logits is not None and inputs.options is not None
        options: dict[str, Any] = {key: value for key, value in inputs.options.items() if key != "top_k"}
        routing = got if case.op == "route" else got[0]
        wrong = routing_error(inputs.router_logits, routing, **options)
        if wrong is None and case.op == "route_and_align":
            wrong = layout_error(
                routing.topk_ids, case["num_experts"], case["block_size"], _named(got[1]), stable=provider.stable
            )
        return wrong
    if case.op in ("permute", "ids_to_rows", "permute_to_fp8"):
        assert inputs.hidden_states is not None and inputs.layout is not None
        if case.op == "permute_to_fp8":
            return fp8_error(inputs.hidden_states, inputs.layout, got, case["group_size"] or None)
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
    if layer.takes(case):
        return layer.bytes_moved(case)
    if case.op == products.OP:
        return products.bytes_moved(case)
    sizes: dict[str, Any] = dict(case.sizes)
    routes = sizes["num_tokens"] * sizes["top_k"]
    if case.op == "moe_align_block_size":
        return int(12 * routes)  # ids read, sorted_token_ids and route_rows written; the rest is small or padding
    size = getattr(torch, sizes["dtype"]).itemsize
    if case.op in ("route", "route_and_align"):
        read_and_written = sizes["num_tokens"] * sizes["num_experts"] * size + 8 * routes
        return int(read_and_written + (8 * routes if case.op == "route_and_align" else 0))
    row = sizes["hidden_size"] * size
    if case.op == "permute_to_fp8":
        scales = sizes["hidden_size"] // sizes["group_size"] if sizes["group_size"] else 1
        return int(sizes["num_tokens"] * row + routes * (sizes["hidden_size"] + 4 * scales))
    return int((sizes["num_tokens"] + routes) * row)


def calls_of_graph(case: Case) -> int:
    """How many calls a graph has whose replays are timed."""
    if case.op in ("fused_experts", products.OP):
        return layer.sets_and_calls(case)[1]
    return 20 if case["num_tokens"] >= 32768 or bytes_moved(case) >= _LARGE_BYTES else 50


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
    if case.op == "ids_to_rows":
        return _ids_to_rows(case, impl)
    if case.op == "route_and_align":
        block = case["block_size"]
        return lambda x: moeyard.route_and_align(x.router_logits, block_size=block, impl=impl, **x.options)

    def run(inputs: Any) -> Any:
        target = out[0] if out else None
        if case.op == "permute":
            result: Any = moeyard.permute(inputs.hidden_states, inputs.layout, out=target, impl=impl)
        elif case.op == "permute_to_fp8":
            size = case["group_size"] or None
            result = moeyard.permute_to_fp8(inputs.hidden_states, inputs.layout, group_size=size, out=target, impl=impl)
        elif case.op == "route":
            result = moeyard.route(inputs.router_logits, out=target, impl=impl, **inputs.options)
        elif case.op == "combine":
            result = moeyard.combine(inputs.rows, inputs.layout, inputs.topk_weights, out=target, impl=impl)
        else:
            result = moeyard.moe_sum(inputs.rows, out=target, impl=impl)
        if not out:
            out.append(result)
        return result.rows if case.op == "permute" else result

    return run


def _one_by_one(case: Case) -> Callable[[Any], Any]:
    """Router, then alignment: what `route_and_align` does for large batches, in two launches."""

    def run(inputs: Any) -> Any:
        routing = moeyard.route(inputs.router_logits, impl="cuda", **inputs.options)
        layout = moeyard.moe_align_block_size(
            routing.topk_ids, num_experts=case["num_experts"], block_size=case["block_size"], impl="cuda"
        )
        return routing, layout

    return run


def _ids_to_rows(case: Case, impl: str) -> Callable[[Any], Any]:
    """Alignment and permute, into a layout and rows that are there already."""
    out: list[Any] = []

    def run(inputs: Any) -> Any:
        layout, target = out or (None, None)
        layout = moeyard.moe_align_block_size(
            inputs.topk_ids, num_experts=case["num_experts"], block_size=case["block_size"], out=layout, impl=impl
        )
        target = moeyard.permute(inputs.hidden_states, layout, out=target, impl=impl)
        out[:] = layout, target
        return target.rows

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
