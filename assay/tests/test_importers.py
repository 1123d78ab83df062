"""Records of four benchmarks and rendered prompts: what becomes of every field and every line."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from assay.cli.shown import schema
from assay.contract import task
from assay.mining import importers, prompt, records
from assay.mining.records import FORMATS
from mined_shop import FAST, SLOW, repository
from prompts import REVERTED, SWAPPED
from small_project import assay, git

PATCH = """diff --git a/src/shop/prices.py b/src/shop/prices.py
--- a/src/shop/prices.py
+++ b/src/shop/prices.py
@@ -16,4 +16,1 @@
-    found = 0
-    for one in prices:
-        found = found + one
-    return found * tax
+    return sum(prices) * tax
diff --git a/tests/test_prices.py b/tests/test_prices.py
--- a/tests/test_prices.py
+++ b/tests/test_prices.py
@@ -1,0 +2,1 @@
+x = 1
"""
_EXPERIMENT = (
    "import shop.prices\n\n\ndef setup():\n    return [1, 2]\n\n\ndef experiment(given):\n    return sum(given)\n"
)


def record(name: str, place: Path) -> dict[str, Any]:
    """A record with every field of its kind, about the same commit."""
    base, commit = git(place, "rev-parse", "HEAD~6"), git(place, "rev-parse", "HEAD~5")
    common = {"instance_id": f"a__shop-{name}", "repo": "a/shop", "base_commit": base, "created_at": "2025"}
    values: dict[str, Any] = {
        "GSO": {
            **common,
            "opt_commit": commit,
            "prob_script": _EXPERIMENT,
            "tests": [_EXPERIMENT, _EXPERIMENT],
            "gt_diff": PATCH,
            "api": "shop.prices.total",
            "install_commands": ["pip install ."],
            "setup_commands": [],
        },
        "SWE-fficiency": {
            **common,
            "workload": "import shop.prices\nprint(shop.prices.total([1], 1.0))\n",
            "covering_tests": ["tests/test_prices.py"],
            "test_cmd": "python -m pytest -rA",
            "rebuild_cmd": "python setup.py build_ext",
            "patch": PATCH,
            "speedup": 3.5,
        },
        "SWE-Perf": {
            **common,
            "head_commit": commit,
            "patch": PATCH,
            "efficiency_test": '["tests/test_prices.py::test_total"]',
            "human_performance": 0.4,
            "patch_functions": '{"src/shop/prices.py": ["total"]}',
            "duration_changes": [],
        },
        "ISO-Bench": {
            "commit_hash": commit,
            "pr_url": "https://github.com/a/shop/pull/3",
            "commit_subject": "Speed up total",
            "diff_text": PATCH,
            "perf_command": "python bench/total.py",
            "files_changed": ["src/shop/prices.py"],
            "models": ["none"],
        },
    }[name]
    form = next(one for one in FORMATS if one.name == name)
    return {**{field: f"a {field}" for field in form.fields if field not in (*values, "repo", "test_script")}, **values}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_every_field_has_a_line(form: records.Format, tmp_path: Path) -> None:
    place = repository(tmp_path)
    one = {**record(form.name, place), "surprise": 1}
    file = tmp_path / "records.json"
    file.write_text(json.dumps(one, indent=1))
    done = assay("task", "import", file, "--repos", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (tmp_path / "out").glob("*/task.toml")
    found = task.read(made)
    assert found.base == git(place, "rev-parse", "HEAD~6") and found.task.scope.files == ("src/shop/prices.py",)
    assert found.reference == ("" if form.name == "SWE-fficiency" else git(place, "rev-parse", "HEAD~5"))
    imported = json.loads((made.parent / "imported.json").read_text())
    jsonschema.Draft202012Validator(schema("mined")).validate(imported)
    lines = {name: number for number, name in enumerate(one, 2)}
    parts = {part["name"]: part for part in imported["parts"]}
    assert set(parts) == set(one) and imported["source"] == form.name
    text = file.read_text().split("\n")
    for name, part in parts.items():
        assert f'"{name}"' in text[part["first"] - 1] and part["words"], (name, part, lines[name])
        assert f"{file.name}:{part['first']}: {name} -> {part['became'] or 'dropped'}: " in done.stdout
    assert not parts["surprise"]["became"] and (made.parent / "reference.patch").read_text() == PATCH
    runs = [timed.run for timed in found.task.workload]
    assert [run.kind for run in runs] == {
        "GSO": ["call"] * 3,
        "SWE-fficiency": ["call"],
        "SWE-Perf": ["command"],
        "ISO-Bench": ["command"],
    }[form.name]
    if form.name == "SWE-fficiency":
        assert found.task.tests.command == ("python", "-m", "pytest", "-rA", "tests/test_prices.py")
        assert any("no commit is named" in words for words in imported["unknown"]) and not runs[0].compare


def test_scripts_of_records_run(tmp_path: Path) -> None:
    """A script with setup and experiment returns its result; another one is run as it is."""
    for text, result in (
        (_EXPERIMENT.replace("import shop.prices\n", ""), 3),
        ("if __name__ == '__main__':\n    RUN[0] = 1\n", None),
    ):
        draft = importers.Draft("t", ".", "")
        importers.script(draft, "script", text)
        scope: dict[str, Any] = {}
        (body,) = draft.files.values()
        exec(
            body.replace('{"__name__": "__main__"}', '{"__name__": "__main__", "RUN": RUN}'),
            scope | {"RUN": (run := [0])},
        )
        scope["RUN"] = run
        exec(body.replace('{"__name__": "__main__"}', '{"__name__": "__main__", "RUN": RUN}'), scope)
        assert scope["assay_run"]() == result and run == [0 if result else 1]


def test_what_is_no_record(tmp_path: Path) -> None:
    """File and line of everything that cannot be read; a clone that is not there is said, and the status is 4."""
    file = tmp_path / "r.jsonl"
    for text, words in (
        ("", ":1: expected records, got none"),
        ('{"a": 1}\n', ":1: expected fields of a known record"),
        ('{"commit_hash": "a", "diff_text": ""}\n3\n', ":2: expected an object"),
        ('\n{"commit_hash": \n', ":2: expected JSON"),
        ('[{"commit_hash": "a", "diff_text": ""}\n, {"b": 1}]', ":2: expected fields of a known record"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            records.read(file)
    file.write_text('{"commit_hash": "abc", "diff_text": ""}\n')
    done = assay("task", "import", file, "--out", tmp_path / "o")
    assert done.returncode == 2 and f"{file}:1: expected a record with repo or pr_url" in done.stderr
    file.write_text('{"commit_hash": "abc", "diff_text": "", "repo": "a/b"}\n')
    done = assay("task", "import", file, "--out", tmp_path / "o", "--repos", tmp_path)
    assert (
        done.returncode == 4
        and "no clone of a/b" in done.stdout
        and "repository.path: expected a directory" in done.stdout
    )


def test_parts_of_a_prompt(tmp_path: Path) -> None:
    """Every part has its own lines, and what was dropped says why."""
    file = tmp_path / "reverted.txt"
    file.write_text(REVERTED)
    lines = REVERTED.split("\n")
    found = prompt.read(file)
    assert found.targets == ["src/shop/tax.py", "tests/test_tax.py", "src/shop/native/tax_table.c"]
    assert found.sizes == {
        "src/shop/tax.py": (4, 36),
        "src/shop/native/tax_table.c": (0, 30),
        "tests/test_tax.py": (0, 22),
    }
    (script,) = found.of("script")
    assert lines[script.first - 1] == "import time" and script.text.startswith("import time")
    (completion,) = found.of("completion")
    assert lines[completion.first - 1] == "git add -A" and lines[completion.last - 1] == "finish"
    wrong = [piece.text for piece in found.wrong]
    assert any("names other files than the list" in words for words in wrong)
    assert any("names tests/test_tax.py, while line" in words for words in wrong) and any(
        "merge-base" in w for w in wrong
    )
    by_name = {part.words.split(": ", 1)[1]: part for part in prompt.parts(found) if part.name == "constraint"}
    assert by_name["All TestPack checks must pass"].became == "tests.command"
    assert by_name["No public API breakage"].became == "api.packages"
    done = assay("task", "import-prompt", file)
    assert (
        done.returncode == 0
        and f"{file.name}:{completion.first}-{completion.last}: completion -> dropped" in done.stdout
    )
    file.write_text(SWAPPED)
    found = prompt.read(file)
    kinds = {piece.kind for piece in found.pieces}
    assert kinds >= {"example", "hint", "order", "message", "statistics", "demand", "place"}
    (order,) = [part for part in prompt.parts(found) if "iteration 3" in part.words]
    assert not order.became and "the budget counts seconds" in order.words
    assert not any("A Person" in part.words for part in prompt.parts(found))
    assert any("another encoding" in piece.text for piece in found.wrong)
    file.write_text("Make it faster.\n")
    done = assay("task", "import-prompt", file)
    assert done.returncode == 2 and f"{file}:1: expected a prompt with <test_script>" in done.stderr


def test_a_prompt_becomes_a_task(tmp_path: Path) -> None:
    place = repository(tmp_path)
    file = tmp_path / "asked.txt"
    file.write_text(SWAPPED.replace("src/shop/prices/rounding/round_up.py", "src/shop/prices.py"))
    given = ["task", "import-prompt", file, "--repo", place, "--commit", "HEAD~5", "--out", tmp_path / "t"]
    done = assay(*given)
    assert done.returncode == 0, done.stdout + done.stderr
    found = task.read(tmp_path / "t/task.toml")
    assert [timed.name for timed in found.task.workload] == ["total", "script"] and SLOW != FAST
    assert "asked.txt:" in found.text and "merge-base" in found.text
    lacking = assay(*given[:3], "--out", tmp_path / "u")
    assert lacking.returncode == 2 and "expected --repo and --commit with it" in lacking.stderr
    file.write_text(
        REVERTED.replace("src/shop/tax.py", "tests/a.py").replace("src/shop/native/tax_table.c", "tests/b.py")
    )
    none = assay(*given[:-1], tmp_path / "v")
    assert none.returncode == 2 and "expected targets that are sources" in none.stderr
