"""Work shared among processes: a compiler takes up to seconds for a kernel, and a core for each."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Lock, local
from typing import Any


def in_processes(
    target: str, tasks: Sequence[tuple[Any, ...]], jobs: int, done: Callable[[], object] = lambda: None
) -> None:
    """Calls `target` ("module:function") with each task's arguments, which JSON can hold, in at most `jobs` processes.

    `done` is called after each. An interrupt, or a call that fails (RuntimeError with its words), ends all processes.
    """
    if not tasks:
        return
    pool = _Processes(target)
    threads = ThreadPoolExecutor(min(jobs, len(tasks)))
    try:
        for made in as_completed([threads.submit(pool.call, task) for task in tasks]):
            made.result()
            done()
    finally:
        pool.end()
        threads.shutdown(cancel_futures=True)


class _Processes:
    """A process for each thread that asks for one."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._mine = local()
        self._all: list[subprocess.Popen[str]] = []
        self._lock, self._ended = Lock(), False

    def call(self, task: tuple[Any, ...]) -> None:
        process = getattr(self._mine, "process", None) or self._begin()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            said = process.stdout.readline()
        except (BrokenPipeError, ValueError):  # it has ended, or was ended
            said = ""
        if not said:
            raise RuntimeError(f"a process for {self._target} has ended with status {process.wait()}")
        problem = json.loads(said)
        if problem:
            raise RuntimeError(problem)

    def _begin(self) -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
        code = f"from moeyard.dispatch.processes import serve; serve({self._target!r})"
        with self._lock:  # what began after the end would stay
            if self._ended:
                raise RuntimeError("the processes have ended")
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                start_new_session=True,  # an interrupt from a terminal is the parent's to answer
            )  # fmt: skip
            self._all.append(process)
        self._mine.process = process
        return process

    def end(self) -> None:
        """Ends all processes, whatever they do."""
        with self._lock:
            self._ended = True
        for process in self._all:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def serve(target: str) -> None:
    """Calls a function with arguments that come as lines of JSON, until there are no more; answers each with what went
    wrong, or "".
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed goes elsewhere
    module, name = target.split(":")
    for line in sys.stdin:
        problem = ""
        try:
            getattr(importlib.import_module(module), name)(*json.loads(line))
        except Exception as failure:  # the parent raises it
            problem = f"{type(failure).__name__}: {failure}"
        print(json.dumps(problem), file=answers, flush=True)
