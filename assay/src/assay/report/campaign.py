"""A campaign for people and for other tools: terminal, Markdown, JUnit, CSV, predictions; the page is beside it."""

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from assay.contract import foreign
from assay.report import campaign_page
from assay.report.whole import Whole, board_words, effects, patch_of

_COLUMNS = (
    *("key", "kind", "who", "task", "number", "outcome", "status", "holm", "run", "tries", "template", "level"),
    *("workload", "verdict", "percent", "low_percent", "high_percent", "blocks", "p"),
    *("agent_s", "judge_s", "tokens", "money", "patch", "reason"),
)


def write(folder: Path, whole: Whole) -> None:
    """All reports, in the campaign's folder. Parquet is written where pyarrow is installed."""
    (folder / "report.html").write_text(campaign_page.html(folder, whole))
    (folder / "report.md").write_text(markdown(whole))
    (folder / "report.xml").write_text(junit(whole))
    (folder / "report.csv").write_text(table(whole))
    (folder / "predictions.jsonl").write_text(predictions(folder, whole))
    parquet(folder / "report.parquet", whole)


def markdown(whole: Whole) -> str:
    """For a pull request."""
    found = [f"## Campaign {foreign.on_one_line(whole.name)}{': void' if whole.void else ''}", ""]
    found += [f"- void: {_plain(words)}" for words in whole.void]
    found += [f"- left out: {_plain(words)}" for words in whole.left_out]
    if whole.board:
        heads = [name for name, _ in board_words(whole.board[0], whole.level)]
        found += ["", f"| who | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for line in whole.board:
            found.append(f"| {_plain(line.who)} | {' | '.join(words for _, words in board_words(line, whole.level))} |")
    found += ["", "| task | who | # | outcome | base / candidate | why |", "|---|---|---|---|---|---|"]
    for row in whole.rows:
        cells = [row["task"]["name"], row["who"]["name"], row["number"], row["outcome"], effects(row), _why(row)]
        found.append(f"| {' | '.join(_plain(cell) for cell in cells)} |")
    return "\n".join(found) + "\n"


def junit(whole: Whole) -> str:
    """A test case per cell, and one per canary that the campaign fell over."""
    suite = ElementTree.Element("testsuite", name=f"assay {foreign.shown(whole.name)}")
    counts = {"tests": 0, "failure": 0, "error": 0, "skipped": 0}

    def case(kind: str, name: str, tag: str, words: str, seconds: float) -> None:
        one = ElementTree.SubElement(suite, "testcase", classname=kind, name=name, time=f"{seconds:.3f}")
        counts["tests"] += 1
        if tag:
            counts[tag] += 1
            ElementTree.SubElement(one, tag, message=foreign.shown(words))

    for row in whole.rows:
        tag = {0: "", 1: "failure", 3: "error", 4: "error", 5: "skipped"}[row["status"]]
        if row["who"]["kind"] == "canary":
            tag = ""
        name = f"{row['who']['name']} #{row['number']}"
        seconds = row["cost"]["agent_s"] + row["cost"]["judge_s"]
        kind = f"{row['who']['kind']}.{row['task']['name']}"
        case(foreign.shown(kind), foreign.shown(name), tag, f"{row['outcome']}: {_why(row)}", seconds)
    for words in whole.void:
        case("canary", foreign.shown(words.partition(",")[0]), "error", words, 0.0)
    for tag, name in (("tests", "tests"), ("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(name, str(counts[tag]))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def records(whole: Whole) -> list[dict[str, Any]]:
    """A flat record per cell and workload, one with an empty workload for a cell that measured none."""
    found = []
    for row in whole.rows:
        cost = row["cost"]
        own = {
            "key": row["key"],
            "kind": row["who"]["kind"],
            "who": row["who"]["name"],
            "task": row["task"]["name"],
            **{name: row[name] for name in _TAKEN},
            "holm": row["key"] in whole.kept,
            **cost,
            "reason": _why(row),
        }
        nothing = {"name": "", "verdict": "", "estimate": None, "low": None, "high": None, "blocks": 0, "p": None}
        for one in row["workloads"] or [nothing]:
            figures = {f"{to}percent": _percent(one[name]) for to, name in _FIGURES}
            record = {**own, "workload": one["name"], "verdict": one["verdict"], "blocks": one["blocks"], "p": one["p"]}
            found.append({name: {**record, **figures}[name] for name in _COLUMNS})
    return found


_TAKEN = ("number", "outcome", "status", "run", "tries", "template", "level", "patch")
_FIGURES = (("", "estimate"), ("low_", "low"), ("high_", "high"))


def table(whole: Whole) -> str:
    """The records as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for record in records(whole):
        writer.writerow(["" if value is None else _cell(value) for value in record.values()])
    return out.getvalue()


def parquet(file: Path, whole: Whole) -> bool:
    """The records as Parquet, columns typed; False where pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet as writer
    except ImportError:
        return False
    kinds = {
        **dict.fromkeys(_COLUMNS, pyarrow.string()),
        **dict.fromkeys(("number", "status", "tries", "blocks"), pyarrow.int64()),
        **dict.fromkeys(("percent", "low_percent", "high_percent", "p"), pyarrow.float64()),
        **dict.fromkeys(("agent_s", "judge_s", "tokens", "money"), pyarrow.float64()),
        "holm": pyarrow.bool_(),
    }
    fields = [(name, kinds[name]) for name in _COLUMNS]
    writer.write_table(pyarrow.Table.from_pylist(records(whole), schema=pyarrow.schema(fields)), file)
    return True


def predictions(folder: Path, whole: Whole) -> str:
    """prediction.jsonl of all attempts that are no canaries, with the patches that were judged."""
    found = []
    for row in whole.rows:
        if row["who"]["kind"] != "canary":
            patch = patch_of(folder, row).decode(errors="replace")
            one = {"instance_id": row["task"]["name"], "model_name_or_path": row["who"]["name"], "model_patch": patch}
            found.append(json.dumps(one) + "\n")
    return "".join(found)


def _why(row: Mapping[str, Any]) -> str:
    return foreign.on_one_line("; ".join(row["words"]))


def _plain(words: object) -> str:
    """Words that no Markdown takes for marks."""
    text = foreign.on_one_line(words)
    return "".join(f"\\{letter}" if letter in "|<>`*_[]\\" else letter for letter in text)


def _cell(value: object) -> object:
    """A text that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    text = foreign.on_one_line(value)
    return f"'{text}" if text[:1] in "=+-@" and text else text


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * math.expm1(value), 6)
