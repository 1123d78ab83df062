"""The page of a campaign, as text and in a real browser: filters, links to attempts, pictures, and nobody's marks."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from assay.contract import cells
from assay.report import campaign, scores
from assay.report.whole import Whole

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</pre><script>document.title = 'evil'</script><img src=x onerror=\"document.title = 'evil'\">"
PROOF = Path(__file__).parents[1] / "proof" / "judge-align-cpu"


def row(number: int, who: str, outcome: str, task: str, estimate: float | None = None) -> dict[str, Any]:
    ends = (None, None) if estimate is None else (estimate - 0.05, estimate + 0.05)
    measured = [] if estimate is None else [cells.Workload("2048-tokens", outcome, estimate, *ends, 12, 0.0025)]
    status = {"faster": 0, "infra.provider": 3}.get(outcome, 1)
    return asdict(
        cells.Row(
            key=f"{number:016x}",
            task=cells.Task(task, "0" * 16, 0.02),
            who=cells.Who("agent", who, "0" * 16),
            number=1,
            tries=1,
            run="finished",
            outcome=outcome,
            words=[f"a reason {EVIL}"],
            status=status,
            level="L2",
            template="middle",
            expect="",
            workloads=measured,
            cost=cells.Cost(12.0, 3.0, 1234.0, None),
            patch="0" * 16,
            attempt="attempt" if number == 1 else "",
            folder=f"cells/{number}",
        )
    )


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A campaign's folder with its reports."""
    rows = [
        row(1, "one", "faster", "align", 0.3),
        row(2, "two", "incorrect", "align"),
        row(3, "one", "infra.provider", "other"),
        row(4, "two", "slower", "other", -0.2),
    ]
    for number in range(1, 5):
        run = tmp_path / "cells" / str(number) / "run-1"
        run.mkdir(parents=True)
        (run / "prompt.md").write_text(f"the prompt {EVIL}")
        (run / "output.log").write_text(f"the output {EVIL}\x1b[31m")
        (run / "patch.diff").write_text(f"+ the patch {EVIL}")
    raw = sorted(PROOF.rglob("*.jsonl"))[0]
    (tmp_path / "attempt/raw").mkdir(parents=True)
    shutil.copyfile(raw, tmp_path / "attempt/raw/2048-tokens.jsonl")
    lines = scores.leaderboard(rows, (1,), 0.05)
    campaign.write(tmp_path, Whole("evil <b>", rows, [], [], lines, 0.05, scores.kept(rows, 0.05)))
    return tmp_path


def test_all_is_on_the_page_and_nothing_is_anybodys_mark(page: Path) -> None:
    text = (page / "report.html").read_text()
    assert text.count('class="attempt"') == 4 and text.count("<script>") == 1 and "<img" not in text
    assert "the prompt &lt;/pre&gt;" in text and "\\x1b[31m" in text and "leak level L2" in text
    assert len(re.findall('class="ratio"', text)) == 2 and "Ratios, block by block" in text
    assert 'href="http' not in text and 'src="' not in text


def test_other_reports_of_the_same(page: Path) -> None:
    assert (page / "report.csv").read_text().count("\n") == 5
    given = [json.loads(line) for line in (page / "predictions.jsonl").read_text().splitlines()]
    assert [one["instance_id"] for one in given] == ["align", "align", "other", "other"]
    assert "<script>" not in (page / "report.md").read_text() and "| one | 1 of 1" in (page / "report.md").read_text()


def test_parquet_holds_what_csv_holds(page: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install 'assay[parquet]'")
    table = parquet.read_table(page / "report.parquet")
    assert table.num_rows == 4 and table.column("outcome").to_pylist()[0] == "faster"
    assert table.schema.field("percent").type == "double" and table.column("money").null_count == 4


def seen(folder: Path, script: str, place: str = "") -> str:
    """The document as a browser has it, after a script of ours."""
    if BROWSER is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    text = (folder / "report.html").read_text().replace("</html>", f"<script>{script}</script></html>")
    (folder / "tried.html").write_text(text)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", f"file://{folder / 'tried.html'}{place}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def shown(document: str) -> list[str]:
    """Outcomes of the attempts that are not hidden."""
    tags = re.findall(r'<details class="attempt"[^>]*>', document)
    return [re.findall('data-outcome="([^"]*)"', tag)[0] for tag in tags if " hidden" not in tag]


def test_filters_and_links_in_a_real_browser(page: Path) -> None:
    choose = "for (const [n, v] of Object.entries({})) {{ const s = document.getElementById('f-' + n); s.value = v; "
    choose += "s.dispatchEvent(new Event('change')); }}"
    every = ["faster", "incorrect", "infra.provider", "slower"]
    document = seen(page, "", "#cell-0000000000000002")
    assert (
        shown(document) == every and "4 attempts" in document and "<title>campaign evil &lt;b&gt;</title>" in document
    )
    opened = re.findall(r'<details class="attempt"[^>]* open', document)
    assert len(opened) == 1 and "0000000000000002" in opened[0]
    assert shown(seen(page, choose.format('{"who": "one"}'))) == ["faster", "infra.provider"]
    assert shown(seen(page, choose.format('{"task": "other", "outcome": "slower"}'))) == ["slower"]
