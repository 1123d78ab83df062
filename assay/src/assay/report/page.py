"""A RAW file as one HTML page that opens offline: verdict, paired ratios, drift, figures, environment."""

import html
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from assay.contract import foreign
from assay.experiment.blocks import Blocks
from assay.report import instructions, terminal, wording
from assay.report.advice import advice
from assay.statistics.looks import Judgement
from assay.statistics.signed_rank import exact_interval

_COLOURS = {"base": "#4878a8", "candidate": "#c8562b", "control": "#8a8f98"}
_NAMES = {"base": "A", "candidate": "B", "control": "A'"}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 260, 64, 16, 14, 34
_MOST_PATCH = 200_000
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2126; max-width: 800px; margin: 2.5em auto; padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.1em; margin: 2em 0 .3em }
.verdict { display: inline-block; padding: .1em .6em; border-radius: .3em; color: #fff; background: #5b6570 }
.slower, .incorrect, .tampered { background: #b3261e }
.faster { background: #2c7a4b } .void, .undecided { background: #8a6d1d }
table { border-collapse: collapse; margin: .5em 0 }
td, th { text-align: right; padding: .15em .8em; border-bottom: 1px solid #e3e6e9 }
td:first-child, th:first-child { text-align: left } p { margin: .3em 0 } .dim { color: #5b6570 }
svg { width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #5b6570 }
.more { color: #2c7a4b } .less { color: #b3261e } pre.patch { overflow: auto; font-size: 12px }
code { background: #f2f4f5; padding: 0 .3em } summary { cursor: pointer; color: #5b6570 }
"""


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The page for RAW's rows, header first. A campaign that has not ended yet is shown as far as it is."""
    header = rows[0]
    seen = _decided(header, [row for row in rows if row["kind"] == "block"])
    verdict = seen.verdict if seen else "unfinished"
    parts = [
        f"<h1>{text(terminal.subject(header))}</h1>",
        "<p class=dim>"
        + " ".join(f"{_NAMES.get(arm, 'H')}: <code>{text(tree)}</code>" for arm, tree in header["trees"].items())
        + "</p>",
        *sections(rows),
    ]
    return document(f"{verdict}: {terminal.subject(header)}", parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A page of its own, which loads nothing."""
    head = f"<meta charset=utf-8><title>{text(title)}</title><style>{_STYLE}</style>"
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang=en>{head}\n{body}\n</html>\n"


def sections(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What RAW's rows show: verdict, pictures, figures, conditions, environment."""
    header, blocks = rows[0], [row for row in rows if row["kind"] == "block"]
    clean = [row for row in blocks if not row["reasons"] and not row["differing"]]
    seen = _decided(header, blocks)
    verdict = seen.verdict if seen else "unfinished"
    lines = terminal.outcome(seen, header["plan"]["delta"]) if seen else [f"unfinished: {len(clean)} clean blocks"]
    parts = [
        f'<p><span class="verdict {text(verdict)}">{text(verdict)}</span> {text(lines[0].partition(": ")[2])}</p>',
        *(f"<p>{text(line)}</p>" for line in lines[1:]),
        *(f"<p>{text(words)}</p>" for words in instructions.lines(rows)),
        *(f"<p>advice: {text(words)}</p>" for words in advice(verdict, rows)),
    ]
    parts += [f"<p>{text(line)}</p>" for line in terminal.got_worse([header, *blocks])]
    if clean:
        parts += [
            "<h2>Ratios, block by block</h2>",
            _ratios(clean, seen, header["plan"]["delta"]),
            "<p class=dim>Above the line B was quicker than A. Orange: A / B, with the interval of its look. Grey: "
            "A / A', two builds of the same tree, with its 95 % interval. The band is the margin.</p>",
            f"<h2>Drift: {text(header['plan']['primary'])} over blocks</h2>",
            _drift(blocks, header["plan"]["primary"]),
            "<p class=dim>Hollow: blocks that were left out, for what else ran and never for their times.</p>",
            "<h2>Figures</h2>",
            _figures([header, *blocks]),
        ]
    parts += [
        "<h2>How it was measured</h2>",
        *(f"<p>{text(line)}</p>" for line in terminal.conditions([header, *blocks])),
    ]
    return [*parts, _environment(header, blocks)]


def _decided(header: dict[str, Any], blocks: Sequence[dict[str, Any]]) -> Judgement | None:
    found = Blocks(header["plan"]["workloads"], header["plan"]["workload"]["rounds"])
    for block in blocks:
        found.add(block)
        seen = found.decision(header["plan"]["delta"])
        if seen is not None and seen.verdict != "continue":
            return seen
    return None


def text(words: str) -> str:
    """Words for HTML."""
    return html.escape(foreign.shown(words))


def patch(diff: str) -> str:
    """A patch, folded, with its lines coloured; its middle is left out if it is long."""
    if len(diff) > _MOST_PATCH:
        half = _MOST_PATCH // 2
        diff = f"{diff[:half]}\n[... {len(diff) - 2 * half} letters ...]\n{diff[-half:]}"
    lines = []
    for line in diff.splitlines():
        kind = "more" if line.startswith("+") else "less" if line.startswith("-") else "dim" * line.startswith("@@")
        lines.append(f'<span class="{kind}">{text(line)}</span>' if kind else text(line))
    whole = "\n".join(lines)
    return f"<details open><summary>the patch that was judged</summary><pre class=patch>{whole}</pre></details>"


class _Axes:
    """Maps blocks and values to a picture; draws ticks."""

    def __init__(self, count: int, low: float, high: float) -> None:
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        self.count, self.low, self.high = max(count, 2), low - room, high + room
        self.parts: list[str] = []

    def x(self, place: float) -> float:
        """Of a block's place."""
        return _LEFT + (place + 0.5) / self.count * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Of a value."""
        return _TOP + (self.high - value) / (self.high - self.low) * (_HEIGHT - _TOP - _BOTTOM)

    def line(self, value: float, colour: str, dash: str = "", width: float = 1) -> None:
        """Across the picture."""
        y = self.y(value)
        self.parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" '
            f'stroke-width="{width}" stroke-dasharray="{dash}"/>'
        )

    def band(self, low: float, high: float, colour: str, opacity: float) -> None:
        """Across the picture, cut to it."""
        top, bottom = self.y(min(high, self.high)), self.y(max(low, self.low))
        self.parts.append(
            f'<rect x="{_LEFT}" width="{_WIDTH - _LEFT - _RIGHT}" y="{top:.1f}" height="{max(0.0, bottom - top):.1f}" '
            f'fill="{colour}" opacity="{opacity}"/>'
        )

    def dot(self, place: float, value: float, colour: str, hollow: bool, words: str) -> None:
        """With what a pointer is told."""
        fill = "#fff" if hollow else colour
        self.parts.append(
            f'<circle cx="{self.x(place):.1f}" cy="{self.y(value):.1f}" r="3.2" fill="{fill}" stroke="{colour}">'
            f"<title>{text(words)}</title></circle>"
        )

    def drawn(self, label: Any, below: str) -> str:
        """The picture; `label` puts a tick's value into words."""
        span = self.high - self.low
        step = 10 ** math.floor(math.log10(span / 4))
        step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
        ticks = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        texts = [
            f'<text x="{_LEFT - 8}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{text(label(tick))}</text>'
            f'<line x1="{_LEFT - 4}" x2="{_LEFT}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}" stroke="#9aa2a9"/>'
            for tick in ticks
        ]
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        texts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{text(below)}</text>')
        frame = f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" fill="none" stroke="#9aa2a9"/>'
        return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join([*self.parts, frame, *texts])}</svg>'


def _ratios(clean: Sequence[dict[str, Any]], seen: Judgement | None, delta: float) -> str:
    base = np.array([row["primary"]["base"] for row in clean])
    ratios = {arm: np.log(base / [row["primary"][arm] for row in clean]) for arm in ("control", "candidate")}
    margin = math.log1p(delta)
    everything = np.concatenate([*ratios.values(), [margin, -margin]])
    axes = _Axes(len(clean), float(everything.min()), float(everything.max()))
    axes.band(-margin, margin, "#9aa2a9", 0.12)
    null = exact_interval(ratios["control"], 0.05) if len(clean) >= 6 else None
    if null is not None:
        axes.band(null.low, null.high, _COLOURS["control"], 0.25)
    if seen is not None and math.isfinite(seen.estimate):
        axes.band(seen.interval.low, seen.interval.high, _COLOURS["candidate"], 0.2)
        axes.line(seen.estimate, _COLOURS["candidate"], width=1.5)
    axes.line(0.0, "#1c2126", "3 3")
    for arm, values in ratios.items():
        for i, value in enumerate(values):
            words = f"block {clean[i]['number']}: A / {_NAMES[arm]} {wording.change(float(value))}"
            axes.dot(i + (0.15 if arm == "candidate" else -0.15), float(value), _COLOURS[arm], False, words)
    return axes.drawn(lambda value: f"{math.exp(value):.3g}", "clean blocks")


def _drift(blocks: Sequence[dict[str, Any]], primary: str) -> str:
    values = [row["primary"][arm] for row in blocks for arm in _NAMES]
    axes = _Axes(len(blocks), min(values), max(values))
    for i, row in enumerate(blocks):
        for shift, arm in zip((-0.2, 0.0, 0.2), [arm for arm in row["order"] if arm in _NAMES], strict=True):
            value = row["primary"][arm]
            words = "; ".join(
                [f"block {row['number']}, {_NAMES[arm]}: {wording.quantity(primary, value)}", *row["reasons"]]
            )
            axes.dot(i + shift, value, _COLOURS[arm], bool(row["reasons"]), words)
    legend = ", ".join(
        f"{_NAMES[arm]} {name}" for arm, name in (("base", "blue"), ("candidate", "orange"), ("control", "grey"))
    )
    return axes.drawn(
        lambda value: wording.quantity(primary, value) if value > 0 else "0", f"all blocks in turn: {legend}"
    )


def _figures(rows: list[dict[str, Any]]) -> str:
    cells = []
    for i, line in enumerate(terminal.figures(rows)):
        name, rest = line[:24].strip(), [line[start : start + 12].strip() for start in (24, 36, 48)]
        tag = "th" if i == 0 else "td"
        cells.append(
            "<tr>" + "".join(f"<{tag}>{text(one)}</{tag}>" for one in (name, *rest, line[60:].strip())) + "</tr>"
        )
    return f"<table>{''.join(cells)}</table>"


def _environment(header: dict[str, Any], blocks: Sequence[dict[str, Any]]) -> str:
    facts = {**header["machine"], "started": header["started"], "blocks": len(blocks)}
    foreign = [row["foreign_cpu_s"] / row["elapsed_s"] for row in blocks if row["foreign_cpu_s"] is not None]
    if foreign:
        facts["foreign load"] = f"{statistics.median(foreign):.1%} of a processor, at most {max(foreign):.1%}"
    clocks = [row["clock_mhz"] for row in blocks if row["clock_mhz"]]
    if clocks:
        facts["processor clock"] = f"{min(clocks)} to {max(clocks)} MHz"
    states = [state for row in blocks for arm in row["gpus"].values() for state in arm]
    if states:
        facts["GPU clock"] = f"{min(s['sm_mhz'] for s in states)} to {max(s['sm_mhz'] for s in states)} MHz"
        facts["GPU temperature"] = f"{min(s['celsius'] for s in states)} to {max(s['celsius'] for s in states)} °C"
    for name, seconds in header["calibrated"].items():
        facts[name] = wording.quantity("", seconds) if name.endswith("_s") else f"{seconds:.0f}"
    shown = {name: ", ".join(value) or "none" if isinstance(value, list) else value for name, value in facts.items()}
    table = "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in shown.items())
    plan = text(json.dumps(header["plan"], indent=1))
    return f"<h2>Environment</h2><table>{table}</table><details><summary>the plan</summary><pre>{plan}</pre></details>"
