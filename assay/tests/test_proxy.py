"""The judge's proxy: named hosts alone, however they are asked for; what it notes; that it dies with its judge."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from assay.agents.proxy import Connection, rows, serving, split
from small_project import environment


@contextlib.contextmanager
def upstream(answer: bytes = b"") -> Iterator[int]:
    """A server that answers each connection's first bytes; without an answer it says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    got = client.recv(65536)
                    if answer:
                        client.sendall(answer.replace(b"GOT", got.split(b"\r\n")[0]))
                        client.close()
                    else:
                        kept.append(client)

        kept: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


def asked(proxy: Path, text: bytes, *, timeout: float = 5.0) -> bytes:
    """What comes back on one connection."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(timeout)
        client.connect(str(proxy))
        client.sendall(text)
        found = b""
        with contextlib.suppress(TimeoutError):
            while data := client.recv(65536):
                found += data
        return found


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "s", tmp_path / "log"


def test_named_hosts_alone(place: tuple[Path, Path]) -> None:
    with (
        upstream(b"HTTP/1.1 200 OK\r\n\r\nGOT") as port,
        upstream(b"never") as other,
        serving(place[0], [f"127.0.0.1:{port}"], place[1]),
    ):
        there, elsewhere = f"127.0.0.1:{port}", f"127.0.0.1:{other}"
        plain = asked(place[0], f"GET http://{there}/a/b?c HTTP/1.1\r\nHost: {there}\r\n\r\n".encode())
        assert plain == b"HTTP/1.1 200 OK\r\n\r\nGET /a/b?c HTTP/1.1"
        tunnel = asked(place[0], f"CONNECT {there} HTTP/1.1\r\n\r\nhello\r\n".encode())
        assert tunnel == b"HTTP/1.1 200 Connection established\r\n\r\nHTTP/1.1 200 OK\r\n\r\nhello"
        refused = [
            f"CONNECT {elsewhere} HTTP/1.1\r\n\r\n",
            f"GET http://{elsewhere}/ HTTP/1.1\r\nHost: {there}\r\n\r\n",
            f"CONNECT localhost:{port} HTTP/1.1\r\n\r\n",
            f"CONNECT 127.1:{port} HTTP/1.1\r\n\r\n",
            f"CONNECT [::1]:{port} HTTP/1.1\r\n\r\n",
            f"GET http://{there}@evil.example/ HTTP/1.1\r\n\r\n",
            "CONNECT evil.example:443 HTTP/1.1\r\n\r\n",
        ]
        for text in refused:
            assert b" 40" in asked(place[0], text.encode())[:16], text
        for text in (
            "CONNECT\r\n\r\n",
            f"GET {there} HTTP/1.1\r\n\r\n",
            "CONNECT a:b HTTP/1.1\r\n\r\n",
            "\r\n\r\n",
        ):
            assert asked(place[0], text.encode()).startswith(b"HTTP/1.1 400"), text
    found = rows(place[1])
    assert [one.allowed for one in found] == [True, True] + [False] * 6
    assert [(one.way, one.status) for one in found[:2]] == [("plain", 200), ("connect", None)]
    assert all(one.words == "not among the template's hosts" and not one.sent for one in found[2:])
    assert found[1].sent == 7 and found[1].received > 20


def test_names_are_compared_in_small_letters(place: tuple[Path, Path]) -> None:
    with upstream(b"yes") as port, serving(place[0], [f"LocalHost:{port}"], place[1]):
        assert asked(place[0], f"CONNECT LOCALHOST:{port} HTTP/1.1\r\n\r\nx".encode()).endswith(b"yes")


@pytest.mark.parametrize("status", [429, 500, 401])
def test_what_a_provider_answered(status: int, place: tuple[Path, Path]) -> None:
    answer = f"HTTP/1.1 {status} No\r\n\r\n".encode()
    with upstream(answer) as port, serving(place[0], [f"127.0.0.1:{port}"], place[1]):
        asked(place[0], f"POST http://127.0.0.1:{port}/ HTTP/1.1\r\n\r\n".encode())
    assert [one.status for one in rows(place[1])] == [status]


def test_a_host_that_says_nothing_and_one_that_is_not_there(place: tuple[Path, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        closed = gone.getsockname()[1]
    with upstream() as port, serving(place[0], [f"127.0.0.1:{port}", f"127.0.0.1:{closed}"], place[1]):
        asked(place[0], f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n{'x' * 500}".encode(), timeout=0.5)
        asked(place[0], f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\nack".encode(), timeout=0.3)
        assert b" 502 " in asked(place[0], f"CONNECT 127.0.0.1:{closed} HTTP/1.1\r\n\r\n".encode())
        with socket.socket(socket.AF_UNIX) as left:
            left.connect(str(place[0]))
            left.sendall(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n{'x' * 500}".encode())
            time.sleep(0.5)
    silent = sorted(one.silent_s for one in rows(place[1]))
    assert len(silent) == 4 and silent[:2] == [0, 0] and min(silent[2:]) >= 0.4
    assert [one.words.partition(":")[0] for one in rows(place[1]) if one.words] == ["cannot be reached"]


def test_a_torn_last_line(tmp_path: Path) -> None:
    one = Connection("h", 1, "plain", True, 0.0)
    (tmp_path / "log").write_text('{"host": "h", "port": 1, "way": "plain", "allowed": true, "at": 0.0}\n{"ho')
    assert rows(tmp_path / "log") == [one] and rows(tmp_path / "nothing") == []


@pytest.mark.parametrize("text", ["", "a", ":1", "a:0", "a:65536", "a b:1", "http://a:1", "a:1:2"])
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(ValueError, match="expected host:port, got"):
        split(text)


def test_it_dies_with_its_judge(place: tuple[Path, Path]) -> None:
    code = f"""
import sys, time
from pathlib import Path
from assay.agents.proxy import serving
with serving(Path({str(place[0])!r}), [], Path({str(place[1])!r})):
    print("up", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment()) as judge:
        assert judge.stdout is not None and judge.stdout.readline() == "up\n"
        (child,) = (int(one) for one in Path(f"/proc/{judge.pid}/task/{judge.pid}/children").read_text().split())
        judge.send_signal(signal.SIGKILL)
    stop = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split():
        assert time.monotonic() < stop
        time.sleep(0.02)
    assert place[0].exists()
