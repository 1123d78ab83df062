"""What of a change runs: in workers, commands and sandboxes, noted by every version of Python."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from assay.admission import reach
from assay.contract.frozen import Frozen
from assay.gates import build
from assay.gates.gate import Given
from small_project import BASE, FASTER, assay, edited, files, git, with_reference


def built(made: Path, store: Path) -> Frozen:
    """The plan of a task's reference, with its arms built."""
    given = ["prepare", made, "--commit", "HEAD", "--store", store, "--no-sandbox", "--skip", "tests,equivalence"]
    done = assay(*given)
    assert done.returncode == 0, done.stderr
    frozen = Frozen.read(Path(done.stdout.strip().removeprefix("prepared: ")))
    assert build.built(Given(frozen, False, lambda _: None)).passed
    return frozen


def test_what_of_a_change_runs(tmp_path: Path) -> None:
    """Lines of functions count, and a function that is defined and not called does not run."""
    text = FASTER.replace("def work", "def other(n):\n    return [one for one in range(n)]\n\n\ndef work")
    made = with_reference(tmp_path, text)
    frozen = built(made, tmp_path / "store")
    (seen,) = reach.found(frozen, [], sandboxed=False, source="s")
    assert (seen.finding, seen.kind, seen.name) == ("for", "measured", "reach") and "0 of" not in seen.words, seen
    way = "sys.monitoring" if hasattr(sys, "monitoring") else "sys.settrace"
    assert seen.words.endswith(f"({way})")
    git(tmp_path / "repo", "checkout", "--quiet", "HEAD~1")
    files(tmp_path / "repo", {"pkg/__init__.py": BASE + "\n\ndef other(n):\n    return [one for one in range(n)]\n"})
    git(tmp_path / "repo", "commit", "--quiet", "--all", "-m", "Speed up other")
    frozen = built(made, tmp_path / "store2")
    (seen,) = reach.found(frozen, [], sandboxed=False, source="s")
    assert seen.finding == "against" and "0 of 1 in the reference ran" in seen.words, seen


@pytest.mark.sandbox
def test_what_runs_is_seen_in_a_sandbox_and_in_commands(tmp_path: Path) -> None:
    made = with_reference(tmp_path)
    run = 'run = {kind = "command", command = ["python", "-c", "from pkg import work; work(9)"]}'
    edited(made, 'run = {kind = "call", target = "pkg:work", inputs = "inputs.py:squares", rounds = 2, calls = 2}', run)
    frozen = built(made, tmp_path / "store")
    (seen,) = reach.found(frozen, [], sandboxed=True, source="s")
    assert seen.finding == "for", seen
    edited(made, '"python", "-c"', '"python", "-I", "-c"')
    edited(made, "from pkg", "import sys; sys.path.append('.'); from pkg")
    (blind,) = reach.found(built(made, tmp_path / "store2"), [], sandboxed=True, source="s")
    assert blind.finding == "open" and "no process of the workload could be looked into" in blind.words, blind


def test_compiled_sources_are_the_provenance_gates(tmp_path: Path) -> None:
    made = with_reference(tmp_path)
    files(tmp_path / "repo", {"pkg/fast.c": "int x;\n"})
    git(tmp_path / "repo", "add", "--all")
    git(tmp_path / "repo", "commit", "--quiet", "-m", "c")
    frozen = built(edited(made, "HEAD~1", "HEAD~1"), tmp_path / "store")
    for outcome, finding in (("", "for"), ("not_evaluated", "against"), ("infra.provenance", "open")):
        gate = {"name": "provenance", "outcome": outcome, "words": "words"}
        (seen,) = reach.found(frozen, [gate], sandboxed=False, source="s")
        assert (seen.finding, seen.kind) == (finding, "measured")
    assert reach.found(frozen, [], sandboxed=False, source="s")[0].finding == "open"


@pytest.mark.parametrize("name", ["python", "python3.12", "python3.13"])
def test_lines_are_noted_by_every_python(name: str, tmp_path: Path) -> None:
    """Each line once, of the tree alone, in threads and in processes that it starts, also when it is killed."""
    python = sys.executable if name == "python" else shutil.which(name)
    if python is None or subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip(f"{name}: not installed here")
    files(tmp_path / "tree", {"child.py": "x = 1\ny = 2\n", "main.py": NOTED})
    out = tmp_path / "out"
    own = {
        "PYTHONPATH": str(Path(reach.inside.__file__).parent),
        "ASSAY_REACH_OUT": str(out),
        "PATH": os.environ["PATH"],
    }
    done = subprocess.run([python, "main.py"], cwd=tmp_path / "tree", env=own, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    noted = out.read_text().splitlines()
    version = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info >= (3, 12))"], capture_output=True, text=True
    )
    way = "sys.monitoring" if version.stdout.strip() == "True" else "sys.settrace"
    assert noted.count(f"#\t{way}") == 2 and len(set(noted)) == len(noted) - 1
    number = {line.strip(): i for i, line in enumerate(NOTED.split("\n"), 1)}
    ran = {int(line.split("\t")[1]) for line in noted if line.startswith("main.py")}
    assert {number["called = n + 1"], number["threaded = 3"], number["os.kill(os.getpid(), 9)"]} <= ran
    assert number["idle = 2"] not in ran and {"child.py\t1", "child.py\t2"} <= set(noted)
    assert all(line.startswith(("#", "main.py", "child.py")) for line in noted)


NOTED = """import os
import subprocess
import sys
import threading


def work(n):
    called = n + 1
    return called


def unused():
    idle = 2


def aside():
    threaded = 3


for i in range(100):
    work(i)
thread = threading.Thread(target=aside)
thread.start()
thread.join()
os.chdir("/")
subprocess.run([sys.executable, os.path.join(os.environ["ASSAY_REACH_ROOT"], "child.py")], check=True)
os.kill(os.getpid(), 9)
"""
