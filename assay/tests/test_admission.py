"""Is a task one? Static reasons, what of a change runs, candidates that must fail, and the record."""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from assay.__main__ import main
from assay.admission import admit, candidates, leak, record
from assay.admission.candidates import CACHED, ZEROS, Place
from assay.cli.shown import schema
from assay.contract import task
from assay.contract.admission import Reason
from assay.judgement.guards import Source
from assay.repository.lines import parsed
from assay.repository.store import Store
from small_project import FASTER, assay, edited, environment, files, git, project, with_reference


def valid(found: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema("admission")).validate(found)


PATCH = """diff --git a/src/a.py b/src/a.py
--- a/src/a.py
+++ b/src/a.py
@@ -1,2 +1,4 @@
-    moved = one + two + three
+    first = fast_path(one)
+    moved = one + two + three
+    second = fast_path(two)
+    return first + second
-    return slow(one)
"""


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("Make it faster.", "L0"),
        ("Make src/a.py faster; moved = one + two + three", "L1"),
        (" src/a.py | 4 +++-\n 1 file changed", "L2"),
        ("Make src/a.py faster.\n\nUse the fast path", "L3"),
        ("Try this:\n+  second   = fast_path(two)\n", "L3"),
        ("first = fast_path(one)\nsecond = fast_path(two)", "L4"),
    ],
)
def test_levels_of_leaks(text: str, level: str) -> None:
    """What a change only moves gives nothing away; space around a line hides nothing."""
    reference = leak.Reference.of(parsed(PATCH), "perf: use the fast path (#12)")
    assert len(reference.lines) == 3 and reference.paths == ("src/a.py",)
    if level == "L3" and "fast path" in text:
        reference = leak.Reference.of(parsed(PATCH), "Use the fast path (#12)")
    found = leak.audit(text, reference)
    assert found.level == level, found


def test_rules_of_the_outcome() -> None:
    """Nothing that is static or declared admits, and nothing measured may be missing."""
    measured = [Reason(name, "measured", "for", "", "") for name in admit.MEASURED]
    assert admit.decided(measured) == "admitted"
    assert admit.decided([Reason(name, "static", "for", "", "") for name in admit.MEASURED]) == "undecided"
    for i, one in enumerate(measured):
        others = [*measured[:i], *measured[i + 1 :]]
        assert admit.decided(others) == "undecided"
        assert admit.decided([*others, Reason(one.name, "measured", "open", "", "")]) == "undecided"
        assert admit.decided([*others, Reason(one.name, "measured", "against", "", "")]) == "rejected"
    assert admit.decided([*measured, Reason("revert", "static", "against", "", "")]) == "rejected"
    assert admit.decided([*measured, Reason("claim", "declared", "noted", "", "")]) == "admitted"


def test_a_record_is_valid_for_one_task_machine_and_time(tmp_path: Path) -> None:
    key = record.Key("1" * 16, "c", record.digest({"processor": "x"}))
    now = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    found: dict[str, Any] = {
        "outcome": "admitted",
        "task": {"digest": "1" * 16},
        "reference": "c",
        "machine": {"processor": "x"},
        "expires": record.stamp(now + datetime.timedelta(seconds=1)),
    }
    assert record.refusal(found, key, now) == ""
    for change, words in (
        ({"outcome": "undecided"}, "it is undecided"),
        ({"task": {"digest": "2" * 16}}, "for another task"),
        ({"reference": "d"}, "for another reference"),
        ({"machine": {}}, "for another machine"),
        ({"expires": record.stamp(now)}, "has expired on 2030-01-01"),
    ):
        assert words in record.refusal(found | change, key, now)
    (tmp_path / "x").write_text('{"kind": "admission", "schema": 0}')
    with pytest.raises(ValueError, match="ADMISSION: expected an admission of schema 1"):
        record.read(tmp_path / "x")


def test_checks_are_done_once_and_for_one_way_of_asking(tmp_path: Path) -> None:
    asked: list[int] = []

    def check() -> list[Reason]:
        asked.append(1)
        return [Reason("a", "static", "for", "w", "s")]

    first = record.Checks(tmp_path, {"prompt": ""}).once("x", check)
    assert record.Checks(tmp_path, {"prompt": ""}).once("x", check) == first and len(asked) == 1
    record.Checks(tmp_path, {"prompt": "other"}).once("x", check)
    assert len(asked) == 2
    record.finish(tmp_path, {"kind": "admission"})
    assert not (tmp_path / record.UNDER_WAY).exists() and json.loads((tmp_path / record.FILE).read_text())


OBJECTS = """class Price:
    __slots__ = ("cents", "name")

    def __init__(self, cents):
        self.cents = cents

    def shown(self):
        return str(self.cents)

    @staticmethod
    def of(text):
        return [int(text), {"a": 1.5}]

    @property
    def twice(self):
        return 2 * self.cents


def total(prices):
    return sum(prices)
"""


def test_what_candidates_return(tmp_path: Path) -> None:
    """Zeros of the first answer's shape, and the first answer itself, for functions, methods and objects."""
    store = Store(tmp_path / "git")
    files(tmp_path / "base", {"prices.py": OBJECTS, "fast.c": "int x;\n"})
    base = store.take(tmp_path / "base").tree

    def scope(kind: str, *names: str) -> dict[str, Any]:
        folder = tmp_path / f"{kind}{len(names)}{names[0]}"
        candidates.wrapped(store, base, kind, [Place("prices.py", name) for name in names], folder)
        code = "import json, prices; P = prices.Price; print(json.dumps([EVERY]))"
        every = "prices.total([1, 2]), prices.total([5]), P(3).shown(), P(4).shown(), P.of('7'), P.of('8')"
        every += ", P(5).twice, P(6).twice"
        done = subprocess.run(
            [sys.executable, "-c", code.replace("EVERY", every)], cwd=folder, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    true = [3, 5, "3", "4", [7, {"a": 1.5}], [8, {"a": 1.5}], 10, 12]
    assert scope(ZEROS, "total") == [0, 0, *true[2:]]
    assert scope(CACHED, "total") == [3, 3, *true[2:]]
    assert scope(ZEROS, "Price.shown", "Price.of", "Price.twice") == [3, 5, "", "", *[[0, {"a": 0.0}]] * 2, 0, 0]
    assert scope(CACHED, "Price.shown", "Price.of", "Price.twice") == [3, 5, "3", "3", *[[7, {"a": 1.5}]] * 2, 10, 10]
    assert scope(CACHED, "Price.__init__") == [3, 5, "3", "3", *true[4:6], 6, 6]
    assert candidates.null(store, base, ["none.py", "data.bin", "fast.c"], tmp_path / "null") == "fast.c"
    assert (tmp_path / "null/fast.c").read_text() == "int x;\n// nothing else\n"
    assert candidates.null(store, base, ["data.bin"], tmp_path / "none") == ""


def test_which_functions_are_replaced(tmp_path: Path) -> None:
    """Those of the tree that a workload names; where a driver calls it, those that the reference changes."""
    made = with_reference(tmp_path)
    read = task.read(made)
    store = Store(tmp_path / "git", read.repository)
    trees = store.tree_of(read.base), store.tree_of(read.reference)
    changed = parsed(store.patch(*trees).decode())
    assert candidates.places(read, store, *trees, changed) == [Place("pkg/__init__.py", "work")]
    files(tmp_path, {"driver.py": "import pkg\n\n\ndef run(n):\n    return pkg.work(n)\n"})
    read = task.read(edited(made, 'target = "pkg:work", inputs', 'target = "driver.py:run", inputs'))
    assert candidates.places(read, store, *trees, changed) == [Place("pkg/__init__.py", "work")]
    assert not candidates.places(read, store, *trees, {})
    files(tmp_path, {"driver.py": "from pkg import work\n\n\ndef run(n):\n    return work(n)\n"})  # as of compiled code
    assert candidates.places(task.read(made), store, *trees, {}) == [Place("pkg/__init__.py", "work")]


def test_a_reference_that_is_wrong_is_rejected(tmp_path: Path) -> None:
    """Before anything is timed; what was not tried says so, and the record is found again."""
    made = with_reference(tmp_path, FASTER.replace("(n - 1)", "(n - 2)"))
    prompt = tmp_path / "prompt.md"
    prompt.write_text("Make pkg/__init__.py faster.\n")
    store = ["--store", tmp_path / "s", "--no-sandbox"]
    done = assay("admit", made, *store, "--prompt", prompt, "--json")
    found = json.loads(done.stdout)
    valid(found)
    assert (found["outcome"], done.returncode, found["expires"]) == ("rejected", 1, ""), done.stderr
    reasons = {one["name"]: one for one in found["reasons"]}
    assert reasons["runs"]["finding"] == "against" and "the reference is tests_failed" in reasons["runs"]["words"]
    assert reasons["claim"] == {
        "name": "claim",
        "kind": "declared",
        "finding": "noted",
        "words": "Speed up work, 3x",
        "source": f"commit {git(tmp_path / 'repo', 'rev-parse', 'HEAD')}",
    }
    assert reasons["null"]["words"].startswith("not tried") and found["leak"]["level"] == "L1"
    checked = assay("admit", made, *store, "--check")
    assert checked.returncode == 5 and checked.stdout == "not admitted: it is rejected\n"
    (file,) = (tmp_path / "s").glob("admissions/*/admission.json")
    assert json.loads(file.read_text()) == found
    shown = assay("admit", made, *store, "--static")
    assert shown.returncode == 5 and shown.stdout.startswith("undecided, unsandboxed: sums\n  + revert (static): ")


@pytest.mark.full
def test_killed_and_run_again(tmp_path: Path) -> None:
    """Whenever it is killed, what was done stays, nothing is done twice, and there is one record in the end."""
    made = with_reference(tmp_path, FASTER.replace("(n - 1)", "(n - 2)"))
    command = [sys.executable, "-m", "assay", "admit", str(made), "--store", str(tmp_path / "s"), "--no-sandbox"]
    checks, attempts = [], 0
    for wanted in ("*/checks.json", "../attempts/*/plan.json"):
        child = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
        while child.poll() is None and not list((tmp_path / "s/admissions").glob(wanted)):
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        checks += [file.read_bytes() for file in (tmp_path / "s").glob("admissions/*/checks.json")]
        attempts = len(list((tmp_path / "s/attempts").glob("*")))
    assert len(set(checks)) == 1 and attempts == 1
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    (file,) = (tmp_path / "s").glob("admissions/*/admission.json")
    valid(json.loads(file.read_text()))
    assert not list(file.parent.glob("checks*")) and len(list((tmp_path / "s/attempts").glob("*"))) == 1
    assert len(assay("ledger", "--store", tmp_path / "s").stdout.splitlines()) == 1


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = project(tmp_path)
    for given, status, words in (
        ([made], 4, "task.toml:6: repository.reference: expected a commit that is known to be better"),
        ([made, "--patch", tmp_path / "none"], 2, "--patch: expected a file"),
        ([made, "--repo", tmp_path], 2, "expected a rendered prompt with them"),
        ([made, "--days", "0"], 2, "--days: expected at least 1"),
        ([tmp_path / "none.txt"], 2, "none.txt"),
        ([tmp_path / "none.txt", "--repo", tmp_path], 2, "--repo: expected --commit with it"),
    ):
        assert main(["admit", *map(str, given), "--no-sandbox", "--store", str(tmp_path / "s")]) == status, given
        assert words in capsys.readouterr().err
    patch = subprocess.run(["git", "-C", tmp_path / "repo", "show", "HEAD"], capture_output=True, check=True).stdout
    (tmp_path / "ref.patch").write_bytes(patch)
    key = admit.key_of(task.read(made), Source("patch", str(tmp_path / "ref.patch")))
    assert len(key.reference) == 16
    assert main(["admit", str(made), "--patch", str(tmp_path / "ref.patch"), "--check", "--store", str(tmp_path)]) == 5
    assert "there is no admission" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["admit", "--help"])
    assert "A task is admitted only if all of this was measured" in " ".join(capsys.readouterr().out.split())


@pytest.mark.full
@pytest.mark.sandbox
def test_an_admission_from_end_to_end(tmp_path: Path) -> None:
    """Everything but the host can be shown beside other work; on a quiet machine it is admitted."""
    made = edited(with_reference(tmp_path), "delta = 0.02", "delta = 0.5")
    done = assay("admit", made, "--store", tmp_path / "s", "--json")
    found = json.loads(done.stdout)
    valid(found)
    findings = {one["name"]: one["finding"] for one in found["reasons"] if one["kind"] == "measured"}
    assert {name: findings[name] for name in ("runs", "reach", "faster", "again", "zeros", "cached")} == dict.fromkeys(
        ("runs", "reach", "faster", "again", "zeros", "cached"), "for"
    )
    assert found["outcome"] == "admitted" or "open" in (findings["null"], findings["host"]), found
    if found["outcome"] == "admitted":
        assert assay("admit", made, "--store", tmp_path / "s", "--check").returncode == 0


@pytest.mark.full
def test_outputs_that_nobody_looks_at(tmp_path: Path) -> None:
    """Zeros and cached answers are called faster where outputs are unchecked and tests look at nothing: no task."""
    made = with_reference(tmp_path)
    text = (
        made.read_text()
        .split("[[property]]")[0]
        .replace('[tests]\ncommand = ["python", "-m", "pytest", "-q", "tests"]\n', "")
    )
    made.write_text(
        text.replace('name = "squares"', 'name = "squares"\noutputs = "unchecked"').replace(
            "calls = 2}", "calls = 2, compare = false}"
        )
        + "[budget]\nmost_foreign = 1e9\n"
    )
    found = json.loads(assay("admit", made, "--store", tmp_path / "s", "--json", "--no-sandbox").stdout)
    reasons = {one["name"]: one for one in found["reasons"]}
    assert found["outcome"] == "rejected" and reasons["zeros"]["finding"] == "against", found
