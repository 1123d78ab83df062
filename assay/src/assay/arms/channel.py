"""Two pipes between the judge and a process of an arm. Nobody waits at them without a look at what the arm uses."""

import fcntl
import os
import select
import time

from assay.arms.process import Running
from assay.contract.errors import ArmError

_SIZE, _SET_SIZE = 1 << 20, 1031


class Channel:
    """The judge's ends; `theirs` are to become descriptors 3, to read from, and 4, to write to, in the process."""

    def __init__(self, arm: str, timeout_s: float) -> None:
        """Makes both pipes. ArmError if none of their size is to be had. `timeout_s` is what errors tell."""
        self.arm, self.timeout_s = arm, timeout_s
        there, self._out = os.pipe()
        self._in, back = os.pipe()
        self.theirs = (there, back)
        try:
            for fd in self.theirs:
                fcntl.fcntl(fd, _SET_SIZE, _SIZE)
        except OSError as problem:  # a user's pages for pipes are counted: somebody has taken them all
            self.started()
            self.close()
            words = f"no pipe of {_SIZE} bytes is to be had: {problem.strerror}"
            raise ArmError(arm, words, infra=True) from None
        os.set_blocking(self._out, False)
        os.set_blocking(self._in, False)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(self._in, select.POLLIN)
        self._writable.register(self._out, select.POLLOUT)

    def started(self) -> None:
        """The process has its ends, or never will: the judge's copies of them are closed."""
        for fd in self.theirs:
            os.close(fd)

    def write(self, data: bytes | memoryview, running: Running, stop: float) -> None:
        """All of it; BrokenPipeError if nobody reads any more, ArmError if it is `stop` on the monotonic clock."""
        whole = memoryview(data)
        while whole:
            try:
                whole = whole[os.write(self._out, whole) :]
            except BlockingIOError:
                self._wait(self._writable, running, stop)

    def read(self, size: int, running: Running, stop: float) -> bytearray:
        """So many bytes; EOFError if there will not be so many, ArmError if it is `stop`."""
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            try:
                count = os.readv(self._in, [view[got:]])
            except BlockingIOError:
                self._wait(self._readable, running, stop)
                continue
            if count == 0:
                raise EOFError
            got += count
        return data

    def _wait(self, poller: "select.poll", running: Running, stop: float) -> None:
        while not poller.poll(running.every_s * 1000):
            running.watch()
            if time.monotonic() > stop:
                raise ArmError(self.arm, f"did not answer within {self.timeout_s:g} s", killed=True)

    def end_writing(self) -> None:
        """So that the process sees the end of what it reads."""
        if self._out >= 0:
            os.close(self._out)
            self._out = -1

    def close(self) -> None:
        """Both of the judge's ends."""
        self.end_writing()
        os.close(self._in)
