"""Tasks are read strictly: every error names a file and a line, and identity follows from content alone."""

import json
from pathlib import Path

import jsonschema
import pytest

from assay.__main__ import main
from assay.contract import patterns, task
from assay.contract.positions import line_of
from small_project import INPUTS, edited, files, git, project


def test_a_good_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project(tmp_path)
    found = task.read(file)
    assert found.base == git(tmp_path / "repo", "rev-parse", "HEAD") and found.reference == ""
    assert found.task.scope.files == ("pkg/**", "lib/**") and found.task.workload[0].run.rounds == 2
    assert found.own("inputs.py:squares") == tmp_path / "inputs.py" and found.own("pkg:work") is None
    assert main(["task", "check", str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"sums {found.digest}: 1 workloads")


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("delta = 0.02", 'delta = "2 %"', 3, "delta: Input should be a valid number"),
        ("delta = 0.02", "delta = -1", 3, "delta: Input should be greater than 0"),
        ("delta = 0.02", 'name = "again"', 3, "Cannot overwrite a value"),
        ("delta = 0.02", "detla = 0.02", 3, "detla: expected a name that tasks have"),
        ('require = "faster"', 'require = "great"', 4, "require: Input should be"),
        ("schema = 1", "schema = 2", 1, "schema: Input should be 1"),
        ('base = "HEAD"', 'base = "nowhere"', 8, "repository.base: expected a commit of"),
        ('base = "HEAD"', 'base = "--all"', 8, "repository.base: expected a commit of"),
        ('path = "repo"', 'path = "nothing"', 7, "repository.path: expected a directory"),
        ('"lib/**"]', '"/lib/**"]', 11, "scope.files[1]: expected a pattern relative to the tree"),
        ('"lib/**"]', '"lib/[a"]', 11, "scope.files[1]: expected a ']' after '['"),
        ("[api]", "[apis]", 13, "apis: expected a name that tasks have"),
        ("rounds = 2", "rouns = 2", 21, "workload[0].run.rouns: expected a name that tasks have"),
        ("rounds = 2", "rounds = 0", 21, "workload[0].run: --rounds: expected at least 1"),
        ('kind = "call"', 'kind = "cell"', 21, "workload[0].run.kind: Input should be"),
        ('strategy = "strategies.py:arguments"', 'strategy = "gone.py:x"', 26, "property[0].strategy: expected a file"),
        ('strategy = "strategies.py:arguments"', 'strategy = "pkg:x"', 26, "expected file.py:function"),
        ('strategy = "strategies.py:arguments"', "", 23, "property[0].strategy: expected it to be given"),
        ("examples = 10", "examples = 0", 27, "property[0].examples: Input should be greater than 0"),
    ],
)
def test_errors_name_file_and_line(old: str, new: str, line: int, words: str, tmp_path: Path) -> None:
    file = edited(project(tmp_path), old, new)
    with pytest.raises(task.TaskError) as error:
        task.read(file)
    assert f"{file}:{line}: " in str(error.value) and words in str(error.value), error.value
    assert main(["task", "check", str(file)]) == 4


def test_a_name_given_twice_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    file = project(tmp_path)
    more = '\n[[workload]]\nname = "squares"\nrun = {kind = "command", command = ["true"]}\n'
    file.write_text(file.read_text() + more)
    with pytest.raises(task.TaskError, match=r":33: workload\[1\].name: expected another name than 'squares'"):
        task.read(file)
    for absent in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(task.TaskError, match="expected a task"):
            task.read(absent)
    (tmp_path / "task.toml").write_text("a = [1,\n")
    with pytest.raises(task.TaskError, match=r"task.toml:\d+: "):
        task.read(file)


def test_identity_is_content(tmp_path: Path) -> None:
    file = project(tmp_path)
    first = task.read(file).digest
    edited(file, "delta = 0.02", "delta = 0.02  # two per cent")
    assert task.read(file).digest == first
    edited(file, 'base = "HEAD"', f'base = "{git(tmp_path / "repo", "rev-parse", "HEAD")}"')
    assert task.read(file).digest == first
    edited(file, "examples = 10", "examples = 11")
    assert task.read(file).digest != first
    edited(file, "examples = 11", "examples = 10")
    files(tmp_path, {"inputs.py": "def squares(seed):\n    return (1,)\n"})
    assert task.read(file).digest != first
    files(tmp_path / "repo", {"new.py": ""})
    git(tmp_path / "repo", "add", "--all")
    git(tmp_path / "repo", "commit", "-m", "more")
    edited(file, str(task.read(file).base), "HEAD")
    files(tmp_path, {"inputs.py": INPUTS})
    assert task.read(file).digest != first


def test_the_schema(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import tomllib

    assert main(["task", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    good = json.loads(json.dumps(tomllib.loads(project(tmp_path).read_text())))
    valid = jsonschema.Draft202012Validator(schema)
    valid.validate(good)
    for bad in ({**good, "more": 1}, {**good, "delta": 0}, {**good, "workload": []}, {**good, "schema": 2}):
        assert not valid.is_valid(bad)


def test_lines_of_values() -> None:
    text = 'a = 1\n[b]\nc = [\n  1,\n]\n[[d]]\ne = {f = 1}\n[[d]]\ne = [\n  {f = 2}]\n[d.g]\n"h" = 3\nb.c = 4\n'
    for place, line in (
        (("a",), 1),
        (("b",), 2),
        (("b", "c", 0), 3),
        (("d", 0, "e", "f"), 7),
        (("d", 1), 8),
        (("d", 1, "e", 0, "f"), 10),
        (("d", 1, "g", "h"), 12),
        (("d", 1, "g", "b", "c"), 13),
        (("nothing",), 1),
    ):
        assert line_of(text, place) == line, place


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("src/*.py", ["src/a.py"], ["src/a/b.py", "a.py", "src/a.pyc"]),
        ("src/**", ["src/a", "src/a/b.py"], ["src", "asrc/b"]),
        ("**/test_*.py", ["test_a.py", "a/b/test_c.py"], ["a/atest_b.py"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["ab", "a/xb"]),
        ("[ab]?.c", ["a1.c", "bb.c"], ["c1.c", "a/.c", "a.c"]),
        ("[!a].c", ["b.c"], ["a.c", "/.c"]),
        ("a+(b).py", ["a+(b).py"], ["aab.py"]),
    ],
)
def test_patterns(pattern: str, inside: list[str], outside: list[str]) -> None:
    assert patterns.checked(pattern) == pattern
    assert all(patterns.matches(path, [pattern]) for path in inside)
    assert not any(patterns.matches(path, [pattern]) for path in outside)


@pytest.mark.parametrize("pattern", ["", "/etc/*", "../x", "a/../b", "./a", "a\\b", "[z-a]"])
def test_bad_patterns(pattern: str) -> None:
    with pytest.raises(ValueError, match="expected a pattern"):
        patterns.checked(pattern)
