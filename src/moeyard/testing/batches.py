"""Batches that a token may find itself in, and whether it gets the same bits in all of them."""

from collections.abc import Callable, Iterator
from random import Random

import torch
from torch import Tensor

from moeyard.testing.comparisons import same_bits


def sub_batches(num_tokens: int, number: int, rng: Random, most: int | None = None) -> Iterator[Tensor | slice]:
    """Parts of a batch: neighbours as they lie, a random choice in random order, tokens that come several times.

    Sizes are as often small as large: uniform in their logarithm, up to `most`, all tokens unless given.
    """
    limit = min(num_tokens, most or num_tokens)
    for i in range(number):
        size = min(limit, int(2 ** rng.uniform(0, limit.bit_length())))
        if i % 3 == 0:
            start = rng.randint(0, num_tokens - size)
            yield slice(start, start + size)
        elif i % 3 == 1:
            yield torch.tensor(rng.sample(range(num_tokens), size))
        else:
            yield torch.tensor(rng.choices(range(num_tokens), k=size))


def differing(
    call: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    batches: Iterator[Tensor | slice],
    goes_on: Callable[[], bool] = lambda: True,
) -> tuple[int, int, str]:
    """(batches, those in which a token's result differs from its result among all tokens, the first of these).

    Args:
        call: (*rows of `tensors`) -> [tokens, ...].
        tensors: [tokens, ...] each.
        batches: as `sub_batches` gives them.
        goes_on: is asked before each batch.
    """
    whole, count, wrong, first = call(*tensors), 0, 0, ""
    for batch in batches:
        if not goes_on():
            break
        where = batch if isinstance(batch, slice) else batch.to(whole.device)
        count += 1
        if not same_bits(call(*(tensor[where] for tensor in tensors)), whole[where]):
            wrong += 1
            first = first or _named(batch)
    return count, wrong, first


def _named(batch: Tensor | slice) -> str:
    if isinstance(batch, slice):
        return f"tokens {batch.start} to {batch.stop - 1}"
    return f"{len(batch)} tokens: {', '.join(map(str, batch[:8].tolist()))}{', ...' if len(batch) > 8 else ''}"
