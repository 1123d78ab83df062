"""Arms that are built beside each other, and arms that are built where a plan is prepared."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from assay.arms import turns
from assay.contract.frozen import FILE, Frozen, of_folder
from assay.contract.plan import VERSION as SCHEMA
from assay.contract.workload import Plan, Workload
from assay.gates import build, notes, provenance
from assay.gates.gate import OUT_OF_BUDGET, Found, Gate, Given
from holding import processes
from small_project import BASE, FASTER, assay, candidate, edited, environment, project

ARMS = ("base", "candidate", "control")
MEETS = """
import pathlib, sys, time
folder, wanted = pathlib.Path(sys.argv[1]), int(sys.argv[2])
mine = folder / pathlib.Path("name").read_text()
mine.write_text("")
most, stop = 0, time.monotonic() + (0.03 if wanted == 1 else 10)
while time.monotonic() < stop and (wanted == 1 or most < wanted):
    most = max(most, len(list(folder.iterdir())))
    time.sleep(0.01)
time.sleep(0.03)
mine.unlink()
sys.exit(most != wanted)
"""
"""A build that ends well if as many as are wanted, and no more, are at work at one time."""


def frozen(folder: Path, command: list[str], trees: Mapping[str, Mapping[str, str]], where: str = "measured") -> Frozen:
    """A plan whose arms have these files; the candidate's are said to be changed."""
    folder.mkdir(exist_ok=True)
    for arm, files in trees.items():
        (folder / "trees" / arm).mkdir(parents=True)
        for name, text in files.items():
            (folder / "trees" / arm / name).write_text(text)
    for name in ("drivers", "private"):
        (folder / name).mkdir()
    content: dict[str, Any] = {
        "kind": "plan",
        "schema": SCHEMA,
        "trees": {arm: of_folder(folder / "trees" / arm) for arm in trees},
        "drivers": of_folder(folder / "drivers"),
        "private": of_folder(folder / "private"),
        "patch": {"changed": list(trees["candidate"])},
        "gates": {"asked": ["provenance"], "skipped": []},
        "commands": {"setup": [], "build": [command], "timeout_s": 60, "where": where},
        "sandbox": {"readable": [], "devices": [], "environment": {}, "memory_bytes": None, "processes": None},
        "workloads": {"w": asdict(Plan(Workload("call", target="work:work", inputs="work:make")).checked())},
    }
    (folder / FILE).write_text(json.dumps(content))
    return Frozen.read(folder / FILE)


def of(plan: Frozen, jobs: int = 3, seconds: float = 60.0) -> Given:
    """The gates' view of it, beside the judge."""
    clean = plan.folder.parent / f"{plan.folder.name}.clean"
    if not clean.exists():
        shutil.copytree(plan.tree("candidate"), clean)
    return Given(plan, False, lambda tree: shutil.copytree(clean, tree), build_jobs=jobs, seconds=seconds)


def found(gate: Gate, given: Given) -> Found:
    return gate.tried(given)


@pytest.mark.parametrize("jobs", [1, 3])
def test_so_many_are_built_beside_each_other(jobs: int, tmp_path: Path) -> None:
    (tmp_path / "at").mkdir()
    command = [sys.executable, "-S", "-c", MEETS, str(tmp_path / "at"), str(jobs)]
    plan = frozen(tmp_path / "plan", command, {arm: {"name": arm} for arm in ARMS})
    assert found(build.GATE, of(plan, jobs)) == ("", "3 arms")
    processors = len(os.sched_getaffinity(0))
    assert Given(plan, False, lambda _: None).jobs(3) == max(1, min(3, processors // 2))


FAILS = "import pathlib, sys, time; at, status = pathlib.Path('how').read_text().split(); time.sleep(float(at)); "
FAILS += "print('words of', at); sys.exit(int(status))"


@pytest.mark.parametrize(
    ("how", "outcome", "words"),
    [
        (("0.1 1", "0 1", "30 0"), "task_invalid", "base: "),
        (("0.1 0", "0 1", "30 0"), "build_failed", "candidate: "),
        (("0 0", "0.1 0", "0 1"), "task_invalid", "control: "),
    ],
    ids=["base", "candidate", "control"],
)
def test_the_first_arm_that_fails_is_told(how: tuple[str, ...], outcome: str, words: str, tmp_path: Path) -> None:
    """In the arms' order, whichever is quicker; the others are stopped, and nothing of them is left."""
    trees = {arm: {"how": text} for arm, text in zip(ARMS, how, strict=True)}
    plan = frozen(tmp_path / "plan", [sys.executable, "-S", "-c", FAILS], trees)
    begun = time.monotonic()
    seen = found(build.GATE, of(plan))
    assert seen.outcome == outcome and seen.words.startswith(words) and "words of" in seen.words
    assert time.monotonic() - begun < 20 and not (plan.folder / build.MARK).exists()
    assert processes("no mark", plan.folder) == []


def test_all_share_the_seconds_of_the_gates(tmp_path: Path) -> None:
    plan = frozen(tmp_path / "plan", ["sleep", "30"], {arm: {"name": arm} for arm in ARMS})
    seen = found(build.GATE, of(plan, seconds=0.1))
    assert seen == (OUT_OF_BUDGET, "build: the task's seconds of gates are spent")
    assert processes("no mark", plan.folder) == []


def test_works_in_turns_end_whatever_happens() -> None:
    """Each is begun in its order, goes on when its descriptor or its time comes, and is closed in the end."""
    there, back = os.pipe()
    seen: list[str] = []

    def work(name: str, seconds: float) -> turns.Steps[str]:
        try:
            seen.append(name)
            ready = yield turns.Wait(there, time.monotonic() + seconds)
            if name == "fails":
                raise ValueError(name)
            return f"{name} {ready}"
        finally:
            seen.append(f"{name} closed")

    jobs = {name: work(name, seconds) for name, seconds in (("slow", 60), ("quick", 0), ("next", 0))}
    ended = turns.beside(jobs, 2)
    assert next(ended) == ("quick", "quick False") and seen == ["slow", "quick", "quick closed"]
    assert next(ended) == ("next", "next False")
    os.write(back, b"!")
    assert list(ended) == [("slow", "slow True")] and turns.alone(work("alone", 60)) == "alone True"
    seen.clear()
    os.read(there, 1)
    with pytest.raises(ValueError, match="fails"):
        list(turns.beside({"waits": work("waits", 60), "fails": work("fails", 0)}, 2))
    assert seen == ["waits", "fails", "fails closed", "waits closed"]
    for fd in (there, back):
        os.close(fd)


JUDGE = (
    "import sys; from pathlib import Path; from assay.contract.frozen import Frozen; from assay.gates import build; "
)
JUDGE += "from assay.gates.gate import Given; build.GATE.tried(Given(Frozen.read(Path(sys.argv[1])), False, print, "
JUDGE += "build_jobs=3))"


def test_nothing_is_left_of_builds_whose_judge_is_killed(tmp_path: Path) -> None:
    """All arms are at work when it happens."""
    plan = frozen(tmp_path / "plan", ["sleep", "60"], {arm: {"name": arm} for arm in ARMS})
    mark = f"ASSAY_TEST_{os.getpid()}_{time.time_ns()}"
    judge = subprocess.Popen([sys.executable, "-c", JUDGE, str(plan.folder / FILE)], env=environment(MARK=mark))
    stop = time.monotonic() + 30
    while len([words for words in processes(mark, plan.folder) if words.startswith("sleep 60")]) < 3:
        assert time.monotonic() < stop and judge.poll() is None
        time.sleep(0.02)
    judge.send_signal(signal.SIGKILL)
    judge.wait()
    stop = time.monotonic() + 10
    while running := processes(mark, plan.folder):
        assert time.monotonic() < stop, running
        time.sleep(0.02)


WORK = (
    "from built import FACTOR\nfrom helps import plus\ndef work(n): return plus(n * FACTOR)\ndef make(s): return (s,)\n"
)
BUILDS = "import os; assert os.environ.pop('BUILDS_HERE'); import shutil; shutil.copy('source.pyx', 'built.py')"
TREE = {"work.py": WORK, "helps.py": "def plus(n): return n + 1\n", "source.pyx": "FACTOR = 2\n"}


@pytest.fixture
def ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Frozen:
    """A plan that was built and then carried away, to where nothing can be built."""
    monkeypatch.setenv("BUILDS_HERE", "yes")
    plan = frozen(tmp_path / "plan", [sys.executable, "-S", "-c", BUILDS], dict.fromkeys(ARMS, TREE), "prepared")
    assert build.GATE.ahead and provenance.GATE.ahead
    assert build.GATE.ahead(of(plan)).passed
    assert provenance.GATE.ahead(of(plan)) == ("", "3 of 3 copies were built")
    monkeypatch.delenv("BUILDS_HERE")
    moved = tmp_path / "moved"
    shutil.move(plan.folder, moved)
    return Frozen.read(moved / FILE)


def test_what_was_built_ahead_is_what_is_measured(ahead: Frozen) -> None:
    """It is built nowhere else, its digests are told, and changed sources are looked at in copies that came along."""
    seen = found(build.GATE, of(ahead))
    digests = {arm: ahead.digest_of(arm) for arm in ARMS}
    assert seen.passed and seen.words.startswith("3 arms, built where it was prepared: base ")
    assert all(f"{arm} {digest}" in seen.words for arm, digest in digests.items())
    looked = found(provenance.GATE, of(ahead))
    assert looked == ("", "nothing works without source.pyx, work.py, helps.py"), looked
    (ahead.tree("base") / "left.pyc").write_text("by a run")
    assert found(build.GATE, of(ahead)).passed, "what runs have left in trees is nobody's change"
    notes.note(ahead, "build", seen)
    assert notes.noted(ahead, ahead.folder)["build"] == seen


CHANGES = {
    "trees/control/built.py": "control to be what was built",
    "cache/base/more": "base to be what was built",
    "drivers/more.py": "drivers to be what was frozen",
    "copies/clean/tree/built.py": "the copy clean to be what was built",
}


def test_what_is_not_what_was_built_is_not_measured(ahead: Frozen, tmp_path: Path) -> None:
    for number, (what, words) in enumerate(CHANGES.items()):
        shutil.copytree(ahead.folder, tmp_path / f"{number}")
        plan = Frozen.read(tmp_path / f"{number}" / FILE)
        (plan.folder / what).write_text("FACTOR = 3\n")
        with pytest.raises(ValueError, match=f"PLAN: expected {words}"):
            found(provenance.GATE if what.startswith("copies") else build.GATE, of(plan))


@pytest.mark.full
def test_prepared_with_its_builds_measured_and_decided(tmp_path: Path) -> None:
    """The commands, from end to end; a build that fails where it is prepared is a verdict."""
    task = project(tmp_path)
    builds = "import os; os.environ['BUILDS_HERE']; open('pkg/made.txt', 'w').write('made')"
    build_ = json.dumps([["python", "-c", builds]])
    edited(task, "[tests]", f'[commands]\nbuild = {build_}\nwhere = "prepared"\n\n[tests]')
    tree = candidate(task, "fast", {"pkg/__init__.py": FASTER})
    given = ("prepare", task, "--tree", tree, "--store", tmp_path / "store", "--no-sandbox")
    refused = assay(*given)
    assert refused.returncode == 4 and "BUILDS_HERE" in refused.stdout, refused.stdout + refused.stderr
    command = [sys.executable, "-m", "assay", *map(str, given)]
    done = subprocess.run(command, env=environment(BUILDS_HERE="1"), capture_output=True, text=True, check=True)
    plan = Path(done.stdout.strip().removeprefix("prepared: "))
    assert (plan.parent / "trees/control/pkg/made.txt").read_text() == "made"
    measured = assay("measure", plan, "--out", tmp_path / "raw", "--no-sandbox")
    assert measured.returncode == 0, measured.stderr
    decided = json.loads(assay("decide", tmp_path / "raw", "--store", tmp_path / "store", "--json").stdout)
    gates = {gate["name"]: gate["words"] for gate in decided["gates"]}
    assert gates["build"].startswith("3 arms, built where it was prepared: base ")
    assert gates["provenance"].startswith("nothing works without pkg/__init__.py")
    assert decided["outcome"] in ("faster", "infra.noise", "void"), decided["words"]
    assert BASE not in (plan.parent / "trees/candidate/pkg/__init__.py").read_text()
