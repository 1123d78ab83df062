"""Times of several providers of one case, taken in turn, so that what drifts hits all of them alike."""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

_LEAST_ROUNDS = 7
_MOST_US = 15e6
_FEWEST_ROUNDS, MOST_ROUNDS = 6, 40  # six pairs are the fewest with an interval of 95 %


@dataclass(frozen=True)
class Times:
    """Microseconds a call over the rounds of one provider."""

    median: float
    p10: float
    p90: float
    samples: tuple[float, ...] = field(default=(), repr=False)
    """One a round, in the order of rounds: those of two providers make pairs."""


def summarise(samples: Sequence[float]) -> Times:
    """Median and the 10 % and 90 % points, in the unit of the samples."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return Times(at(0.5), at(0.1), at(0.9), tuple(samples))


def ratio_interval(ours: Times, theirs: Times, confidence: float = 0.95) -> tuple[float, float, float]:
    """The median over rounds of ours / theirs, and an interval that covers the true one.

    The interval is the exact one of the sign test: order statistics of the paired ratios, as many from either end as
    the binomial distribution allows. With fewer than six rounds no interval has 95 %: then the whole range.
    """
    ratios = sorted(a / b for a, b in zip(ours.samples, theirs.samples, strict=True))
    n = len(ratios)
    outside, skipped = 2 * 0.5**n, 0
    while outside + 2 * math.comb(n, skipped + 1) * 0.5**n <= 1 - confidence:
        skipped += 1
        outside += 2 * math.comb(n, skipped) * 0.5**n
    return summarise(ratios).median, ratios[skipped], ratios[n - 1 - skipped]


def time_in_turn(
    runs: Sequence[Callable[[Any], object]],
    inputs: Sequence[Any],
    *,
    rounds: int,
    sample_us: float,
    finish: Callable[[], None],
    after_round: Callable[[], None],
    seed: int = 0,
) -> list[Times]:
    """Times calls on the host clock: in every round each run gets one sample, in random order.

    A sample makes whole turns over `inputs`, as many as last about `sample_us`, and ends with `finish`, which waits for
    the device if there is one. Slow runs get fewer rounds, so that a case ends in about 15 s.
    """
    for run in runs:
        for value in inputs:
            run(value)  # first calls compile
    turn_us = [_sample(run, inputs, 1, finish) * len(inputs) for run in runs]
    counts = [max(1, round(sample_us / turn)) for turn in turn_us]
    round_us = sum(count * turn for count, turn in zip(counts, turn_us, strict=True))
    rounds = max(min(rounds, _LEAST_ROUNDS), min(rounds, round(_MOST_US / max(round_us, 1.0))))
    samples: list[list[float]] = [[] for _ in runs]
    order = list(range(len(runs)))
    shuffler = random.Random(seed)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for i in order:
            samples[i].append(_sample(runs[i], inputs, counts[i], finish))
        after_round()
    return [summarise(sample) for sample in samples]


def _sample(run: Callable[[Any], object], inputs: Sequence[Any], turns: int, finish: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(turns):
        for value in inputs:
            run(value)
    finish()
    return (time.perf_counter() - start) * 1e6 / (turns * len(inputs))


def time_graphs_in_turn(
    runs: Sequence[Callable[[Any], object]],
    inputs: Sequence[Any],
    *,
    rounds: int,
    calls: int,
    after_round: Callable[[], None],
    seed: int = 0,
) -> list[Times]:
    """Times CUDA-graph replays of `calls` calls over rotating inputs, by events, in random order."""
    graphs = [_capture(run, inputs, calls) for run in runs]
    return _replay_in_turn(graphs, calls, rounds, after_round, seed)


def time_graphs_within(
    runs: Sequence[Callable[[Any], object]],
    inputs: Sequence[Any],
    *,
    calls: int,
    seconds: float,
    captured: Callable[[int], None],
    seed: int = 0,
    most_rounds: int = MOST_ROUNDS,
) -> list[Times]:
    """Like `time_graphs_in_turn`, with as many rounds as fit into `seconds`, at least 6, and hardly any warm-up.

    For calls that are long and whose kernels are compiled already. `captured` is told which run comes next. Only the
    first two inputs are called on before: runs may keep something for each of two inputs, not of more.
    """
    graphs = []
    for i, run in enumerate(runs):
        captured(i)
        graphs.append(_capture(run, inputs[:2], calls, over=inputs, replays=0))
    round_us = sum(_replay_us(graph) for graph in graphs)
    rounds = max(_FEWEST_ROUNDS, min(most_rounds, int(seconds * 1e6 / max(round_us, 1.0))))
    return _replay_in_turn(graphs, calls, rounds, lambda: None, seed)


def _replay_in_turn(
    graphs: Sequence[torch.cuda.CUDAGraph], calls: int, rounds: int, after_round: Callable[[], None], seed: int
) -> list[Times]:
    samples: list[list[float]] = [[] for _ in graphs]
    order = list(range(len(graphs)))
    shuffler = random.Random(seed)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for i in order:
            samples[i].append(_replay_us(graphs[i]) / calls)
        after_round()
    return [summarise(sample) for sample in samples]


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e3


def _capture(
    run: Callable[[Any], object],
    inputs: Sequence[Any],
    calls: int,
    *,
    over: Sequence[Any] | None = None,
    replays: int = 3,
) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls that rotate over `over`, or `inputs`; called once on each of `inputs` before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for value in inputs:
            run(value)
    torch.cuda.current_stream().wait_stream(side)
    graph, rotated = torch.cuda.CUDAGraph(), inputs if over is None else over
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(rotated[i % len(rotated)])
    for _ in range(replays):
        graph.replay()
    torch.cuda.synchronize()
    return graph


@dataclass(frozen=True)
class Rates:
    """What a machine reaches at most in the same run, measured with torch."""

    copy_gb_s: float
    """A copy into an existing tensor, read and written bytes added, in GB/s."""
    read_gb_s: float
    """The quicker of two reductions of a tensor, in GB/s."""
    matrix_tflops: float
    """The product of two random square matrices of `matrix_dtype`, in TFLOP/s."""
    matrix_dtype: str
    """What products are quickest in: bfloat16 on a GPU, float32 on a CPU, which mostly widens narrower ones."""

    def times_us(self, moved: float, operations: float, dtype: torch.dtype) -> dict[str, float | None]:
        """What a row has beside its time: the microseconds that bytes and operations take at these rates.

        Reads are quicker than copies, so a time may be below `copy_time_us`. `product_time_us` is None without
        operations, and for a dtype that is wider than `matrix_dtype`, since its rate is another.
        """
        known = operations and dtype.itemsize <= getattr(torch, self.matrix_dtype).itemsize
        product = operations / self.matrix_tflops / 1e6 if known else None
        return {
            "copy_time_us": round(moved / self.copy_gb_s / 1e3, 3),
            "read_time_us": round(moved / self.read_gb_s / 1e3, 3),
            "product_time_us": None if product is None else round(product, 3),
        }


def rates(device: torch.device) -> Rates:
    """The rates of a machine, from tensors that no cache holds."""
    if device.type == "cuda":
        return Rates(copy_gb_s(device), read_gb_s(device), matrix_tflops(device, torch.bfloat16, 8192), "bfloat16")
    return Rates(copy_gb_s(device), read_gb_s(device), matrix_tflops(device, torch.float32, 1024), "float32")


def copy_gb_s(device: torch.device) -> float:
    """The machine's copy bandwidth in GB/s, read and written bytes added: torch's copy into an existing tensor."""
    size = 1 << (30 if device.type == "cuda" else 27)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), device) / 1e9


def read_gb_s(device: torch.device) -> float:
    """The machine's read bandwidth in GB/s: the quicker of torch's sum of float32 and largest value of int32."""
    count = 1 << (29 if device.type == "cuda" else 26)
    source = torch.rand(count, device=device)
    seconds = min(_median_seconds(reduce, device) for reduce in (source.sum, source.view(torch.int32).amax))
    return source.nbytes / seconds / 1e9


def matrix_tflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The rate of torch's product of two random square matrices, in TFLOP/s."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(left, right, out=product), device) / 1e12


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of 9 calls, by events on a GPU; the first one, which may compile, comes before."""
    call()
    seconds = []
    for _ in range(9):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            seconds.append(start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
    return summarise(seconds).median
