"""transformers' experts over the ranks of a process group: what `moeyard.parallel.shard_model` does."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeyard import parallel
from moeyard.integrations.transformers import _gate, _has_norm, _matrices
from moeyard.parallel import Connection, Plan
from moeyard.parallel.connection import agree, device_of, digest
from moeyard.values import Activation, ExpertWeights, Routing

NAME = "moeyard-parallel"
"""What transformers calls this implementation."""
_SHARD = "_moeyard_shard"


class Sharded(NamedTuple):
    """The experts of one block on this rank."""

    name: str
    """Of the module in its model."""
    connection: Connection
    activation: Activation

    def __str__(self) -> str:
        plan, rank = self.connection.plan, self.connection.rank
        return f"{self.name}: {len(plan.experts_of(rank))} of {plan.num_experts} experts; {self.connection.explanation}"


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module that `shard` changed, as transformers calls its implementations.

    Args:
        self: the module.
        hidden_states: [num_tokens, hidden_size], this rank's tokens.
        top_k_index: [num_tokens, top_k] int64; ids of `num_experts` and above add nothing.
        top_k_weights: [num_tokens, top_k] of a floating-point dtype.

    Returns [num_tokens, hidden_size] of the dtype of `hidden_states`. All ranks call it.
    """
    shard: Sharded | None = vars(self).get(_SHARD)
    if shard is None:
        raise ValueError(
            f"experts_implementation: expected a model that moeyard.parallel.shard_model sharded for {NAME!r}, got "
            f"{type(self).__name__} without shards"
        )
    weights = _held(self)
    routing = Routing(top_k_weights.float(), top_k_index)
    rows = hidden_states.to(shard.connection.dtype)
    result = parallel.fused_experts(rows, routing, weights, shard.connection, activation=shard.activation)
    return result.to(hidden_states.dtype)


def _held(module: Any) -> ExpertWeights:
    w13, w2, b13, b2 = _matrices(module)
    return ExpertWeights(w13, w2, b13, b2, gated=module.has_gate)


def shard(
    model: nn.Module,
    group: dist.ProcessGroup | None,
    plans: Mapping[str, Plan],
    top_k: int | None,
    **options: Any,
) -> list[Sharded]:
    """`moeyard.parallel.shard_model`."""
    modules = {name: module for name, module in model.named_modules() if "is_concatenated" in vars(module)}
    if not modules:
        raise ValueError(f"model: expected one with transformers' experts interface, got {type(model).__name__}")
    unknown = sorted(set(plans) - set(modules))
    if unknown:
        raise ValueError(f"plans: expected names of experts modules ({', '.join(modules)}), got {unknown[0]!r}")
    if top_k is None:
        top_k = _top_k(model)
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ValueError("group: expected a process group (torch.distributed.init_process_group makes one), got none")
    ranks, rank = group.size(), group.rank()
    chosen = {}
    for name, module in modules.items():  # all, before one is changed
        _activation_of(name, module)
        experts = _matrices(module)[0].shape[0]
        chosen[name] = plans.get(name) or parallel.contiguous_plan(experts, ranks)
    agree({"plans": digest(chosen)}, group, device_of(None, group))
    found, connections = [], {}
    for name, module in modules.items():
        activation, plan = _activation_of(name, module), chosen[name]
        with torch.no_grad():
            mine = parallel.slice_experts(_halves_first(module), plan, rank)
        same = (plan, mine.w13.shape[1:], mine.gated, mine.w13.dtype, mine.w13.device)
        if same not in connections:  # layers take turns, and share what a connection holds
            connections[same] = parallel.connect(mine, plan, top_k=top_k, group=group, **options)
        _replace(module, mine)
        vars(module)[_SHARD] = Sharded(name, connections[same], activation)
        found.append(vars(module)[_SHARD])
    model.set_experts_implementation(NAME)  # type: ignore[operator]
    return found


def _top_k(model: Any) -> int:
    config = model.config.get_text_config()
    found = getattr(config, "num_experts_per_tok", None)
    if found is None:
        raise ValueError(f"top_k: expected a number, as {type(config).__name__} has no num_experts_per_tok, got None")
    return int(found)


def _activation_of(name: str, module: Any) -> Activation:
    """The activation of a module that can be sharded."""
    kind = f"{name} ({type(module).__name__})"
    if _SHARD in vars(module):
        raise ValueError(f"{kind}: expected experts that are whole, got ones that are sharded already")
    gate = _gate(module)  # which refuses sharded parameters and dtypes that nothing takes
    if gate.activation is None:
        raise ValueError(f"{kind}: expected a gate that is one of moeyard's activations ({Activation.NAMES})")
    if _has_norm(module):
        raise ValueError(f"{kind}: expected no norm behind the second product, which ranks would have to share")
    return gate.activation


def _halves_first(module: Any) -> ExpertWeights:
    """All experts of a module, the gate half of the first matrix first."""
    weights = _held(module)
    if _gate(module).in_turn:
        first, bias = weights.w13, weights.w13_bias
        weights = replace(
            weights,
            w13=torch.cat((first[:, 0::2], first[:, 1::2]), 1),
            w13_bias=None if bias is None else torch.cat((bias[:, 0::2], bias[:, 1::2]), 1),
        )
    return weights


def _replace(module: Any, mine: ExpertWeights) -> None:
    """Puts this rank's experts in place of all."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    turned = module.is_transposed
    parts = {first: mine.w13, "down_proj": mine.w2, f"{first}_bias": mine.w13_bias, "down_proj_bias": mine.w2_bias}
    for name, tensor in parts.items():
        if tensor is not None:
            held = tensor.transpose(1, 2) if turned and tensor.dim() == 3 else tensor
            wanted = getattr(module, name).requires_grad
            setattr(module, name, nn.Parameter(held.detach(), requires_grad=wanted))


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
