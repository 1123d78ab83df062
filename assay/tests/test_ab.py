"""assay ab: commits, several candidates, all cases of a benchmark, hooks; all arms are copies, made in the same way."""

import json
from pathlib import Path
from typing import Any

import pytest

from assay.__main__ import main
from assay.contract.workload import Plan, Workload
from assay.experiment.copies import copied
from small_project import files, git

ANY_LOAD = ["--most-foreign", "1e9", "--delta", "0.5"]
SLEEP = "sleep 0.0{}\n"


def raw_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def repository(folder: Path, *sleeps: int) -> Path:
    """A commit per time that its script sleeps, hundredths of a second."""
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    for one in sleeps:
        files(folder, {"work.sh": SLEEP.format(one)})
        git(folder, "add", "--all")
        git(folder, "commit", "-m", f"{one}")
    return folder


def test_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both trees are written out; nothing of the repository changes, and no worktree is noted in it."""
    repo = repository(tmp_path / "repo", 6, 1)
    files(repo, {"work.sh": "exit 1\n"})  # what is not committed is in no commit
    (repo / "below").mkdir()
    monkeypatch.chdir(repo / "below")
    assert main(["ab", "HEAD~1", "main", "--out", str(tmp_path / "raw"), *ANY_LOAD, "--", "sh", "work.sh"]) == 0
    assert capsys.readouterr().out.startswith("faster: the interval lies above 0, beyond the margin")
    header = raw_of(tmp_path / "raw")[0]
    assert header["trees"] == {"base": "HEAD~1", "candidate": "main", "control": "HEAD~1"}
    assert len(git(repo, "worktree", "list").splitlines()) == 1 and (repo / "work.sh").read_text() == "exit 1\n"
    for given in (["nowhere", "main"], ["main", "--prime", "nowhere", "HEAD"]):
        assert main(["ab", *given, *ANY_LOAD, "--", "true"]) == 2
        assert "expected a directory or a commit of the repository here, got nowhere" in capsys.readouterr().err
    monkeypatch.chdir("/")
    assert main(["ab", "main", "main", "--", "true"]) == 2 and "lies in no repository" in capsys.readouterr().err


@pytest.mark.full
def test_several_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is a comparison of its own, at levels divided by their number."""
    monkeypatch.chdir(repository(tmp_path / "repo", 3, 1, 8))
    out, pages = tmp_path / "raw", tmp_path / "pages"
    given = [
        "ab",
        "HEAD~2",
        "HEAD~1",
        "HEAD",
        "--out",
        str(out),
        "--html",
        str(pages),
        *ANY_LOAD,
        "--",
        "sh",
        "work.sh",
    ]
    assert main(given) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2].startswith("HEAD~1: faster: A / B: ") and shown[-1].startswith("HEAD: slower: A / B: ")
    assert sorted(file.name for file in out.iterdir()) == ["HEAD-1.jsonl", "HEAD.jsonl"]
    for file in out.iterdir():
        rows = raw_of(file)
        assert rows[0]["plan"]["workloads"] == 2 and rows[-1]["alpha"] == 0.0005
        assert (pages / f"{file.stem}.html").read_text().startswith("<!doctype html>")
    assert main(["ab", "HEAD", "HEAD~1", "HEAD~1", "--", "true"]) == 2
    assert "B: expected different candidates" in capsys.readouterr().err


ASV = """import time
class Suite:
    params = [[1, 2]]
    param_names = ["times"]
    def time_sleep(self, times): time.sleep(times * {})
"""


@pytest.mark.full
def test_all_cases_of_an_asv_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files(tmp_path, {"a/b.py": ASV.format(0.004), "b/b.py": ASV.format(0.001)})
    given = [
        "ab",
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        *ANY_LOAD,
        "--asv",
        "b.py:Suite.time_sleep",
        "--calls",
        "2",
    ]
    given += ["--rounds", "1", "--out"]
    assert main([*given, str(tmp_path / "raw")]) == 0
    assert [line.partition(" (")[2].partition(":")[0] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        "times=1)",
        "times=2)",
    ]
    assert [raw_of(file)[0]["plan"]["workload"]["case"] for file in sorted((tmp_path / "raw").iterdir())] == [0, 1]
    assert main([*given, str(tmp_path / "none"), "--case", "2"]) == 3
    assert "case: expected below 2" in capsys.readouterr().err


@pytest.mark.full
def test_hooks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--setup` once in each tree, `--prepare` before each run and in no figure; the trees that were given stay."""
    files(tmp_path, {"a/made.txt": "0.03\n", "b/made.txt": "0.01\n"})
    given = ["ab", str(tmp_path / "a"), str(tmp_path / "b"), *ANY_LOAD, "--out", str(tmp_path / "raw")]
    log = tmp_path / "log"
    given += ["--setup", f"echo setup >> {log}; cp made.txt built.txt"]
    given += ["--prepare", f"echo prepare >> {log}; test -e built.txt; rm -f left; sleep 0.12"]
    assert main([*given, "--", "sh", "-c", "test ! -e left && touch left && sleep $(cat built.txt)"]) == 0
    counts = log.read_text().split()
    blocks = [row for row in raw_of(tmp_path / "raw") if row["kind"] == "block"]
    assert counts.count("setup") == 3 and counts.count("prepare") == 3 + 3 * len(blocks)  # a run that does not count
    assert min(row["figures"]["candidate"]["wall"] for row in blocks) < 0.12  # of which 0.12 would be the preparation
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["made.txt"]
    for more, words in (
        (["--setup", "exit 3"], "--setup: ended with status 3"),
        (["--prepare", "exit 4"], "--prepare"),
    ):
        (tmp_path / "raw").unlink()
        assert main([*given, *more, "--", "true"]) == 3
        assert words in capsys.readouterr().err
        (tmp_path / "raw").touch()
    assert main(["ab", "a", "b", "--prepare", "true", "--call", "a:b"]) == 2
    assert "--prepare: expected a command with it" in capsys.readouterr().err


def test_all_arms_are_copies_made_alike(tmp_path: Path) -> None:
    files(tmp_path, {"a/x.py": "1\n", "a/.assay/ledger.sqlite": "", "b/x.py": "2\n"})
    (tmp_path / "work").mkdir()
    given = {"base": tmp_path / "a", "candidate": tmp_path / "b", "control": tmp_path / "a"}
    with copied(given, tmp_path / "work", "links") as trees:
        texts = {arm: (tree / "x.py").read_text() for arm, tree in trees.trees.items()}
        assert texts == {"base": "1\n", "candidate": "2\n", "control": "1\n"}
        assert not {tmp_path / "a", tmp_path / "b"} & set(trees.trees.values())
        assert {tree.parent for tree in trees.trees.values()} == {tmp_path / "work/copies"}
        assert not (trees.trees["base"] / ".assay").exists()


def test_a_plan_of_earlier_raw_has_no_prepare() -> None:
    plan = Plan(Workload("command", ("true",)))
    found = json.loads(json.dumps({"workload": {"kind": "command", "command": ["true"]}, "delta": 0.02}))
    assert Plan.from_json(found).workload == plan.workload
