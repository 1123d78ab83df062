"""Judgements from end to end on a small repository: every outcome, reports, resuming, the three commands apart."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from assay.__main__ import main
from assay.cli.shown import schema
from small_project import (
    BASE,
    FASTER,
    assay,
    candidate,
    edited,
    environment,
    files,
    git,
    project,
    verdict,
)


def valid(name: str, found: Any) -> None:
    found_schema = schema(name)
    jsonschema.Draft202012Validator.check_schema(found_schema)
    jsonschema.Draft202012Validator(found_schema).validate(found)


@pytest.mark.sandbox
def test_a_faster_patch_and_all_that_is_written(tmp_path: Path) -> None:
    task = project(tmp_path)
    tree = candidate(task, "fast", {"pkg/__init__.py": FASTER, "tests/test_work.py": "", "model_patch.diff": "+x\n"})
    found = verdict(task, "--tree", tree, "--store", tmp_path / "store")
    assert found["outcome"] == "faster" and found["status"] == 0 and found["trust"][0] == "sandboxed", found
    valid("verdict", found)
    assert found["patch"]["changed"] == ["pkg/__init__.py"] and found["patch"]["restored"] == ["tests/test_work.py"]
    assert [(gate["name"], gate["outcome"]) for gate in found["gates"]] == [
        ("build", ""),
        ("tests", ""),
        ("equivalence", ""),
        ("provenance", ""),
    ]
    assert found["gates"][1]["words"].startswith("4 tests passed") and "10 examples" in found["gates"][2]["words"]
    folder = tmp_path / "store/attempts" / found["attempt"]["id"]
    plan = json.loads((folder / "plan.json").read_text())
    valid("plan", plan)
    rows = [json.loads(line) for line in (folder / "raw/squares.jsonl").read_text().splitlines()]
    for row in rows:
        valid("raw", row)
    assert rows[0]["isolation"] == "sandbox" and rows[-1]["kind"] == "verdict"
    seed = plan["workloads"]["squares"]["seed"]
    assert rows[0]["plan"]["seed"] == seed and str(seed) not in (folder / "patch.diff").read_text()

    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "http" not in page and "<script" not in page
    assert "faster" in page and page.count("<circle") == 5 * found["workloads"][0]["blocks"]
    assert "| squares | faster | ×" in (folder / "report.md").read_text()
    suite = ElementTree.parse(folder / "report.xml").getroot()
    assert suite.get("tests") == "6" and suite.get("failures") == suite.get("errors") == "0"
    table = list(csv.DictReader((folder / "report.csv").read_text().splitlines()))
    assert [row["verdict"] for row in table] == ["faster", "faster"] and float(table[0]["low_percent"]) > 0

    again = assay("replay", folder)
    assert again.returncode == 0 and again.stdout.startswith("faster: the interval lies above 0")
    assert "attempt 1 of this task" in again.stdout
    second = verdict(task, "--tree", tree, "--store", tmp_path / "store")
    assert second["attempt"]["number"] == 2 and second["attempt"]["of_patch"] == 2
    listed = assay("ledger", "--store", tmp_path / "store").stdout.splitlines()
    assert len(listed) == 2 and all(line.endswith("faster") for line in listed)


SLOWER = BASE.replace("    return total", "    for i in range(3 * n):\n        total = total + 0\n    return total")
WRONG = FASTER.replace("(n - 1) * n", "(n - 1) * n * (n != 60007)")  # only on inputs that no test and no strategy has


@pytest.mark.parametrize(
    ("change", "outcome", "status", "words"),
    [
        ({"other.py": "x = 1\n"}, "out_of_scope", 1, "other.py: outside the task's scope"),
        ({"tests/test_work.py": ""}, "no_patch", 1, "nothing that the task's scope holds"),
        ({"pkg/__init__.py": BASE.replace(", base=2", "")}, "api_break", 1, "pkg.work: Parameter was removed"),
        ({"pkg/__init__.py": FASTER.replace("(n - 1)", "(n - 2)")}, "tests_failed", 1, "did not pass"),
        ({"pkg/__init__.py": "import os\nos._exit(0)\n" + BASE}, "tests_failed", 1, "4 of 4 tests were not reported"),
        ({"pkg/__init__.py": SLOWER}, "slower", 1, "the interval lies below 0"),
        ({"pkg/__init__.py": BASE.replace("range(n)", "range(n + (n > 1000))")}, "incorrect", 1, "differ from base's"),
        pytest.param({"pkg/__init__.py": BASE + "_t = 1\n"}, "", None, "", marks=pytest.mark.full),
    ],
)
def test_outcomes(change: dict[str, str], outcome: str, status: int | None, words: str, tmp_path: Path) -> None:
    """Without a sandbox, which is tried elsewhere, and is what the verdict says; the null is not called material."""
    task = project(tmp_path)
    found = verdict(task, "--tree", candidate(task, "c", change), "--store", tmp_path / "store", "--no-sandbox")
    valid("verdict", found)
    assert found["trust"][0] == "unsandboxed"
    if status is None:
        assert found["outcome"] in ("equivalent", "undecided", "void") or not found["workloads"][0]["material"]
    else:
        assert (found["outcome"], found["status"]) == (outcome, status), found
        assert any(words in one for one in found["words"]), found["words"]
    assert "unsandboxed" in assay("ledger", "--store", tmp_path / "store").stdout


@pytest.mark.sandbox
def test_a_property_that_fails_and_a_build_that_does(tmp_path: Path) -> None:
    task = project(tmp_path)
    wrong = BASE.replace("return total", "return total + (base != 2 and n > 10)")
    found = verdict(task, "--tree", candidate(task, "w", {"pkg/__init__.py": wrong}), "--store", tmp_path / "store")
    assert found["outcome"] == "incorrect" and found["words"][0].startswith("sums: "), found
    check = '["python", "-c", "import pkg, pathlib; pathlib.Path(\'built\').write_text(str(pkg.work(3)))"]'
    edited(task, "[tests]", f"[commands]\nbuild = [{check}]\n\n[tests]")
    found = verdict(task, "--tree", candidate(task, "b", {"pkg/__init__.py": "1 / 0\n"}), "--store", tmp_path / "store")
    # A package that cannot be imported is still read; only the build runs it.
    assert found["outcome"] in ("build_failed", "api_break"), found
    edited(task, '[api]\npackages = ["pkg"]\n', "")
    found = verdict(task, "--tree", tmp_path / "b", "--store", tmp_path / "store")
    assert found["outcome"] == "build_failed" and "ZeroDivisionError" in found["words"][0], found
    edited(task, "pkg.work(3)", "pkg.nothing")
    found = verdict(task, "--tree", tmp_path / "w", "--store", tmp_path / "store")
    assert (found["outcome"], found["status"]) == ("task_invalid", 4) and found["words"][0].startswith("base: ")


def test_three_commands_apart(tmp_path: Path) -> None:
    """Measured in slices, in another folder, by an interpreter that has numpy and nothing else of ours."""
    task = project(tmp_path)
    tree = candidate(task, "fast", {"pkg/__init__.py": FASTER})
    done = assay("prepare", task, "--tree", tree, "--store", tmp_path / "store", "--no-sandbox")
    assert done.returncode == 0 and done.stdout.startswith("prepared: "), done.stderr
    plan = Path(done.stdout.strip().removeprefix("prepared: "))
    again = assay("prepare", task, "--tree", tree, "--store", tmp_path / "store", "--no-sandbox")
    assert again.stdout == done.stdout  # it goes on with what was prepared
    moved, raw = tmp_path / "elsewhere", tmp_path / "raw"
    shutil.copytree(plan.parent, moved, symlinks=True)
    code = (
        "import sys; from assay.__main__ import main; status = main(sys.argv[1:]); "
        "loaded = {'pydantic', 'griffe', 'hypothesis', 'torch', 'assay.contract.task'} & set(sys.modules); "
        "sys.exit(f'loaded {loaded}' if loaded else status)"
    )
    slices = 0
    while True:
        given = [moved / "plan.json", "--out", raw, "--seconds", "0.5", "--no-sandbox"]
        one = subprocess.run(
            [sys.executable, "-c", code, "measure", *map(str, given)],
            capture_output=True,
            text=True,
            env=environment(),
            check=False,
        )
        slices += 1
        assert one.returncode in (0, 5) and slices < 60, one.stderr + one.stdout
        if one.returncode == 0:
            break
    rows = [json.loads(line) for line in (raw / "squares.jsonl").read_text().splitlines()]
    assert slices > 1 and sum(row["kind"] == "resumed" for row in rows) == slices - 1
    assert [row["number"] for row in rows if row["kind"] == "block"] == list(range(len(rows) - slices - 1))
    for row in rows:
        valid("raw", row)
    decided = assay("decide", raw, "--store", tmp_path / "store", "--json")
    found = json.loads(decided.stdout)
    valid("verdict", found)
    assert (found["outcome"], decided.returncode) == ("faster", 0) and found["trust"][0] == "unsandboxed"
    gates = [(gate["name"], gate["outcome"], gate["words"]) for gate in found["gates"]]
    assert gates[0] == ("build", "", "3 arms") and gates[2] == ("equivalence", "", "10 examples"), gates
    assert gates[1][:2] == ("tests", "") and gates[1][2].startswith("4 tests passed") and len(gates) == 4
    assert (raw / "report.html").exists() and assay("replay", raw).returncode == 0
    assert assay("ledger", "--store", tmp_path / "store").stdout.rstrip().endswith("faster unsandboxed")
    (moved / "trees/candidate/pkg/__init__.py").write_text(BASE)
    (moved / "built.json").unlink()
    changed = assay("measure", moved / "plan.json", "--out", tmp_path / "raw2", "--no-sandbox")
    assert changed.returncode == 2 and "expected candidate to be what was frozen" in changed.stderr


@pytest.mark.full
def test_many_patches_and_a_reference_and_two_workloads(tmp_path: Path) -> None:
    task = project(tmp_path)
    repository = tmp_path / "repo"
    files(repository, {"pkg/__init__.py": FASTER})
    git(repository, "commit", "-a", "-m", "better")
    edited(task, 'base = "HEAD"', 'base = "HEAD~1"\nreference = "HEAD"')
    task.write_text(
        task.read_text()
        + '\n[[workload]]\nname = "cubes"\noutputs = "unchecked"\n'
        + 'run = {kind = "command", command = ["python", "-S", "-c", '
        + '"from pkg import work; work(300000)"]}\n'
    )
    (tmp_path / "patches").mkdir()
    patch = subprocess.run(["git", "-C", repository, "diff", "HEAD~1"], check=True, capture_output=True).stdout
    (tmp_path / "patches/good.diff").write_bytes(patch)
    (tmp_path / "patches/bad.patch").write_text("nonsense\n")
    for number in range(3):  # beside other tests two builds of base may scatter: void, and to be judged again
        store = tmp_path / f"store{number}"
        given = ["judge", task, "--patch", tmp_path / "patches", "--store", store, "--no-sandbox", "--jobs", 2]
        done = assay(*map(str, given))
        if "good.diff: void:" not in done.stdout:
            break
    lines = sorted(done.stdout.splitlines())
    assert done.returncode == 1 and len(lines) == 2, done.stderr
    assert "bad.patch: no_patch: the patch does not apply" in lines[0] and "good.diff: faster: " in lines[1]
    (verdict_file,) = store.glob("attempts/*/raw/../verdict.json")
    found = json.loads(verdict_file.read_text())
    valid("verdict", found)
    assert [one["verdict"] for one in found["workloads"]] == ["faster", "faster"]
    for one in found["workloads"]:
        assert one["reference"]["interval"][0] > 0 and one["alpha"] <= 0.0015 and one["p"] < 0.0025
    joint = found["joint"]
    assert joint["interval"][0] < joint["estimate"] < joint["interval"][1]
    rows = [json.loads(line) for line in (verdict_file.parent / "raw/cubes.jsonl").read_text().splitlines()]
    assert all(len(row["order"]) == 4 for row in rows if row["kind"] == "block")
    for row in rows:
        valid("raw", row)


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, store = project(tmp_path), ["--store", str(tmp_path / "s")]
    for given, status, words in (
        (["judge", str(task), "--tree", str(tmp_path / "none"), "--no-sandbox", *store], 2, "--tree: expected"),
        (["judge", str(tmp_path / "none.toml"), "--tree", "."], 4, "expected a task"),
        (["measure", str(tmp_path / "plan.json"), "--out", str(tmp_path / "raw")], 2, "PLAN: expected a plan"),
        (["decide", str(tmp_path)], 2, "PLAN: expected a plan"),
        (["ledger", "--store", str(tmp_path / "none")], 2, "--store: expected a folder with a ledger"),
        (["replay", str(tmp_path)], 2, "PLAN: expected a plan"),
    ):
        assert main(given) == status
        assert words in capsys.readouterr().err
    for name in ("task", "prepare", "measure", "decide", "judge", "ledger"):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0 and "usage: assay" in capsys.readouterr().out
    for name in ("raw", "plan", "verdict", "task"):
        assert main(["schema", name]) == 0 and json.loads(capsys.readouterr().out)["$id"].startswith(f"assay-{name}-")
