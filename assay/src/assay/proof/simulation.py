"""Does the procedure keep its promises? Thousands of experiments with a known truth, under noise like a machine's."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from assay.statistics.looks import LOOKS, VOID_ALPHA
from assay.statistics.signed_rank import Floats, depth, walsh_averages

Generator = np.random.Generator


@dataclass(frozen=True)
class Scenario:
    """A way in which blocks disturb times. An experiment has arms A, B, A' in every block, run in random order."""

    name: str
    description: str
    noise: Callable[[Generator, tuple[int, int, int]], Floats]
    """[experiments, blocks, 3]: what is added to the log-times in the order in which arms run."""
    persistent: float = 0.0
    """Spread of an offset that an arm keeps through all blocks: what one process a campaign has."""
    sound: bool = True
    """Whether the procedure must keep its level here; otherwise void has to catch what it does not."""


def _quiet(generator: Generator, shape: tuple[int, int, int]) -> Floats:
    return generator.normal(0, 0.01, shape)


def _tails(generator: Generator, shape: tuple[int, int, int]) -> Floats:
    """As measured on two shared cores: a core of 1.7 %, and now and then tens of per cent."""
    rare = generator.random(shape) < 0.08
    core = generator.normal(0, 0.012, shape)
    slow: Floats = core + rare * generator.exponential(0.25, shape)
    return slow


def _drift(generator: Generator, shape: tuple[int, int, int]) -> Floats:
    total = np.linspace(0, 0.3, shape[1] * shape[2]).reshape(1, shape[1], shape[2])
    drifted: Floats = total + generator.normal(0, 0.01, shape)
    return drifted


def _autoregressive(generator: Generator, shape: tuple[int, int, int]) -> Floats:
    steps = generator.normal(0, 0.01, (shape[0], shape[1] * shape[2]))
    level = np.zeros(shape[0])
    out = np.empty_like(steps)
    for i in range(steps.shape[1]):
        level = 0.9 * level + steps[:, i]
        out[:, i] = level
    return out.reshape(shape)


SCENARIOS = (
    Scenario("quiet", "independent normal noise of 1 %", _quiet),
    Scenario("tails", "a narrow core, and 8 % of runs slower by 25 % on average", _tails),
    Scenario("drift", "everything gets slower by 30 % from the first run to the last", _drift),
    Scenario("ar1", "noise that remembers: each run keeps 0.9 of the one before", _autoregressive),
    Scenario(
        "persistent",
        "one process an arm for the whole campaign, off by 2 %: blocks are no replicates",
        _quiet,
        persistent=0.02,
        sound=False,
    ),
)


@dataclass(frozen=True)
class Counts:
    """What became of the experiments of one scenario and effect."""

    scenario: str
    effect: float
    """True log-ratio, base over candidate."""
    experiments: int
    void: int
    wrong: int
    """Valid experiments that excluded the true effect at their look (null: false claims)."""
    claimed: int
    """Valid experiments that excluded 0."""
    covered: int
    """Experiments whose 95 % interval at the last look held the true effect, void or not."""


def simulate(scenario: Scenario, effect: float, experiments: int, seed: int, *, pooled: bool = False) -> Counts:
    """Runs the three looks of the protocol on experiments with a known effect.

    `pooled` averages base and A' before the ratio is taken, which the protocol does not do: skewed times break it.
    """
    generator = np.random.default_rng(seed)
    blocks = LOOKS[-1].blocks
    shape = (experiments, blocks, 3)
    noise = scenario.noise(generator, shape)
    order = generator.permuted(np.broadcast_to(np.arange(3), shape), axis=2)
    noise = np.take_along_axis(noise, order, axis=2)  # place in the block -> arm
    times = noise + np.array([0.0, -effect, 0.0])
    times += generator.normal(0, 1, (experiments, 1, 3)) * scenario.persistent
    base, candidate, control = np.moveaxis(times, 2, 0)
    ratios, null = ((base + control) / 2 if pooled else base) - candidate, base - control
    open_, void = np.ones(experiments, bool), np.zeros(experiments, bool)
    wrong, claimed = np.zeros(experiments, bool), np.zeros(experiments, bool)
    for look in LOOKS:
        low, high = _intervals(ratios[:, : look.blocks], look.alpha)
        bad_low, bad_high = _intervals(null[:, : look.blocks], VOID_ALPHA)
        voided = open_ & ((bad_low > 0) | (bad_high < 0))
        decided = open_ & ~voided & ((low > 0) | (high < 0))
        ends = decided | (open_ & ~voided & (look == LOOKS[-1]))
        void |= voided
        claimed |= decided
        wrong |= ends & ((low > effect) | (high < effect))
        open_ &= ~(voided | decided)
    low, high = _intervals(ratios, 0.05)
    covered = (low <= effect) & (effect <= high)
    return Counts(
        scenario.name,
        effect,
        experiments,
        int(void.sum()),
        int(wrong.sum()),
        int(claimed.sum()),
        int(covered.sum()),
    )


def _intervals(values: Floats, alpha: float) -> tuple[Floats, Floats]:
    """Low and high ends of the exact intervals of [experiments, blocks]."""
    k = depth(values.shape[1], alpha)
    averages = walsh_averages(values)
    return averages[:, k], averages[:, -1 - k]


def failures(counts: Counts, scenario: Scenario) -> list[str]:
    """The promises that a scenario's counts break, in words: the level of all looks together, and coverage."""
    n, level = counts.experiments, sum(look.alpha for look in LOOKS)
    found = []
    allowed = level + 3 * math.sqrt(level * (1 - level) / n)
    if scenario.sound and counts.effect == 0 and counts.claimed > allowed * n:
        found.append(f"{counts.claimed} of {n} null experiments were called, more than {allowed:.2%}")
    if scenario.sound and abs(counts.covered / n - 0.95) > 0.01 + 3 * math.sqrt(0.95 * 0.05 / n):
        found.append(f"the 95 % interval covers {counts.covered / n:.1%}")
    return found
