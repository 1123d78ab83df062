"""A whole layer of a named model: router, experts, shared expert."""

import torch

import moeyard
from moeyard.bench import layers
from moeyard.bench.operators import Case, Operator, Provider, Run, able
from moeyard.bench.routers import router_options


def providers(case: Case, device: torch.device) -> list[Provider]:
    """moeyard alone."""
    return [Provider("moeyard", impl, _moeyard(case, impl, device)) for impl in able("fused_experts", case, device)]


OPERATOR = Operator(
    layers.SIZES,
    layers.draw_layer,
    providers,
    layers.error,
    layers.bytes_moved,
    operations=layers.operations,
    beside=layers.beside,
)


def _moeyard(case: Case, impl: str, device: torch.device) -> Run:
    options, act = router_options(case, device), layers.activation(case)
    return lambda x: moeyard.moe_layer(
        x.hidden_states, x.router_weight, x.weights, activation=act, shared=x.shared, shared_gate=x.shared_gate,
        impl=impl, **options,
    )  # fmt: skip
