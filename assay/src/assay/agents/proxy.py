"""The judge's end of an agent's only way out: a CONNECT proxy on a Unix socket that lets through named hosts.

It runs as a process of its own beside the judge, dies with it, and writes a line of JSON per connection: which host,
whether it was let through, how many bytes went each way, and, for plain HTTP, the reply's status. It never writes what
was sent.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import assay

_MOST_HEAD, _MOST, _CONNECT_S, _HEAD_S = 1 << 16, 1 << 16, 30.0, 60.0
_PDEATHSIG = 1
_LEAST_REQUEST = 256
"""Bytes without an answer that are a request: acknowledgements inside a tunnel are shorter."""
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_HOST = re.compile(r"^(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+)):(\d{1,5})$")


@dataclass
class Connection:
    """One connection, as its row of the log tells it."""

    host: str
    port: int
    way: str
    """`connect`, or `plain` for a request that the proxy forwards itself."""
    allowed: bool
    at: float
    """Seconds since the proxy began."""
    words: str = ""
    """Why it failed, if it did."""
    status: int | None = None
    """Of a plain reply."""
    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    silent_s: float = 0.0
    """How long the host had said nothing to a request when the connection ended."""


def split(text: str) -> tuple[str, int]:
    """`host:port` as its parts, the name in small letters. ValueError says what is wrong."""
    found = _HOST.match(text)
    port = int(found[3]) if found else 0
    if found is None or not 0 < port < 1 << 16:
        raise ValueError(f"expected host:port, got {text!r}")
    return (found[1] or found[2]).lower(), port


@contextlib.contextmanager
def serving(socket: Path, hosts: Sequence[str], log: Path) -> Iterator[None]:
    """A proxy on `socket` that lets through `hosts` (host:port), with its log in a file. OSError if it cannot start."""
    # A socket's whole path may have no more than 107 bytes, so the proxy stands in its folder.
    order = json.dumps({"socket": socket.name, "hosts": list(hosts), "log": str(log.resolve()), "parent": os.getpid()})
    path = os.pathsep.join([str(Path(assay.__file__).parents[1]), *sys.path])
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    process = subprocess.Popen(
        [sys.executable, "-m", "assay.agents.proxy"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=socket.parent,
        env={**environment, "PYTHONPATH": path},
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(order.encode())
        process.stdin.close()
        if process.stdout.readline() != b"ready\n":
            raise OSError(f"proxy: expected it to serve {socket}, got status {process.wait()}")
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def rows(log: Path) -> list[Connection]:
    """What a proxy wrote, in the order of ends; a torn last line is left out."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [Connection(**json.loads(line)) for line in lines]


@dataclass
class _Flow:
    """What is known of an open connection."""

    one: Connection
    begun: float
    said: float
    """When a byte last went either way."""
    pending: int = 0
    """Bytes sent since the host last said something."""


@dataclass
class _Proxy:
    hosts: frozenset[tuple[str, int]]
    log: TextIO
    begun: float = field(default_factory=time.monotonic)
    open: dict[int, _Flow] = field(default_factory=dict)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from the sandbox, from its head to its end."""
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _HEAD_S)
            await self.answer(head, reader, writer)
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _, rest = head.partition(b"\r\n")
        parts = line.decode("latin-1").split(" ")
        way = "connect" if parts[0] == "CONNECT" else "plain"
        try:
            method, target, _ = parts
            place = target if way == "connect" else target.split("/")[2]
            if way == "plain" and not target.startswith("http://"):
                raise ValueError(f"expected CONNECT or http://, got {target!r}")
            host, port = split(place if way == "connect" or ":" in place else f"{place}:80")
        except (ValueError, IndexError):
            writer.write(_reply(400, "Bad Request"))
            return
        now = time.monotonic()
        one = Connection(host, port, way, (host, port) in self.hosts, round(now - self.begun, 3))
        flow = self.open[id(one)] = _Flow(one, now, now)
        try:
            if not one.allowed:
                one.words = "not among the template's hosts"
                writer.write(_reply(403, "Forbidden"))
                return
            try:
                there, upstream = await asyncio.wait_for(asyncio.open_connection(host, port), _CONNECT_S)
            except (OSError, TimeoutError) as problem:
                one.words = f"cannot be reached: {problem or 'no answer'}"
                writer.write(_reply(502, "Bad Gateway"))
                return
            if way == "connect":
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                path = "/" + "/".join(target.split("/")[3:])
                upstream.write(f"{method} {path} HTTP/1.1\r\n".encode("latin-1") + _closing(rest))
                one.sent += len(head)
                flow.pending += len(head)
            try:
                tasks = [
                    asyncio.ensure_future(self.carry(reader, upstream, flow, up=True)),
                    asyncio.ensure_future(self.carry(there, writer, flow, up=False)),
                ]
                # A client of plain HTTP that says no more has gone; in a tunnel each side may end on its own.
                await asyncio.wait(tasks, return_when="FIRST_COMPLETED" if way == "plain" else "ALL_COMPLETED")
                for task in tasks:
                    task.cancel()
            finally:
                upstream.close()
        finally:
            self.tell(flow)

    async def carry(self, source: asyncio.StreamReader, to: asyncio.StreamWriter, flow: _Flow, *, up: bool) -> None:
        """Bytes one way, counted, until their end."""
        one = flow.one
        with contextlib.suppress(ConnectionError):
            while data := await source.read(_MOST):
                flow.said = time.monotonic()
                if up:
                    one.sent += len(data)
                    flow.pending += len(data)
                else:
                    flow.pending = 0
                    if one.way == "plain" and not one.received and (found := _STATUS.match(data)):
                        one.status = int(found[1])
                    one.received += len(data)
                to.write(data)
                await to.drain()
            if to.can_write_eof() and (one.way == "connect" or not up):
                to.write_eof()

    def tell(self, flow: _Flow) -> None:
        """Writes a connection's row, once."""
        one = flow.one
        if self.open.pop(id(one), None) is None:
            return
        now = time.monotonic()
        one.seconds = round(now - flow.begun, 3)
        one.silent_s = round(now - flow.said, 3) if flow.pending >= _LEAST_REQUEST else 0.0
        self.log.write(json.dumps(asdict(one)) + "\n")
        self.log.flush()

    async def serve(self, socket: str) -> None:
        """Until it is told to end; connections that are open then get their rows, too."""
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        server = await asyncio.start_unix_server(self.accept, socket, limit=_MOST_HEAD)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await stop.wait()
        server.close()
        for flow in list(self.open.values()):
            self.tell(flow)


def _closing(rest: bytes) -> bytes:
    """A request's header lines without those that are between it and the proxy: one request per connection."""
    lines = rest.split(b"\r\n")[:-2]
    between = (b"connection", b"proxy-connection", b"proxy-authorization")
    kept = [line for line in lines if line.partition(b":")[0].strip().lower() not in between]
    return b"".join(line + b"\r\n" for line in kept) + b"Connection: close\r\n\r\n"


def _reply(status: int, words: str) -> bytes:
    return f"HTTP/1.1 {status} {words}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


def main() -> None:
    """Reads its order from stdin and serves; dies with its parent."""
    order: dict[str, Any] = json.load(sys.stdin)
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != order["parent"]:
        os._exit(1)
    with Path(order["log"]).open("a") as log:
        asyncio.run(_Proxy(frozenset(map(split, order["hosts"])), log).serve(order["socket"]))
    os._exit(0)  # whoever is still being carried has his row


if __name__ == "__main__":
    main()
