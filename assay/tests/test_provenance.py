"""Sources that are used and sources that only look as if they were."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from assay.arms import sandbox
from assay.contract.box import Box
from assay.contract.frozen import FILE, Frozen
from assay.contract.plan import VERSION as SCHEMA
from assay.contract.workload import Plan, Workload
from assay.gates import provenance

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
    found = provenance.check(plan, changed, lambda folder: shutil.copytree(plan.tree("candidate"), folder) and None)
    assert not list(plan.folder.glob("poison-*"))
    return found


CALL = Workload("call", target="work:work", inputs="inputs:make")
COMMAND = Workload("command", command=("python3", "-c", "import work; work.work(3)"))


@pytest.mark.parametrize("run", [CALL, COMMAND], ids=lambda run: str(run.kind))
def test_built_sources(run: Workload, tmp_path: Path) -> None:
    plan = frozen(tmp_path, LOADED, [BUILD], run)
    found = check(plan, "kernel.c", "units.h", "work.py", "gone.c")
    assert (found.outcome, found.poisoned) == ("", ("kernel.c", "units.h"))
    found = check(plan, "kernel.c", "other.c")
    assert found.outcome == "not_evaluated" and "source not on the workload's path: other.c" in found.words
    assert check(plan, "work.py").poisoned == ()


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
    assert check(plan, "kernel.c").outcome == "infra.provenance"
    assert asdict(found)["poisoned"] == ()
