"""Campaigns from their file to their reports: nothing is done twice, nothing is lost, and a wrong canary voids all."""

import contextlib
import csv
import fcntl
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from agent_parts import KEY, agent, provider, reply
from assay.agents.redaction import Redactor
from assay.campaign import canaries, plan, rows
from assay.campaign.predictions import Prediction, read_predictions, written_predictions
from assay.contract import cells, task
from assay.contract.errors import UsageError
from small_project import BASE, assay, edited, environment, files, git, project

OUTSIDE = """diff --git a/other.py b/other.py
new file mode 100644
--- /dev/null
+++ b/other.py
@@ -0,0 +1 @@
+x = "</pre><script>alert(1)</script>"
"""
WRONG = """diff --git a/pkg/__init__.py b/pkg/__init__.py
--- a/pkg/__init__.py
+++ b/pkg/__init__.py
@@ -1,5 +1,5 @@
 def work(n, base=2):
     total = 0
     for i in range(n):
-        total = total + i**base
+        total = total + i
     return total
"""
CAMPAIGN = """schema = 1
name = "small"
tasks = ["task.toml"]
canaries = false
pass_at = [1, 2]
retries = 0

[[canary]]
task = "sums"
name = "wrong-sums"
patch = "wrong.diff"
expect = "rejected"

[[prediction]]
file = "given.jsonl"
"""
PATCHES = (("outsider", OUTSIDE), ("outsider", ""), ("mistaken", WRONG))
GIVEN = [Prediction("sums", model, patch.encode()) for model, patch in PATCHES]


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # locks are there: judges of other tests are not waited for


def campaign(folder: Path, text: str = CAMPAIGN) -> Path:
    project(folder)
    files(folder, {"wrong.diff": WRONG, "given.jsonl": written_predictions(GIVEN), "campaign.toml": text})
    return folder / "campaign.toml"


def journal(folder: Path) -> list[dict[str, Any]]:
    """Its whole lines."""
    return [json.loads(line) for line in (folder / rows.JOURNAL).read_text().split("\n")[:-1]]


def command_lines() -> list[str]:
    """Of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text())
    return found


@pytest.mark.sandbox
def test_from_file_to_reports(tmp_path: Path) -> None:
    file = campaign(tmp_path)
    with provider(tmp_path, reply(bash="cp pkg/__init__.py copy.py"), reply(say="done"), reply(status=429)) as options:
        values = dict(one.split("=", 1) for one in options[1::2])
        entry = (
            f'\n[[agent]]\nfile = "{agent(tmp_path)}"\nset = {{base = "{values["base"]}", host = "{values["host"]}"}}\n'
        )
        file.write_text(file.read_text().replace("retries = 0", "retries = 0\nattempts = 2\njobs = 2") + entry)
        done = assay("run", file, "--out", tmp_path / "out")
    assert done.returncode == 3, done.stdout + done.stderr  # the second attempt met 429
    found = journal(tmp_path / "out")
    for row in found:
        jsonschema.validate(row, cells.schema())
    assert [(row["who"]["name"], row["number"], row["outcome"]) for row in found] == [
        ("wrong-sums", 1, "tests_failed"),
        ("outsider", 1, "out_of_scope"),
        ("outsider", 2, "no_patch"),
        ("mistaken", 1, "tests_failed"),
        *[(row["who"]["name"], row["number"], row["outcome"]) for row in found[4:]],
    ]
    assert sorted(row["outcome"] for row in found[4:]) == ["infra.provider", "out_of_scope"]
    assert found[4]["level"] == "L0" and found[4]["template"] == "default" and found[4]["cost"]["agent_s"] > 0
    before = (tmp_path / "out" / rows.JOURNAL).read_bytes()
    again = assay("run", file, "--out", tmp_path / "out")
    assert again.returncode == 3 and (tmp_path / "out" / rows.JOURNAL).read_bytes() == before, again.stderr
    assert "small: succeeded 0 of 1 [0%, 79%]; pass@1 0%; pass@2 -; held at 5% 0; spoilt 1; cost " in again.stdout
    looked = Redactor([KEY])
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or looked.clean(path.read_bytes())[1] == 0, path
    reports_are_whole(tmp_path / "out", found)


def reports_are_whole(folder: Path, found: list[dict[str, Any]]) -> None:
    page = (folder / "report.html").read_text()
    assert page.count('class="attempt"') == len(found) and "<script>alert" not in page and "leak level L0" in page
    suite = ElementTree.fromstring((folder / "report.xml").read_text())
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("6", "4", "1")
    table = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    assert [row["key"] for row in table] == [row["key"] for row in found] and {row["kind"] for row in table} == {
        "canary",
        "prediction",
        "agent",
    }
    assert "| mistaken | 0 of 1" in (folder / "report.md").read_text()
    given = read_predictions(folder / "predictions.jsonl")
    assert [one.patch for one in given[:3]] == [one.patch for one in GIVEN] or b"other.py" in given[0].patch
    assert [(one.instance, one.model) for one in given[:3]] == [(one.instance, one.model) for one in GIVEN]


@pytest.mark.sandbox
def test_a_wrong_canary_voids_the_campaign(tmp_path: Path) -> None:
    file = campaign(tmp_path, CAMPAIGN.replace('expect = "rejected"', 'expect = "slower"'))
    done = assay("run", file, "--out", tmp_path / "out")
    assert done.returncode == 3 and "void: sums: canary wrong-sums, expected slower, came out otherwise" in done.stdout
    assert [row["who"]["kind"] for row in journal(tmp_path / "out")] == ["canary"]
    assert 'class="void-campaign"' in (tmp_path / "out/report.html").read_text()


@pytest.mark.full
@pytest.mark.sandbox
def test_killed_in_the_middle_nothing_is_lost_or_done_twice(tmp_path: Path) -> None:
    text = CAMPAIGN[: CAMPAIGN.index("[[canary]]")] + CAMPAIGN[CAMPAIGN.index("[[prediction]]") :]
    file = campaign(tmp_path, text)
    command = [sys.executable, "-m", "assay", "run", str(file), "--out", str(tmp_path / "out")]
    for lines in (1, 2):
        with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as judge:
            stop = time.monotonic() + 60
            while not (tmp_path / "out" / rows.JOURNAL).exists() or len(journal(tmp_path / "out")) < lines:
                assert time.monotonic() < stop and judge.poll() is None
                time.sleep(0.02)
            time.sleep(0.2)
            judge.send_signal(signal.SIGKILL)
        while any(str(tmp_path / "out") in line for line in command_lines()):  # one that just begins ends by itself
            assert time.monotonic() < stop + 10
            time.sleep(0.05)
        with (tmp_path / "out" / rows.JOURNAL).open("a") as torn:
            torn.write('{"kind": "cell", "ke')
    assert assay("run", file, "--out", tmp_path / "out").returncode == 0
    names = ("number", "outcome", "status")
    seen = [tuple(row[name] for name in names) for row in rows.read(tmp_path / "out").values()]
    assert seen == [(1, "out_of_scope", 1), (2, "no_patch", 1), (1, "tests_failed", 1)]
    assert len(journal(tmp_path / "out")) == 3
    for place in (tmp_path / "out/cells").iterdir():
        ledger = assay("ledger", "--store", place / "store").stdout.splitlines()
        assert len(ledger) == 1 and "not finished" not in ledger[0], ledger


def test_two_at_once(tmp_path: Path) -> None:
    file = campaign(tmp_path)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = assay("run", file, "--out", tmp_path / "out")
    assert done.returncode == 2 and "expected a folder that no other campaign works in" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ('name = "small"', 'name = "a b"', 2, "name: String should match"),
        ('tasks = ["task.toml"]', 'tasks = ["gone.toml"]', 3, "gone.toml: expected a task"),
        ('tasks = ["task.toml"]', 'tasks = ["task.toml", "task.toml"]', 3, "tasks.1: expected another task than sums"),
        ("retries = 0", "retrys = 0", 6, "retrys: expected a name that campaigns have"),
        ("retries = 0", "attempts = 0", 6, "attempts: Input should be greater than 0"),
        ('task = "sums"', 'task = "other"', 9, "canary.0.task: expected a task of the campaign, got other"),
        ('patch = "wrong.diff"', 'patch = "gone.diff"', 11, "canary.0.patch: expected a file, got gone.diff"),
        ('expect = "rejected"', 'expect = "good"', 12, "canary.0.expect: Input should be"),
        ('file = "given.jsonl"', 'file = "gone.jsonl"', 15, "prediction.0.file: "),
        (
            "[[prediction]]",
            '[[agent]]\nfile = "nobody"\n[[prediction]]',
            15,
            "agent.0.file: --agent: expected",
        ),
        (
            "retries = 0",
            'template = "early"\n[[agent]]\nfile = "codex"',
            6,
            "template: --template early:",
        ),
    ],
)
def test_errors_name_file_and_line(old: str, new: str, line: int, words: str, tmp_path: Path) -> None:
    file = edited(campaign(tmp_path), old, new)
    with pytest.raises(UsageError) as error:
        plan.read(file)
    assert f"{file}:{line}: " in str(error.value) and words in str(error.value), error.value


def test_keys_follow_content(tmp_path: Path) -> None:
    file = campaign(tmp_path)
    before = {one.key for one in plan.read(file).cells}
    assert len(before) == 4 and before == {one.key for one in plan.read(file).cells}
    edited(tmp_path / "task.toml", "delta = 0.02", "delta = 0.03")
    assert not before & {one.key for one in plan.read(file).cells}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ":1: expected a JSON object"),
        ("\n[]", ":2: expected texts instance_id"),
        ('{"instance_id": "sums"}', ":1: expected texts"),
        (
            '{"instance_id": "a", "model_name_or_path": "b", "model_patch": 3}',
            ":1: model_patch: expected",
        ),
    ],
)
def test_predictions_that_are_none(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UsageError) as error:
        read_predictions(tmp_path / "p.jsonl")
    assert words in str(error.value)


def test_predictions_of_others_have_more_keys(tmp_path: Path) -> None:
    text = '{"instance_id": "a", "model_name_or_path": "b", "model_patch": null, "cost": 3}\n\n'
    (tmp_path / "p.jsonl").write_text(text)
    assert [(one.instance, one.model, one.patch) for one in read_predictions(tmp_path / "p.jsonl")] == [("a", "b", b"")]


def test_canaries_that_can_be_made(tmp_path: Path) -> None:
    """They fit, change the function that a workload calls, and keep its signature; what cannot be made is said."""
    found, words = canaries.made(task.read(project(tmp_path)), [])
    assert [one.name for one in found] == ["null", "sabotage", "zeros", "cached"]
    assert words == ["canary reference: the task has no reference"]
    for one in found:
        (tmp_path / "one.diff").write_bytes(one.patch)
        git(tmp_path / "repo", "apply", str(tmp_path / "one.diff"))
        scope: dict[str, Any] = {}
        exec((tmp_path / "repo/pkg/__init__.py").read_text(), scope)
        results = [scope["work"](4), scope["work"](5)]
        wanted = {"null": [14, 30], "sabotage": [14, 30], "zeros": [0, 0], "cached": [14, 14]}[one.name]
        assert results == wanted and "def work(n, base=2):" in (tmp_path / "repo/pkg/__init__.py").read_text()
        git(tmp_path / "repo", "checkout", "-q", ".")
    own = canaries.made(task.read(tmp_path / "task.toml"), ["zeros", "reference"])
    assert [one.name for one in own[0]] == ["null", "sabotage", "cached"] and not own[1]


def test_canaries_through_an_import_and_those_that_cannot_be_made(tmp_path: Path) -> None:
    file = project(tmp_path)
    files(tmp_path / "repo", {"pkg/__init__.py": "from pkg.inner import work\n", "pkg/inner.py": BASE})
    git(tmp_path / "repo", "add", "--all")
    git(tmp_path / "repo", "commit", "--quiet", "-m", "moved")
    found, _ = canaries.made(task.read(file), [])
    assert all(b"b/pkg/inner.py" in one.patch for one in found)
    edited(file, 'files = ["pkg/**", "lib/**"]', 'files = ["README.md"]')
    found, words = canaries.made(task.read(file), [])
    assert not found and len(words) == 5 and all(one.startswith("canary ") for one in words)


@pytest.mark.parametrize(
    ("expect", "outcome", "held"),
    [
        ("nothing", "equivalent", True),
        ("nothing", "undecided", True),
        ("nothing", "faster", False),
        ("nothing", "void", None),
        ("faster", "faster", True),
        ("faster", "undecided", False),
        ("slower", "slower", True),
        ("rejected", "incorrect", True),
        ("rejected", "tests_failed", True),
        ("rejected", "slower", False),
        ("rejected", "faster", False),
        ("rejected", "infra.run", None),
        ("rejected", "task_invalid", False),
    ],
)
def test_what_a_canary_must_come_to(expect: str, outcome: str, held: bool | None) -> None:
    assert canaries.holds(expect, outcome) is held


@pytest.mark.full
@pytest.mark.sandbox
def test_all_canaries_for_real(tmp_path: Path) -> None:
    """With a margin that a busy machine can meet."""
    file = campaign(
        tmp_path, CAMPAIGN.replace("canaries = false", "canaries = true").replace("retries = 0", "retries = 2")
    )
    edited(tmp_path / "task.toml", "delta = 0.02", "delta = 1.0")
    done = assay("run", file, "--out", tmp_path / "out")
    outcomes = {row["who"]["name"]: row["outcome"] for row in journal(tmp_path / "out")}
    assert done.returncode == 0, done.stdout
    assert outcomes["sabotage"] == "slower" and outcomes["null"] in ("equivalent", "undecided")
    assert "left out: sums: canary reference: the task has no reference" in done.stdout
