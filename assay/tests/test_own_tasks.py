"""The first customer: this repository's tasks are read, prepared and, in the full tests, judged on its own commits."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from assay.contract import task
from small_project import assay, git, verdict

ROOT = Path(__file__).parents[2]
TASKS = sorted((ROOT / "tasks").glob("*.toml"))


def history(commits: int) -> None:
    """Skips where the tree came without its commits."""
    done = subprocess.run(["git", "-C", ROOT, "rev-parse", f"HEAD~{commits}"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("the repository's commits are not here")


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_every_task_is_read(file: Path) -> None:
    history(0)
    found = task.read(file)
    assert found.task.name == file.stem.replace("_", "-") and found.base == git(ROOT, "rev-parse", "HEAD")


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_a_commit_is_prepared(file: Path, tmp_path: Path) -> None:
    """The latest commit that changed the library; the plan brings the driver along."""
    history(1)
    commit = git(ROOT, "log", "--format=%H", "--no-merges", "-1", "--", "src/moeyard")
    given = ["--base", f"{commit}~1", "--commit", commit, "--store", tmp_path / "store", "--no-sandbox"]
    done = assay("prepare", file, *given, "--skip", "tests,equivalence")
    (plan,) = (tmp_path / "store").glob("attempts/*/plan.json")
    content = json.loads(plan.read_text())
    assert content["outcome"] in ("", "api_break", "out_of_scope", "no_patch"), done.stderr
    assert any(path.startswith("src/moeyard/") for path in content["patch"]["changed"])
    (run,) = (one["workload"] for one in content["workloads"].values())
    driver = plan.parent / run["target"].partition(":")[0]
    assert run["target"].startswith("drivers/") and driver.read_bytes() == (ROOT / "tasks/align.py").read_bytes()


@pytest.mark.full
@pytest.mark.sandbox
def test_two_commits_of_this_repository_are_judged(tmp_path: Path) -> None:
    """aae35e2 changed the router and not the layout: whatever the machine allows to say, it is not that it broke."""
    history(1)
    if subprocess.run(["git", "-C", ROOT, "cat-file", "-e", "aae35e2"], capture_output=True, check=False).returncode:
        pytest.skip("the commit aae35e2 is not here")
    given = ["--base", "aae35e2~1", "--commit", "aae35e2", "--store", tmp_path / "store"]
    found = verdict(ROOT / "tasks/align_cpu.toml", *given)
    assert all(gate["outcome"] in ("", "not_asked") for gate in found["gates"]), found["gates"]
    assert found["outcome"] in ("equivalent", "undecided", "void") or not found["workloads"][0]["material"]
    print(os.linesep.join(f"{one['name']}: {one['verdict']}: {one['reason']}" for one in found["workloads"]))
