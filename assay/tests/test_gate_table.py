"""Adding a gate touches two files: its own, and the table. Tried with a made-up one, judged from end to end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import assay
from small_project import BASE, candidate, project

MADE_UP = '''"""A made-up gate: a patch may not say nonsense."""

from assay.gates.gate import Found, Gate, Given, Where


def read(given: Given) -> Found:
    """Looks at the candidate's files."""
    said = [path.name for path in given.frozen.tree("candidate").rglob("*.py") if "nonsense" in path.read_text()]
    return Found("says_nonsense", f"{said[0]}: it says nonsense") if said else Found("", "no nonsense")


GATE = Gate("sense", read, Where.PREPARED, rejects=("says_nonsense",), asked=lambda task, changed: bool(changed))
'''


def copied(folder: Path) -> Path:
    """assay's source with one more gate."""
    source = Path(assay.__file__).parent
    shutil.copytree(source, folder / "assay", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "assay/gates/sense.py").write_text(MADE_UP)
    table = folder / "assay/gates/table.py"
    text = table.read_text()
    text = text.replace("import build,", "import build, sense,").replace("(build.GATE,", "(build.GATE, sense.GATE,")
    table.write_text(text)
    changed = [
        path.relative_to(folder / "assay").as_posix()
        for path in (folder / "assay").rglob("*.py")
        if not (old := source / path.relative_to(folder / "assay")).exists() or old.read_bytes() != path.read_bytes()
    ]
    assert sorted(changed) == ["gates/sense.py", "gates/table.py"]
    return folder


def test_a_gate_is_a_file_and_a_row(tmp_path: Path) -> None:
    path = os.pathsep.join([str(copied(tmp_path / "source")), *sys.path])
    task = project(tmp_path)
    tree = candidate(task, "c", {"pkg/__init__.py": f"# nonsense\n{BASE}"})

    def run(*given: str | Path) -> tuple[int, Any]:
        command = [sys.executable, "-m", "assay", *map(str, given)]
        environment = dict(os.environ, PYTHONPATH=path)
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    given = ("judge", task, "--tree", tree, "--store", tmp_path / "store", "--no-sandbox", "--json")
    status, found = run(*given)
    assert (status, found["outcome"], found["status"]) == (1, "says_nonsense", 1), found
    assert found["words"] == ["__init__.py: it says nonsense"]
    assert [gate["name"] for gate in found["gates"]] == ["build", "sense"]
    (tree / "pkg/__init__.py").write_text(BASE.replace("total + i**base", "total - 1"))
    status, found = run(*given)  # it passes, and the next gate does not
    assert (status, found["outcome"]) == (1, "tests_failed") and found["gates"][1]["outcome"] == "", found
    (tree / "pkg/__init__.py").write_text(f"# nonsense\n{BASE}".replace("total + i**base", "total - 1"))
    status, found = run(*given, "--skip", "sense")
    assert found["gates"][1]["outcome"] == "skipped" and found["outcome"] == "tests_failed", found
    _, schema = run("schema", "verdict")
    assert "says_nonsense" in schema["properties"]["outcome"]["pattern"]
    assert "sense" in schema["$defs"]["GateFound"]["properties"]["name"]["enum"]
    _, schema = run("schema", "plan")
    assert "sense" in schema["$defs"]["GatesAsked"]["properties"]["asked"]["items"]["enum"]
