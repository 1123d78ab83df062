"""Logits to a routing and the layout of what it chose."""

from typing import Any

import torch

import moeyard
from moeyard.bench.operators import Case, Operator, Provider, Run, able
from moeyard.bench.routers import RouterInputs, bytes_of_routing, draw_logits, rules
from moeyard.bench.rows import LAYOUT_SIZES, named
from moeyard.testing import layout_error, routing_error


def providers(case: Case, device: torch.device) -> list[Provider]:
    """moeyard, with its kernels for CUDA in one call and one by one."""
    impls = able("route", case, device)
    found = [Provider("moeyard", impl, _together(case, impl)) for impl in impls]
    if "cuda" in impls:
        found.append(Provider("moeyard", "cuda-one-by-one", _one_by_one(case)))
    return found


def error(case: Case, provider: Provider, inputs: RouterInputs, got: Any) -> str | None:
    """The routing, then the layout of its ids."""
    routing, layout = got
    wrong = routing_error(inputs.logits, routing, **rules(inputs.options))
    if wrong is not None:
        return wrong
    sizes = (case["num_experts"], case["block_size"])
    return layout_error(routing.topk_ids, *sizes, named(layout), stable=provider.stable)


def bytes_moved(case: Case) -> int:
    """Those of the routing, and two words per route of the layout."""
    return bytes_of_routing(case) + int(8 * case["num_tokens"] * case["top_k"])


OPERATOR = Operator((*LAYOUT_SIZES, "dtype"), draw_logits, providers, error, bytes_moved)


def _together(case: Case, impl: str) -> Run:
    block = case["block_size"]
    return lambda x: moeyard.route_and_align(x.logits, block_size=block, impl=impl, **x.options)


def _one_by_one(case: Case) -> Run:
    """What `route_and_align` does for large batches, in two launches."""
    sizes = {"num_experts": case["num_experts"], "block_size": case["block_size"]}

    def run(x: RouterInputs) -> Any:
        routing = moeyard.route(x.logits, impl="cuda", **x.options)
        return routing, moeyard.moe_align_block_size(routing.topk_ids, impl="cuda", **sizes)

    return run
