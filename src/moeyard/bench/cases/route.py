"""Logits to a routing: of a named model, or by num_groups (see `moeyard.bench.routers.router_options`)."""

from typing import Any

import torch
from torch import Tensor

import moeyard
from moeyard.bench import vllm_peer
from moeyard.bench.operators import Case, Operator, Provider, Run, able, reusing
from moeyard.bench.peers import peer_version
from moeyard.bench.routers import RouterInputs, bytes_of_routing, draw_logits, plain_route, router_options, rules
from moeyard.testing import routing_error
from moeyard.values import Routing

_TOPK = "topk alone"  # scores and weights left out: what the choice costs by itself


def providers(case: Case, device: torch.device) -> list[Provider]:
    """moeyard, plain torch and its topk alone, on a GPU vLLM."""
    found = [Provider("moeyard", impl, _moeyard(impl)) for impl in able(case.op, case, device)]
    found.append(Provider("torch", "plain", lambda x: plain_route(x.logits, **x.options)))
    found.append(Provider("torch", _TOPK, lambda x: torch.topk(x.logits, case["top_k"], dim=1)))
    if device.type == "cuda" and peer_version("vllm"):
        found.append(Provider("vllm", peer_version("vllm"), _vllm(case)))
    return found


def error(case: Case, provider: Provider, inputs: RouterInputs, got: Any) -> str | None:
    """The choice exactly, weights against float64; of topk alone the chosen logits."""
    if provider.impl == _TOPK:
        best = inputs.logits.sort(1, descending=True).values[:, : case["top_k"]]
        return None if torch.equal(got.values, best) else "values are not those of the best experts"
    return routing_error(inputs.logits, got, **rules(inputs.options))


SIZES = ("num_tokens", "num_experts", "top_k", "num_groups", "dtype")
OPERATOR = Operator(SIZES, draw_logits, providers, error, bytes_of_routing, from_model=("num_groups",))


def _moeyard(impl: str) -> Run:
    return reusing(lambda x, out: moeyard.route(x.logits, out=out, impl=impl, **x.options))


def _vllm(case: Case) -> Run:
    vllm_peer.load()
    if router_options(case).get("num_groups", 1) > 1:
        return _vllm_grouped

    kept: list[Tensor] = []

    def softmax(x: RouterInputs) -> Routing:
        if not kept:
            weights = x.logits.new_empty((case["num_tokens"], case["top_k"]), dtype=torch.float32)
            kept[:] = weights, *(torch.empty_like(weights, dtype=torch.int32) for _ in range(2))
        torch.ops._moe_C.topk_softmax(*kept, x.logits, x.options["renormalize"], None)
        return Routing(kept[0], kept[1])

    return softmax


def _vllm_grouped(x: RouterInputs) -> Routing:
    options = x.options
    return Routing(
        *torch.ops._moe_C.grouped_topk(
            x.logits, options["num_groups"], options["top_k_groups"], options["top_k"], options["renormalize"],
            options["routed_scaling_factor"], options["selection_bias"], 1,
        )
    )  # fmt: skip
