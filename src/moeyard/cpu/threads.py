"""Work cut into parts that run on a few threads.

Numba's own parallel layers are not used: its default one ends the process when two Python threads enter it at
once. Kernels that release the GIL on a plain thread pool cost about 70 us a hand-over and cannot do that.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="moeyard")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child inherits the pool but none of its threads


def count_parts(amount: int, least: int) -> int:
    """How many parts to cut `amount` into: at most torch's threads, none smaller than `least`."""
    return 1 if amount < 2 * least else min(torch.get_num_threads(), amount // least)


def run_parts(part: Callable[..., object], parts: int, amount: int, *arguments: object) -> None:
    """Calls `part(i, start, stop, *arguments)` for every part i of range(amount), the last on this thread."""
    cuts = [amount * i // parts for i in range(parts + 1)]
    waiting = [_pool(parts - 1).submit(part, i, cuts[i], cuts[i + 1], *arguments) for i in range(parts - 1)]
    try:
        part(parts - 1, cuts[-2], cuts[-1], *arguments)
    finally:  # also if this thread is interrupted: nobody may free the outputs while others write them
        for future in waiting:
            future.result()
