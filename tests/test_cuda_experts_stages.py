"""The stages of experts.cu, threads and copies in random order: nobody stands still, and what is read is there."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

Thread = Iterator[Callable[[], bool] | None]
"""Yields what it waits for, or None where others may go first."""


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all expected bytes have come."""

    def __init__(self, count: int) -> None:
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0

    def change(self, arrivals: int, more: int) -> None:
        assert self.pending >= arrivals, "more arrivals than the phase has room for"
        self.pending -= arrivals
        self.bytes += more
        if not self.pending and not self.bytes:
            self.pending, self.phase = self.count, self.phase + 1

    def until(self, parity: int) -> Callable[[], bool]:
        return lambda: self.phase % 2 != parity


@dataclass
class Pipeline:
    """A block that works through `tiles`, of which these are the steps. Two threads stand for the 128 that gather."""

    tiles: list[int]
    depth: int
    groups: int
    gathers: bool
    ahead: bool
    """Whether the first stages' weights are loaded before everything else."""
    lead: int
    """The step of the first warpgroup after which the second begins."""
    releases: int = 0
    """Steps back that a stage is given away early: 0, or a mutant."""
    copies: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.full = [Barrier(3 if self.gathers else 1) for _ in range(self.depth)]
        self.empty = [Barrier(4 * self.groups) for _ in range(self.depth)]
        self.begin = Barrier(4)
        self.held: list[list[object]] = [[None, None] for _ in range(self.depth)]  # weights, rows
        self.work = [(tile, step) for tile, steps in enumerate(self.tiles) for step in range(steps)]
        self.done: list[list[tuple[int, int]]] = [[] for _ in range(4 * self.groups)]

    def copy(self, number: int, part: int, what: object, arrivals: int, size: int) -> None:
        """Puts a copy on its way, which ends when it likes."""

        def come() -> None:
            self.held[number][part] = what
            self.full[number].change(arrivals, -size)

        self.copies.append(come)

    def load(self, first: bool) -> Thread:
        early = min(self.depth, self.tiles[0]) if self.ahead and self.tiles else 0
        for i in range(early):
            self.full[i].change(1, 2)
            self.copy(i, 0, self.work[i], 0, 1)
        yield None
        for i, what in enumerate(self.work):
            number, parity = i % self.depth, i // self.depth % 2
            if i >= early:
                yield self.empty[number].until(parity ^ 1)
                if first:
                    self.full[number].change(1, 1 if self.gathers else 2)
                    self.copy(number, 0, what, 0, 1)
            yield None
            self.copy(number, 1, what, int(self.gathers), int(not self.gathers))

    def multiply(self, warp: int) -> Thread:
        group, i = warp // 4, 0
        if group == 1 and self.tiles:
            yield self.begin.until(0)
        for tile, steps in enumerate(self.tiles):
            for step in range(steps):
                number, parity = i % self.depth, i // self.depth % 2
                yield self.full[number].until(parity)
                if self.releases:
                    self.empty[number].change(1, 0)
                    yield None
                assert self.held[number] == [self.work[i], self.work[i]], "read what is not there"
                self.done[warp].append((tile, step))
                if self.groups == 2 and warp < 4 and tile == 0 and step == min(self.lead, steps - 1):
                    self.begin.change(1, 0)
                yield None
                if step > 0 and not self.releases:
                    self.empty[(i - 1) % self.depth].change(1, 0)
                i += 1
            yield None
            if not self.releases:
                self.empty[(i - 1) % self.depth].change(1, 0)

    def run(self, rng: np.random.Generator) -> None:
        loaders = [self.load(thread == 0) for thread in range(2 if self.gathers else 1)]
        threads: list[tuple[Thread, Callable[[], bool] | None]]
        threads = [(thread, None) for thread in (*loaders, *(self.multiply(warp) for warp in range(4 * self.groups)))]
        while threads or self.copies:
            ready = [i for i, (_, wait) in enumerate(threads) if wait is None or wait()]
            assert ready or self.copies, "nobody can go on"
            chosen = int(rng.integers(len(ready) + len(self.copies)))
            if chosen >= len(ready):
                self.copies.pop(chosen - len(ready))()
                continue
            thread = threads.pop(ready[chosen])[0]
            with contextlib.suppress(StopIteration):
                threads.append((thread, next(thread)))
        assert all(done == self.work for done in self.done)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("gathers", [True, False])
def test_stages_never_stand_still_and_hold_what_is_read(groups: int, gathers: bool) -> None:
    rng = np.random.default_rng()
    for depth, tiles in itertools.product((2, 3, 4, 9), ([], [1], [1, 1, 1], [7], [2, 2, 2, 2, 2], [5, 5, 5])):
        for ahead in (False, True) if not gathers else (False,):
            Pipeline(tiles, depth, groups, gathers, ahead, 2 if depth > 2 else 1).run(rng)


def test_a_lead_as_deep_as_the_stages_stands_still() -> None:
    with pytest.raises(AssertionError, match="nobody can go on"):
        Pipeline([7], 2, 2, True, False, 2).run(np.random.default_rng())


def test_a_stage_given_away_before_it_is_read_is_seen() -> None:
    rng = np.random.default_rng()
    with pytest.raises(AssertionError, match="read what is not there"):
        for _ in range(50):
            Pipeline([5, 5], 2, 1, False, False, 1, releases=1).run(rng)
