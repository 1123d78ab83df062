"""A history as one HTML page that opens offline: how long it takes over commits, what changed, every judgement."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from assay.report import wording
from assay.report.page import document, text

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 960, 320, 70, 20, 16, 44
_STYLE = "<style>body { max-width: 1000px } td, th { text-align: left } .step { stroke: #b3261e } </style>"
Point = tuple[int, float, float, float]
"""A commit's index, and the log of its time over the first commit's, with the ends of its interval."""


def html(found: Mapping[str, Any]) -> str:
    """The page. Subjects of commits are escaped, as is everything else."""
    commits = found["commits"]
    parts = [
        _STYLE,
        f"<h1>{text(found['subject'])}</h1>",
        f'<p><span class="verdict {_kind(found["outcome"])}">{text(found["outcome"])}</span> '
        f"{len(commits) - 1} commits, {text(_short(commits[0]))} to {text(_short(commits[-1]))}</p>",
        _picture(found, points(found["pairs"])),
        "<p class=dim>Time of a commit over that of the first one, by the judgements that lead there; below the line "
        "is faster. Bars are intervals, added up along the way. Red lines are commits that changed something.</p>",
        "<h2>What changed</h2>",
        *(f"<p>{text(line)}</p>" for line in steps(found)),
        f"<h2>Judgements: {len(found['pairs'])} of {found['most']} that were allowed</h2>",
        f"<p class=dim>{text(_LEVELS)}</p>",
        _table(found),
    ]
    return document(f"{found['outcome']}: {found['subject']}", parts)


_LEVELS = (
    "Every level is divided by the number of judgements that were allowed, which was fixed before the first one. A "
    "pair that was void was measured again, and its RAW is kept."
)


def steps(found: Mapping[str, Any]) -> list[str]:
    """A line per commit that changed something, and per thing that could not be shown."""
    commits, lines = found["commits"], []
    for step in found["steps"]:
        change, low, high = wording.changes(step["estimate"], step["interval"])
        last = commits[step["last"]]
        who = (
            _short(last)
            if step["first"] == step["last"]
            else f"one of {step['last'] - step['first'] + 1} up to {_short(last)}"
        )
        words = f"; {step['words']}" if step["words"] else ""
        lines.append(f"{step['kind']}: {who}: {change} [{low}, {high}]{words}")
    lines += [f"open: {words}" for words in found["open"]]
    lines += [f"left out: {words}" for words in found["broken"].values()]
    return lines or ["Nothing: the ends of the range do not differ by more than the margin."]


def points(pairs: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The commits that judgements lead to from the first one, each by the fewest of them."""
    known: dict[int, Point] = {0: (0, 0.0, 0.0, 0.0)}
    waiting = [0]
    while waiting:
        here = known[waiting.pop(0)]
        for pair in pairs:
            for start, end, sign in ((pair["before"], pair["after"], -1), (pair["after"], pair["before"], 1)):
                if start == here[0] and end not in known and pair["estimate"] is not None:
                    least, most = pair["interval"]
                    open_ = (-math.inf if least is None else least, math.inf if most is None else most)
                    low, high = sorted(sign * value for value in open_)
                    known[end] = (end, here[1] + sign * pair["estimate"], here[2] + low, here[3] + high)
                    waiting.append(end)
    return sorted(known.values())


def _picture(found: Mapping[str, Any], shown: Sequence[Point]) -> str:
    commits, margin = found["commits"], math.log1p(found["delta"])
    values = [value for point in shown for value in point[1:] if math.isfinite(value)] + [2 * margin, -2 * margin]
    low, high = min(values), max(values)
    room = (high - low) * 0.06

    def x(index: float) -> float:
        return _LEFT + index / max(1, len(commits) - 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high + room - value) / (high - low + 2 * room) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<rect x="{_LEFT}" width="{_WIDTH - _LEFT - _RIGHT}" y="{y(margin):.1f}" '
        f'height="{y(-margin) - y(margin):.1f}" fill="#9aa2a9" opacity="0.15"/>'
    ]
    for step in found["steps"]:
        place = x((step["first"] + step["last"]) / 2)
        parts.append(f'<line class="step" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    for (one, value, *_), (two, other, *_) in pairwise(shown):
        parts.append(
            f'<line x1="{x(one):.1f}" y1="{y(value):.1f}" x2="{x(two):.1f}" y2="{y(other):.1f}" stroke="#9aa2a9"/>'
        )
    for index, value, least, most in shown:
        words = f"{_short(commits[index])}: {wording.change(value)} of time"
        if math.isfinite(least) and math.isfinite(most):
            parts.append(
                f'<line x1="{x(index):.1f}" x2="{x(index):.1f}" y1="{y(least):.1f}" y2="{y(most):.1f}" '
                'stroke="#c8562b" stroke-width="2"/>'
            )
        parts.append(
            f'<circle cx="{x(index):.1f}" cy="{y(value):.1f}" r="4" fill="#c8562b">'
            f"<title>{text(words)}</title></circle>"
        )
    for value in dict.fromkeys([low, 0.0, high]):
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{text(f"{math.exp(value):.3g}")}</text>'
        )
    for index in dict.fromkeys([0, len(commits) - 1]):
        anchor = "start" if index == 0 else "end"
        words = f"{commits[index]['name'][:10]} {commits[index]['date'][:10]}"
        parts.append(f'<text x="{x(index):.1f}" y="{_HEIGHT - 16}" text-anchor="{anchor}">{text(words)}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _table(found: Mapping[str, Any]) -> str:
    rows = [("commit", "against", "verdict", "before / after", "blocks", "level", "void before", "RAW")]
    for pair in found["pairs"]:
        names = [found["commits"][pair[end]]["name"][:10] for end in ("after", "before")]
        change = ""
        if pair["estimate"] is not None:
            change, low, high = wording.changes(pair["estimate"], pair["interval"])
            change = f"{change} [{low}, {high}]"
        counts = (str(pair["blocks"]), wording.level(pair["alpha"]), str(pair["voids"]))
        rows.append((*names, pair["verdict"], change, *counts, pair["raw"]))
    cells = ["".join(f"<{'td' if i else 'th'}>{text(one)}" for one in row) for i, row in enumerate(rows)]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _short(commit: Mapping[str, Any]) -> str:
    return f"{commit['name'][:10]} {commit['subject']}"


def _kind(outcome: str) -> str:
    """The colour of a verdict."""
    return {"regressed": "slower", "improved": "faster", "undecided": "undecided"}.get(outcome, "")
