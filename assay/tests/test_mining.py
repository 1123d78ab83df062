"""Commits that claim to be faster, and tasks that are made from them."""

import json
from pathlib import Path

import jsonschema
import pytest

from assay.cli.shown import schema
from assay.contract import task
from assay.mining import find, functions, history, new, reverts
from assay.repository.lines import parsed
from mined_shop import FAST, FASTER, repository
from small_project import assay, files, git


def test_find(tmp_path: Path) -> None:
    place = repository(tmp_path)
    search = find.find(place)
    assert (search.read, search.claimed, search.no_source) == (7, 4, 1)
    faster, revert, first = search.found
    assert [one.subject[:12] for one in search.found] == ["perf: 30-40%", 'Revert "Spee', "Speed up tot"]
    assert {(one.kind, one.words) for one in faster.evidence} >= {("figure", "perf: 30-40% faster shown")}
    kinds = {one.kind for one in first.evidence}
    assert kinds == {"subject", "figure", "benchmark", "reverted"} and "A Person" not in str(first)
    assert "revert" in {one.kind for one in revert.evidence} and first.sources == ["src/shop/prices.py"]
    assert (first.added, first.removed) == (1, 4) and first.parent == git(place, "rev-parse", "HEAD~6")
    assert [one.subject for one in find.find(place, grep="twice").found] == ["total: twice"]
    assert not find.find(place, paths=["docs"]).found and find.find(place, paths=["docs"]).no_source == 1
    with pytest.raises(ValueError, match="--grep: expected a regular expression"):
        find.find(place, grep="(")
    done = assay("task", "find", "--repo", place, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 3 and done.returncode == 0
    for line in lines:
        jsonschema.Draft202012Validator(schema("mined")).validate(line)
    assert assay("task", "find", "--repo", place).stdout.endswith("4 claim it, 1 of them change no code; 3 listed\n")
    missing = assay("task", "find", "--repo", tmp_path / "none")
    assert missing.returncode == 2 and "--repo: expected a directory" in missing.stderr


def test_a_merge_is_what_it_brought_in(tmp_path: Path) -> None:
    place = repository(tmp_path)
    git(place, "checkout", "--quiet", "-b", "side")
    files(place, {"src/shop/other.py": "x = 1\n"})
    git(place, "add", "--all")
    git(place, "commit", "--quiet", "-m", "Update other.py")
    git(place, "checkout", "--quiet", "main")
    git(place, "merge", "--quiet", "--no-ff", "side", "-m", "Merge pull request #9 from side\n\nSpeed up other")
    found = find.find(place).found[0]
    assert found.subject.startswith("Merge") and found.sources == ["src/shop/other.py"]
    assert found.evidence[0].kind == "body" and found.evidence[0].words == "Speed up other"


def test_reverts(tmp_path: Path) -> None:
    """By words and by the inverse patch; what repeats an earlier change is none."""
    place = repository(tmp_path)
    signs = reverts.found(place, history.commit(place, "HEAD~3"))
    assert [sign.how for sign in signs] == ["subject", "inverse"]
    assert {sign.commit for sign in signs} == {git(place, "rev-parse", "HEAD~5")} and "100%" in signs[1].words
    for other in ("HEAD", "HEAD~1", "HEAD~5"):  # HEAD~1 takes back the revert
        assert not reverts.found(place, history.commit(place, other))
    files(place, {"src/shop/prices.py": FAST.replace("_helper", "_help")})
    git(place, "commit", "--quiet", "--all", "-m", "Tidy")
    (sign,) = reverts.found(place, history.commit(place, "HEAD"))
    assert sign.how == "inverse" and sign.commit == git(place, "rev-parse", "HEAD~1")


def test_code_that_goes_with_its_tests() -> None:
    assert "what they tested is gone" in reverts.removal({"a.py": (3, 40), "tests/test_a.py": (0, 9)})
    for sizes in (
        {"a.py": (3, 40), "tests/test_a.py": (9, 0)},
        {"a.py": (30, 40), "tests/test_a.py": (0, 9)},
        {"a.py": (0, 40)},
        {"a.py": (0, 3), "tests/test_a.py": (0, 9)},
    ):
        assert reverts.removal(sizes) == ""


def test_a_new_task_is_one(tmp_path: Path) -> None:
    place = repository(tmp_path)
    done = assay("task", "new", "--repo", place, "--commit", "HEAD", "--out", tmp_path / "t")
    assert done.returncode == 0, done.stderr
    found = task.read(tmp_path / "t/task.toml")
    assert assay("task", "check", tmp_path / "t/task.toml").returncode == 0
    one = found.task
    assert one.scope.files == ("src/shop/prices.py",) and one.api.packages == ("shop",)
    assert one.tests.command[-1] == "tests/test_prices.py" and one.sandbox.environment == {"PYTHONPATH": "src"}
    assert (found.base, found.reference) == (git(place, "rev-parse", "HEAD~1"), git(place, "rev-parse", "HEAD"))
    assert [timed.name for timed in one.workload] == ["price-shown"]
    driver = (tmp_path / "t/driver.py").read_text()
    assert "def price_shown(cents, places):\n    return shop.prices.Price(cents).shown(places)\n" in driver
    scope: dict[str, object] = {}
    exec((tmp_path / "t/inputs.py").read_text(), scope)
    cents, places = scope["price_shown"](3)  # type: ignore[operator]
    assert isinstance(cents, int) and isinstance(places, int)
    exec((tmp_path / "t/strategies.py").read_text(), scope)
    assert "not found out: driver.py: price_shown makes its object in every call" in done.stdout
    record = json.loads((tmp_path / "t/imported.json").read_text())
    jsonschema.Draft202012Validator(schema("mined")).validate(record)
    assert record["unknown"] and all(f"# - {words}" in found.text for words in record["unknown"])
    again = assay("task", "new", "--repo", place, "--commit", "HEAD", "--out", tmp_path / "t")
    assert again.returncode == 2 and "expected a folder without a task" in again.stderr
    for commit, words in (("HEAD~4", "expected a commit with a change of code"), ("nothing", "expected a commit of")):
        lost = assay("task", "new", "--repo", place, "--commit", commit, "--out", tmp_path / "u")
        assert lost.returncode == 2 and words in lost.stderr and not (tmp_path / "u").exists()
    warned = assay("task", "new", "--repo", place, "--commit", "HEAD~3", "--out", tmp_path / "r")
    assert warned.returncode == 0 and warned.stdout.count("not found out: it may be a revert") == 2


def test_a_new_task_where_little_is_known(tmp_path: Path) -> None:
    """No annotation, and no Python at all: it says what to fill in, and the task is one all the same."""
    place = repository(tmp_path)
    text = FASTER.replace("_helper", "_help").replace("[one for one in table]", "list(table)")
    files(place, {"src/shop/prices.py": text})
    git(place, "commit", "--quiet", "--all", "-m", "helper")
    draft, file = new.new(place, "HEAD", tmp_path / "p")
    assert task.read(file).task.workload[0].run.target == "driver.py:help"
    assert any("_help is private" in words for words in draft.unknown)
    assert (
        "raise NotImplementedError('fill in table: not annotated; return (table,)')"
        in (tmp_path / "p/inputs.py").read_text()
    )
    files(place, {"src/shop/fast.c": "int x;\n", "CMakeLists.txt": "x"})
    git(place, "add", "--all")
    git(place, "commit", "--quiet", "-m", "native")
    draft, file = new.new(place, "HEAD", tmp_path / "c")
    assert task.read(file).task.api.native == ("src/shop/fast.c",)
    assert any("commands.build: src/shop/fast.c must be compiled" in words for words in draft.unknown)
    assert any("which function to call" in words for words in draft.unknown)


def test_lines_of_patches() -> None:
    """Lines that look like headers inside a hunk are counted, and numbers are those of the files."""
    patch = """diff --git a/x.py b/x.py
--- a/x.py
+++ b/x.py
@@ -2,3 +2,2 @@ def f():
 a
--- b
-c
+++ d
@@ -10,0 +10,1 @@
+e
\\ No newline at end of file
diff --git a/gone.py b/gone.py
deleted file mode 100644
--- a/gone.py
+++ /dev/null
@@ -1 +0,0 @@
-z
"""
    found = parsed(patch)
    assert found["x.py"].removed == [(3, "-- b"), (4, "c")] and found["x.py"].added == [(3, "++ d"), (10, "e")]
    assert found["gone.py"].gone == ["z"] and list(found) == ["x.py", "gone.py"]


def test_lines_of_bodies() -> None:
    text = "import a\n\n\n@wrap\ndef f(x=1):\n    y = x\n    return y\n\n\nz = f()\n"
    assert functions.bodies(text) == {6, 7} and [one.name for one in functions.touched(text, [5])] == ["f"]
    assert functions.functions("def (") == [] and functions.module_of("src/a/__init__.py") == "a"
