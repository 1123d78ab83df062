"""In an agent's sandbox: a port of its loopback leads to the judge's proxy, and nowhere else. Standard library only.

Started by its path: SOCKET PORT PROGRAM ARGUMENTS. Descriptor 3 holds a JSON object of environment variables, which
stand on no command line. The program runs until its end, whose status becomes this process's own.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Sequence

_MOST = 1 << 16


def main(arguments: Sequence[str]) -> int:
    """The program's exit status; 128 and the signal's number if a signal ended it; 127 if it cannot be started."""
    path, port, command = arguments[0], int(arguments[1]), list(arguments[2:])
    with os.fdopen(3, "rb") as given:
        more = json.load(given)
    listening = socket.create_server(("127.0.0.1", port))
    child = os.fork()
    if child == 0:
        listening.close()
        try:
            os.execvpe(command[0], command, {**os.environ, **more})  # noqa: S606 - that is what it is for
        except OSError as problem:
            os.write(2, f"assay: cannot start {command[0]}: {problem.strerror}\n".encode())
        os._exit(127)
    more.clear()
    threading.Thread(target=_serve, args=(listening, path), daemon=True).start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


def _serve(listening: socket.socket, path: str) -> None:
    while True:
        client, _ = listening.accept()
        threading.Thread(target=_join, args=(client, path), daemon=True).start()


def _join(client: socket.socket, path: str) -> None:
    """Carries bytes both ways until both ends have said all."""
    with client, socket.socket(socket.AF_UNIX) as judge:
        try:
            judge.connect(path)
        except OSError:
            return
        back = threading.Thread(target=_carry, args=(judge, client), daemon=True)
        back.start()
        _carry(client, judge)
        back.join()


def _carry(source: socket.socket, to: socket.socket) -> None:
    try:
        while data := source.recv(_MOST):
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)
    except OSError:
        for one in (source, to):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)
