"""What the blocks of an experiment say so far."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from assay.contract.outcome import NOISE
from assay.statistics.looks import LOOKS, MOST_CONTAMINATED, Judgement, Look, judge
from assay.statistics.signed_rank import Interval

ARMS = ("base", "candidate", "control")
"""Every block has these. A fourth one, "reference", is shown and never judged."""


NOISE_BLOCKS = 3
"""After so many clean blocks a machine that scatters too much for the margin is refused."""
_NORMAL, _MEDIAN, _HALF_WIDTH, _SHOWS, _GUARD = 1.4826, 1.2533, 0.317, 0.7, 5.0
"""In standard deviations: the inverse of the median of |x|; that of a median of n, times the root of n; half the 95 %
interval of 40 blocks; the smallest effect that 24 blocks show in half of all campaigns. And how far beyond the margin
n ratios have to speak: 1 + 5 / sqrt(n) times, as three blocks can be unlucky and noise has tails."""


def _too_many(clean: int) -> float:
    """Beside so many clean blocks no more than this may be left out."""
    return MOST_CONTAMINATED * clean / (1 - MOST_CONTAMINATED)


@dataclass
class Blocks:
    """What has been measured so far."""

    workloads: int = 1
    """How many are judged together: as in Plan."""
    rounds: int = 1
    """Turns that the workers of a block take: as in Workload."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    transport: list[float] = field(default_factory=list)
    """What was taken out of every figure of a clean block for sending."""
    spared: list[float] = field(default_factory=list)
    """What an arm that has patched its worker could spare beside, in each clean block."""
    late: list[float] = field(default_factory=list)
    """What the candidate's calls take longer where the next one follows at once, in each clean block."""
    contaminated: int = 0
    compared: int = 0
    """Calls whose outputs were compared, in clean blocks."""
    escapes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ARMS, 0))
    """Blocks in which an arm's processes worked outside its turn."""
    escaped: str = ""
    """How the candidate's did it last, in words."""
    incorrect: str = ""
    ratios: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS[1:]})
    """Of the first clean blocks: log of base over the arm, of each round."""
    grown: bool = False
    """Whether the last block was clean."""

    def add(self, block: dict[str, Any]) -> None:
        """Takes a block of RAW: its primary figures if it is clean."""
        elsewhere = block.get("elsewhere", "")
        self.grown = not (block["differing"] or block["reasons"] or elsewhere)
        if block["differing"]:
            self.incorrect = f"outputs of {len(block['differing'])} of {block['compared']} calls differ from base's"
            self.incorrect += _told(block.get("mismatch"))
        elif elsewhere:
            self.incorrect = f"called by another program than assay's worker: {elsewhere}"
        elif block["reasons"]:
            self.contaminated += 1
            for arm, words in block.get("escapes", {}).items():
                self.escapes[arm] = self.escapes.get(arm, 0) + bool(words)
                self.escaped = words[0] if words and arm == "candidate" else self.escaped
        else:
            self.transport.append(block.get("transport_s", 0.0))
            self.spared.append(block.get("spared_s", 0.0))
            self.late.append(block.get("late_s", 0.0))
            self.compared += block.get("compared", 0)
            for arm, figure in block["primary"].items():
                self.seconds.setdefault(arm, []).append(figure)
            if len(self.seconds["base"]) <= NOISE_BLOCKS:
                for arm in self.ratios:
                    self.ratios[arm] += self._by_round(block, arm)

    def _by_round(self, block: dict[str, Any], arm: str) -> list[float]:
        """Log of base over an arm in each round; of the whole block where its figure is not made of rounds."""
        calls = [block.get("calls", {}).get(one, []) for one in ("base", arm)]
        steady = block.get("figures", {}).get(arm, {}).get("steady", math.nan)
        if not calls[0] or not math.isclose(steady, block["primary"][arm], rel_tol=1e-4):  # one of them is rounded
            return [math.log(block["primary"]["base"] / block["primary"][arm])]
        base, other = (np.median(np.log(np.reshape(one, (self.rounds, -1))), axis=1) for one in calls)
        return list(base - other)

    def decision(self, delta: float) -> Judgement | None:
        """The judgement, if the last block led to a look or to an end; its verdict may be "continue"."""
        clean = len(self.seconds["base"])
        if self.incorrect:
            return _without_times("incorrect", self.incorrect, clean)
        candidates, all_ = self.escapes["candidate"], clean + self.contaminated
        due = self.grown and clean in [look.blocks for look in LOOKS]
        if candidates > _too_many(clean if due else LOOKS[-1].blocks) and candidates == sum(self.escapes.values()):
            words = f"candidate: {self.escaped}, in {candidates} of {all_} blocks, and in no other arm"
            return _without_times("tampered", words, clean)
        if self.contaminated > _too_many(LOOKS[-1].blocks):
            return _without_times("void", f"{self.contaminated} of {all_} blocks contaminated", clean)
        if self.grown and clean == NOISE_BLOCKS and (words := self._noise(delta)):
            return _without_times(NOISE, words, clean)
        if not due:
            return None
        base, candidate, control = (self.seconds[arm] for arm in ARMS)
        looks = [Look(look.blocks, look.alpha / self.workloads) for look in LOOKS]
        seen = judge(base, candidate, control, delta=delta, contaminated=self.contaminated, looks=looks)
        if seen.verdict == "faster" and any((*self.transport, *self.spared, *self.late)):
            bounded = [
                judge(base, figures, control, delta=delta, contaminated=self.contaminated, looks=looks).verdict
                for figures in (self.bounded(), self.followed())
            ]
            if bounded != ["faster", "faster"]:
                last = seen.blocks == looks[-1].blocks
                words = "the interval lies above 0, but not beyond what a patched worker could explain"
                return replace(seen, verdict="undecided" if last else "continue", reason=words)
        return seen

    def _noise(self, delta: float) -> str:
        """Why all blocks that are allowed could not show the margin, from the first ones; "" if they might.

        The scatter of a block's A / A' follows from that of its rounds. An effect that is large beside it is looked
        for all the same: this stops campaigns, it calls nothing.
        """
        ratios, rounds = self.ratios["control"], len(self.ratios["control"]) // NOISE_BLOCKS
        scatter = _NORMAL * float(np.median(np.abs(ratios)))
        scatter *= _MEDIAN / math.sqrt(rounds) if rounds > 1 else 1.0
        half, effect = _HALF_WIDTH * scatter, abs(float(np.median(self.ratios["candidate"])))
        if half <= (1 + _GUARD / math.sqrt(len(ratios))) * math.log1p(delta) or effect >= _SHOWS * scatter:
            return ""
        return (
            f"two builds of base scatter by {math.expm1(scatter):.0%} from block to block: {LOOKS[-1].blocks} blocks "
            f"could show {math.expm1(half):.1%} here, the margin is {delta:.1%}"
        )

    def bounded(self) -> list[float]:
        """The candidate's figures as if it had spared all that is in the hands of its own process."""
        columns = (self.seconds["candidate"], self.transport, self.spared)
        return [sum(figures) for figures in zip(*columns, strict=True)]

    def followed(self) -> list[float]:
        """These figures as if each call were followed by the next one at once."""
        return [sum(figures) for figures in zip(self.bounded(), self.late, strict=True)]


def _told(mismatch: dict[str, Any] | None) -> str:
    """A call whose output differs, in words; "" where RAW has none."""
    if mismatch is None:
        return ""
    given = f"; call {mismatch['call']} was given {mismatch['input']}"
    return f"{given}; base returned {mismatch['base']}, the candidate {mismatch['candidate']}; {mismatch['where']}"


def _without_times(verdict: str, reason: str, blocks: int) -> Judgement:
    return Judgement(verdict, reason, math.nan, Interval(-math.inf, math.inf), blocks, 1.0, False, math.inf)
