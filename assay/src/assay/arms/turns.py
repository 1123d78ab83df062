"""Several arms beside each other, started and watched by one thread.

What dies with its parent dies with the thread that forked it (PR_SET_PDEATHSIG). So there is no thread per arm: work
that waits for a process is a generator that says what it waits for, and goes on where it stopped.
"""

import select
import time
from collections.abc import Generator, Mapping
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Wait(NamedTuple):
    """What a generator waits for."""

    fd: int
    """A descriptor that can be read, or whose other end is closed."""
    until: float
    """On the monotonic clock: it goes on then all the same."""


Steps = Generator[Wait, bool, T]
"""Work in steps, and what it gives in the end. It is sent whether its descriptor can be read."""


def alone(steps: Steps[T]) -> T:
    """Does the work; what it gives. Raises what it raises."""
    ready = None
    while True:
        try:
            wait = steps.send(ready)  # type: ignore[arg-type] # None starts it
        except StopIteration as end:
            found: T = end.value
            return found
        ready = bool(_readable({wait.fd: wait.until}))


def beside(jobs: Mapping[str, Steps[T]], most: int) -> Generator[tuple[str, T], None, None]:
    """Does several works, at most so many at a time; names and what each gives, as they end. Raises what any raises.

    Works are begun in their order. However this ends, those that have not ended are closed.
    """
    left = list(jobs)
    waits: dict[str, Wait] = {}
    ready: dict[str, bool | None] = {}
    try:
        while left or waits or ready:
            while left and len(waits) + len(ready) < most:
                ready[left.pop(0)] = None
            for name in list(ready):
                try:
                    waits[name] = jobs[name].send(ready.pop(name))  # type: ignore[arg-type] # as above
                except StopIteration as end:
                    yield name, end.value
            if waits and not (left and len(waits) < most):
                readable = _readable({wait.fd: wait.until for wait in waits.values()})
                now = time.monotonic()
                for name, wait in list(waits.items()):
                    if wait.fd in readable or now >= wait.until:
                        ready[name] = wait.fd in readable
                        del waits[name]
    finally:
        for job in jobs.values():
            job.close()


def _readable(waits: Mapping[int, float]) -> set[int]:
    """Which descriptors can be read, once one can or the first of the times has come."""
    poller = select.poll()
    for fd in waits:
        poller.register(fd, select.POLLIN)
    return {fd for fd, _ in poller.poll(max(0.0, min(waits.values()) - time.monotonic()) * 1000)}
