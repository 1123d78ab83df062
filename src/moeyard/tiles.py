"""Sizes in, sizes out: how long outputs are and how work is cut. Pure functions that need nothing."""

from collections.abc import Callable


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def layout_capacity(
    num_routes: int, num_local_experts: int, block_size: int, smaller: Callable[[int, int], int] = min
) -> int:
    """Slots that hold `num_routes` routes on `num_local_experts` experts however they are routed.

    Every expert that receives a route wastes at most `block_size - 1` slots, and no more than `num_routes` experts
    receive one. The result is a multiple of `block_size`. `smaller` is `min`, or what stands for it on symbolic sizes.
    """
    touched = smaller(num_routes, num_local_experts)
    return round_up(num_routes + touched * (block_size - 1), block_size)


def batched_layout_capacity(num_local_experts: int, max_num_tokens: int, block_size: int) -> int:
    """Slots for `num_local_experts` batches of at most `max_num_tokens` rows, each padded by itself."""
    return num_local_experts * round_up(max_num_tokens, block_size)


MOST_DECODE_TOKENS = 64
"""Tokens that one launch may route and align together."""
