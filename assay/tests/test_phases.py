"""A candidate cannot tell from what it can see whether it is checked or timed: a differ lists all of that in both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.arms.trees import Trees
from assay.contract import task
from assay.experiment import samples
from assay.judgement.attempt import judge
from assay.judgement.guards import Source
from small_project import BASE, candidate, edited, project

LOOKS = '''
import json, os, signal, sys, threading

def _file(path):
    try:
        with open(path) as file: return file.read()
    except OSError as problem:
        return problem.strerror

def _frames():
    """Names, and values that are plain, in every frame below the call."""
    frame, found = sys._getframe(), []
    while frame is not None:
        plain = {name: value for name, value in frame.f_locals.items() if isinstance(value, PLAIN)}
        found.append([frame.f_code.co_filename, frame.f_code.co_name, sorted(frame.f_locals), plain])
        frame = frame.f_back
    return [[file, name, names, {key: str(value) for key, value in plain.items() if key not in CHANGES}]
            for file, name, names, plain in found]

PLAIN = (str, int, bytes, list, dict)
CHANGES = {"n", "base", "body", "mark", "head", "found", "size", "got", "number", "given", "seconds", "start", "reply",
           "frame", "data", "part", "value"}  # of a request and the reply before it

def look(n):
    keep = ("Cap", "Sec", "NoNew", "Cpus", "Sig", "Umask", "Threads", "NStgid", "Uid", "Gid", "Shd")
    status = [line for line in _file("/proc/self/status").splitlines() if line.startswith(keep)]
    own, first = (_file(f"/proc/{process}/cmdline") for process in ("self", "1"))
    return {
        "environment": {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"},
        "hash seed": os.environ["PYTHONHASHSEED"] == "0",
        "arguments": [sys.argv, sys.path, sys.orig_argv, list(sys.flags)[:-5]],
        "place": [os.getcwd(), sorted(os.listdir("/")), sorted(os.listdir("/assay"))],
        "commands": [own, first],
        "mounts": [line.split()[3:6] for line in _file("/proc/self/mountinfo").splitlines()],
        "status": status,
        "limits": _file("/proc/self/limits"),
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "modules": sorted(sys.modules),
        "threads": threading.active_count(),
        "signals": [str(signal.getsignal(number)) for number in (1, 2, 13, 15, 17, 18)],
        "processes": sorted(name for name in os.listdir("/proc") if name.isdigit()),
        "frames": _frames(),
        "worker": sorted(vars(sys._getframe(3).f_locals["self"])),
        "options": str(sys._getframe(4).f_locals.get("options")),
    }

_work = work
def work(n, base=2):
    with open(os.environ["XDG_CACHE_HOME"] + "/seen", "a") as file: print(json.dumps(look(n)), file=file)
    return _work(n, base)
'''


class _EnoughError(Exception):
    """Both phases have been seen."""


def seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """What the candidate saw in every call, by kind: while it was checked, and while it was timed."""
    given = edited(project(folder), "rounds = 2, calls = 2", "rounds = 2, calls = 4")
    text = given.read_text().replace('packages = ["pkg"]', "packages = []")
    given.write_text(text.replace('command = ["python", "-m", "pytest", "-q", "tests"]', "command = []"))
    tree = candidate(given, "c", {"pkg/__init__.py": BASE + LOOKS})
    found: list[dict[str, set[str]]] = []
    place: list[Path] = []

    def taken() -> dict[str, set[str]]:
        kinds: dict[str, set[str]] = {}
        file = place[0] / "cache/candidate/seen"
        for line in file.read_text().splitlines():
            for kind, value in json.loads(line).items():
                kinds.setdefault(kind, set()).add(json.dumps(value))
        file.unlink()
        return kinds

    def told(what: dict[str, Any]) -> None:
        if what == {"kind": "stage", "name": "measure"}:
            place.extend((folder / "store/attempts").iterdir())
            found.append(taken())
        elif what["kind"] == "header":
            found.append(taken())
            raise _EnoughError

    with pytest.raises(_EnoughError):
        print(judge(task.read(given), Source("tree", str(tree)), folder / "store", told=told))
    return found[0], found[1]


def differences(checked: dict[str, set[str]], timed: dict[str, set[str]]) -> list[str]:
    return [kind for kind in checked if checked[kind] != timed[kind]]


@pytest.mark.sandbox
def test_what_can_be_seen_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, timed = seen(tmp_path, monkeypatch)
    assert len(checked) == len(timed) == 16 and checked["hash seed"] == {"false"}
    assert differences(checked, timed) == [], [(checked[k], timed[k]) for k in differences(checked, timed)]


def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Trees.environment
    asked = samples.asked

    def told(trees: Trees, arm: str, seed: int) -> dict[str, str]:
        return environment(trees, arm, seed) | {"PHASE": "timed" if timing else "checked"}

    timing: list[bool] = []

    def drawn(order: Any) -> bool:
        timing.append(True)
        return asked(order)

    monkeypatch.setattr(Trees, "environment", told)
    monkeypatch.setattr(samples, "asked", drawn)


@pytest.mark.sandbox
@pytest.mark.parametrize(("change", "kind"), [(_environment, "environment")])
def test_the_differ_finds_what_differs(
    change: Callable[[pytest.MonkeyPatch], None], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    assert kind in differences(*seen(tmp_path, monkeypatch))


@pytest.mark.parametrize("mends", ["arguments", "outputs"])
def test_timed_calls_are_asked_as_checked_ones_are(mends: str, tmp_path: Path) -> None:
    """A candidate that overwrites its argument, or gives out one list again, is found out while it is timed."""
    from assay.__main__ import main

    base = "def work(x):\n    total = 0\n    for i in range(60000): total += i\n    return [total, x[0]]\n"
    bad = {
        "arguments": base.replace("    return", "    x.append(1)\n    return"),
        "outputs": "kept = [0, 0]\n" + base.replace("return [total, x[0]]", "kept[:] = [total, x[0]]\n    return kept"),
    }
    for name, text in (("a", base), ("b", bad[mends])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "work.py").write_text(f"{text}\ndef make(seed): return ([seed],)\n")
    given = ["ab", str(tmp_path / "a"), str(tmp_path / "b"), "--call", "work:work", "--inputs", "work:make"]
    assert (
        main([*given, "--out", str(tmp_path / "raw"), "--rounds", "2", "--calls", "12", "--most-foreign", "1e9"]) == 1
    )
    assert json.loads((tmp_path / "raw").read_text().splitlines()[-1])["verdict"] == "incorrect"
