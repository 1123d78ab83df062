"""Expert ids as models produce them, well and badly balanced."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

_CHUNK = 1 << 24  # scores drawn at once


def _weighted(weights: Tensor, num_tokens: int, top_k: int, generator: Generator) -> Tensor:
    """Draws `top_k` different experts a token, by the Gumbel trick; experts of weight 0 are never drawn."""
    step, weights = max(1, _CHUNK // len(weights)), weights.to(generator.device)
    parts = []
    for start in range(0, num_tokens, step):
        shape = (min(step, num_tokens - start), len(weights))
        uniform = torch.rand(shape, generator=generator, device=generator.device).clamp_(min=1e-12)
        parts.append((weights.log() - (-uniform.log()).log()).topk(top_k, dim=1).indices.int())
    return torch.cat(parts)


def uniform(num_tokens: int, num_experts: int, top_k: int, generator: Generator) -> Tensor:
    """Every expert equally likely, none twice for a token."""
    return _weighted(torch.ones(num_experts), num_tokens, top_k, generator)


def independent(num_tokens: int, num_experts: int, top_k: int, generator: Generator) -> Tensor:
    """Every route drawn by itself, as the seed script does."""
    shape, device = (num_tokens, top_k), generator.device
    return torch.randint(0, num_experts, shape, dtype=torch.int32, generator=generator, device=device)


def zipf(num_tokens: int, num_experts: int, top_k: int, generator: Generator) -> Tensor:
    """Popularity falls as 1 / rank."""
    return _weighted(1.0 / torch.arange(1, num_experts + 1), num_tokens, top_k, generator)


def one_hot(num_tokens: int, num_experts: int, top_k: int, generator: Generator) -> Tensor:
    """Expert 0 gets a route of every token, the other routes are uniform."""
    weights = torch.ones(num_experts)
    weights[0] = 1e30
    return _weighted(weights, num_tokens, top_k, generator)


def half_empty(num_tokens: int, num_experts: int, top_k: int, generator: Generator) -> Tensor:
    """Every other expert gets nothing."""
    weights = torch.ones(num_experts)
    if top_k <= (num_experts + 1) // 2:
        weights[1::2] = 0
    return _weighted(weights, num_tokens, top_k, generator)


def dropped(num_tokens: int, num_experts: int, top_k: int, generator: Generator) -> Tensor:
    """Uniform, with a tenth of the routes dropped (-1)."""
    ids = uniform(num_tokens, num_experts, top_k, generator)
    return ids.masked_fill(torch.rand(ids.shape, generator=generator, device=generator.device) < 0.1, -1)


def equal(num_tokens: int, num_experts: int, top_k: int, generator: Generator) -> Tensor:
    """Experts in turn, in a random order: every expert gets the same number of routes, or one more than another."""
    device = generator.device
    order = torch.randperm(num_experts, generator=generator, device=device)
    turn = torch.arange(num_tokens * top_k, device=device).view(num_tokens, top_k) % num_experts
    return order[turn[torch.randperm(num_tokens, generator=generator, device=device)]].int()


ROUTINGS: dict[str, Callable[[int, int, int, Generator], Tensor]] = {
    "uniform": uniform,
    "independent": independent,
    "zipf": zipf,
    "one_hot": one_hot,
    "half_empty": half_empty,
    "dropped": dropped,
    "equal": equal,
}
"""Name -> (num_tokens, num_experts, top_k, generator) -> [num_tokens, top_k] int32 on the generator's device."""
