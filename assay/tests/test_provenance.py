"""Sources that are used and sources that only look as if they were."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from assay.arms import sandbox
from assay.contract.box import Box
from assay.contract.frozen import FILE, Frozen
from assay.contract.plan import VERSION as SCHEMA
from assay.contract.workload import Plan, Workload
from assay.gates import provenance
from assay.gates.gate import Given

pytestmark = [
    pytest.mark.sandbox,
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]

KERNEL = (
    '#include "units.h"\nlong work(long n) { long t = n; for (long i = 0; i < UNITS; i++) t += i * i % 7; return t; }\n'
)
LOADED = "import ctypes\ntwice = ctypes.CDLL('./kernel.so').work\ntwice.restype = ctypes.c_long\n"
LOADED += "twice.argtypes = [ctypes.c_long]\ndef work(n): return twice(n)\n"
JIT = """
import ctypes, os, subprocess
found = os.environ["XDG_CACHE_HOME"] + "/kernel.so"
def work(n):
    if not os.path.exists(found): subprocess.run(["cc", "-shared", "-fPIC", "-o", found, "kernel.c"], check=True)
    return ctypes.CDLL(found).work(n)
"""
FALLBACK = JIT.replace("    return ctypes", "    if not os.path.exists(found): return 1\n    return ctypes").replace(
    ", check=True", ""
)
BUILD = ["cc", "-shared", "-fPIC", "-o", "kernel.so", "kernel.c"]


def frozen(folder: Path, work: str, build: list[list[str]], run: Workload) -> Frozen:
    """A plan whose candidate has a kernel, a header and a source that nobody uses."""
    for arm in ("base", "candidate"):
        tree = folder / "trees" / arm
        tree.mkdir(parents=True)
        for name, text in (("kernel.c", KERNEL), ("units.h", "#define UNITS 1000\n"), ("other.c", KERNEL)):
            (tree / name).write_text(text)
        (tree / "work.py").write_text(work)
        (tree / "inputs.py").write_text("def make(seed): return (seed,)\n")
    assert sandbox.run(Box(folder / "trees" / "base", writable=True), BUILD, timeout_s=60).status == 0
    content = {
        "kind": "plan",
        "schema": SCHEMA,
        "trees": {"base": "", "candidate": ""},
        "commands": {"setup": [], "build": build, "timeout_s": 60},
        "sandbox": {"readable": [], "devices": [], "environment": {}, "memory_bytes": None, "processes": None},
        "workloads": {"w": asdict(Plan(run).checked())},
    }
    (folder / FILE).write_text(json.dumps(content))
    return Frozen.read(folder / FILE)


def check(plan: Frozen, *changed: str) -> provenance.Provenance:
    given = Given(plan, True, lambda folder: shutil.copytree(plan.tree("candidate"), folder), build_jobs=2)
    found = provenance.check(given, changed)
    assert not list(plan.folder.glob("poison-*"))
    return found


CALL = Workload("call", target="work:work", inputs="inputs:make")
COMMAND = Workload("command", command=("python3", "-c", "import work; work.work(3)"))


@pytest.mark.parametrize("run", [CALL, COMMAND], ids=lambda run: str(run.kind))
def test_built_sources(run: Workload, tmp_path: Path) -> None:
    plan = frozen(tmp_path, LOADED, [BUILD], run)
    found = check(plan, "kernel.c", "units.h", "work.py", "gone.c")
    assert (found.outcome, found.poisoned) == ("", ("kernel.c", "units.h", "work.py"))
    found = check(plan, "kernel.c", "other.c")
    assert found.outcome == "not_evaluated" and "source not on the workload's path: other.c" in found.words
    assert check(plan, "work.py").words == "nothing works without work.py"
    assert check(plan, "gone.c", "gone.py", "test_work.py").words == "nothing works without the tree"


def test_sources_that_are_compiled_at_run_time(tmp_path: Path) -> None:
    assert check(frozen(tmp_path / "1", JIT, [], CALL), "kernel.c").outcome == ""
    found = check(frozen(tmp_path / "2", FALLBACK, [], CALL), "kernel.c")
    assert found.outcome == "not_evaluated"


def test_a_stale_library_is_found_out(tmp_path: Path) -> None:
    """The source is changed, what is loaded was there before: the build does not even look at the source."""
    plan = frozen(tmp_path, LOADED, [["true"]], CALL)
    tree = plan.tree("candidate")
    built = sandbox.run(Box(tree, writable=True), BUILD, timeout_s=60)
    assert built.status == 0
    assert check(plan, "kernel.c").outcome == "not_evaluated"


def test_a_candidate_that_does_not_build_proves_nothing(tmp_path: Path) -> None:
    plan = frozen(tmp_path, LOADED, [["cc", "none.c"]], CALL)
    found = check(plan, "kernel.c")
    assert found.outcome == "infra.provenance" and "none.c" in found.words
    plan = frozen(tmp_path / "2", LOADED, [BUILD], Workload("call", target="work:other", inputs="inputs:make"))
    assert check(plan, "kernel.c").outcome == "infra.provenance"  # base has no such function either
    plan = frozen(tmp_path / "3", LOADED, [BUILD], CALL)
    (plan.tree("candidate") / "work.py").write_text("raise RuntimeError('no')\n")
    assert check(plan, "kernel.c").words.startswith("nothing can be said: the candidate fails by itself, w: ")
    assert asdict(found)["poisoned"] == ()


INSTALLED = Workload("call", target="pkg:work", inputs="inputs:make")
IMPORTS = Workload("command", command=("python3", "-c", "import pkg"))


@pytest.mark.parametrize("run", [INSTALLED, IMPORTS], ids=lambda run: str(run.kind))
@pytest.mark.parametrize("shown", [True, False])
def test_what_is_timed_is_the_tree_that_is_judged(shown: bool, run: Workload, tmp_path: Path) -> None:
    """With a src layout and nothing that leads there, the package that is installed beside the tree is what runs."""
    plan = frozen(tmp_path, LOADED, [BUILD], replace(run, paths=(".", "src") if shown else (".",)))
    for folder in (tmp_path / "installed", *(plan.tree(arm) / "src" for arm in ("base", "candidate"))):
        (folder / "pkg").mkdir(parents=True)
        (folder / "pkg/__init__.py").write_text("def work(n): return n\n")
    found = [str(tmp_path / "installed")]
    path = ["/assay/tree/src", *found] if shown else found
    plan.content["sandbox"] |= {"readable": found, "environment": {"PYTHONPATH": ":".join(path)}}
    seen = check(plan, "src/pkg/__init__.py")
    assert seen.outcome == ("" if shown else "not_evaluated"), seen
    assert shown or "what is timed runs though src/pkg/__init__.py raise when they are imported" in seen.words


@pytest.mark.full
@pytest.mark.parametrize("changed", ["work.py", "table.txt"])
def test_each_workload_times_the_tree_that_is_judged(changed: str, tmp_path: Path) -> None:
    """One that no changed file breaks needs some file of the tree, and not the one alone that is started."""
    plan = frozen(tmp_path, "def work(n): return n\n", [], CALL)
    for folder in (tmp_path / "installed", *(plan.tree(arm) / "src" for arm in ("base", "candidate"))):
        (folder / "pkg").mkdir(parents=True)
        (folder / "pkg/__init__.py").write_text("def work(n): return n\n")
    for arm in ("base", "candidate"):
        (plan.tree(arm) / "run.py").write_text("import pkg\n")
        (plan.tree(arm) / changed).touch()
    place = str(tmp_path / "installed")
    plan.content["sandbox"] |= {"readable": [place], "environment": {"PYTHONPATH": place}}
    runs = Workload("command", command=("python3", "run.py"))
    plan.content["workloads"]["run"] = asdict(Plan(runs).checked())
    seen = check(plan, changed)
    assert seen.outcome == "not_evaluated" and seen.words.startswith("run: what is timed runs "), seen
    plan.content["sandbox"]["environment"] = {"PYTHONPATH": "/assay/tree/src"}
    assert check(plan, changed).outcome == ""


def test_a_file_that_is_done_without_where_it_cannot_be_imported(tmp_path: Path) -> None:
    """A caller that catches ImportError would go on without the file: it raises something else."""
    falls_back = "def work(n): return n\ntry: from quick import work\nexcept ImportError: pass\n"
    plan = frozen(tmp_path, falls_back, [], CALL)
    (plan.tree("candidate") / "quick.py").write_text("def work(n): return n\n")
    assert check(plan, "quick.py").outcome == ""
    (plan.tree("candidate") / "unused.py").write_text("")
    assert check(plan, "unused.py").outcome == "not_evaluated"


def test_a_build_that_imports_what_is_changed(tmp_path: Path) -> None:
    plan = frozen(tmp_path, "def work(n): return n\n", [["python3", "-c", "import work"]], CALL)
    assert check(plan, "work.py").outcome == ""
