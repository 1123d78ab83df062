"""A verdict for people and for other tools: an HTML page that opens offline, Markdown, JUnit and CSV."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from assay.contract import foreign
from assay.contract.outcome import DECIDED
from assay.experiment.raw import whole_rows
from assay.gates.gate import NOT_ASKED, SKIPPED
from assay.report import page, wording
from assay.report.page import text

PATCH = "patch.diff"
"""The patch that was judged, in an attempt's folder and in RAW's."""
_MET = {0: "met", 1: "not met", 3: "not judged", 4: "not judged", 5: "not shown"}
_COLUMNS = (
    "workload",
    "verdict",
    "percent",
    "low_percent",
    "high_percent",
    "level",
    "blocks",
    "material",
    "reason",
    "beside",
)


def write(folder: Path, verdict: Mapping[str, Any]) -> None:
    """All four beside the verdict; RAW is looked for in `raw`."""
    raw = folder / "raw" if (folder / "raw").is_dir() else folder
    (folder / "report.html").write_text(html(verdict, raw))
    (folder / "report.md").write_text(markdown(verdict))
    (folder / "report.xml").write_text(junit(verdict))
    (folder / "report.csv").write_text(table(verdict))


def lines(verdict: Mapping[str, Any]) -> list[str]:
    """The verdict in a few lines of text."""
    found = [f"{verdict['outcome']}: {words}" for words in verdict["words"][:1]]
    found += [f"  {words}" for words in verdict["words"][1:10]]
    if len(verdict["words"]) > 10:
        found.append(f"  and {len(verdict['words']) - 10} more")
    for one in verdict["workloads"]:
        found.append(f"{one['name']}: {one['verdict']}{effect(one, verdict['task']['delta'], verdict['words'])}")
        found += [f"  {words}" for words in _beside(one)]
        if one["reference"]:
            found.append(f"  the reference: {_change(one['reference'])}")
    if verdict["joint"]:
        found.append(f"geometric mean of {len(verdict['workloads'])} workloads: {_change(verdict['joint'])}")
    for gate in verdict["gates"]:
        told = gate["words"] in verdict["words"]
        found.append(f"{gate['name']}: {gate['outcome'] or 'passed'}" + ("" if told else f": {gate['words']}"))
    return [*found, *_facts(verdict)]


def _facts(verdict: Mapping[str, Any]) -> list[str]:
    task, patch, attempt = verdict["task"], verdict["patch"], verdict["attempt"]
    of = f"{attempt['of_patch']} of this patch in the ledger"
    return [
        f"require {verdict['require']}: {_MET[verdict['status']]}; {'; '.join(verdict['trust'])}",
        f"task {task['name']} {task['digest']}, patch {patch['digest']} ({len(patch['changed'])} files, "
        f"{patch['bytes']} bytes), protocol {verdict['protocol']}",
        f"attempt {attempt['number']} of this task, patch, environment and protocol; {of}",
    ]


def _beside(one: Mapping[str, Any]) -> list[str]:
    """What stands beside a workload's verdict: what got worse, counts of instructions, and advice."""
    worse, counts = wording.worse(one.get("worse", ())), one.get("instructions")
    hints = [f"advice: {words}" for words in one.get("advice", [])]
    return [*([worse] if worse else []), *([counts["words"]] if counts else []), *hints]


def effect(one: Mapping[str, Any], delta: float, told: Sequence[str] = ()) -> str:
    """A workload's change with its interval, if it has one, else its reason unless that was `told` above."""
    if one["estimate"] is None:
        return "" if one["reason"] in told else f": {one['reason']}"
    by = ", by Holm's procedure" if one["holm"] else ""
    low, high = one["interval"]
    margin = wording.beside_margin(one["verdict"], one["material"], low, high, delta)
    return f", {_change(one)}, {one['blocks']} blocks{by}{margin}"


def _plain(one: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    """A workload's change, or why it has none, for a cell of a table."""
    return effect(one, verdict["task"]["delta"]).lstrip(",: ")


def _change(one: Mapping[str, Any]) -> str:
    change, low, high = wording.changes(one["estimate"], one["interval"])
    return f"{change} ({wording.level(one['alpha'])} interval {low} to {high})"


def html(verdict: Mapping[str, Any], raw: Path) -> str:
    """The page, with the pictures of every workload that was measured."""
    outcome = verdict["outcome"]
    parts = [
        f"<h1>{text(verdict['task']['name'])}</h1>",
        f'<p><span class="verdict {text(outcome)}">{text(outcome)}</span> {text("; ".join(verdict["words"][:1]))}</p>',
        *(f"<p>{text(words)}</p>" for words in verdict["words"][1:]),
        *(f"<p class=dim>{text(words)}</p>" for words in _facts(verdict)),
    ]
    if verdict["gates"]:
        gates = [(gate["name"], gate["outcome"] or "passed", gate["words"]) for gate in verdict["gates"]]
        parts += ["<h2>Gates</h2>", _table(("gate", "outcome", ""), gates)]
    if verdict["workloads"]:
        effects = [(one["name"], one["verdict"], _plain(one, verdict)) for one in verdict["workloads"]]
        parts += ["<h2>Workloads</h2>", _table(("workload", "verdict", "base / candidate"), effects)]
    if verdict["joint"]:
        parts.append(f"<p>Geometric mean: {text(_change(verdict['joint']))}, from a bootstrap over blocks.</p>")
    files = [f"<code>{text(name)}</code>" for name in verdict["patch"]["changed"]]
    parts.append(f"<h2>Patch</h2><p>{', '.join(files) or 'nothing changed'}</p>")
    places = [folder / PATCH for folder in (raw, raw.parent)]
    if diff := next((place.read_text(errors="replace") for place in places if place.is_file()), ""):
        parts.append(page.patch(diff))
    for one in verdict["workloads"]:
        rows = whole_rows(raw / f"{one['name']}.jsonl")
        if rows and rows[0]["kind"] == "header":
            parts += [f"<h1>{text(one['name'])}</h1>", *page.sections(rows)]
    return page.document(f"{outcome}: {verdict['task']['name']}", parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = ["".join(f"<th>{text(one)}</th>" for one in head)]
    cells += ["".join(f'<td style="text-align:left">{text(one)}</td>' for one in row) for row in rows]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def markdown(verdict: Mapping[str, Any]) -> str:
    """For a pull request."""
    found = [f"## {verdict['task']['name']}: {verdict['outcome']}", ""]
    found += [f"- {_escaped(words)}" for words in verdict["words"]]
    if verdict["workloads"]:
        found += ["", "| workload | verdict | base / candidate |", "|---|---|---|"]
        found += [
            f"| {one['name']} | {one['verdict']} | {_escaped(_plain(one, verdict))} |" for one in verdict["workloads"]
        ]
    found += ["", *(f"- {_escaped(words)}" for one in verdict["workloads"] for words in _beside(one))]
    if verdict["joint"]:
        found += ["", f"Geometric mean: {_change(verdict['joint'])}"]
    if verdict["gates"]:
        found += ["", "| gate | outcome | |", "|---|---|---|"]
        found += [
            f"| {gate['name']} | {gate['outcome'] or 'passed'} | {_escaped(gate['words'])} |"
            for gate in verdict["gates"]
        ]
    return "\n".join([*found, "", *(f"- {_escaped(words)}" for words in _facts(verdict)), ""])


def _escaped(words: str) -> str:
    """Words that are no Markdown: no table, link, picture, heading or HTML begins in them."""
    return re.sub(r"([\\|`*\[\]<>#!~@])", r"\\\1", foreign.on_one_line(words))


def junit(verdict: Mapping[str, Any]) -> str:
    """A test case a gate and a workload: failures count against the candidate, errors and skips do not."""
    cases = [("gate", gate["name"], gate["outcome"], gate["words"]) for gate in verdict["gates"]]
    cases += [("workload", one["name"], one["verdict"], _plain(one, verdict)) for one in verdict["workloads"]]
    cases.append(("verdict", verdict["require"], verdict["outcome"], "; ".join(verdict["words"])))
    suite = ElementTree.Element("testsuite", name=f"assay {verdict['task']['name']}", tests=str(len(cases)))
    beside = {one["name"]: _beside(one) for one in verdict["workloads"]}
    counts = {"failure": 0, "error": 0, "skipped": 0}
    for kind, name, outcome, words in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=kind, name=name)
        tag = _tag(outcome, verdict["status"] if kind == "verdict" else None)
        if tag:
            counts[tag] += 1
            ElementTree.SubElement(case, tag, message=foreign.shown(f"{outcome}: {words}"))
        if said := beside.get(name, []) if kind == "workload" else []:
            ElementTree.SubElement(case, "system-out").text = foreign.shown("\n".join(said))
    for tag, name in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(name, str(counts[tag]))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _tag(outcome: str, status: int | None) -> str:
    """The element of an outcome; none for what has passed."""
    if status is not None:
        return {0: "", 1: "failure", 3: "error", 4: "error", 5: "skipped"}[status]
    if outcome.startswith("infra.") or outcome in ("void", "task_invalid"):
        return "error"
    if outcome in ("undecided", "not_evaluated", SKIPPED, NOT_ASKED):
        return "skipped"
    return "" if outcome in ("", *DECIDED) and outcome != "slower" else "failure"


def table(verdict: Mapping[str, Any]) -> str:
    """A line a workload, and one for the outcome; changes in per cent, positive is faster."""
    out = io.StringIO()
    lines_ = csv.writer(out, lineterminator="\n")
    lines_.writerow(("task", "patch", *_COLUMNS))
    start = (verdict["task"]["name"], verdict["patch"]["digest"])
    for one in verdict["workloads"]:
        figures = [_percent(value) for value in (one["estimate"], *one["interval"])]
        level = f"{1 - one['alpha']:.6g}"
        counts = (level, one["blocks"], one["material"], _cell(one["reason"]), _cell("; ".join(_beside(one))))
        lines_.writerow((*start, one["name"], one["verdict"], *figures, *counts))
    joint = verdict["joint"] or {"estimate": None, "interval": (None, None)}
    figures = [_percent(value) for value in (joint["estimate"], *joint["interval"])]
    lines_.writerow((*start, "", verdict["outcome"], *figures, "", "", "", _cell("; ".join(verdict["words"])), ""))
    return out.getvalue()


def _cell(words: str) -> str:
    """Words that no spreadsheet takes for a formula."""
    text = foreign.on_one_line(words)
    return f"'{text}" if text[:1] in "=+-@" and text else text


def _percent(value: float | None) -> str:
    return "" if value is None or math.isinf(value) else f"{100 * math.expm1(value):.6g}"
