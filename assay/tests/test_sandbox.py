"""Attempts to get out of a sandbox. Each one succeeds outside, so that it is the sandbox that stops it."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from assay.arms import groups, sandbox
from assay.arms.sandbox import run
from assay.contract.box import Box, Limits
from assay.contract.errors import ArmError

pytestmark = pytest.mark.sandbox

ATTEMPTS = r"""
import ctypes, json, os, socket, sys
given = json.load(sys.stdin)
won = []

def attempt(name):
    def tried(function):
        try:
            if function(): won.append(name)
        except OSError:
            pass
    return tried

def read(path):
    with open(path) as file: return given["secret"] in file.read()

def write(path, text):
    with open(path, "w") as file: file.write(text)
    return True

for name in ("host file", "home", "ledger", "another arm"):
    attempt(name)(lambda: read(given[name]))
attempt("host file written")(lambda: write(given["host file"] + ".new", "x"))
attempt("own tree written")(lambda: write("work.py", "x"))
attempt("directory of the ledger")(lambda: os.listdir(os.path.dirname(given["ledger"])))

@attempt("network")
def _():
    with socket.create_connection(("127.0.0.1", given["port"]), 2) as found: return found.recv(3) == b"in!"

@attempt("socket without a file")
def _():
    with socket.socket(socket.AF_UNIX) as found:
        found.connect("\0" + given["socket"])
        return found.recv(3) == b"in!"

@attempt("the judge's process")
def _():
    os.kill(given["judge"], 0)
    return open(f"/proc/{given['judge']}/environ", "rb").read(1) != b""

attempt("kernel settings")(lambda: os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY) > 0)
attempt("capabilities")(lambda: "CapEff:\t0000000000000000" not in open("/proc/self/status").read())
attempt("environment")(lambda: given["secret"] in json.dumps(dict(os.environ)))

if given["inside"]:  # outside it would go through, and not for the test alone
    attempt("mount")(lambda: ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0)
@attempt("user namespace")
def _():
    child = os.fork()
    if child == 0: os._exit(ctypes.CDLL(None).unshare(0x10000000) != 0)
    return os.waitpid(child, 0)[1] == 0

print(json.dumps(won))
"""
INSIDE = r"""
import glob, os, signal
won = []
for number in os.listdir("/proc/1/fd") if os.access("/proc/1/fd", os.R_OK) else []:
    try:
        os.close(os.open(f"/proc/1/fd/{number}", os.O_WRONLY)); won.append(number)
    except OSError: pass
try:
    os.close(os.open("/proc/1/mem", os.O_RDWR)); won.append("memory")
except OSError: pass
os.kill(1, signal.SIGKILL); os.kill(1, signal.SIGTERM)
print(won, sorted(name for name in os.listdir("/proc/self/fd")))
"""


@pytest.fixture
def listening() -> Iterator[tuple[int, str]]:
    """A port of this machine and an abstract socket; both greet."""
    name = "assay-" + secrets.token_hex(8)
    greeter = f"""
import socket, sys
one = socket.create_server(("127.0.0.1", 0)); two = socket.socket(socket.AF_UNIX); two.bind("\\0{name}"); two.listen()
print(one.getsockname()[1], flush=True)
import select
while True:
    for ready in select.select([one, two], [], [])[0]:
        with ready.accept()[0] as found: found.sendall(b"in!")
"""
    with subprocess.Popen([sys.executable, "-c", greeter], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline()), name
        process.kill()


def attempts(tmp_path: Path, listening: tuple[int, str]) -> tuple[dict[str, object], Path, Path]:
    secret = secrets.token_hex(8)
    home = Path.home() / f".assay-test-{secret}"
    given: dict[str, object] = {"secret": secret, "port": listening[0], "socket": listening[1], "judge": os.getpid()}
    for name in ("host file", "ledger", "another arm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(secret)
        given[name] = str(tmp_path / name / "file")
    home.write_text(secret)
    given["home"] = str(home)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "work.py").write_text("")
    return given, tree, home


def test_nothing_gets_out(tmp_path: Path, listening: tuple[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    given, tree, home = attempts(tmp_path, listening)
    monkeypatch.setenv("ASSAY_SECRET", str(given["secret"]))
    try:
        command = [sys.executable, "-c", ATTEMPTS]
        words = json.dumps(given | {"inside": True}).encode()
        inside = run(Box(tree), command, timeout_s=30, stdin=words)
        words = json.dumps(given | {"inside": False}).encode()
        outside = subprocess.run(command, cwd=tree, input=words, capture_output=True, check=True, timeout=30)
    finally:
        home.unlink()
    assert (inside.status, inside.output.strip()) == (0, b"[]")
    won = set(json.loads(outside.stdout))
    always = {"host file", "home", "ledger", "another arm", "host file written", "own tree written", "network"}
    always |= {"directory of the ledger", "socket without a file", "the judge's process", "environment"}
    assert won >= always, "outside, these must go through"
    if os.getuid() == 0:
        assert won >= {"kernel settings", "capabilities"}


def test_a_file_that_may_be_read_is_read(tmp_path: Path) -> None:
    """The mutant of the allow-list: what is declared is seen, and only read."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tool").write_text("here")
    box = Box(tmp_path / "tree", readable=(tmp_path / "tool",))
    ended = run(box, ["sh", "-c", f"cat {tmp_path}/tool; ls {tmp_path}; echo > {tmp_path}/tool"], timeout_s=30)
    assert ended.output.startswith(b"heretool\n") and ended.status != 0 and (tmp_path / "tool").read_text() == "here"


def test_the_supervisor_is_out_of_reach(tmp_path: Path) -> None:
    """It holds the pipe on which it tells how the command ended, and runs as the same user."""
    ended = run(Box(tmp_path), [sys.executable, "-c", INSIDE], timeout_s=30)
    assert (ended.status, ended.output.strip()) == (0, b"[] ['0', '1', '2', '3']")  # 3 is the listing's own


def test_what_is_left_is_counted_and_killed(tmp_path: Path) -> None:
    code = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)\n"
    )
    mark = f"{code}#{secrets.token_hex(8)}"
    ended = run(Box(tmp_path), [sys.executable, "-c", mark + "\nos.wait()"], timeout_s=30)
    assert (ended.status, ended.left) == (0, 1)
    assert mark.encode() not in b"".join(cmdlines())


def cmdlines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes()
        except OSError:
            continue


def test_a_box_written_while_it_is_built(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "cache").mkdir()
    box = Box(tmp_path / "tree", writable=True, cache=tmp_path / "cache", environment={"CC": "cc"})
    code = "echo $CC > made; echo 1 > $TRITON_CACHE_DIR-kept; echo 2 > ~/gone; echo 3 > /tmp/gone; pwd"
    ended = run(box, ["sh", "-c", code], timeout_s=30)
    assert (ended.status, ended.output) == (0, b"/assay/tree\n")
    assert (tmp_path / "tree" / "made").read_text() == "cc\n" and (tmp_path / "cache" / "triton-kept").exists()
    closed = replace(box, writable=False, cache=None)
    ended = run(closed, ["sh", "-c", "cat made; ls ~ /tmp $XDG_CACHE_HOME; echo > made"], timeout_s=30)
    assert ended.output.startswith(b"cc\n") and b"gone" not in ended.output and b"kept" not in ended.output
    assert ended.status != 0 and (tmp_path / "tree" / "made").read_text() == "cc\n"


MANY = "import os, time\nfor _ in range(40):\n    if os.fork() == 0: time.sleep(3); os._exit(0)\ntime.sleep(2)"


@pytest.mark.parametrize("cgroups", [True, False])
def test_memory_and_processes_are_limited(cgroups: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path, memory_bytes=200 << 20, most_processes=20)
    if cgroups:
        group = groups.Group(box.limits)
        made = bool(group.folders)
        group.end()
        if not made:
            pytest.skip("no cgroup may be made here")
    else:
        monkeypatch.setattr(groups, "_ROOT", tmp_path / "none")
    hold = "import sys, time; held = bytearray(int(sys.argv[1]) << 20); time.sleep(1)"
    ended = run(box, [sys.executable, "-c", hold, "400"], timeout_s=30)
    assert ended.status == -9 and "bytes of memory" in ended.killed
    ended = run(box, [sys.executable, "-c", hold, "40"], timeout_s=30)
    assert (ended.status, ended.killed) == (0, "")
    ended = run(box, ["dd", "if=/dev/zero", "of=/tmp/full", "bs=1M", "count=400"], timeout_s=30)
    assert ended.status != 0
    ended = run(box, [sys.executable, "-c", MANY], timeout_s=30)
    assert b"Resource temporarily unavailable" in ended.output or "processes, more than 20" in ended.killed


def test_ends(tmp_path: Path) -> None:
    ended = run(Box(tmp_path), [sys.executable, "-c", "print('x' * 100000, 'end'); raise SystemExit(5)"], timeout_s=30)
    assert ended.status == 5 and len(ended.output) == sandbox.TAIL and ended.output.endswith(b" end\n")
    start = time.monotonic()
    ended = run(Box(tmp_path), ["sleep", "60"], timeout_s=0.5)
    assert (ended.status, ended.killed) == (-9, "did not end within 0.5 s") and time.monotonic() - start < 10
    assert run(Box(tmp_path), ["cat"], timeout_s=30, stdin=b"given").output == b"given"
    ended = run(Box(tmp_path), ["sh", "-c", "kill -SEGV $$"], timeout_s=30)
    assert ended.status == -signal.SIGSEGV
    with pytest.raises(ArmError, match="cannot start no-such"):
        run(Box(tmp_path), ["no-such"], timeout_s=30)
    with pytest.raises(ArmError, match=r"sandbox: .*find source path"):
        run(Box(tmp_path / "none"), ["true"], timeout_s=30)


def test_without_bubblewrap_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", tempfile.gettempdir())
    sandbox.refusal.cache_clear()
    try:
        assert "expected bubblewrap" in str(sandbox.refusal())
    finally:
        sandbox.refusal.cache_clear()


def test_all_arms_see_the_same(tmp_path: Path) -> None:
    seen = []
    for name in ("a", "longer-name"):
        (tmp_path / name).mkdir()
        code = "import os, sys; print(os.getcwd(), sys.argv, sorted(os.environ.items()), os.uname(), os.getpid())"
        code += "; print([open(f'/proc/{p}/cmdline').read() for p in os.listdir('/proc') if p.isdigit()])"
        ended = run(Box(tmp_path / name), [sys.executable, "-c", code], timeout_s=30)
        assert ended.status == 0
        seen.append(ended.output)
    assert seen[0] == seen[1] and str(tmp_path).encode() not in seen[0]


def test_groups_of_killed_judges_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    left = groups.Group(Limits(most_processes=10))
    if not left.folders:
        pytest.skip("no cgroup may be made here")
    young = groups.Group(Limits(most_processes=10))
    assert all(folder.exists() for folder in (*left.folders, *young.folders))
    monkeypatch.setattr(groups, "_STALE_S", -60.0)
    groups.Group(Limits(most_processes=10)).end()
    assert not any(folder.exists() for folder in (*left.folders, *young.folders))
    left.end()
    young.end()
