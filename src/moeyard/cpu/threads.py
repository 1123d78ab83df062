"""Work cut into parts that run on a few threads.

Numba's own parallel layers are not used: the default one ends the process when two Python threads enter it at once.
Kernels that release the GIL on a plain pool of threads cost about 70 us per hand-over and cannot do that.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from queue import SimpleQueue

import torch
from torch import Tensor


@cache
def _pool() -> ThreadPoolExecutor:
    """One pool per process; its threads start when they are first needed."""
    return ThreadPoolExecutor(max(os.cpu_count() or 1, 2), thread_name_prefix="moeyard")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child inherits the pool but none of its threads


def count_parts(amount: int, least: int) -> int:
    """How many parts to cut `amount` into: at most torch's threads, none smaller than `least`."""
    return 1 if amount < 2 * least else min(torch.get_num_threads(), amount // least)


def run_parts(
    part: Callable[..., object], parts: int, amount: int, tensors: Sequence[Tensor | None], *values: object
) -> None:
    """Calls `part(i, start, stop, *addresses, *values)` once for every part i of range(amount), here and on helpers.

    The addresses belong to `tensors`, 0 for None. Helpers hold the tensors while they work. This function returns or
    raises only after the last part has ended. Where no helper can be had (no more threads, a process that is ending),
    this thread does all parts.
    """
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    if parts == 1:
        part(0, 0, amount, *addresses, *values)
        return
    cuts = [amount * i // parts for i in range(parts + 1)]
    job = _Job(lambda i: part(i, cuts[i], cuts[i + 1], *addresses, *values), parts, tensors)
    try:
        for _ in range(parts - 1):
            _pool().submit(job.help)
    except RuntimeError:  # "can't start new thread", or an interpreter that shuts down
        pass
    finally:
        job.finish()
    if job.problems:
        raise job.problems[0]


def dense(tensor: Tensor | None) -> Tensor | None:
    """A tensor whose values are one after the other, as kernels read what has no stride beside it."""
    return None if tensor is None else tensor.contiguous()


class _Job:
    """The parts of one call. A part belongs to the thread that takes it out of `todo`; no thread waits for a helper
    that never came, and a helper that comes late finds nothing to do.

    Signals interrupt the main thread between any two steps, so all counts are deques, whose operations are atomic: a
    helper first enters, then looks for parts, and leaves when there are none.
    """

    def __init__(self, run: Callable[[int], object], parts: int, held: object) -> None:
        """`held` lives as long as a helper may write into it."""
        self.run, self.held = run, held
        self.todo = deque(range(parts))
        self.entered: deque[None] = deque()
        self.left: deque[None] = deque()
        self.problems: deque[BaseException] = deque()
        self.wake: SimpleQueue[None] = SimpleQueue()

    def help(self) -> None:
        """What a helper does."""
        self.entered.append(None)
        try:
            self._take_parts()
        except BaseException as problem:
            self.todo.clear()
            self.problems.append(problem)
        finally:
            self.left.append(None)
            self.wake.put(None)

    def _take_parts(self) -> None:
        while self.todo:
            try:
                i = self.todo.popleft()
            except IndexError:  # another thread was quicker
                return
            self.run(i)

    def finish(self) -> None:
        """Does what is left and waits for the helpers, also if this thread is interrupted meanwhile."""
        try:
            self._take_parts()
            while len(self.left) < len(self.entered):
                self.wake.get()
        except BaseException:
            self.todo.clear()
            raise
        finally:
            if len(self.left) < len(self.entered):
                self.finish()
