"""Prepared, measured and decided apart, and without a sandbox: gates are tried where they can be, or left out aloud."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from assay.__main__ import main
from assay.contract.rows import VERSION as SCHEMA
from holding import processes
from small_project import BASE, FASTER, assay, candidate, edited, environment, files, git, project, verdict

compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
LOADS = """import ctypes
import pathlib
_kernel = ctypes.CDLL(str(pathlib.Path(__file__).parent / "{library}")).scaled
_kernel.restype = ctypes.c_double


def work(n, base=2):
    return sum(i**base for i in range(n)) + 0 * int(_kernel(n))
"""
KERNEL = "double scaled(int n) { return n * 0.5; }\n"
BUILD = '["cc", "-shared", "-fPIC", "-o", "pkg/built.so", "pkg/kernel.c"]'


def compiled(folder: Path, library: str = "built.so") -> Path:
    """The small project with a C source; the package loads `library`, and only built.so is built from the source."""
    task = project(folder)
    files(folder / "repo", {"pkg/__init__.py": LOADS.format(library=library), "pkg/kernel.c": KERNEL})
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "pkg/old.so", "pkg/kernel.c"], cwd=folder / "repo", check=True)
    git(folder / "repo", "add", "--all", "--force")
    git(folder / "repo", "commit", "--quiet", "-m", "a kernel")
    return edited(task, "[tests]", f"[commands]\nbuild = [{BUILD}]\n\n[tests]") if library == "built.so" else task


def prepared(task: Path, tree: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    return assay("prepare", task, "--tree", tree, "--store", task.parent / "store", "--no-sandbox", *more)


def plan_of(done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0 and done.stdout.startswith("prepared: "), done.stderr + done.stdout
    return Path(done.stdout.strip().removeprefix("prepared: "))


def decided(plan: Path, raw: Path) -> dict[str, Any]:
    """The verdict of what `measure` leaves, its exit status checked."""
    done = assay("measure", plan, "--out", raw, "--no-sandbox")
    assert done.returncode == 0, done.stderr
    told = assay("decide", raw, "--json")
    found: dict[str, Any] = json.loads(told.stdout)
    assert told.returncode == found["status"]
    return found


@compiler
@pytest.mark.parametrize(
    ("library", "outcome", "status"), [("built.so", "measured", None), ("old.so", "not_evaluated", 5)]
)
def test_a_compiled_source_is_looked_at_where_it_is_measured(
    library: str, outcome: str, status: int | None, tmp_path: Path
) -> None:
    """A library that was there before hides that the changed source is not what runs."""
    task = compiled(tmp_path, library)
    tree = candidate(task, "c", {"pkg/kernel.c": KERNEL.replace("n * 0.5", "0.5 * n")})
    plan = plan_of(prepared(task, tree))
    gates = json.loads((plan.parent / "gates.json").read_text())["gates"]
    assert list(gates) == ["build", "tests", "equivalence"] and not (plan.parent / "built.json").exists()
    assert not list(plan.parent.glob("trees/*/pkg/built.so"))  # whoever measures builds anew
    if status is None:
        done = assay("measure", plan, "--out", tmp_path / "raw", "--no-sandbox", "--seconds", "1")
        assert done.returncode in (0, 5), done.stderr
        gates = json.loads((tmp_path / "raw/gates.json").read_text())["gates"]
        assert gates["provenance"] == ["", "nothing works without pkg/kernel.c"]
    else:
        found = decided(plan, tmp_path / "raw")
        assert (found["outcome"], found["status"], found["workloads"]) == (outcome, status, [])
        assert found["words"][0].startswith("source not on the workload's path: pkg/kernel.c")
        assert main(["replay", str(tmp_path / "raw")]) == status
    assert not (plan.parent / "clean").exists() and not list(plan.parent.glob("poison-*"))


@compiler
def test_without_a_sandbox_the_gates_are_tried_as_well(tmp_path: Path) -> None:
    task = compiled(tmp_path, "old.so")
    tree = candidate(task, "c", {"pkg/kernel.c": KERNEL.replace("n * 0.5", "0.5 * n")})
    given = [task, "--tree", tree, "--store", tmp_path / "store", "--no-sandbox"]
    found = verdict(*given)
    assert (found["outcome"], found["status"]) == ("not_evaluated", 5), found
    assert [gate["name"] for gate in found["gates"]] == ["build", "tests", "equivalence", "provenance"]
    work = (tree / "pkg/__init__.py").read_text()
    files(tree, {"pkg/__init__.py": work.replace("for i in range(n))", "for i in range(n)) + (base != 2 and n > 10)")})
    found = verdict(*given)
    assert (found["outcome"], found["status"]) == ("incorrect", 1) and found["words"][0].startswith("sums: "), found


@compiler
def test_a_candidate_that_does_not_build_where_it_is_measured(tmp_path: Path) -> None:
    task = compiled(tmp_path)
    tree = candidate(task, "c", {"pkg/kernel.c": "no C\n"})
    plan = plan_of(prepared(task, tree, "--skip", "equivalence,tests"))
    found = decided(plan, tmp_path / "raw")
    assert (found["outcome"], found["status"]) == ("build_failed", 1), found
    assert decided(plan, tmp_path / "raw")["outcome"] == "build_failed"
    edited(task, BUILD, '["false"]')
    plan = plan_of(prepared(task, tree, "--skip", "equivalence,tests"))
    for _ in range(2):  # where base does not build either, the machine may be mended, and measuring tried again
        done = assay("measure", plan, "--out", tmp_path / "raw2", "--no-sandbox")
        assert done.returncode == 3 and "base: false: ended with status 1" in done.stderr
        assert not (plan.parent / "gates.json").exists()


@pytest.mark.full
def test_what_prepare_rejects_is_a_verdict(tmp_path: Path) -> None:
    task = project(tmp_path)
    tree = candidate(task, "c", {"pkg/__init__.py": FASTER.replace("(n - 1)", "(n - 2)")})
    done = prepared(task, tree)
    assert done.returncode == 1 and done.stdout.startswith("tests_failed: ") and "did not pass" in done.stdout
    files(tree, {"pkg/__init__.py": BASE.replace("return total", "return total + (base != 2 and n > 10)")})
    done = prepared(task, tree)
    assert done.returncode == 1 and done.stdout.startswith("incorrect: sums: "), done.stdout
    files(tree, {"other.py": ""})
    assert prepared(task, tree).stdout.startswith("out_of_scope: ")
    listed = assay("ledger", "--store", tmp_path / "store").stdout.splitlines()
    outcomes = [line.removesuffix(" unsandboxed").rpartition(" ")[2] for line in listed]
    assert outcomes == ["tests_failed", "incorrect", "out_of_scope"]


@pytest.mark.full
def test_gates_that_are_left_out_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = project(tmp_path)
    tree = candidate(task, "c", {"pkg/__init__.py": FASTER})
    plan = plan_of(prepared(task, tree, "--skip", "equivalence,tests"))
    assert not (plan.parent / "gates.json").exists()
    found = decided(plan, tmp_path / "raw")
    assert (found["outcome"], found["status"]) == ("faster", 0), found
    assert found["trust"] == ["unsandboxed", "left out on request: tests, equivalence"]
    assert "| tests | skipped | left out on request |" in (tmp_path / "raw/report.md").read_text()
    assert 'name="tests"><skipped' in (tmp_path / "raw/report.xml").read_text()
    listed = assay("ledger", "--store", tmp_path / "store").stdout
    assert listed.rstrip().endswith("not finished unsandboxed without tests, equivalence")
    wrong = candidate(task, "w", {"pkg/__init__.py": FASTER.replace("(n - 1)", "(n - 2)")})
    given = [task, "--tree", wrong, "--store", tmp_path / "store2", "--no-sandbox", "--skip", "tests,equivalence"]
    found = verdict(*given)
    assert found["outcome"] == "incorrect" and re.match(r"outputs of (\d) of \1 calls differ", found["words"][0]), found
    assert [gate["outcome"] for gate in found["gates"]] == ["", "skipped", "skipped", ""]
    with pytest.raises(SystemExit):
        main(["prepare", str(task), "--tree", str(tree), "--skip", "tests,build"])
    assert "expected some of tests, equivalence, provenance, got build" in capsys.readouterr().err


def test_gates_that_nobody_ran(tmp_path: Path) -> None:
    """What was found lies beside the plan; where it is lost, the measurement alone is not enough."""
    task = project(tmp_path)
    plan = plan_of(prepared(task, candidate(task, "c", {"pkg/__init__.py": FASTER})))
    (plan.parent / "gates.json").unlink()
    found = decided(plan, tmp_path / "raw")
    assert (found["outcome"], found["status"]) == ("not_evaluated", 5), found
    assert found["words"] == ["tests: asked for and not run", "equivalence: asked for and not run"]
    assert found["workloads"][0]["verdict"] == "faster"


def test_a_budget_that_is_too_small(tmp_path: Path) -> None:
    task = edited(project(tmp_path), "[budget]", "[budget]\nseconds = 0.01")
    tree = candidate(task, "c", {"pkg/__init__.py": FASTER})
    mark = f"ASSAY_TEST_{os.getpid()}_{time.time_ns()}"
    command = [sys.executable, "-m", "assay", "judge", str(task), "--tree", str(tree), "--no-sandbox", "--json"]
    command += ["--store", str(tmp_path / "store"), "--skip", "tests,equivalence,provenance"]
    done = subprocess.run(command, env=environment(MARK=mark), capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert (found["outcome"], found["status"], done.returncode) == ("infra.budget", 3, 3), found
    assert found["words"] == ["the task's seconds of measuring are spent, and this is not decided"]
    assert processes(mark, tmp_path / "store") == []
    rows = (tmp_path / "store/attempts" / found["attempt"]["id"] / "raw/squares.jsonl").read_text().splitlines()
    assert [json.loads(row)["kind"] for row in rows] == ["header", "block", "failed"]


@pytest.mark.full
def test_the_budget_is_that_of_all_workloads(tmp_path: Path) -> None:
    task = project(tmp_path)
    second = '\n[[workload]]\nname = "more"\nrun = {kind = "command", command = ["true"]}\n\n[budget]\nseconds = 99.0'
    edited(task, "\n[budget]", second)
    plan = plan_of(
        prepared(task, candidate(task, "c", {"pkg/__init__.py": FASTER}), "--skip", "tests,equivalence,provenance")
    )
    content = json.loads(plan.read_text())
    raw = tmp_path / "raw"
    raw.mkdir()
    for used, outcome in ((99.0, "infra.budget"), (1.0, "")):
        primary = dict.fromkeys(("base", "candidate", "control"), 1.0)
        block = {"kind": "block", "elapsed_s": used, "differing": [], "reasons": [], "primary": primary}
        header = {"kind": "header", "schema": SCHEMA, "plan": content["workloads"]["squares"], "isolation": "links"}
        rows = [header, block, {"kind": "verdict"}]
        (raw / "squares.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (raw / "more.jsonl").unlink(missing_ok=True)
        done = assay("measure", plan, "--out", raw, "--no-sandbox")
        assert done.returncode == 0, done.stderr
        last = json.loads((raw / "more.jsonl").read_text().splitlines()[-1])
        assert last.get("outcome", "") == outcome
