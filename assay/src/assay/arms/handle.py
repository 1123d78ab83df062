"""The judge's side of a worker: starts it, sends requests, times from before the input can be read to the last byte."""

import marshal
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from assay.arms.channel import Channel
from assay.arms.inside.wire import HEAD, frame
from assay.arms.process import PYTHON, Running, Wrap
from assay.arms.sandbox import INSIDE
from assay.arms.trees import Trees
from assay.contract import traces
from assay.contract.box import Limits
from assay.contract.errors import ArmError
from assay.contract.workload import Workload

_OPTIONS = ("kind", "target", "chain", "links", "clock", "graph", "case", "paths")
MOST_BYTES, _MOST_WORDS, _WORDS = 1 << 32, 1 << 20, 2000
"""Of a reply: a worker shall not make the judge run out of memory."""


def _last(printed: bytes) -> str:
    """The end of what a worker said, a line per traceback."""
    return traces.brief(printed.decode(errors="replace")).strip()[-_WORDS:]


def _mark() -> bytes:
    """A request's own, which nobody can know before."""
    return os.urandom(8)


@dataclass(frozen=True)
class Reply:
    """What came back, and when."""

    seconds: float
    """On the judge's clock."""
    inner: float
    """What the worker says: evidence, or the figure itself if its clock is the declared one."""
    body: bytes | bytearray
    at: float = 0.0
    """The judge's clock when its last byte had come."""


class Worker:
    """A fresh interpreter that has loaded the workload from its tree."""

    def __init__(
        self,
        arm: str,
        workload: Workload,
        tree: Path,
        place: Path,
        environment: dict[str, str],
        *,
        timeout_s: float,
        namespaces: bool,
        wrap: Wrap | None = None,
        limits: Limits | None = None,
        makes_inputs: bool = False,
        weighs: bool = False,
        prefix: Sequence[str] = (),
    ) -> None:
        """Starts and loads; only who `makes_inputs` is told of their function. ArmError with the worker's own words.

        `prefix`: a program that starts it (counters.py), with its arguments.
        """
        self.arm, self.timeout_s = arm, timeout_s
        self.log: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        try:
            self.channel = Channel(arm, timeout_s)
        except ArmError:
            self.log.close()
            raise
        worker = place.parent / "worker.py" if wrap else INSIDE / "worker.py"
        try:
            self.running = Running(
                arm,
                [*prefix, workload.python or PYTHON, str(worker)],
                tree,
                place,
                environment,
                log=self.log.fileno(),
                fds=self.channel.theirs,
                namespaces=namespaces,
                wrap=wrap,
                limits=limits,
                weighs=weighs,
            )
        finally:
            self.channel.started()
        self.started = self.running.release()
        # Nothing of what is done with it: how often it is called, in which turns, with which tolerances.
        options: dict[str, object] = {name: getattr(workload, name) for name in _OPTIONS}
        options |= {"compare": workload.compares, "inputs": workload.inputs if makes_inputs else ""}
        try:
            self.import_s = self.ask(b"l", 0, [marshal.dumps(options)]).seconds
        except ArmError:
            self.end()
            raise

    def ask(
        self,
        letter: bytes,
        number: float = 0.0,
        body: Sequence[bytes | bytearray | memoryview] = (),
        most: int = MOST_BYTES,
    ) -> Reply:
        """One request and its reply. Raises ArmError if the worker dies, is too late, or reports an error.

        A reply of more than `most` bytes is not read, nor an error of more than a mebibyte.

        It is `tampered` for what worker.py never sends: a reply to another request than this one, a time that is none.
        """
        mark = _mark()
        data = frame(letter, number, mark, [bytes(part) if isinstance(part, bytearray) else part for part in body])
        whole = b"".join(data)
        self.running.watch_in_time()
        stop = time.monotonic() + self.timeout_s
        start = time.perf_counter()
        try:
            self.channel.write(whole, self.running, stop)
            head = self.channel.read(HEAD.size, self.running, stop)
            size, kind, inner, marked = HEAD.unpack(head)
            if marked != mark or kind not in (b"r", b"x"):
                raise ArmError(self.arm, "sent a reply that was not asked for", tampered=True)
            if not 0 <= inner < math.inf:
                raise ArmError(self.arm, f"said that something took {inner:g} s", tampered=True)
            allowed = most if kind == b"r" else min(most, _MOST_WORDS)
            if size > allowed:
                raise ArmError(self.arm, f"announced a reply of {size} bytes, more than {allowed}")
            reply = self.channel.read(size, self.running, stop)
        except (BrokenPipeError, EOFError):
            raise self._last_words() from None
        end = time.perf_counter()
        if kind != b"r":
            raise ArmError(self.arm, _last(bytes(reply)))
        return Reply(end - start, inner, reply, end)

    def _last_words(self) -> ArmError:
        try:
            problem = ArmError(self.arm, f"ended with status {self.running.wait(1).status}")
        except ArmError as seen:
            problem = seen
        self.log.seek(0)
        words = f"{problem.words}: {_last(self.log.read())}"
        return ArmError(self.arm, words, killed=problem.killed, infra=problem.infra)

    def finish(self, timeout_s: float) -> str:
        """Lets it end by itself; all that it and its `prefix` have printed. ArmError if it does not end so in time."""
        self.channel.end_writing()
        status = self.running.wait(timeout_s).status
        self.log.seek(0)
        printed = self.log.read().decode(errors="replace")
        if status:
            raise ArmError(self.arm, f"ended with status {status}: {printed[-2000:].strip()}")
        return printed

    def end(self) -> None:
        """Kills it and whatever it started."""
        self.running.end()
        self.channel.close()
        self.log.close()


def started(
    arm: str,
    workload: Workload,
    trees: Trees,
    hash_seed: int,
    timeout_s: float,
    *,
    makes_inputs: bool = False,
    weighs: bool = False,
    prefix: Sequence[str] = (),
) -> Worker:
    """A worker in an arm's tree, which has loaded the workload. ArmError if it cannot."""
    return Worker(
        arm,
        workload,
        trees.trees[arm],
        trees.place(arm),
        trees.environment(arm, hash_seed),
        timeout_s=timeout_s,
        namespaces=trees.namespaces,
        wrap=trees.wrap(arm),
        limits=trees.limits(arm),
        makes_inputs=makes_inputs,
        weighs=weighs,
        prefix=prefix,
    )
