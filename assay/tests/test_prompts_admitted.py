"""Rendered prompts as they stand: what speaks against them though nothing is run, by itself and by history."""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from assay.__main__ import main
from assay.admission import admit, named
from assay.cli.shown import schema
from assay.mining import prompt, script
from prompts import REVERTED, SWAPPED
from small_project import files, git

SEEDS, CLONE = "ASSAY_SEEDS", "ASSAY_SEEDS_REPOSITORY"
"""Folder of two rendered prompts that are nobody's to publish, and a clone of the repository that they are about."""

ROUNDING = """from shop import fast


def round_up(values, step, places=0):
    return [fast.rounded(one, step) for one in values]
"""
TAX = "\n".join(f"RATE_{i} = {i}" for i in range(40)) + "\n\n\ndef tax(price):\n    return price * RATE_7\n"
TESTS = "\n".join(f"def test_{i}():\n    assert {i} == {i}\n" for i in range(8))


def repository(folder: Path) -> Path:
    """A commit that speeds tax up, its revert, and one that rounds quicker."""
    place = folder / "shop"
    history = [
        (
            "start",
            {"tax.py": "def tax(price):\n    return price * 7\n", "__init__.py": "", "native/tax_table.c": "int t;\n"},
        ),
        ("[perf] Table of taxes (#3)", {"tax.py": TAX, "tests": TESTS}),
        (
            'Revert "[perf] Table of taxes (#3)" (#5)',
            {"tax.py": "def tax(price):\n    return price * 7\n", "tests": "x = 1\n"},
        ),
        (
            "[perf] Round prices quicker (#7)",
            {"prices/rounding/round_up.py": ROUNDING.replace("[", "list(").replace("]", ")")},
        ),
    ]
    files(
        place,
        {
            "src/shop/prices/rounding/round_up.py": ROUNDING,
            "src/shop/fast.py": "def rounded(one, step):\n    return one\n",
        },
    )
    files(place, {"src/shop/prices/__init__.py": "", "src/shop/prices/rounding/__init__.py": ""})
    git(folder, "init", "--quiet", str(place))
    for message, contents in history:
        for name, text in contents.items():
            files(place, {"tests/test_tax.py" if name == "tests" else f"src/shop/{name}": text})
        git(place, "add", "--all")
        git(place, "commit", "--quiet", "-m", message)
    return place


def reasons(found: dict[str, Any], finding: str = "against") -> dict[str, str]:
    jsonschema.Draft202012Validator(schema("admission")).validate(found)
    assert {one["kind"] for one in found["reasons"] if one["finding"] == finding} <= {"static"}
    return {one["name"]: f"{one['words']} [{one['source']}]" for one in found["reasons"] if one["finding"] == finding}


def asked(file: Path, text: str, place: Path | None = None, commit: str = "") -> dict[str, Any]:
    file.write_text(text)
    return admit.of_prompt(prompt.read(file), place, commit)


def test_a_revert_whose_script_misses(tmp_path: Path) -> None:
    """By the prompt alone code goes with its tests; by the history it is the inverse of an earlier commit."""
    file = tmp_path / "reverted.txt"
    alone = asked(file, REVERTED)
    assert alone["outcome"] == "rejected" and set(reasons(alone)) == {"removal", "reach"}
    lines = REVERTED.split("\n")
    bars = [i for i, line in enumerate(lines, 1) if " | " in line]
    assert reasons(alone)["removal"].endswith(f"[reverted.txt:{bars[0]}-{bars[-1] + 1}]")
    place = repository(tmp_path)
    known = asked(file, REVERTED, place, "HEAD~1")
    against = reasons(known)
    assert known["outcome"] == "rejected" and set(against) == {"revert", "removal", "reach", "script", "arguments"}
    assert [one["words"].split(": ")[1] for one in known["reasons"] if one["name"] == "revert"][:2] == [
        "its subject says so",
        "its patch is the inverse of "
        + git(place, "rev-parse", "--short=12", "HEAD~2")
        + ", '[perf] Table of taxes (#3)'",
    ]
    assert "no name leads from what the script calls (round_up) to any of the 2 targets" in against["reach"]
    text = REVERTED.replace("src/shop/tax.py", "src/shop/fast.py")
    assert "reach" not in reasons(asked(file, text, place, "HEAD~1"))  # names lead there


def test_a_script_that_calls_a_module_and_swaps_arguments(tmp_path: Path) -> None:
    file = tmp_path / "swapped.txt"
    alone = asked(file, SWAPPED)
    assert alone["outcome"] == "rejected" and set(reasons(alone)) == {"script"} and alone["leak"]["level"] == "L3"
    call = next(i for i, line in enumerate(SWAPPED.split("\n"), 1) if line.startswith("result = "))
    assert "it calls round_up, which is the module src/shop/prices/rounding/round_up.py" in reasons(alone)["script"]
    assert reasons(alone)["script"].endswith(f"[swapped.txt:{call}]")
    place = repository(tmp_path)
    known = asked(file, SWAPPED, place, "HEAD")
    assert set(reasons(known)) == {"script", "arguments"}
    assert (
        "takes (values, step, places): places is passed for step; step is passed for places"
        in reasons(known)["arguments"]
    )
    assert known["leak"]["message"] and known["leak"]["targets"] == 1.0
    files(place, {"src/shop/prices/rounding/__init__.py": "from .round_up import round_up\n"})
    git(place, "commit", "--quiet", "--all", "-m", "export")
    files(place, {"src/shop/fast.py": "def rounded(one, step):\n    return int(one)\n"})
    git(place, "commit", "--quiet", "--all", "-m", "[perf] int")
    right = SWAPPED.replace("(values, places, step)", "(values, step, places)")
    assert reasons(asked(file, right, place, "HEAD")) == {}  # the package binds the function, and the order is its own


def test_a_script_that_is_no_python(tmp_path: Path) -> None:
    found = asked(tmp_path / "p.txt", SWAPPED.replace("import time", "import time ="))
    assert reasons(found)["script"].startswith("it is no Python") and found["outcome"] == "rejected"


FRONT = """from . import back


def sell(x):
    return back.Till(x).open()


def idle():
    return unused()
"""
BACK = """import torch
from shop.ops import run


class Till:
    def open(self):
        return torch.ops.shop.sum_all(run)
"""


def test_names_that_are_followed(tmp_path: Path) -> None:
    """Through modules, classes and relative imports, up to names that a compiled source defines."""
    place = tmp_path / "r"
    files(
        place,
        {
            "shop/__init__.py": "from .front import sell\n",
            "shop/front.py": FRONT,
            "shop/back.py": BACK,
            "shop/ops.py": "def run():\n    pass\n\n\ndef other():\n    pass\n",
            "shop/far.py": "def far():\n    pass\n",
            "csrc/a.cu": "void sum_all(int n) {\n  helper(n);\n}\n",
            "csrc/b.cu": "void helper(int n) {\n  sum_all(n);\n}\n",
        },
    )
    git(tmp_path, "init", "--quiet", str(place))
    git(place, "add", "--all")
    git(place, "commit", "--quiet", "-m", "x")
    tree = named.Tree(place, "HEAD")
    seen, names = named.reached(tree, script.read("from shop import sell\nsell(1)\n"))
    assert seen == {"shop/front.py", "shop/back.py", "shop/ops.py"} and "unused" not in names and "other" not in names
    assert named.defines(tree.text("csrc/a.cu"), names) and not named.defines(tree.text("csrc/b.cu"), names)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "reverted.txt"
    file.write_text(REVERTED)
    assert main(["admit", str(file)]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("rejected: reverted.txt\n") and "nothing was run, so it cannot be admitted" in shown
    assert main(["admit", str(file), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["machine"] == {}
    harmless = (
        REVERTED.split("## Files Modified")[0].replace("shop.prices.rounding", "shop.tax").replace("round_up", "tax")
    )
    file.write_text(harmless)
    assert main(["admit", str(file)]) == 5 and capsys.readouterr().out.startswith("undecided: ")


def seed(number: str) -> Path:
    folder = os.environ.get(SEEDS)
    if not folder:
        pytest.skip(f"{SEEDS}: names no folder of rendered prompts")
    (found,) = Path(folder).glob(f"{number}_*.txt")
    return found


@pytest.mark.parametrize(("number", "wanted"), [("000", {"removal"}), ("002", {"script"})])
def test_seeds_by_themselves(number: str, wanted: set[str]) -> None:
    found = admit.of_prompt(prompt.read(seed(number)), None, "")
    assert found["outcome"] == "rejected" and set(reasons(found)) == wanted


@pytest.mark.parametrize(
    ("number", "commit", "wanted"),
    [
        ("000", "e7b204268132cb775c139574c1ff4ad7e15c8f66", {"revert", "removal", "reach", "script", "arguments"}),
        ("002", "0ec82edda59aaf5cf3b07aadf4ecce1aa1131add", {"script", "arguments"}),
    ],
)
def test_seeds_with_their_history(number: str, commit: str, wanted: set[str]) -> None:
    """000 is the revert of an optimisation and reaches none of its targets; 002 calls a module and swaps arguments."""
    file, clone = seed(number), os.environ.get(CLONE)
    if not clone:
        pytest.skip(f"{CLONE}: names no clone with the history of the prompts' repository")
    found = admit.of_prompt(prompt.read(file), Path(clone), commit)
    against = reasons(found)
    assert found["outcome"] == "rejected" and set(against) == wanted
    assert "num_experts is passed for block_size; block_size is passed for num_experts" in against["arguments"]
    if number == "000":
        assert "to any of the 3 targets that are sources" in against["reach"] and "inverse" in against["revert"]
    else:
        assert found["leak"]["level"] == "L3"
