"""The experts of one rank out of all experts, and what weights a rank may hold."""

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn import Parameter

from moeyard.dispatch.checks import check_int
from moeyard.parallel.plan import Plan
from moeyard.values import ExpertWeights


def refuse_sharded(weights: object) -> None:
    """TypeError naming the tensor where weights are no plain tensors, as DTensor and FSDP's shards are."""
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"weights: expected ExpertWeights, got {type(weights).__name__}")
    for field in fields(weights):
        tensor = getattr(weights, field.name)
        if isinstance(tensor, Tensor) and type(tensor) not in (Tensor, Parameter):
            placed = getattr(tensor, "placements", None)
            raise TypeError(
                f"weights.{field.name}: expected a plain tensor of this rank's experts (to_local() of a tensor that is "
                "sharded over experts, or full_tensor() inside FSDP's forward), got "
                f"{type(tensor).__name__}{'' if placed is None else f' with placements {placed}'}"
            )


def slice_experts(weights: ExpertWeights, plan: Plan, rank: int) -> ExpertWeights:
    """The weights that a rank holds, copied out of those of all experts.

    Args:
        weights: of all `plan.num_experts` experts, in their global order, of any scheme.
        plan: who holds which. With `plan.tensor` of more than 1 the weights have no scheme, and the intermediate size
            is a multiple of it: rank r has slice r % tensor, and the first rank of a share alone has w2's bias.
        rank: whose weights.

    Returns contiguous `ExpertWeights`, in the order of `plan.experts_of(rank)`. Gradients flow. Raises TypeError or
    ValueError naming the argument. `load_experts` reads slices of quantised experts from checkpoints.
    """
    refuse_sharded(weights)
    check_int("rank", rank, low=0, high=plan.ranks - 1)
    if weights.num_local_experts != plan.num_experts:
        raise ValueError(f"weights: expected all {plan.num_experts} experts of plan, got {weights.num_local_experts}")
    chosen = torch.tensor(plan.experts_of(rank), device=weights.w13.device)
    take: Callable[[Tensor], Tensor] = lambda tensor: _rows(tensor, chosen)  # noqa: E731
    moved = [None if t is None else take(t) for t in (weights.w13, weights.w2, weights.w13_bias, weights.w2_bias)]
    w13, w2, first_bias, second_bias = moved
    assert w13 is not None and w2 is not None
    scales = None if weights.scales is None else weights.scales.moved(take)
    if plan.tensor > 1:
        if weights.scheme is not None:
            raise ValueError(
                f"plan.tensor: expected 1 for experts of scheme {str(weights.scheme)!r} (load_experts reads their "
                f"slices), got {plan.tensor}"
            )
        size, part = weights.intermediate_size, rank % plan.tensor
        if size % plan.tensor:
            raise ValueError(f"plan.tensor: expected a divisor of intermediate_size={size}, got {plan.tensor}")
        step, halves = size // plan.tensor, 2 if weights.gated else 1
        columns = slice(part * step, (part + 1) * step)
        w13 = w13.unflatten(1, (halves, size))[:, :, columns].flatten(1, 2).contiguous()
        w2 = w2[:, :, columns].contiguous()
        if first_bias is not None:
            first_bias = first_bias.unflatten(1, (halves, size))[:, :, columns].flatten(1).contiguous()
        second_bias = second_bias if part == 0 else None
    return ExpertWeights(w13, w2, first_bias, second_bias, weights.gated, weights.scheme, scales)


def _rows(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Some of the first axis, also of dtypes of 8 bits, which an index does not take everywhere."""
    if tensor.dtype.itemsize == 1:
        return tensor.view(torch.uint8)[chosen].view(tensor.dtype)
    return tensor[chosen]


def slots_agree(weights: ExpertWeights, experts: Sequence[int]) -> str | None:
    """Why weights cannot be those of a rank's slots, in words."""
    if weights.num_local_experts == len(experts):
        return None
    return f"weights: expected {len(experts)} experts (the slots of this rank), got {weights.num_local_experts}"
