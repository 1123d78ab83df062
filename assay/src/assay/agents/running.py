"""One run of an agent: workspace, sandbox, proxy, budget. Its files are looked at when nothing of it runs any more."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import assay
from assay.agents import measure, record
from assay.agents.budget import Used, inside, used
from assay.agents.outcome import Outcome, decided
from assay.agents.proxy import Connection, rows, serving
from assay.agents.redaction import Redactor
from assay.agents.template import Agent, Read, fill
from assay.agents.workspace import Changed, Workspace
from assay.arms import sandbox
from assay.arms.process import PYTHON, Running
from assay.arms.sandbox import HOME, INSIDE, PLACE
from assay.contract.box import Box
from assay.contract.errors import ArmError, LateError, NoSandboxError, UsageError
from assay.contract.frozen import written
from assay.machine import locks
from assay.prompts.render import Prompt

if TYPE_CHECKING:
    from assay.contract.task import Read as Task

Told = Callable[[dict[str, Any]], None]
_PORT = 3128
_PROXY, _PROMPT, _BRIDGE = "/assay/proxy", "/assay/prompt.md", "/assay/bridge.py"
_LOOK_S = 1.0
_MOST_OUTPUT = 16 << 20
_CERTIFICATES = ("/etc/ssl", "/etc/pki", "/etc/ca-certificates")
"""What programs trust, where a system keeps it. Keys of the machine itself lie below them, too, and are not shown."""
_PRIVATE = "private"
_USERS = "root:x:0:0:root:/assay/home:/bin/sh\nassay:x:{user}:{group}:assay:/assay/home:/bin/sh\n"
_LEFT = (".bench_scratch/**", "model_patch.diff")


@dataclass(frozen=True)
class Order:
    """What is to be run."""

    task: "Task"
    agent: Read
    prompt: Prompt
    secrets: Mapping[str, str]
    """Values of the template's keys."""
    number: int = 1


def secrets_of(agent: Agent, environment: Mapping[str, str]) -> dict[str, str]:
    """Values of an agent's keys. UsageError names those that are not set."""
    if missing := [name for name in agent.environment.keys if not environment.get(name)]:
        raise UsageError(f"{', '.join(missing)}: expected the agent's key in the environment, got none")
    return {name: environment[name] for name in agent.environment.keys}


def done(folder: Path) -> dict[str, Any] | None:
    """What a finished run of this folder came to; None if there is none."""
    file = folder / record.FILE
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
    return found


def run(order: Order, folder: Path, told: Told = lambda _: None) -> dict[str, Any]:
    """Runs an agent; what run.json says. A folder whose run is finished is not run again.

    A run that was interrupted begins anew: an agent cannot go on in the middle. NoSandboxError, UsageError and
    TaskError say why there is no run at all.
    """
    if (found := done(folder)) is not None:
        return found
    if refused := sandbox.refusal():
        raise NoSandboxError(f"{refused}; an agent is never run without a sandbox")
    _installed(order.agent.agent)
    redactor = Redactor(order.secrets.values())
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    work = folder / "work"
    try:
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        workspace = Workspace(order.task, work)
        measure.write(order.task, work / "measure")
        (folder / record.PROMPT).write_text(redactor.clean_text(order.prompt.text))
        with locks.held("cpu", alone=False, waiting=lambda name: told({"kind": "waiting", "name": name})):
            told({"kind": "stage", "name": f"{order.agent.agent.name} on {order.task.task.name}"})
            ran = _ran(order, work, workspace)
        changed = workspace.changed((*order.task.task.scope.left, *_LEFT, *order.agent.agent.left), redactor)
        found = _kept(order, folder, ran, changed, redactor, started)
        written(folder / record.FILE, json.dumps(found, indent=1) + "\n")
        return found
    finally:
        shutil.rmtree(work, ignore_errors=True)


@dataclass
class _Ran:
    """What is known when nothing of the agent runs any more."""

    output: bytes
    connections: list[Connection]
    used: Used
    seconds: float = 0.0
    status: int | None = None
    left: int = 0
    cut: Outcome | None = None
    words: str = ""


def _ran(order: Order, work: Path, workspace: Workspace) -> _Ran:
    """Runs the command to its end or its budget's."""
    agent, log = order.agent.agent, work / "network.jsonl"
    home = _home(agent, work)
    (work / "prompt.md").write_text(order.prompt.text)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryFile())
        socket = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="assay-"))) / "s"
        stack.enter_context(serving(socket, agent.network.hosts, log))
        found = _Ran(b"", [], Used())
        running = stack.enter_context(_started(order, work, workspace, home, socket, output.fileno()))
        begun = time.perf_counter()
        try:
            begun = running.release()
            _watched(running, agent, found, home, output.fileno(), begun)
        except ArmError as problem:
            found.cut = Outcome.LIMITS if problem.killed else Outcome.SANDBOX
            found.words = problem.words
        finally:
            found.seconds = max(0.0, time.perf_counter() - begun)
            running.end()  # from here on nothing of it can write
        found.output = _all(output.fileno())
        found.used = used(agent.usage, found.output, home)
    found.connections = rows(log)
    return found


def _watched(running: Running, agent: Agent, found: _Ran, home: Path, output: int, begun: float) -> None:
    """Waits for the end, and looks at what is spent meanwhile."""
    reports = agent.budget.tokens is not None or agent.budget.money is not None
    while True:
        left = agent.budget.seconds - (time.perf_counter() - begun)
        try:
            ended = running.wait(max(0.0, min(_LOOK_S, left)))
        except LateError:
            if left <= _LOOK_S:
                found.cut, found.words = Outcome.TIME, f"it took more than {agent.budget.seconds:g} s"
                return
            over = used(agent.usage, _all(output), home).over(agent.budget) if reports else None
            if over is not None:
                found.cut, found.words = over
                return
            continue
        found.status, found.left = ended.status, ended.left
        return


@contextlib.contextmanager
def _started(
    order: Order, work: Path, workspace: Workspace, home: Path, socket: Path, output: int
) -> Iterator[Running]:
    """The command at its gate, in a sandbox with one way out. Keys go in through a descriptor, on no command line."""
    agent = order.agent.agent
    own = {
        "prompt": order.prompt.text,
        "prompt_file": _PROMPT,
        "tree": str(PLACE),
        "home": str(HOME),
        "seconds": f"{agent.budget.seconds:.0f}",
        "measure": " && ".join(measure.offered(order.task).values()) or "true",
    }
    argv = [fill(one, own) for one in agent.command.argv]
    command = [PYTHON, "-I", "-S", _BRIDGE, f"{_PROXY}/{socket.name}", str(_PORT), *argv]
    box = _box(agent, work, workspace, home, socket)
    with _memory(json.dumps(dict(order.secrets)).encode()) as keys, tempfile.TemporaryFile() as given:
        given.write(order.prompt.text.encode() if agent.command.prompt == "stdin" else b"")
        given.seek(0)
        running = Running(
            "agent",
            command,
            box.tree,
            PLACE,
            sandbox.environment(box),
            log=output,
            fds=(keys,),
            stdin=given.fileno(),
            namespaces=False,
            wrap=sandbox.Entry(box),
            limits=box.limits,
        )
        try:
            yield running
        finally:
            running.end()


@contextlib.contextmanager
def _memory(data: bytes) -> Iterator[int]:
    """A descriptor of a file without a name, in memory."""
    file = os.memfd_create("assay", os.MFD_CLOEXEC)
    try:
        os.write(file, data)
        os.lseek(file, 0, os.SEEK_SET)
        yield file
    finally:
        os.close(file)


def _box(agent: Agent, work: Path, workspace: Workspace, home: Path, socket: Path) -> Box:
    """The agent profile of the sandbox."""
    proxy = f"http://127.0.0.1:{_PORT}"
    ways = {name: proxy for word in ("http", "https", "all") for name in (f"{word}_proxy", f"{word.upper()}_PROXY")}
    values = {"tree": str(PLACE), "home": str(HOME), "prompt_file": _PROMPT}
    ours = {name: fill(text, values) for name, text in agent.environment.set.items()}
    passed = {name: os.environ[name] for name in agent.environment.allow if name in os.environ}
    folders = [*agent.sandbox.path, *sandbox.environment(Box(workspace.tree))["PATH"].split(os.pathsep)]
    users = work / "passwd"
    users.write_text(_USERS.format(user=os.getuid() or 65534, group=os.getgid() or 65534))
    placed = [(socket.parent, _PROXY), (INSIDE / "bridge.py", _BRIDGE), (work / "prompt.md", _PROMPT)]
    placed += [(workspace.base, measure.BASE), (work / "measure", measure.TOOL), (users, "/etc/passwd")]
    readable = [Path(name) for name in agent.sandbox.readable]
    return Box(
        workspace.tree,
        writable=True,
        home=home,
        readable=(*readable, *_interpreters(readable), *measure.readable(), *_certificates()),
        environment={
            "NODE_USE_ENV_PROXY": "1",
            **passed,
            **ours,
            **ways,
            "PATH": os.pathsep.join(dict.fromkeys(folders)),
        },
        placed=tuple(placed),
        memory_bytes=agent.sandbox.memory_bytes,
        disk_bytes=agent.sandbox.disk_bytes,
        most_processes=agent.sandbox.processes,
    )


def _certificates() -> list[Path]:
    """Files and folders of trusted certificates, private keys left out."""
    found = []
    for folder in map(Path, _CERTIFICATES):
        if folder.is_dir():
            found += [path for path in sorted(folder.iterdir()) if path.name != _PRIVATE and not path.is_symlink()]
    return found


def _interpreters(readable: list[Path]) -> list[Path]:
    """Where the Python of a virtual environment lies, for those among the folders that are one, or hold one."""
    found = []
    for folder in readable:
        for file in (folder / "pyvenv.cfg", *folder.glob("*/pyvenv.cfg")):
            lines = file.read_text().splitlines() if file.is_file() else []
            homes = [Path(line.partition("=")[2].strip()).parent for line in lines if line.startswith("home")]
            found += [home for home in homes if home.is_dir()]
    return found


def _installed(agent: Agent) -> None:
    """UsageError if the program or what it needs to see is not there."""
    program = agent.command.argv[0]
    for name in (*agent.sandbox.readable, *([program] if program.startswith("/") else [])):
        if not Path(name).exists() and not Path(name).is_relative_to("/assay"):
            raise UsageError(f"agent {agent.name}: expected {name}, which is not there; is it installed?")


def _home(agent: Agent, work: Path) -> Path:
    """HOME, with the template's files in it."""
    home = work / "home"
    home.mkdir()
    for name, text in agent.sandbox.home.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    return home


def _all(fd: int) -> bytes:
    """What a file holds, its middle left out if it is too long."""
    size = os.fstat(fd).st_size
    if size <= _MOST_OUTPUT:
        return os.pread(fd, size, 0)
    half = _MOST_OUTPUT // 2
    return os.pread(fd, half, 0) + b"\n[...]\n" + os.pread(fd, half, size - half)


def _kept(order: Order, folder: Path, ran: _Ran, changed: Changed, redactor: Redactor, started: str) -> dict[str, Any]:
    """Writes what is kept, redacted, and returns the record."""
    agent, home = order.agent.agent, folder / "work" / "home"
    output, in_output = redactor.clean(ran.output)
    network = "".join(json.dumps(asdict(one)) + "\n" for one in ran.connections).encode()
    network, in_network = redactor.clean(network)
    for name, data in ((record.OUTPUT, output), (record.NETWORK, network), (record.PATCH, changed.patch)):
        (folder / name).write_bytes(data)
    kept, in_kept = [], 0
    for name in agent.keeps:
        if (path := inside(home, name)) is not None:
            data, count = redactor.clean(path.read_bytes())
            to = folder / record.KEPT / name
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(data)
            kept.append(name)
            in_kept += count
    outcome, words = decided(
        -1 if ran.status is None else ran.status,
        ran.cut,
        ran.words,
        output=ran.output,
        connections=ran.connections,
        errors=agent.provider.errors,
        changed=bool(changed.patch),
        seconds=ran.seconds,
    )
    allowed = [one for one in ran.connections if one.allowed]
    refused = [f"{one.host}:{one.port}" for one in ran.connections if not one.allowed]
    found = record.Run(
        assay=assay.__version__,
        task=record.Named(order.task.task.name, order.task.digest),
        agent=record.Named(agent.name, order.agent.digest),
        prompt=record.PromptFacts(
            order.prompt.template, order.prompt.digest, order.prompt.level, list(order.prompt.tells)
        ),
        number=order.number,
        started=started,
        outcome=outcome,
        words=words,
        status=ran.status,
        left_running=ran.left,
        used=record.UsedFacts(round(ran.seconds, 3), ran.used.tokens, ran.used.money),
        network=record.NetworkFacts(
            len(allowed), sum(one.sent for one in allowed), sum(one.received for one in allowed), refused
        ),
        patch=record.ChangedFacts(
            hashlib.sha256(changed.patch).hexdigest()[:16],
            len(changed.patch),
            list(changed.files),
            list(changed.left),
            list(changed.refused),
        ),
        redacted=record.Redacted(changed.redacted, in_output, in_network, in_kept),
        kept=kept,
    )
    text = redactor.clean_text(json.dumps(asdict(found)))
    cleaned: dict[str, Any] = json.loads(text)
    return cleaned


def limited(agent: Read, seconds: float | None) -> Read:
    """The agent with less time than its template gives it, if `seconds` says so."""
    if seconds is None or seconds >= agent.agent.budget.seconds:
        return agent
    budget = replace(agent.agent.budget, seconds=seconds)
    digest = hashlib.sha256(f"{agent.digest} {seconds}".encode()).hexdigest()[:16]
    return Read(replace(agent.agent, budget=budget), agent.file, digest, agent.given)
