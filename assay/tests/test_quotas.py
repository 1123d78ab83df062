"""What an arm may take of the machine, and the judge of time and memory; whatever runs out ends in a typed outcome."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from assay.__main__ import main
from assay.arms import quotas
from assay.arms.handle import started
from assay.arms.inside.wire import encode
from assay.arms.process import Running, namespaces_work
from assay.arms.sandbox import run
from assay.arms.trees import Trees
from assay.cli.shown import schema
from assay.contract.box import Box, Limits
from assay.contract.errors import ArmError
from assay.contract.task import read
from assay.contract.workload import Workload
from assay.experiment.exchange import Exchange
from assay.judgement import attempt, measurement
from assay.judgement.guards import Source
from small_project import BASE, FASTER, assay, candidate, edited, environment, git, project

NOTHING = b"".join(bytes(part) for part in encode(()))
HOLDS = "import time\nheld = bytearray(b'x') * ({size} << 20)\ntime.sleep({seconds})\n"
FORKS = "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        {inner}\n        os._exit(0)\n"
FORKS += "for _ in range(3): os.wait()\n"


def exchange(folder: Path, code: str, **more: Any) -> Exchange:
    (folder / "work.py").write_text(code)
    (folder / "places").mkdir(exist_ok=True)
    trees = Trees.at({"candidate": folder}, folder / "places")
    return Exchange(started("candidate", Workload("call", target="work:work"), trees, 0, 20, weighs=True), **more)


def test_memory_is_that_of_the_whole_tree(tmp_path: Path) -> None:
    inner = HOLDS.format(size=40, seconds=0.4).replace("\n", "; ").rstrip("; ")
    (tmp_path / "run.py").write_text(FORKS.format(inner=inner))
    command = [sys.executable, "-S", "run.py"]
    with tempfile.TemporaryFile() as log:
        for weighs in (False, True):
            running = Running(
                "base",
                command,
                tmp_path,
                tmp_path / "place",
                os.environ,
                log=log.fileno(),
                namespaces=False,
                weighs=weighs,
            )
            running.release()
            running.wait(60)
            assert (running.peak_kib() > 110 * 1024) is weighs
            running.end()


def test_memory_of_a_workers_tree(tmp_path: Path) -> None:
    forks = FORKS.format(inner="held = bytearray(b'x') * (40 << 20); time.sleep(0.4)")
    code = "def work():\n" + "".join(f"    {line}\n" for line in forks.splitlines())
    asked = exchange(tmp_path, code)
    try:
        asked.call(NOTHING)
        assert asked.worker.running.peak_kib() > 110 * 1024
    finally:
        asked.worker.end()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def work(): return b'x' * (3 << 20)\n", "announced a reply of"),
        ("def work(): return [0] * (1 << 20)\n", "announced a reply of"),
        ("def work(): raise ValueError('x' * (3 << 20))\n", "announced a reply of"),
    ],
)
def test_a_reply_that_is_far_too_long_is_not_read(code: str, words: str, tmp_path: Path) -> None:
    asked = exchange(tmp_path, code, expected=100)
    try:
        with pytest.raises(ArmError, match=words) as seen:
            asked.call(NOTHING)
        assert seen.value.outcome == "incorrect"
    finally:
        asked.worker.end()


@pytest.mark.sandbox
@pytest.mark.parametrize(
    "code",
    [
        "import os\nwith open(os.environ['XDG_CACHE_HOME'] + '/x', 'wb') as f:\n while True: f.write(b'x' * (1 << 20))",
        "while True: print('x' * (1 << 20))",
        "f = open('x', 'wb')\nwhile True: f.write(b'x' * (1 << 20))",
    ],
    ids=["cache", "log", "tree"],
)
def test_disk_has_a_quota(code: str, tmp_path: Path) -> None:
    for name in ("tree", "cache"):
        (tmp_path / name).mkdir()
    box = Box(tmp_path / "tree", writable=True, cache=tmp_path / "cache", disk_bytes=64 << 20)
    start = time.monotonic()
    ended = run(box, [sys.executable, "-S", "-c", code], timeout_s=120)
    assert ended.status == -9 and "more than 67108864" in ended.killed and time.monotonic() - start < 60, ended.killed
    for folder in ("tree", "cache"):
        (tmp_path / folder / "x").unlink(missing_ok=True)
    assert run(box, ["true"], timeout_s=30).status == 0


@pytest.mark.sandbox
def test_limits_of_the_kernel(tmp_path: Path) -> None:
    """No file grows above the quota, not even for a moment; file systems in memory have a size; no core is left."""
    code = """
import os, resource
print([resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in ("FSIZE", "CORE")])
print(resource.getrlimit(resource.RLIMIT_NOFILE)[1] <= 8192, resource.getrlimit(resource.RLIMIT_NPROC)[1])
for path in ("/tmp/x", os.environ["XDG_CACHE_HOME"] + "/x", "/assay/tree/x", "/dev/shm/x", "/dev/x"):
    try:
        with open(path, "wb") as file:
            for _ in range(99): file.write(bytes(1 << 20))
    except OSError as problem: print(path, problem.strerror, os.path.exists(path) and os.stat(path).st_size >> 20)
    if os.path.exists(path): os.unlink(path)
print([os.statvfs(path).f_blocks * os.statvfs(path).f_frsize >> 20 for path in ("/tmp", "/assay/home", "/dev/shm")])
try: held = [open("/dev/null") for _ in range(9000)]
except OSError as problem: print(problem.strerror)
"""
    for name in ("tree", "cache"):
        (tmp_path / name).mkdir()
    most = {"disk_bytes": 32 << 20, "most_processes": 50}
    ended = run(
        Box(tmp_path / "tree", writable=True, cache=tmp_path / "cache", **most),  # type: ignore[arg-type]
        [sys.executable, "-S", "-c", code],
        timeout_s=60,
    )
    large = "\n".join(f"{path} File too large 32" for path in ("/assay/cache/x", "/assay/tree/x"))
    text = ended.output.decode()
    assert text.startswith(f"[({(32 << 20) + 4096}, {(32 << 20) + 4096}), (0, 0)]\nTrue 54\n/tmp/x "), ended
    assert large in text and "/dev/x Read-only file system False" in text, text
    assert text.splitlines()[-2:] == ["[32, 32, 32]", "Too many open files"], text


BRIEF = "import os\nwith open('{path}', 'wb') as file:\n    for _ in range(3): file.write(bytes(1 << 20))\n"


@pytest.mark.sandbox
def test_what_ends_soon_is_looked_at_as_well(tmp_path: Path) -> None:
    """Many files, each within the limit, in less than a second."""
    (tmp_path / "cache").mkdir()
    box = Box(tmp_path, cache=tmp_path / "cache", disk_bytes=8 << 20)
    code = "".join(BRIEF.format(path=f"/assay/cache/{i}") for i in range(4))
    ended = run(box, [sys.executable, "-S", "-c", code], timeout_s=30)
    assert ended.status == -9 and ended.killed == f"wrote {12 << 20} bytes, more than {8 << 20}", ended


def test_a_worker_that_answers_quickly_is_watched(tmp_path: Path) -> None:
    """Nobody waits for it for long enough to look at it meanwhile."""
    (tmp_path / "work.py").write_text("def work(): print('x' * (1 << 16), flush=True)\n")
    (tmp_path / "places").mkdir()
    trees = Trees.at({"candidate": tmp_path}, tmp_path / "places", most=Limits(disk_bytes=1 << 25))
    asked = Exchange(started("candidate", Workload("call", target="work:work"), trees, 0, 20))
    try:
        with pytest.raises(ArmError, match=r"wrote \d+ bytes, more than 33554432|Bad file|File too large"):
            for _ in range(20000):
                asked.call(NOTHING)
    finally:
        asked.worker.end()


def test_without_a_sandbox_there_are_quotas_too(tmp_path: Path) -> None:
    task = project(tmp_path)
    edited(task, "[budget]", "[budget]\ndisk_bytes = 8388608\nprocesses = 20")
    text = task.read_text()
    for first, then in (("[tests]", "[[workload]]"), ("[[property]]", "[budget]")):
        text = text[: text.index(first)] + text[text.index(then) :]
    task.write_text(text)
    prints = f"{FASTER}\nimport os, sys\nwhile 'worker' in sys.argv[0]: os.write(1, bytes(1 << 16))\n"
    forks = f"{FASTER}\nimport os, time\nfor _ in range(60):\n    if os.fork() == 0: time.sleep(9); os._exit(0)\n"
    for name, text, words in (
        ("prints", prints, ["File too large", "more than 8388608"]),
        ("forks", forks, ["more than 20", "Resource temporarily unavailable"]),
    ):
        tree = candidate(task, name, {"pkg/__init__.py": text})
        given = ["--tree", tree, "--store", tmp_path / "store", "--no-sandbox", "--skip", "provenance", "--json"]
        found = json.loads(assay("judge", task, *given).stdout)
        assert found["outcome"] == "incorrect" and any(one in found["words"][0] for one in words), found


@pytest.mark.sandbox
def test_pipes_have_a_quota(tmp_path: Path) -> None:
    """Whoever has all of a user's pages for pipes would leave none to the judge, who is the same user."""
    code = "import os, resource, time\nmost = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
    code += "resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))\n"
    code += "held = [os.pipe() for _ in range({})]\ntime.sleep({})"
    ended = run(Box(tmp_path), [sys.executable, "-S", "-c", code.format(700, 60)], timeout_s=30)
    assert ended.status == -9 and "pipes, more than 512" in ended.killed, ended
    assert run(Box(tmp_path), [sys.executable, "-S", "-c", code.format(100, 2.5)], timeout_s=30).status == 0


@pytest.mark.sandbox
def test_which_quotas_the_kernel_keeps() -> None:
    """For any user; memory, and the number of processes, where control groups or the kernel allow for it."""
    always = {"each file", "open files of a process"}
    assert always <= set(quotas.kept(sandboxed=False)) <= set(quotas.WHAT) - set(quotas.SANDBOX_ALONE)
    inside = set(quotas.kept(sandboxed=True))
    assert inside >= always | set(quotas.SANDBOX_ALONE) and "all files of a cache together" not in inside


def test_pipes_are_counted_before_others_have_their_turn(tmp_path: Path) -> None:
    """An arm that was not looked at for long enough cannot take its pipes with it while it is frozen."""
    code = "import os, resource\nmost = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
    code += "resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))\nheld = []\n"
    code += "def work(): held.extend(os.pipe() for _ in range(300))\n"
    asked = exchange(tmp_path, code)
    try:
        asked.call(NOTHING)
        asked.worker.running.freeze()
        asked.worker.running.thaw()
        asked.call(NOTHING)
        with pytest.raises(ArmError, match="pipes, more than 512") as seen:
            asked.worker.running.freeze()
        assert seen.value.outcome == "incorrect"
    finally:
        asked.worker.end()


def test_gates_have_a_budget(tmp_path: Path) -> None:
    """A test that stalls ends with the seconds of the task, and it is nobody's fault."""
    task = edited(project(tmp_path), "[budget]", "[budget]\nseconds = 6.0")
    tree = candidate(task, "c", {"pkg/__init__.py": f"import time\ntime.sleep(600)\n{BASE}"})
    start = time.monotonic()
    done = assay("judge", task, "--tree", tree, "--store", tmp_path / "store", "--no-sandbox", "--json")
    found = json.loads(done.stdout)
    assert (found["outcome"], found["status"]) == ("infra.budget", 3), found
    assert found["words"] == ["tests: the task's seconds of gates are spent"] and time.monotonic() - start < 40
    assert assay("ledger", "--store", tmp_path / "store").stdout.rstrip().endswith("infra.budget unsandboxed")


@pytest.mark.parametrize("errno", [28, 5])
def test_a_full_disk_is_infrastructure_with_a_row(
    errno: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = project(tmp_path)
    tree = candidate(task, "c", {"pkg/__init__.py": FASTER})

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno, os.strerror(errno))

    monkeypatch.setattr(measurement, "_decided", full)
    options = ["--skip", "tests,equivalence", "--store", str(tmp_path / "store"), "--no-sandbox"]
    assert main(["judge", str(task), "--tree", str(tree), *options, "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["outcome"] == "infra.host" and found["words"][0].startswith("measure: OSError: "), found
    assert main(["ledger", "--store", str(tmp_path / "store")]) == 0
    assert capsys.readouterr().out.rstrip().endswith("infra.host unsandboxed without tests, equivalence")
    rows = 1
    for module, name, stage in ((attempt.freeze, "freeze", "prepare"), (attempt.freeze, "handed_in", "read")):
        monkeypatch.setattr(module, name, full)  # before there is a plan
        for command in ("judge", "prepare"):
            assert main([command, str(task), "--tree", str(tree), *options]) == 3
            assert f"infra.host: {stage}: OSError: " in capsys.readouterr().out
            rows += 1
            assert main(["ledger", "--store", str(tmp_path / "store")]) == 0
            listed = capsys.readouterr().out.splitlines()
            assert len(listed) == rows and all("infra.host" in line for line in listed), listed
        verdicts = [json.loads(file.read_text()) for file in tmp_path.glob("store/attempts/*/verdict.json")]
        assert len(verdicts) == rows
        for found in verdicts:
            jsonschema.Draft202012Validator(schema("verdict")).validate(found)


SMALL_DISK = """
mkdir -p {store} && mount -t tmpfs -o size={size}k none {store}
{python} -m assay judge {task} --tree {tree} --store {store} --no-sandbox --json; echo status $?
{python} -m assay ledger --store {store}
"""


@pytest.mark.parametrize("size", [1700, 4000, 7000, 8000])
def test_a_disk_that_is_full_indeed(size: int, tmp_path: Path) -> None:
    """Wherever it runs full (reading the patch, the plan, the build): there is a verdict, and a last row."""
    if not namespaces_work():
        pytest.skip("no file system may be mounted here")
    task = edited(project(tmp_path), 'packages = ["pkg"]', "packages = []")
    task.write_text(task.read_text() + '\n[commands]\nbuild = [["cp", "large", "larger"]]\n')
    (tmp_path / "repo/large").write_bytes(os.urandom(1 << 20))
    git(tmp_path / "repo", "add", "--all")
    git(tmp_path / "repo", "commit", "--quiet", "-m", "large")
    tree = candidate(task, "c", {"pkg/__init__.py": FASTER})
    script = SMALL_DISK.format(store=tmp_path / "store", size=size, python=sys.executable, task=task, tree=tree)
    command = ["unshare", *([] if os.getuid() == 0 else ["--map-root-user"]), "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=120)
    text, _, rest = done.stdout.partition("\nstatus ")
    assert text.startswith("{"), done.stdout + done.stderr
    said, (status, *listed) = json.loads(text), rest.splitlines()
    print(said["words"])
    assert (said["outcome"] in ("infra.host", "infra.build"), status) == (True, "3"), done.stdout + done.stderr
    assert any(words in said["words"][0] for words in ("No space left on device", "disk is full"))
    assert len(listed) == 1 and listed[0].rstrip().endswith(f"{said['outcome']} unsandboxed"), listed


def test_who_no_longer_listens_changes_nothing(tmp_path: Path) -> None:
    task = project(tmp_path)
    tree = candidate(task, "c", {"other.py": ""})
    command = [sys.executable, "-m", "assay", "judge", str(task), "--tree", str(tree), "--no-sandbox"]
    command += ["--store", str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as judge:
        assert judge.stdout is not None and judge.stderr is not None
        judge.stdout.close()
        said = judge.stderr.read()
        assert judge.wait(60) == 1 and said == b""
    assert assay("ledger", "--store", tmp_path / "store").stdout.rstrip().endswith("out_of_scope unsandboxed")


def test_an_error_in_reading_a_reply_is_the_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from assay.gates import equivalence

    def odd(*_: Any) -> str:
        raise IndexError("odd")

    task = project(tmp_path)
    tree = candidate(task, "c", {"pkg/__init__.py": BASE.replace("return total", "return total + (n > 150)")})
    difference = equivalence.difference

    def read_oddly(one: Any, two: Any, *more: Any) -> str:
        return odd() if one != two else difference(one, two, *more)

    monkeypatch.setattr(equivalence, "difference", read_oddly)
    found, _ = attempt.judge(read(task), Source("tree", str(tree)), tmp_path / "s", sandboxed=False, skipped=["tests"])
    assert found["outcome"] == "incorrect", found
    assert "sent what cannot be compared: IndexError: odd" in found["words"][0]
