"""A campaign as one HTML page that opens offline: leaderboard, a section per task, every attempt with its evidence.

Filters run in the page; without scripts everything is shown.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from assay.experiment.raw import whole_rows
from assay.report import page, wording
from assay.report.page import text
from assay.report.whole import Whole, board_words, effects, patch_of

_WIDTH, _ROW, _LEFT = 720, 22, 220
_MOST_TEXT = 200_000
_APART = 40
"""Between two figures below an axis."""
_STYLE = """<style>
body { max-width: 1000px } nav a { margin-right: 1em }
.filters { position: sticky; top: 0; background: #fff; padding: .5em 0 }
select { font: inherit; margin-right: 1em } details { border-bottom: 1px solid #e3e6e9; padding: .3em 0 }
details > summary { color: #1c2126 } details details { border: 0; margin-left: 1em } td, th { text-align: left }
pre { background: #f2f4f5; padding: .6em; overflow: auto; max-height: 30em; font-size: 12px }
.void-campaign { background: #b3261e; color: #fff; padding: .5em 1em }
.infra { background: #8a6d1d } [hidden] { display: none }
</style>"""
_SCRIPT = """<script>
const names = ["task", "who", "outcome"];
function differs(one, n) {
  const wanted = document.getElementById("f-" + n).value;
  return wanted !== "" && wanted !== one.dataset[n];
}
function show() {
  let count = 0;
  for (const one of document.querySelectorAll("details.attempt")) {
    one.hidden = names.some(n => differs(one, n));
    count += !one.hidden;
  }
  for (const one of document.querySelectorAll("section.task")) one.hidden = differs(one, "task");
  document.getElementById("count").textContent = count + " attempts";
}
function open_() {
  const one = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (one && one.tagName === "DETAILS") one.open = true;
}
for (const n of names) document.getElementById("f-" + n).addEventListener("change", show);
addEventListener("hashchange", open_); show(); open_();
</script>"""


def html(folder: Path, whole: Whole) -> str:
    """The page. What agents and providers wrote is escaped, as is everything else."""
    tasks = list(dict.fromkeys(row["task"]["name"] for row in whole.rows))
    parts = [_STYLE, f"<h1>Campaign {text(whole.name)}</h1>"]
    parts += [f'<p class="void-campaign">void: {text(words)}</p>' for words in whole.void]
    parts += [f"<p>left out: {text(words)}</p>" for words in whole.left_out]
    parts += [_board(whole), _filters(whole.rows)]
    parts.append("<nav>" + "".join(f'<a href="#task-{text(name)}">{text(name)}</a>' for name in tasks) + "</nav>")
    for name in tasks:
        own = [row for row in whole.rows if row["task"]["name"] == name]
        parts.append(f'<section class="task" data-task="{text(name)}" id="task-{text(name)}"><h2>{text(name)}</h2>')
        parts += [_intervals(own), *(_attempt(folder, row, whole) for row in own), "</section>"]
    return page.document(f"campaign {whole.name}", [*parts, _SCRIPT])


def _board(whole: Whole) -> str:
    if not whole.board:
        return "<p>No agent was run.</p>"
    heads = ["who", *(name for name, _ in board_words(whole.board[0], whole.level))]
    rows = [[line.who, *(words for _, words in board_words(line, whole.level))] for line in whole.board]
    note = (
        "Shares with Wilson's 95 % interval. What infrastructure spoilt counts for nobody. Held: calls of faster that "
        f"Holm's procedure keeps among all measured attempts, at {whole.level:.0%}."
    )
    return f"<h2>Leaderboard</h2>{_table(heads, rows, 'board')}<p class=dim>{text(note)}</p>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    cells = ["".join(f"<th>{text(one)}</th>" for one in heads)]
    cells += ["".join(f"<td>{text(one)}</td>" for one in row) for row in rows]
    return f'<table id="{name}">{"".join(f"<tr>{row}</tr>" for row in cells)}</table>'


def _filters(rows: Sequence[Mapping[str, Any]]) -> str:
    values = {
        "task": [row["task"]["name"] for row in rows],
        "who": [row["who"]["name"] for row in rows],
        "outcome": [row["outcome"] for row in rows],
    }
    parts = []
    for name, found in values.items():
        options = "".join(f"<option>{text(one)}</option>" for one in sorted(set(found)))
        parts.append(f'<label>{name} <select id="f-{name}"><option value="">all</option>{options}</select></label>')
    return f'<div class="filters">{"".join(parts)}<span id="count" class=dim></span></div>'


def _intervals(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every attempt's interval, a line each, on one axis of ratios."""
    shown = [(row, one) for row in rows for one in row["workloads"] if one["estimate"] is not None]
    if not shown:
        return "<p class=dim>Nothing was measured.</p>"
    margin = math.log1p(rows[0]["task"]["delta"])
    ends = [value for _, one in shown for value in (one["low"], one["high"], one["estimate"]) if value is not None]
    low, high = float(min([*ends, -2 * margin])), float(max([*ends, 2 * margin]))
    room = (high - low) * 0.05

    def x(value: float) -> float:
        return _LEFT + float(value - low + room) / (high - low + 2 * room) * (_WIDTH - _LEFT - 10)

    height = _ROW * (len(shown) + 1) + 10
    parts = [
        f'<rect x="{x(-margin):.1f}" width="{x(margin) - x(-margin):.1f}" y="0" height="{height - _ROW}" '
        'fill="#9aa2a9" opacity="0.15"/>',
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{height - _ROW}" stroke="#1c2126" stroke-dasharray="3 3"/>',
    ]
    for i, (row, one) in enumerate(shown):
        y = _ROW * (i + 0.7)
        ends_ = [low if one["low"] is None else one["low"], high if one["high"] is None else one["high"]]
        words = f"{row['who']['name']} #{row['number']}, {one['name']}: {wording.change(one['estimate'])}"
        name = f"{row['who']['name']} #{row['number']} {one['name']}"[:34]
        parts.append(
            f'<a href="#cell-{row["key"]}"><text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text(name)}</text>'
            f'<line x1="{x(ends_[0]):.1f}" x2="{x(ends_[1]):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#c8562b" '
            f'stroke-width="2"/><circle class="ratio" cx="{x(one["estimate"]):.1f}" cy="{y:.1f}" r="4" fill="#c8562b">'
            f"<title>{text(words)}</title></circle></a>"
        )
    for value in [0.0, *(one for one in (low, high) if abs(x(one) - x(0)) > _APART)]:
        parts.append(
            f'<text x="{x(value):.1f}" y="{height - 6}" text-anchor="middle">{text(f"{math.exp(value):.3g}")}</text>'
        )
    words = "base / candidate with the interval of its look; right of the line is faster; the band is the margin"
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(parts)}</svg><p class=dim>{text(words)}</p>'


def _attempt(folder: Path, row: Mapping[str, Any], whole: Whole) -> str:
    """One cell, folded: outcome, reasons, cost, level, patch, prompt, output, pictures of each workload."""
    outcome, who = row["outcome"], row["who"]
    kind = "infra" if outcome.startswith("infra.") else outcome
    facts = [
        ("reasons", "; ".join(row["words"])),
        ("effects", effects(row)),
        ("run", row["run"] and f"{row['run']}, {row['tries']} tried"),
        ("prompt", row["template"] and f"{row['template']}, leak level {row['level']}"),
        ("expected", row["expect"]),
        ("cost", f"agent {row['cost']['agent_s']:.0f} s, judge {row['cost']['judge_s']:.0f} s"),
        ("tokens", "" if row["cost"]["tokens"] is None else f"{row['cost']['tokens']:g}"),
        ("money", "" if row["cost"]["money"] is None else f"{row['cost']['money']:g}"),
        ("Holm", "held over the whole campaign" if row["key"] in whole.kept else ""),
        ("folder", row["folder"]),
    ]
    run = folder / row["folder"] / f"run-{row['tries']}"
    texts = {
        "patch": patch_of(folder, row).decode(errors="replace"),
        "prompt": _read(run / "prompt.md"),
        "what the agent printed": _read(run / "output.log"),
        "network": _read(run / "network.jsonl"),
    }
    parts = [
        f'<details class="attempt" id="cell-{row["key"]}" data-task="{text(row["task"]["name"])}" '
        f'data-who="{text(who["name"])}" data-outcome="{text(outcome)}"><summary>'
        f'<span class="verdict {text(kind)}">{text(outcome)}</span> {text(who["name"])} #{row["number"]} '
        f"<span class=dim>{text(effects(row))}</span></summary>",
        "<table>",
        *(f"<tr><td>{name}</td><td>{text(str(one))}</td></tr>" for name, one in facts if one),
        "</table>",
    ]
    for name, words in texts.items():
        if words:
            parts.append(f"<details><summary>{name}</summary><pre>{text(words)}</pre></details>")
    for one in row["workloads"]:
        raw = whole_rows(folder / row["attempt"] / "raw" / f"{one['name']}.jsonl") if row["attempt"] else []
        if raw and raw[0]["kind"] == "header":
            parts.append(f"<details><summary>blocks of {text(one['name'])}</summary>")
            parts += [*page.sections(raw), "</details>"]
    return "".join([*parts, "</details>"])


def _read(path: Path) -> str:
    """A file's text, its middle left out if it is long."""
    if not path.is_file():
        return ""
    found = path.read_text(errors="replace")
    half = _MOST_TEXT // 2
    return found if len(found) <= _MOST_TEXT else f"{found[:half]}\n[...]\n{found[-half:]}"
