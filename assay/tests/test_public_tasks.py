"""Tasks about commits that nobody here wrote: they are read, and every verdict that was kept is decided again."""

import importlib.util
import json
import tomllib
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest

from assay.admission import admit, record
from assay.cli.shown import schema
from assay.contract import task
from assay.contract.admission import Reason
from assay.contract.frozen import FILE
from assay.judgement.decision import replayed

PUBLIC = Path(__file__).parents[2] / "tasks/public"
TASKS = sorted(path for path in PUBLIC.glob("*.toml") if path.stem != "wrong")
KEPT = sorted(PUBLIC.glob("results/*/*/verdict.json"))


def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("public_run", PUBLIC / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(file: Path) -> str:
    """A verdict's outcome; empty if there is none."""
    return str(json.loads(file.read_text())["outcome"]) if file.exists() else ""


@pytest.mark.parametrize("file", TASKS, ids=lambda file: file.stem)
def test_a_task_is_one(file: Path) -> None:
    """Its schema and its own files; its repository need not be here."""
    found = task.adapter().validate_json(json.dumps(tomllib.loads(file.read_text())))
    assert found.name == file.stem.replace("_", "-") and found.property and found.tests.command
    for _, name, _ in task.functions_of(found):
        path, _, function = name.partition(":")
        text = (PUBLIC / path).read_text()
        assert f"def {function}(" in text or f"{function} = " in text, name
    assert all(len(found.repository.__getattribute__(each)) == 40 for each in ("base", "reference"))
    if (PUBLIC / found.repository.path).is_dir():
        assert task.read(file).base == found.repository.base


def test_how_many() -> None:
    repositories = {tomllib.loads(file.read_text())["repository"]["path"] for file in TASKS}
    assert len(TASKS) >= 10 and len(repositories) >= 5


@pytest.mark.parametrize("file", KEPT, ids=lambda file: "-".join(file.parts[-3:-1]))
def test_a_verdict_is_decided_again(file: Path) -> None:
    kept = json.loads(file.read_text())
    found, _ = replayed(file.parent)
    pairs = zip(found["workloads"], kept["workloads"], strict=True)
    workloads = [{name: said for name, said in new.items() if name in old} for new, old in pairs]  # some are newer
    assert (found["outcome"], workloads) == (kept["outcome"], kept["workloads"])
    assert bool(kept["workloads"]) == (file.parent / FILE).exists()  # what is rejected before has no samples
    variant = file.parts[-2]
    assert variant != "wrong" or found["outcome"] == "incorrect"
    assert variant != "comment" or found["outcome"] in ("equivalent", "undecided", "void")
    texts = "".join(path.read_text() for path in file.parent.iterdir()).replace('"/tmp/hypothesis"', "")
    assert '"/' not in texts  # no place of the machine that judged


@pytest.mark.parametrize("folder", sorted({file.parents[1] for file in KEPT}), ids=lambda folder: folder.name)
def test_there_and_back_is_no_gain_twice(folder: Path) -> None:
    """The way back from a commit that is `faster` is not, nor from one that is `slower`."""
    there, back = (outcome(folder / variant / "verdict.json") for variant in ("reference", "reverse"))
    assert there != back or there not in ("faster", "slower")


@pytest.mark.parametrize("file", sorted(PUBLIC.glob("results/*/admission.json")), ids=lambda file: file.parent.name)
def test_an_admission_follows_from_its_reasons(file: Path) -> None:
    found = record.read(file)
    jsonschema.Draft202012Validator(schema("admission")).validate(found)
    assert admit.decided([Reason(**one) for one in found["reasons"]]) == found["outcome"]
    named = tomllib.loads((PUBLIC / f"{file.parent.name}.toml").read_text())
    assert (found["task"]["name"], found["reference"]) == (named["name"], named["repository"]["reference"])
    assert '"/' not in file.read_text()


def test_the_table_is_that_of_the_verdicts() -> None:
    module = run()
    text = (PUBLIC / "README.md").read_text()
    assert text.split(module.BEGIN)[1].split(module.END)[0].strip().split("\n") == module.rows()


@pytest.mark.parametrize(
    ("suffix", "text", "wanted"),
    [
        (
            ".py",
            'class A:\n    def f(\n        self,\n    ):\n        """D."""\n        return 1\n',
            '"""D."""\n        x = 1\n        return',
        ),
        (".py", "class A:\n    def f(self):\n        return 1\n", "self):\n        x = 1\n        return"),
    ],
)
def test_where_a_mistake_is_put(suffix: str, text: str, wanted: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_text(text)
    run().mistaken(file, "A.f", "x = 1")
    assert wanted in file.read_text()
    native = tmp_path / "a.c"
    native.write_text("static int\nf(int n)\n{\n\treturn n;\n}\n")
    run().mistaken(native, "f", "n++;")
    assert "{\n\tn++;\n\treturn n;" in native.read_text()
