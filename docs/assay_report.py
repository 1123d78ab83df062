"""The picture of README that shows a report of assay: `python docs/assay_report.py .`, which `make docs` calls.

It is the report's own words and its own drawing of the ratios, from the verdict and the samples in assay/proof.
"""

import json
import re
import sys
from html import escape, unescape
from pathlib import Path

from assay.experiment.raw import whole_rows
from assay.report import page, verdict

PROOF = Path("assay") / "proof" / "judge-align-h200"
PICTURE = Path("docs") / "pictures" / "assay-report.svg"
_WIDTH, _MARGIN, _LINE, _LETTERS = 760, 20, 19, 98


def picture(root: Path) -> str:
    """An SVG: the verdict in words, and below it A / B block by block."""
    found = json.loads((root / PROOF / "faster.json").read_text())
    lines = [part for line in verdict.lines(found) for part in _broken(line)]
    sections = page.sections(whole_rows(root / PROOF / "faster.jsonl"))
    drawing = next(part for part in sections if part.startswith("<svg"))
    box = re.match(r'<svg viewBox="0 0 (\d+) (\d+)"', drawing)
    assert box is not None
    width, height = map(int, box.groups())
    top = _MARGIN + _LINE * len(lines) + 8
    below = top + height
    told = [part for line in _said_below(sections, drawing) for part in _broken(line)]
    words = [_text(line, _MARGIN + _LINE * i + 10, bold=i == 0) for i, line in enumerate(lines)]
    words += [_text(line, below + _LINE * (i + 1)) for i, line in enumerate(told)]
    inner = drawing.replace("<svg ", f'<svg y="{top}" width="{width}" height="{height}" ', 1)
    style = "<style>svg text { font: 11px system-ui, sans-serif; fill: #5b6570 }</style>"
    shown = "\n".join([*words, inner.replace(">", ">" + style, 1)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {below + _LINE * (len(told) + 1)}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{shown}\n</svg>\n'
    )


def _said_below(sections: list[str], drawing: str) -> list[str]:
    """What the page says below a drawing."""
    return [unescape(re.sub("<[^>]+>", "", sections[sections.index(drawing) + 1]))]


def _text(line: str, y: int, bold: bool = False) -> str:
    look = f"font: {'bold ' if bold else ''}12px ui-monospace, Menlo, Consolas, monospace"
    colour = "#2c7a4b" if bold else "#1c2126"
    return f'<text x="{_MARGIN}" y="{y}" style="{look}; fill: {colour}" xml:space="preserve">{escape(line)}</text>'


def _broken(line: str) -> list[str]:
    """A line in pieces that fit, broken at spaces."""
    pieces, indent = [], ""
    while len(line) > _LETTERS:
        at = line.rindex(" ", 0, _LETTERS)
        pieces.append(indent + line[:at])
        line, indent = line[at + 1 :], "    "
    return [*pieces, indent + line]


if __name__ == "__main__":
    base = Path(sys.argv[1])
    (base / PICTURE).write_text(picture(base))
