"""Result files, their commits, pictures and tables of them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
from moeyard.bench import docs, hosts, peers, plots, results, suite
from moeyard.bench.timing import Rates

CPU = torch.device("cpu")
RATES = Rates(20.0, 30.0, 0.5, "float32")


def a_result(**change: Any) -> dict[str, Any]:
    row = {
        "op": "moe_align_block_size", "workload": "seed", "routing": "uniform",
        "sizes": {"num_tokens": 8, "num_experts": 4, "top_k": 2, "block_size": 16},
        "provider": "moeyard", "impl": "cpu", "mode": "cpu",
        "time_us": 12.345, "time_us_p10": 12.0, "time_us_p90": 13.0, "correct": True,
        "copy_time_us": 0.5, "read_time_us": 0.4, "product_time_us": None,
    }  # fmt: skip
    rows = [row | change, row | {"provider": "torch", "impl": "plain", "time_us": 123.4}]
    rows.append(row | {"provider": "peer", "impl": "1.0", "time_us": None, "correct": False})
    return results.document(rows, results.machine(CPU, RATES), peers.versions(CPU))


def test_result_files_survive_a_round_trip(tmp_path: Path) -> None:
    content, path = {**a_result(), "stalls": [{"calls": 3}]}, tmp_path / "deep" / "seed.json"
    results.write(path, content)
    assert results.read(path) == content
    assert set(a_result()) == {"schema", "date", "commit", "version", "machine", "peers", "rows"}
    assert content["machine"]["copy_gb_s"] == 20.0 and content["peers"]["torch"] == torch.__version__
    assert len(path.read_text().splitlines()) < 60  # a row a line: readable in a diff


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99, "rows": []}', '{"schema": 1, "rows": [{"op": "x"}]}'])
def test_what_is_not_a_result_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="result file: expected"):
        results.read(path)
    with pytest.raises(ValueError, match="result file: expected"):
        results.read(tmp_path / "absent.json")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / f"picture{suffix}"
    assert plots.plot(a_result(), out) == 2
    assert out.stat().st_size > 5000
    with pytest.raises(ValueError, match="expected timed rows of mode graph"):
        plots.plot(a_result(), out, mode="graph")


def test_tables_hold_what_was_measured() -> None:
    text = docs.table(a_result())
    assert "| moe_align_block_size: 8 tokens, 4 experts, 2 top_k, 16 block_size; uniform | 12.3 | 123 | wrong |" in text
    assert "copy bandwidth 20.0 GB/s, read bandwidth 30.0 GB/s; float32 product 0.50 TFLOP/s" in text
    text = docs.table(a_result(), ["moe_align_block_size"])
    assert "| bytes / copy bandwidth | bytes / read bandwidth |" in text and "| wrong | 0.50 | 0.40 |" in text


def old_result(*, products: bool) -> dict[str, Any]:
    """A file of schema 1."""
    content = a_result(mode="graph")
    for row in content["rows"]:
        row["floor_us"] = row.pop("copy_time_us")
        del row["read_time_us"], row["product_time_us"]
    facts = {"gpu": "a GPU", "copy_gb_s": 20.0} | ({"matrix_tflops": 800.0} if products else {})
    return {**content, "schema": 1, "machine": facts}


@pytest.mark.parametrize("products", [False, True])
def test_older_files_are_shown_in_honest_words(products: bool, tmp_path: Path) -> None:
    results.write(tmp_path / "old.json", old_result(products=products))
    content = results.read(tmp_path / "old.json")
    word = "copy or product time" if products else "bytes / copy bandwidth"
    assert f"| {word} |" in docs.table(content, ["moe_align_block_size"])
    text = docs.ratio_table(content)
    assert f"| µs per call | {word} | moeyard | moeyard / copy{' or product' if products else ''} time |" in text
    assert "| 0.50 | 12.3 | 24.69 |" in text and "floor" not in text
    assert results.yardstick_us(content["rows"][0]) == 0.5


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def checkout(root: Path, project: str, place: str) -> Path:
    """A repository of a project that has bench/ at a place; the folder of bench/."""
    folder = root / place / "moeyard" / "bench"
    folder.mkdir(parents=True)
    (folder / "results.py").write_text("")
    (root / "pyproject.toml").write_text(f"[project]\nname = '{project}'\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "x")
    return folder


def test_the_commit_is_that_of_our_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEYARD_COMMIT", raising=False)
    own, other = checkout(tmp_path / "own", "moeyard", "src"), checkout(tmp_path / "user", "theirs", "src")
    monkeypatch.chdir(tmp_path / "user")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "user" / ".git"))
    head = git(tmp_path / "own", "--git-dir", str(tmp_path / "own" / ".git"), "rev-parse", "--short=12", "HEAD")
    assert results.commit_of(own) == head
    (own / "new.py").write_text("")
    assert results.commit_of(own) == f"{head} with changes"
    monkeypatch.delenv("GIT_DIR")
    installed = checkout(tmp_path / "user2", "moeyard", ".venv/lib/python3/site-packages")
    (tmp_path / "own" / "pyproject.toml").unlink()
    (tmp_path / "alone").mkdir()
    for folder in (other, installed, own, tmp_path / "alone"):
        assert results.commit_of(folder).startswith(f"{results.NO_COMMIT}: moeyard {moeyard.__version__} ")
    monkeypatch.setenv("MOEYARD_COMMIT", "told")
    assert results.commit_of(other) == "told"


def test_committed_results_are_right_and_name_their_commit() -> None:
    for path in (Path(__file__).parents[1] / "benchmarks" / "results").rglob("*.json"):
        content = results.read(path)
        assert all(row["correct"] for row in content["rows"] if row["provider"] == "moeyard"), path
        assert not json.loads(path.read_text())["commit"].startswith(results.NO_COMMIT)


def test_summary_of_a_test_run(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="3" time="2.5"/></testsuites>')
    assert suite.test_summary(path) == {"passed": 4, "failed": 2, "skipped": 3, "seconds": 2.5}


def test_the_page_of_serving(tmp_path: Path) -> None:
    assert hosts.tables(tmp_path) == hosts.NOTHING
    row = {"mode": "host", "workload": "m", "copy_time_us": None, "read_time_us": None}
    content = a_result(**row, op="mm", time_us=10.0)
    content["rows"][1:] = a_result(**row, op="fused_experts", time_us=25.0)["rows"][:1]
    content |= {
        "warm_up": [{"impl": "cuda", "workload": "m", "seconds": {"kernels": 9.0, "calls": 1.5}}],
        "stalls": [
            {"impl": "cuda", "workload": "m", "calls": 7, "compilations": 0, "over_5_ms": 1,
             "longest_ms": {"route": [0.5, 3], "permute": [6.25, 40]}}
        ],
        "few": [{"workload": "m", "kernels": "few", "ratios": {"route 1": 1.5, "permute 2": 0.75}, "all_us": {}}],
    }  # fmt: skip
    results.write(tmp_path / "benchmarks/results/card/serving.json", content)
    text = hosts.tables(tmp_path)
    assert "| m | mm: moeyard cpu | 10.0 |" in text and "| m | fused_experts: moeyard cpu | 25.0 (2.5) |" in text
    assert "Warm-up of m for `cuda`: 10.5 s" in text
    assert (
        "7 calls of `cuda` at random numbers of tokens (m): 0 compilations, 1 calls over 5 ms, the longest 6.25" in text
    )
    assert "from 0.75 (permute 2) to 1.50 (route 1)" in text
