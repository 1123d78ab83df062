"""What code of a patch may see and do: an allow-list of mounts under bubblewrap, and nothing of the network.

Inside, an arm's tree is always at PLACE, HOME and every cache are its own, and the judge's files, results, other arms
and the user's home are not there at all. Processes and memory are limited by groups.py.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from assay.arms import inside, turns
from assay.arms.process import PREFIX, PYTHON, Running
from assay.contract.box import MOST_DISK, Box
from assay.contract.errors import ArmError

PLACE = Path("/assay/tree")
"""Where every arm sees its tree."""
HOME = Path("/assay/home")
CACHE = Path("/assay/cache")
TAIL = 1 << 16
"""Bytes of a command's output that are kept."""
INSIDE = Path(inside.__file__).parent
PARTS = ("supervisor.py", "worker.py", "wire.py", "benchmarks.py", "sealed.py", "counting.py")
"""What starts by path, in a sandbox or beside it."""
_SYSTEM = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime")
_MASKED = [Path("/proc", name) for name in ("kcore", "keys", "kmsg", "kpagecgroup", "kpagecount", "kpageflags")]
_CPUS = "/sys/devices/system/cpu"
_CACHES = {  # not PYTHONPYCACHEPREFIX: it hides the interpreter's own compiled modules, which are read-only here
    "XDG_CACHE_HOME": "",
    "CUDA_CACHE_PATH": "cuda",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "NUMBA_CACHE_DIR": "numba",
    "CCACHE_DIR": "ccache",
    "PIP_CACHE_DIR": "pip",
    "CARGO_HOME": "cargo",
    "MOEYARD_CACHE": "moeyard",
}


@dataclass(frozen=True)
class Finished:
    """How a command in a box ended."""

    status: int
    output: bytes
    """The end of what it wrote to stdout and stderr."""
    seconds: float
    left: int
    """Processes that still ran when the command had ended; they are killed."""
    killed: str = ""
    """Why it was killed, in words: it took too long, or too much; the status is then -9."""


@cache
def refusal() -> str | None:
    """Why no sandbox is to be had here, in words; None if it is."""
    if shutil.which("bwrap") is None:
        return "bwrap: expected bubblewrap 0.8 or later on PATH, found none (Debian: apt-get install bubblewrap)"
    with tempfile.TemporaryDirectory(prefix="assay-") as folder:
        argv = wrapped(Box(Path(folder)), ["/bin/sh", "-c", "exit 7"])
        tried = subprocess.run(argv, capture_output=True, check=False, env={})
    if tried.returncode == 7:
        return None
    words = tried.stderr.decode(errors="replace").strip().splitlines() or [f"status {tried.returncode}"]
    return f"bwrap: expected version 0.8 or later that may make namespaces here, got {words[-1]}"


def environment(box: Box, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """All of the environment inside: the same for all arms that were declared alike."""
    folders = dict.fromkeys([str(Path(PYTHON).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    own = {
        "PATH": os.pathsep.join(folders),
        "HOME": str(HOME),
        "USER": "assay",
        "LOGNAME": "assay",
        "LANG": "C.UTF-8",
        "TMPDIR": "/tmp",  # noqa: S108 - the sandbox's own
        "PWD": str(PLACE),
        "PYTEST_ADDOPTS": "-p no:assay",  # assay's own plugin may be installed from a folder that is not shown
    }
    return own | dict(box.environment) | caches(CACHE) | dict(more or {})


def caches(folder: Path) -> dict[str, str]:
    """Environment variables that put every cache we know of below a folder."""
    return {name: str(folder / below) for name, below in _CACHES.items()}


def wrapped(box: Box, argv: Sequence[str], environment_: Mapping[str, str] | None = None) -> list[str]:
    """The program and arguments that run `argv` in the box. To be started from the judge's main thread."""
    return [*_entry(box, environment(box) if environment_ is None else environment_), "--", *argv]


@dataclass(frozen=True)
class Entry:
    """Supervisor's arguments and environment -> the command that runs it inside."""

    box: Box

    def __call__(self, arguments: list[str], environment: Mapping[str, str]) -> list[str]:
        supervisor = [PYTHON, "-I", "-S", "/assay/supervisor.py"]
        return [*_entry(self.box, environment), "--as-pid-1", "--", *supervisor, *arguments]


def _entry(box: Box, environment: Mapping[str, str]) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise FileNotFoundError("bwrap: expected bubblewrap on PATH, found none")
    made = [program, "--unshare-all", "--unshare-user", "--disable-userns", "--new-session", "--die-with-parent"]
    made += ["--cap-drop", "ALL", "--clearenv", "--hostname", "assay"]
    for name, value in environment.items():
        made += ["--setenv", name, value]
    made += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib32", "lib64", "libx32", "sbin"):
        path = Path("/", name)
        if path.is_symlink():
            made += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            made += ["--ro-bind", str(path), str(path)]
    size = ["--size", str(_memory_file_system(box))]
    made += ["--proc", "/proc", "--dev", "/dev", *size, "--tmpfs", "/dev/shm"]  # noqa: S108 - the sandbox's own
    for path in _MASKED:
        made += ["--ro-bind", "/dev/null", str(path)] if path.is_file() else []
    made += ["--remount-ro", "/proc"]  # root's /proc/sys is the host's: core_pattern is a way out
    for path in box.devices:
        made += ["--dev-bind", str(path), str(path)]
    made += ["--remount-ro", "/dev"]  # its size cannot be limited
    made += [*size, "--tmpfs", "/tmp"]  # noqa: S108 - the sandbox's own
    made += ["--bind", str(box.home), str(HOME)] if box.home else [*size, "--tmpfs", str(HOME)]
    made += ["--bind", str(box.cache), str(CACHE)] if box.cache else [*size, "--tmpfs", str(CACHE)]
    for folder in _CACHES.values():
        made += ["--dir", str(CACHE / folder)] if folder and not box.cache else []
    for name in (*_SYSTEM, _CPUS):
        made += ["--ro-bind-try", name, name]
    for name in dict.fromkeys([sys.base_prefix, PREFIX, *map(str, box.readable)]):
        if not Path(name).is_relative_to("/usr"):
            made += ["--ro-bind", name, name]
    for name in PARTS:
        made += ["--ro-bind", str(INSIDE / name), f"/assay/{name}"]
    for source, place in box.placed:
        made += ["--ro-bind", str(source), place]
    made += ["--bind" if box.writable else "--ro-bind", str(box.tree.resolve()), str(PLACE)]
    return [*made, "--remount-ro", "/", "--chdir", str(PLACE)]


def _memory_file_system(box: Box) -> int:
    """Bytes of each: what an arm may have in memory or on disk, at most an eighth of the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return box.memory_bytes or min(memory // 8, box.disk_bytes or MOST_DISK)


def run(box: Box, argv: Sequence[str], *, timeout_s: float, stdin: bytes = b"") -> Finished:
    """Runs a command in a box to its end or `timeout_s`, whichever is first; nothing of it is left afterwards.

    Raises ArmError if the sandbox or the command cannot be started.
    """
    return turns.alone(steps(box, argv, timeout_s=timeout_s, stdin=stdin))


def steps(box: Box, argv: Sequence[str], *, timeout_s: float, stdin: bytes = b"") -> turns.Steps[Finished]:
    """As `run`, beside others (turns.py)."""
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        running = Running(
            "command",
            argv,
            box.tree,
            PLACE,
            environment(box),
            log=log.fileno(),
            stdin=given.fileno(),
            namespaces=False,
            wrap=Entry(box),
            limits=box.limits,
        )
        start = time.perf_counter()
        try:
            start = running.release()
            ended = yield from running.ending(timeout_s)
            running.watch(now=True)
            status, left, killed = ended.status, ended.left, ""
        except ArmError as problem:
            if not problem.killed:
                raise ArmError("sandbox", f"{problem} {_tail(log.fileno()).decode(errors='replace')}".strip()) from None
            status, left, killed = -9, 0, problem.words
        finally:
            seconds = time.perf_counter() - start
            running.end()
        return Finished(status, _tail(log.fileno()), seconds, left, killed)


def _tail(fd: int) -> bytes:
    return os.pread(fd, TAIL, max(0, os.fstat(fd).st_size - TAIL))
