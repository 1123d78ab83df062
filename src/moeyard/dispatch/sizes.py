"""Sizes in, sizes out: how long outputs are. Pure functions of integers, symbolic ones included."""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch

from moeyard.values import INT32_MAX

MOST_FUSED_TOKENS = 64
"""Tokens that one launch may route and align together."""


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def power(value: int, least: int) -> int:
    """The smallest power of two of at least `value` and `least`."""
    return max(least, 1 << max(0, value - 1).bit_length())


def layout_capacity(
    num_routes: int, num_local_experts: int, block_size: int, smaller: Callable[[int, int], int] = min
) -> int:
    """Slots that hold `num_routes` routes on `num_local_experts` experts however they are routed.

    Every expert that receives a route wastes at most `block_size - 1` slots, and no more than `num_routes` experts
    receive one. The result is a multiple of `block_size`. `smaller` is `min`, or its counterpart for symbolic sizes.
    """
    touched = smaller(num_routes, num_local_experts)
    return round_up(num_routes + touched * (block_size - 1), block_size)


def layout_lengths(
    num_routes: int, num_local_experts: int, block_size: int, *, capacity: int | None = None
) -> tuple[int, ...]:
    """The lengths of the six tensors of a Layout; ValueError if capacity passes int32."""
    if capacity is None:
        symbolic = isinstance(num_routes, torch.SymInt) or isinstance(num_local_experts, torch.SymInt)
        smaller = torch.sym_min if symbolic else min  # a compiler's constants know the one, fake tensors the other
        capacity = layout_capacity(num_routes, num_local_experts, block_size, smaller)
    if capacity > INT32_MAX:
        raise ValueError(
            f"block_size: expected a capacity of at most {INT32_MAX} slots (int32), got {capacity} from {num_routes} "
            f"routes, {num_local_experts} local experts and block_size={block_size}"
        )
    return capacity, capacity // block_size, 1, num_local_experts + 1, num_local_experts, num_routes


cached_layout_lengths = lru_cache(maxsize=1024)(layout_lengths)
"""`layout_lengths` of plain integers: layers and steps repeat their sizes."""


def expected_routes(num_routes: int, num_local_experts: int, num_experts: int) -> int:
    """How many of the routes of all ranks this one has, if each expert has as many; all if `num_experts` is 0.

    Plans depend on it: under expert parallelism `num_routes` counts the routes of every rank.
    """
    if not num_routes or not num_experts:
        return num_routes
    return max(1, num_routes * min(num_local_experts, num_experts) // num_experts)


def batched_layout_lengths(num_experts: int, max_num_tokens: int, block_size: int) -> tuple[int, ...]:
    """The lengths of the layout of `num_experts` batches of at most `max_num_tokens` rows, each padded by itself."""
    capacity = num_experts * round_up(max_num_tokens, block_size)
    return layout_lengths(num_experts * max_num_tokens, num_experts, block_size, capacity=capacity)


def changes(asked: Callable[[int], object], most_tokens: int) -> list[int]:
    """Numbers of tokens, one at least of each run of neighbours for which `asked` gives the same, up to the most."""
    counts = list(range(1, min(most_tokens, _SINGLY) + 1))
    while counts[-1] < most_tokens:
        counts.append(min(most_tokens, counts[-1] + counts[-1] // 64))
    found = {count: asked(count) for count in counts}
    waiting = list(pairwise(counts))
    while waiting:
        low, high = waiting.pop()
        if found[low] != found[high] and high - low > 1:
            between = (low + high) // 2
            found[between] = asked(between)
            waiting += [(low, between), (between, high)]
    counts = sorted(found)
    return [1, *(high for low, high in pairwise(counts) if found[low] != found[high])]


_SINGLY = 128
"""Up to so many tokens every number is tried; beyond, steps of a 64th, and all changes between two that differ."""
