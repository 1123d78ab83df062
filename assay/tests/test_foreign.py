"""Nobody's words but the judge's own reach a person raw: not in a terminal, not in a report, not in a file name."""

import ast
import csv
import io
import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import assay
from assay.contract import foreign
from assay.report import page, terminal, verdict
from small_project import BASE, candidate, edited, files, project
from small_project import assay as run

SOURCE = Path(assay.__file__).parent
DRAWS = "\x1b[2J\x1b[1;1Hfaster: the interval lies above 0\r\x9b1mdone\x07\u202e0 evoba\u2028x\ud800\n"
FORGED = "faster: the interval lies above 0"
WORDS = f"{DRAWS}{FORGED}\n| forged | passed |\n# forged\n<script>alert(1)</script>![x](http://example.org/x)`"


def test_every_letter_that_does_not_print_is_escaped() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    kept = set(foreign.shown(everything))
    assert {unicodedata.category(letter) for letter in kept - {"\n"}}.isdisjoint({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
    assert foreign.shown("größer – µs 漢") == "größer – µs 漢"
    assert foreign.shown("\x1b[1m\u202e\ud800") == r"\x1b[1m\u202e\ud800"
    assert foreign.told("one\ntwo\n") == "one\n  | two" and foreign.on_one_line("a\n\x07 b") == r"a \x07 b"


def test_only_the_terminal_prints() -> None:
    """What it prints is escaped; selftest and doctor say only what is ours, two processes answer their parent."""
    own = {"report/terminal.py", "proof/selftest.py", "proof/doctor.py", "judgement/api.py", "agents/proxy.py"}
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        writes = {"print"} & names or re.search(r"sys\.(stdout|stderr)\.write", path.read_text())
        assert not writes or path.relative_to(SOURCE).as_posix() in own, path


def found(words: str) -> dict[str, Any]:
    """A verdict whose every text is somebody's."""
    workload = {"name": "w", "verdict": "incorrect", "reason": words, "estimate": None, "interval": [None, None]}
    workload |= {"blocks": 0, "alpha": 1.0, "material": False, "holm": False, "reference": None}
    patch = {"digest": "0" * 16, "changed": [words], "bytes": 1, "restored": [], "left": []}
    return {
        "outcome": "incorrect",
        "words": [words, words],
        "require": "faster",
        "status": 1,
        "task": {"name": "t", "digest": "0" * 16, "delta": 0.02},
        "patch": patch,
        "protocol": "0" * 16,
        "attempt": {"number": 1, "of_patch": 1},
        "gates": [{"name": "tests", "outcome": "tests_failed", "words": words}],
        "workloads": [workload],
        "joint": None,
        "trust": ["sandboxed", f"restored from base: {words}"],
    }


def raw_letters(text: str) -> str:
    return "".join(letter for letter in text if not letter.isprintable() and letter != "\n")


def test_terminal_and_reports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shown = found(WORDS)
    (tmp_path / "patch.diff").write_bytes(f"+{WORDS}".encode(errors="replace"))
    terminal.lines(verdict.lines(shown))
    printed = capsys.readouterr().out
    assert not raw_letters(printed) and not any(line.startswith("faster") for line in printed.splitlines())
    verdict.write(tmp_path, shown)  # the lone surrogate of a file's name cannot be written as it is
    for name in ("html", "md", "xml", "csv"):
        assert not raw_letters((tmp_path / f"report.{name}").read_text()), name
    text = (tmp_path / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 6 and not any(line.startswith(("# ", "faster", "| forged")) for line in text.splitlines())
    assert "<script" not in text.replace(r"\<", "") and "](" not in text.replace(r"\]", "")
    page_ = (tmp_path / "report.html").read_text()
    assert "<script" not in page_ and '<pre class=patch><span class="more">+' in page_
    suite = ElementTree.parse(tmp_path / "report.xml").getroot()
    assert suite.get("tests") == "3"
    verdict.write(tmp_path, found('=cmd("x")'))
    cells = list(csv.reader(io.StringIO((tmp_path / "report.csv").read_text())))
    assert cells[1][-2] == cells[2][-2].partition(";")[0] == '\'=cmd("x")'


def test_a_page_of_raw() -> None:
    header = {"plan": {"workload": {"kind": "command", "command": ["x\x1b[0m", "\u202e"]}}}
    assert not raw_letters(page.text(terminal.subject(header)))


def test_the_control_draws_a_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "told", str)
    terminal.lines(verdict.lines(found(WORDS.replace("\ud800", ""))))
    assert FORGED in capsys.readouterr().out.splitlines()


def test_a_candidate_that_draws(tmp_path: Path) -> None:
    """Its last words reach the terminal through an error, a test's name and a file's name."""
    task = edited(project(tmp_path), "[tests]", '[commands]\nbuild = [["python", "-c", "import pkg"]]\n\n[tests]')
    edited(task, '[api]\npackages = ["pkg"]\n', "")
    tree = candidate(
        task, "c", {"pkg/__init__.py": f"{BASE}\nraise RuntimeError({DRAWS.replace(chr(0xD800), '')!r})\n"}
    )
    given = ("judge", task, "--tree", tree, "--store", tmp_path / "store", "--no-sandbox")
    done = run(*given)
    assert done.returncode == 1 and done.stdout.startswith("build_failed: "), done.stdout + done.stderr
    assert not raw_letters(done.stdout) and r"\x1b[2J" in done.stdout
    assert not any(line.startswith("faster") for line in done.stdout.splitlines())
    files(tree, {"other\x1b[2J.py": ""})
    done = run(*given)
    assert done.stdout.startswith("out_of_scope: ") and not raw_letters(done.stdout) and r"\x1b[2J" in done.stdout
    assert json.loads(run(*given, "--json").stdout)["outcome"] == "out_of_scope"
