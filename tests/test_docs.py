"""README and docs: tables, numbers and pictures follow from files; links lead somewhere; code blocks run."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moeyard.bench import claims, docs, drawings, results, support
from moeyard.dispatch import schemes, table
from moeyard.testing import SOURCE
from moeyard.values import Layout

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HEADLINES = [*PAGES, ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
needs_all = pytest.mark.skipif(bool(support.missing()), reason=f"not installed: {', '.join(support.missing())}")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@needs_all
@pytest.mark.parametrize("page", docs.pages(ROOT), ids=named)
def test_pages_show_what_is_measured_and_what_runs(page: Path) -> None:
    assert docs.regenerate(page, ROOT, draw=False) == page.read_text(), "run make docs"


def test_readme_is_short_and_made_from_files() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert set(re.findall(r"<!-- made: (\S+) -->", text)) == {"layer", "numbers", "layout", "operators", "schemes"}
    assert "| ---" not in text and "results:" not in text, "tables of results are in docs/results"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What pages are made from, in a tree of its own."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


@needs_all
@pytest.mark.parametrize("name", ["h200/experts_bf16", "h200/align", "cpu-2core/experts-qwen3"])
def test_a_number_that_is_stale_is_seen(name: str, copy: Path) -> None:
    page, file = copy / "README.md", copy / "benchmarks" / "results" / f"{name}.json"
    assert docs.regenerate(page, copy, draw=False) == page.read_text()
    content = results.read(file)
    for row in content["rows"]:
        if row["provider"] == "moeyard" and row["time_us"] is not None:
            row["time_us"] *= 2
            row["ratio_to"] = {peer: [2 * part for part in ratio] for peer, ratio in row.get("ratio_to", {}).items()}
    results.write(file, content)
    assert docs.regenerate(page, copy, draw=False) != page.read_text()
    page.write_text(page.read_text().replace("times as fast", "times faster"))
    assert docs.regenerate(page, copy, draw=False).count("times as fast") == 3


@needs_all
def test_the_table_of_what_runs_where_follows_the_table_of_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "| `permute` | `cpu` | `cuda` | `cuda` | `hidden_states` | yes |" in support.operators()
    before = support.schemes()
    rows = tuple(row for row in table.TABLE["permute"] if row.name != "cpu")
    monkeypatch.setitem(table.TABLE, "permute", rows)
    assert "| `permute` | `torch` | `cuda` | `cuda` |" in support.operators()
    monkeypatch.setitem(schemes.TAKES, "triton", lambda scheme: scheme.weights == "int4")
    after = support.schemes()
    assert after != before
    cells = dict(
        zip(*(line.split(" | ") for line in after.splitlines() if re.match(r"\| (we|INT4 g)", line)), strict=True)
    )
    assert cells["triton"] == "yes"
    monkeypatch.setattr(support, "installed", lambda name: name != "triton")
    with pytest.raises(ValueError, match="expected numba, cuda-core and triton to be installed, got no triton"):
        support.operators()


def test_the_drawing_is_the_example_that_layout_tells(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told, found = Layout.__doc__ or "", drawings.example()
    for name, tensor in zip(Layout.TENSORS, found.tensors, strict=True):
        line = re.search(rf"{name} +\[(.+)\]", told)
        assert line is not None and [int(part) for part in re.findall(r"-?\d+", line[1])] == tensor.tolist(), name
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    drawings.layout(first)
    drawings.layout(second)
    assert first.read_bytes() == second.read_bytes()


def test_the_picture_of_a_layer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    content = results.read(ROOT / "benchmarks" / "results" / "h200" / "experts_bf16.json")
    assert drawings.layer(content, tmp_path / "a.svg", "qwen3-30b-a3b", "Qwen3") == 3
    assert (tmp_path / "a.svg").stat().st_size > 20000
    with pytest.raises(ValueError, match="result file: expected rows of"):
        drawings.layer(content, tmp_path / "b.svg", "absent", "absent")


def test_the_picture_of_a_report_is_that_of_the_proof(tmp_path: Path) -> None:
    pytest.importorskip("assay")
    made = runpy.run_path(str(ROOT / "docs" / "assay_report.py"))
    assert made["picture"](ROOT) == (ROOT / made["PICTURE"]).read_text(), "run make docs"


def test_blocks_without_a_meaning_are_errors(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- made: nothing -->\n<!-- /made -->\n")
    with pytest.raises(ValueError, match=r"expected one of .* behind 'made:', got 'nothing'"):
        docs.regenerate(page, ROOT, draw=False)
    assert claims.numbers(ROOT).count("\n") == 3


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", HEADLINES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if "://" not in link and not link.startswith("#"):
            assert (page.parent / link.partition("#")[0]).exists(), link


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    """The file that it is, if it is one."""
    test: str
    """"": in every run; "full"; or "no" and why."""
    text: str


_FENCE = re.compile(r'(?:<!-- test: (.+?) -->\n)?```(\w*)(?: title="(\S+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[Block]:
    found = [Block(language, title, test, text) for test, language, title, text in _FENCE.findall(page.read_text())]
    assert page.read_text().count("```") == 2 * len(found), f"{page}: expected blocks that are fenced alone"
    return found


WITH_BLOCKS = [page for page in PAGES if blocks(page)]


def a_model() -> Any:
    """A model of transformers, small: what pages call `model`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def run(page: Path, folder: Path, full: bool) -> int:
    """Runs the blocks of a page one after the other, as a reader would in an empty folder; returns how many."""
    given, done = {"__name__": "page"}, 0
    path = folder / "bin"
    path.mkdir()
    (path / "moeyard").write_text(f'#!/bin/sh\nexec {sys.executable} -m moeyard "$@"\n')
    (path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for command in path.iterdir():
        command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "PYTHONPATH": f"{SOURCE}:{folder}"}
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text)
        elif block.test.startswith("no") or ((block.test == "full" or block.language == "bash") and not full):
            continue
        elif block.language == "bash":
            ended = subprocess.run(
                ["bash", "-ec", block.text], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            assert ended.returncode == 0, f"{block.text}{ended.stdout}{ended.stderr}"
        else:
            if re.search(r"\bmodel\.", block.text) and "model" not in given:
                given["model"] = a_model()
            exec(compile(block.text, str(page), "exec"), given)
        done += 1
    return done


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=named)
def test_blocks_of_python_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = [b for b in blocks(page) if b.language == "python" and not b.test and not b.title]
    assert run(page, tmp_path, full=False) >= len(quick)


@pytest.mark.full
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=named)
@pytest.mark.filterwarnings("ignore")  # of packages that blocks import
def test_all_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    left = [block for block in blocks(page) if block.test.startswith("no")]
    assert run(page, tmp_path, full=True) == len(blocks(page)) - len(left) > 0 or left


def test_every_block_says_what_it_is() -> None:
    for page in WITH_BLOCKS:
        for block in blocks(page):
            assert block.language in ("python", "bash", "toml"), f"{page}: {block.text}"
            assert block.language != "toml" or block.title, page
            assert re.fullmatch(r"|full|no, \w.{10,}", block.test), page


def test_a_block_that_fails_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        run(page, tmp_path, full=False)
