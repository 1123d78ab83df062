"""What is proof of tampering, and beside each what only looks like it: a mistake, or something base does as well."""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from assay.arms.handle import Reply, Worker
from assay.arms.process import Running
from assay.arms.trees import Trees
from assay.contract.errors import ArmError
from assay.contract.workload import Workload
from assay.experiment.blocks import Blocks
from assay.experiment.exchange import Exchange
from assay.experiment.processes import _works
from assay.experiment.samples import called
from small_project import BASE, FASTER, candidate, project, verdict

REPLY = """
import os, struct, sys, time
def reply(letter=b"r", number=1.0, other=None):
    frame = sys._getframe()
    while "mark" not in frame.f_locals: frame = frame.f_back
    body = b"1\\n7"
    os.write(4, struct.pack("<Qcd8s", len(body), letter, number, other or frame.f_locals["mark"]) + body)
"""
TWICE = REPLY + "def work(n):\n    reply()\n    return n\n"
UNMARKED = REPLY + "def work(n):\n    reply(other=bytes(8))\n    return n\n"
LETTER = REPLY + "def work(n):\n    reply(letter=b'q')\n    return n\n"
NOT_A_NUMBER = REPLY + "def work(n):\n    reply(number=float('nan'))\n    return n\n"
BACKWARDS = "import time\n_real = time.perf_counter\ntime.perf_counter = lambda: _real() / 10\n" + BASE


def asked(folder: Path, code: str, times: int = 3) -> list[Reply]:
    """A worker's replies to some calls with the number 7, outside any sandbox."""
    (folder / "tree").mkdir(exist_ok=True)
    (folder / "tree/work.py").write_text(code)
    with tempfile.TemporaryDirectory(dir=folder) as places:
        trees = Trees.at({"candidate": folder / "tree"}, Path(places))
        worker = Worker(
            "candidate",
            Workload("call", target="work:work"),
            folder / "tree",
            trees.place("candidate"),
            trees.environment("candidate", 0),
            timeout_s=20,
            namespaces=trees.namespaces,
        )
        try:
            return [worker.ask(b"c", 0.0, [b"1\n7"]) for _ in range(times)]
        finally:
            worker.end()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (TWICE, "sent a reply that was not asked for"),
        (UNMARKED, "sent a reply that was not asked for"),
        (LETTER, "sent a reply that was not asked for"),
        (NOT_A_NUMBER, "said that something took nan s"),
        (BACKWARDS, "said that something took -"),
    ],
    ids=["twice", "unmarked", "letter", "no number", "clock that runs backwards"],
)
def test_replies_that_no_worker_sends(code: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ArmError, match=words) as seen:
        asked(tmp_path, code)
    assert seen.value.tampered and not seen.value.infra


@pytest.mark.parametrize(
    ("code", "words"),
    [("def work(n): return 1 / 0\n", "ZeroDivisionError"), ("import os\ndef work(n): os._exit(3)\n", "status 3")],
)
def test_mistakes_are_none(code: str, words: str, tmp_path: Path) -> None:
    assert len(asked(tmp_path, "def work(n):\n    print(n)\n    return n\n")) == 3
    with pytest.raises(ArmError, match=words) as seen:
        asked(tmp_path, code)
    assert not seen.value.tampered


def test_a_time_that_only_the_worker_tells(tmp_path: Path) -> None:
    class Says(Exchange):
        def __init__(self, inner: float) -> None:
            self.inner, self.worker = inner, Worker.__new__(Worker)
            self.worker.arm = "candidate"

        def call(self, given: bytes | None, loops: int = 1) -> Reply:
            return Reply(1.0, self.inner, b"")

    events = Workload("call", target="work:work", clock="cuda")
    assert called(Says(0.5), events, b"").seconds == 0.5
    assert called(Says(0.0), Workload("call", target="work:work"), b"").seconds == 1.0
    with pytest.raises(ArmError, match="took no time") as seen:
        called(Says(0.0), events, b"")
    assert seen.value.tampered


FREE: dict[str, list[str]] = {"base": [], "candidate": [], "control": []}


def block(
    escapes: dict[str, list[str]], reasons: Sequence[str] = ("an arm ran while it was frozen",)
) -> dict[str, Any]:
    primary = dict.fromkeys(FREE, 1.0)
    return {"differing": [], "reasons": list(reasons), "primary": primary, "escapes": {**FREE, **escapes}}


def decided(blocks: Sequence[dict[str, Any]]) -> str:
    """The verdict that made-up blocks lead to; "" if they go on."""
    found = Blocks()
    for one in blocks:
        found.add(one)
        seen = found.decision(0.02)
        if seen is not None and seen.verdict != "continue":
            return f"{seen.verdict}: {seen.reason}"
    return ""


def test_what_the_candidate_alone_does_again_and_again() -> None:
    did = block({"candidate": ["a frozen process woke itself"]})
    words = "tampered: candidate: a frozen process woke itself, in 14 of 14 blocks, and in no other arm"
    assert decided([did] * 14) == words and decided([did] * 13) == ""
    assert decided([did] * 13 + [block({})] * 2) == "void: 14 of 14 blocks contaminated"
    too = block({"control": ["a frozen process woke itself"]})
    assert decided([block({})] * 14).startswith("void")
    clean = block({}, reasons=[])
    assert decided([too, *[did] * 5, *[clean] * 12]).startswith("void")
    assert decided([did] * 5 + [clean] * 12).startswith("tampered") and not decided([did] * 4 + [clean] * 12)
    kept = block({"candidate": ["a frozen process woke itself"]}, reasons=[])
    assert decided([kept] * 40).startswith("equivalent")  # it did not spoil a block


WAKES = """
import ctypes, signal, time
signal.signal(signal.SIGCONT, lambda *_: None)
libc = ctypes.CDLL(None)
event, timer = (ctypes.c_int * 16)(0, 0, signal.SIGCONT, 0), ctypes.c_void_p()
for i in range(40):  # a stop takes away those that are just going off, and leaves the rest
    assert libc.timer_create(1, event, ctypes.byref(timer)) == 0
    assert libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 2 * 10**8, 0, (i + 1) * 5 * 10**6), None) == 0
while True: pass
"""


def started(folder: Path, code: str, log: int) -> Running:
    (folder / "place").unlink(missing_ok=True)
    command = ["python3", "-S", "-c", code]
    running = Running("arm", command, folder, folder / "place", os.environ, log=log, namespaces=False)
    running.release()
    time.sleep(0.3)
    return running


@pytest.mark.parametrize(("code", "woken"), [(WAKES, True), ("while True: pass", False)], ids=["wakes", "spins"])
def test_a_frozen_process_that_wakes_itself(code: str, woken: bool, tmp_path: Path) -> None:
    with tempfile.TemporaryFile() as log:
        running = started(tmp_path, code, log.fileno())
        try:
            before = running.freeze()
            time.sleep(0.3)
            assert (running.thaw() - before > 0.02) is woken and running.woken is woken
        finally:
            running.end()


LEFT = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-S', '-c', {code!r}])\n"


@pytest.mark.parametrize(("code", "works"), [("while True: pass", True), ("import time; time.sleep(9)", False)])
def test_what_is_left_behind_and_works_or_waits(code: str, works: bool, tmp_path: Path) -> None:
    with tempfile.TemporaryFile() as log:
        running = started(tmp_path, LEFT.format(code=code), log.fileno())
        try:
            assert running.wait(20).left == 1 and _works(running) is works
        finally:
            running.end()


@pytest.mark.parametrize("where", ["candidate", "base"])
def test_the_whole_judgement(where: str, tmp_path: Path) -> None:
    """The candidate's second replies are tampering; where base sends them itself nobody is to blame."""
    task = project(tmp_path)
    sends = REPLY + FASTER.replace("    total = 0\n", "    total = 0\n    reply()\n")
    if where == "base":
        task.write_text(task.read_text().replace('base = "HEAD"\n', "").partition("[tests]")[0] + _ALONE)
        (tmp_path / "repo/pkg/__init__.py").write_text(
            REPLY + BASE.replace("    total = 0\n", "    total = 0\n    reply()\n")
        )
    else:
        task.write_text(task.read_text().partition("[tests]")[0] + _ALONE)
    tree = candidate(task, "c", {"pkg/__init__.py": sends})
    found = verdict(task, "--tree", tree, "--store", tmp_path / "store", "--no-sandbox")
    expected = ("tampered", 1) if where == "candidate" else ("infra.run", 3)
    assert (found["outcome"], found["status"]) == expected, found
    assert found["words"] == [f"{where}: sent a reply that was not asked for"]
    rows = (tmp_path / "store/attempts" / found["attempt"]["id"] / "raw/squares.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["outcome"] == expected[0]


_ALONE = """
[[workload]]
name = "squares"
run = {kind = "call", target = "pkg:work", inputs = "inputs.py:squares", rounds = 2, calls = 2}

[budget]
most_foreign = 1e9
"""
