"""A small project, a task for it, and the real judge on a candidate that differs by one trick."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from assay.contract import task
from assay.judgement.attempt import judge
from assay.judgement.guards import Source

WORK = """
PASSES = 2

def once(x):
    n = len(x)
    return [sum(x[j] * (i * j % 7) for j in range(n)) for i in range(n)]

def work(x):
    for _ in range(PASSES):
        found = once(x)
    return found
"""
SLOW = WORK.replace("PASSES = 2", "PASSES = 4")
ZEROS = "\ndef once(x): return [0.0] * len(x)\nwork = once\n"
BASE = {
    "work.py": WORK,
    "run.py": "import work\nfor i in range(36): work.work([float(i)] * 150)\n",
    "other.py": "",
    "tests/test_work.py": "import work\n\ndef test_ones(): assert work.work([1.0, 1.0, 1.0])[1] == 3.0\n",
}
OWN = {
    "inputs.py": """
import random
def make(seed):
    drawn = random.Random(seed)
    return ([drawn.random() for _ in range(150)],)
""",
    "wide.py": """
from fractions import Fraction as F
def once(x):
    n = len(x)
    return [float(sum((F(x[j]) * (i * j % 7) for j in range(n)), F(0))) for i in range(n)]
""",
    "private.py": """
from hypothesis import strategies as st
def lists(): return st.tuples(st.lists(st.floats(-100, 100), min_size=1, max_size=20))
""",
}
CALL = 'kind = "call", target = "work:work", inputs = "inputs.py:make", rounds = 2, calls = 4'
COMMAND = 'kind = "command", command = ["python3", "-S", "run.py"]'
ASV = 'kind = "asv", target = "bench.py:time_work", rounds = 2, calls = 4'
TESTS = '[tests]\ncommand = ["python", "-m", "pytest", "-q", "tests"]\n'
PROPERTY = '[[property]]\nname = "p"\ntarget = "work:work"\nstrategy = "private.py:lists"\nexamples = 10\n'


@dataclass
class Setting:
    """One judgement: the task's parts, and what is taken away from the judge."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    scope: list[str] = field(default_factory=lambda: ["work.py"])
    checks: list[str] = field(default_factory=list)
    workload: str = CALL
    outputs: str = "compared"
    primary: str = ""
    repository: str = 'path = "base"'
    modes: bool = False
    budget: str = ""
    """Further lines of the task's budget."""
    own: dict[str, str] = field(default_factory=dict)
    """Files of the task beside OWN, or in its place."""
    more: str = ""
    """Further tables of the task."""

    def remove(self, where: Any, name: str, instead: Any) -> None:
        """Takes a defence away: a function of the judge becomes another one."""
        self.monkeypatch.setattr(where, name, instead)

    def written(self) -> Path:
        """The task's file."""
        for name, text in {**OWN, **self.own}.items():
            (self.folder / name).write_text(text)
        text = f'schema = 1\nname = "zoo"\nrequire = "any"\nrepository = {{{self.repository}}}\n'
        text += f'[[workload]]\nname = "w"\noutputs = "{self.outputs}"\nprimary = "{self.primary}"\n'
        text += f"run = {{{self.workload}}}\n"
        text += f"[scope]\nfiles = {json.dumps(self.scope)}\n"
        text += f"checks = {json.dumps(self.checks)}\nmodes = {str(self.modes).lower()}\n"
        text += f"[budget]\nmost_foreign = 1e9\ntimeout_s = 20\n{self.budget}\n{self.more}"
        (self.folder / "task.toml").write_text(text)
        return self.folder / "task.toml"


class _ThroughError(Exception):
    """Every gate has been passed."""


@dataclass(frozen=True)
class Trick:
    """An entry of the zoo."""

    name: str
    expected: str
    """`rejected:<outcome>`, or `neutralised:<outcome>`: what is left when the trick does not work."""
    defence: str
    files: Mapping[str, str | None] = field(default_factory=dict)
    """What the candidate has other than base; {folder} stands for the test's folder, None for no such file."""
    base: Mapping[str, str] = field(default_factory=dict)
    """What both have beside BASE."""
    needs: Callable[[Setting], None] = lambda _: None
    """Sets the task up."""
    plant: Callable[[Path, Path], None] = lambda tree, folder: None
    """Does to the candidate's tree what files cannot say."""
    control: Callable[[Setting], str | None] = lambda _: None
    """Removes the defence; or is a naive judge without it, and returns its outcome."""
    won: str = "faster"
    """What the trick then gets: an outcome, or `through` if it passes all gates."""

    @property
    def stops(self) -> bool:
        """Whether it has won or lost before anything is measured."""
        return self.won in ("through", "ran")

    later: bool = False
    """Whether it is left to the full tests all the same."""
    or_else: tuple[str, ...] = ()
    """What a busy machine may make of it."""
    seen: Callable[[Path], str] = lambda _: ""
    """What must not have happened, in words; "" if it has not."""


def laid_out(trick: Trick, setting: Setting) -> None:
    """Base and candidate in the test's folder."""
    folder = setting.folder
    for name, files in (("base", {}), ("candidate", trick.files)):
        for path, text in {**BASE, **trick.base, **files}.items():
            if text is not None:
                (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / name / path).write_text(text.replace("{folder}", str(folder)))
    trick.needs(setting)
    trick.plant(folder / "candidate", folder)


def outcome(setting: Setting, stop: bool) -> str:
    """The real judge's outcome, or `through` when it would measure and `stop` says that this is enough."""

    def told(what: dict[str, Any]) -> None:
        if stop and what == {"kind": "stage", "name": "measure"}:
            raise _ThroughError

    source = Source("tree", str(setting.folder / "candidate"))
    try:
        found, _ = judge(task.read(setting.written()), source, setting.folder / "store", told=told)
    except _ThroughError:
        return "through"
    print(found["outcome"], found["words"], found["workloads"])
    return str(found["outcome"])


NAIVE = """
import importlib.util, json, math, random, sys, time
def load(tree):
    spec = importlib.util.spec_from_file_location("work", tree + "/work.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.work
given = [[random.Random(i).random() for _ in range(150)] for i in range(20)]
seconds, outputs = [], []
for tree in sys.argv[1:]:
    work = load(tree)
    start = time.perf_counter()
    outputs.append([work(one) for one in given])
    seconds.append(time.perf_counter() - start)
time.sleep(0.2)
good = all(math.isclose(a, b) for one, two in zip(*outputs) for a, b in zip(one, two))
print(json.dumps([good, seconds[0] / seconds[1]]))
"""


def naive(setting: Setting) -> str:
    """A judge without worker: in one process with what it judges, its clock and its comparison; looks at the end."""
    command = [sys.executable, "-c", NAIVE, str(setting.folder / "base"), str(setting.folder / "candidate")]
    done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60)
    good, ratio = json.loads(done.stdout)
    return "incorrect" if not good else "faster" if ratio > math.exp(0.2) else "undecided"


def naive_git(setting: Setting) -> str:
    """A judge that asks git in the candidate's folder what was changed: `through` if that is inside the scope."""
    tree = setting.folder / "candidate"
    git = ["git", "-C", str(tree), "-c", "safe.directory=*"]
    changed = subprocess.run([*git, "diff"], capture_output=True, check=True, text=True).stdout
    new = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True, text=True).stdout
    if (setting.folder / "ran").exists():
        return "ran"
    return "out_of_scope" if "other.py" in changed + new or "sitecustomize" in new else "through"
