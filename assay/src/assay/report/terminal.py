"""What a person sees in a terminal: progress while blocks are measured, and the outcome as a table."""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from assay.contract import foreign
from assay.experiment import beside
from assay.machine.conditions import PATIENCE_S
from assay.report import wording
from assay.statistics.looks import LOOKS, Judgement

_SAID_S = 30.0
"""How often it is said, without a terminal, what is waited for."""
_SEEN = 0.02
"""Of a processor: less is not shown."""
_NAMES = {"base": "A", "candidate": "B", "control": "A'"}


class Progress:
    """Follows RAW's rows on stderr: a bar where rich is there, else a line; without a terminal only what is waited for.

    It shows how far the campaign is and never an estimate: what is seen early must not tempt anybody to stop.
    """

    def __init__(self) -> None:
        self.bar: Any = None
        self.clean = self.left_out = 0
        self.stage = self.others = ""
        self.said = -math.inf
        self.start = time.monotonic()
        self.shows = self.begun = False

    def begin(self) -> None:
        """Shows itself from now on, if stderr is a terminal. The first row does the same."""
        self.begun, self.shows = True, sys.stderr.isatty()
        if self.shows:
            try:
                from rich.console import Console
                from rich.progress import Progress as Bar

                self.bar = Bar(console=Console(stderr=True), transient=True, auto_refresh=False)
                self.task = self.bar.add_task("calibrating", total=LOOKS[-1].blocks)
                self.bar.start()
            except ImportError:
                self.say("calibrating")

    def told(self, row: dict[str, Any]) -> None:
        """Takes a row."""
        if not self.begun:
            self.begin()
        if row["kind"] in ("block", "load"):
            self.others = others(row)
        if row["kind"] == "load" and not self.shows and time.monotonic() - self.said > _SAID_S:
            self.said = time.monotonic()
            most = "" if row["patience_s"] > PATIENCE_S else ", which --patient extends"
            who = self.others or "nobody is seen"
            line(f"waiting until others rest, {row['patience_s']:.0f} s at most{most}: {who}", sys.stderr)
        if row["kind"] == "block":
            self.clean += not row["reasons"]
            self.left_out += bool(row["reasons"])
        elif row["kind"] in ("stage", "workload", "waiting"):
            self.clean = self.left_out = 0
            self.stage = row["name"] if row["kind"] != "waiting" else f"another judge has {row['name']}"
            if row["kind"] == "waiting" and not self.shows:
                line(f"waiting: {self.stage}", sys.stderr)
        if self.shows:
            look = next((look.blocks for look in LOOKS if look.blocks > self.clean), LOOKS[-1].blocks)
            words = f"block {self.clean}, next look at {look}" + f", {self.left_out} left out" * bool(self.left_out)
            words = f"waiting until others rest; {words}" if row["kind"] == "load" else words
            words += f"; {self.others}" * bool(self.others)
            if self.stage:
                words = f"{self.stage}: {words}" if self.clean or self.left_out else self.stage
            if self.bar is None:
                self.say(f"{words}, {time.monotonic() - self.start:.0f} s")
            else:
                self.bar.update(self.task, completed=self.clean, description=_unmarked(words), refresh=True)

    def say(self, words: str) -> None:
        """Replaces the line."""
        print(f"\r{foreign.on_one_line(words):<70}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leaves the terminal clean."""
        if self.bar is not None:
            self.bar.stop()
        elif self.shows:
            print("\r" + " " * 70 + "\r", end="", file=sys.stderr, flush=True)


def others(row: dict[str, Any]) -> str:
    """How much of a processor others used while a block, or a wait, lasted, and who; "" if it was next to nothing."""
    foreign, seconds = row["foreign_cpu_s"], row["elapsed_s"]
    if foreign is None or foreign < _SEEN * seconds:
        return ""
    who = ", ".join(f"{name} {used / seconds:.2f}" for name, used in row.get("others", {}).items())
    return f"others use {foreign / seconds:.2f} of a processor{f' ({who})' * bool(who)}"


def _unmarked(words: str) -> str:
    """For rich, whose own marks stand in brackets."""
    return foreign.on_one_line(words).replace("[", r"\[")


def line(words: str, where: TextIO | None = None) -> None:
    """Prints a line at once, to stdout unless told otherwise. What may be anybody's words is escaped."""
    _written(foreign.told(words), where or sys.stdout)


def _written(text: str, where: TextIO) -> None:
    """Prints; who no longer listens (`assay ... | head`) changes nothing of what a command comes to."""
    try:
        print(text, file=where, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), where.fileno())


def lines(many: Iterable[str]) -> None:
    """Prints one after another."""
    for one in many:
        line(one)


def document(content: Any) -> None:
    """Prints JSON, in which everything beside ASCII is escaped."""
    _written(json.dumps(content, indent=1), sys.stdout)


def outcome(seen: Judgement, delta: float) -> list[str]:
    """The verdict and what it rests on, a line each; `delta` is the margin, as a fraction."""
    margin = wording.beside_margin(seen.verdict, seen.material, seen.interval.low, seen.interval.high, delta)
    lines = [f"{seen.verdict}: {seen.reason}{margin}"]
    if math.isfinite(seen.estimate):
        change, low, high = wording.changes(seen.estimate, (seen.interval.low, seen.interval.high))
        seen_at = f"{seen.blocks} blocks; an effect of {wording.change(seen.detectable)} would have been seen"
        estimate = f"A / B: {math.exp(seen.estimate):.4g}, that is {change}"
        lines.append(f"{estimate}; {wording.level(seen.alpha)} interval {low} to {high}; {seen_at}")
    return lines


def figures(rows: list[dict[str, Any]]) -> list[str]:
    """A table of the medians over clean blocks of everything that was measured."""
    clean = [row for row in rows if row["kind"] == "block" and not row["reasons"]]
    if not clean:
        return []
    primary = rows[0]["plan"]["primary"]
    lines = [f"{'median of clean blocks':<24}{'A':>12}{'B':>12}{chr(39).join(('A', '')):>12}{'A / B':>9}"]
    for name in clean[0]["figures"]["base"]:
        values = {arm: statistics.median(row["figures"][arm][name] for row in clean) for arm in _NAMES}
        shown = [wording.quantity(name, values[arm]) for arm in _NAMES]
        ratio = f"{values['base'] / values['candidate']:.3f}" if values["candidate"] > 0 else "-"
        label = f"{name}, gets the verdict" if name == primary else name
        lines.append(f"{label:<24}" + "".join(f"{one:>12}" for one in shown) + f"{ratio:>9}")
    return lines


def got_worse(rows: list[dict[str, Any]]) -> list[str]:
    """What got worse beside the primary figure, on a line; none if nothing did."""
    found = beside.worse(rows, rows[0]["plan"]["primary"], math.log1p(rows[0]["plan"]["delta"]))
    return [wording.worse(found)] if found else []


def conditions(rows: list[dict[str, Any]]) -> list[str]:
    """How it was measured, and what was left out, a line each."""
    header = rows[0]
    blocks = [row for row in rows if row["kind"] == "block"]
    lines = [
        f"{subject(header)}; protocol {header['protocol']}, seed {header['plan']['seed']}, "
        f"margin {header['plan']['delta']:.1%}, isolation: {header['isolation']}"
    ]
    if header["clock"] == "cooperative":
        lines.append("clock: cooperative (CUDA events inside the arm); trust: benign, no tamper resistance is claimed")
    sending = [row["transport_s"] for row in blocks if row.get("transport_s")]
    if sending:
        seconds = wording.quantity("transport", statistics.median(sending))
        lines.append(
            f"sending: {seconds}, as base's worker echoes it, is taken out "
            f"of all arms' times; what a patched worker could explain is not called faster"
        )
    elif (
        header.get("loops", 1) == 1 and header["plan"]["primary"] in ("steady", "first") and header["clock"] == "judge"
    ):
        lines.append("sending: in the times of all arms")
    if (loops := header.get("loops", 1)) > 1 and blocks:
        sealing = statistics.median(row["figures"]["base"]["transport"] for row in blocks)
        seconds = wording.quantity("transport", sealing)
        lines.append(
            f"calls in loops of {loops}: times are those of one call, without the {seconds} that hide its input"
        )
    if processors := header.get("processors"):
        many = len(processors)
        lines.append(f"on processor {processors[0]} alone" if many == 1 else f"on {many} processors")
    compared = sum(row["compared"] for row in blocks)
    if compared:
        lines.append(f"outputs: {compared} compared with base's, {sum(len(row['differing']) for row in blocks)} differ")
    else:
        lines.append("outputs: not compared")
    lines += [f"block {row['number']} left out: {'; '.join(row['reasons'])}" for row in blocks if row["reasons"]][:5]
    return lines


def subject(header: dict[str, Any]) -> str:
    """What was run, in a few words."""
    workload = header["plan"]["workload"]
    if workload["kind"] == "command":
        return " ".join(workload["command"])
    return f"{workload['kind']} {workload['target']}"
