"""Runs inside an arm: loads the callable and answers one request at a time. Started as a script, by its path.

Standard library only, and little of it before it is needed: every sample starts an interpreter. It knows neither its
arm nor the clock. Requests come on descriptor 3, replies go to 4, as frames (wire.py); a letter says what is wanted:

l  load the workload                        m  make an input from a seed
i  keep an input for later calls            e  echo: decode the input, answer with the kept output
c  call with the input in the frame         g  call with the kept input, so often as the frame's number says
k  keep this output for echoes              p  nothing: to see it awake
n  count the interpreter's instructions of a call with the input in the frame (counting.py)
s  seconds of a copy of arguments and output for each call of a request
t  combinations of parameters that the benchmark has, as texts
a  the last call's input as it is now; of a chain, the last link's
w  walk: a loop of calls whose inputs are sealed (sealed.py)
b  base alone: seal inputs, made from the seeds in the frame, so many per request
o  an earlier call's output as it is now, by how many calls ago: 0 is the last
z  overwrite the last call's input, then as `o` with 0
"""

from __future__ import annotations

import marshal
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def _load(name: str, folder: str) -> Any:
    """A module beside this file; the folder does not stay on the path, where its names could hide others."""
    sys.path.insert(0, folder)
    found = __import__(name)
    del sys.path[0], sys.modules[name]
    return found


def find(name: str) -> Any:
    """What `module:path.to.attribute` or `file.py:path.to.attribute` names."""
    place, _, path = name.partition(":")
    if place.endswith(".py"):
        found = _file(name, os.path.realpath(place))
    else:
        __import__(place)
        found = sys.modules[place]
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _file(name: str, file: str) -> Any:
    """A module from a file that need not be on the path; once, however often it is named."""
    from importlib.util import module_from_spec, spec_from_file_location

    stem = os.path.basename(file).removesuffix(".py")
    found = sys.modules.get(stem)
    if found is not None and getattr(found, "__file__", None) == file:
        return found
    spec = spec_from_file_location(stem, file)
    if spec is None or spec.loader is None or not os.path.isfile(file):
        raise FileNotFoundError(f"{name}: expected a Python file, found none at {file}")
    sys.path.append(os.path.dirname(file))
    found = sys.modules[stem] = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Workload:
    """The loaded callable, and what is kept between requests."""

    def __init__(
        self, wire: Any, folder: str, options: dict[str, Any], function: Callable[..., Any] | None = None
    ) -> None:
        import json  # noqa: F401 - for values; the first call is not to be charged with it

        self.wire, self.options = wire, options
        self.folder = folder
        self.module: Any = None
        kind, target = options["kind"], options["target"]
        self.function: Callable[..., Any]
        self.cases = [""]
        if function is not None:
            self.function = function
        elif kind == "asv":
            self.function, self.cases = _load("benchmarks", folder).asv(find, target, options["case"])
        elif kind == "pyperf":
            self.function = _load("benchmarks", folder).pyperf(target)
        else:
            self.function = find(target)
        self.inputs = find(options["inputs"]) if options["inputs"] else None
        self.next: Callable[[Any, Any], Any] | None = find(options["chain"]) if options["chain"] else None
        self.sends = bool(options["compare"])
        self.input: Any = ()
        self.last: Any = ()
        self.output: Any = None
        self.kept: list[Any] = []
        self.walked: list[Any] = []
        self.loops = 1

    def answer(self, letter: bytes, number: float, body: bytearray) -> tuple[float, Any]:
        """A number and the value to send back."""
        if letter in b"ci":
            self.input = self.last = self.wire.decode(body, tensors=True)
        if letter in b"cgw":
            start, inner = time.perf_counter(), 0.0
            if letter == b"w":
                output = self.walk(body)
            elif self.options["clock"] == "cuda":
                inner, output = self.on_device()
            else:
                output = self.repeated(int(number)) if letter == b"g" and number > 1 else self.call()
            seconds = inner or time.perf_counter() - start
            if self.sends:
                self.kept = [output, *self.kept[:1]]
            return seconds, output if self.sends else None
        if letter == b"a":
            return 0.0, self.last
        if letter in b"oz":
            if letter == b"z":
                overwrite(self.last)
            return 0.0, self.kept[int(number)]
        if letter == b"m":
            if self.inputs is None:
                return 0.0, ()
            return 0.0, self.inputs(int(number))
        if letter == b"n":
            given = self.wire.decode(body, tensors=True)
            return float(_load("counting", self.folder).counted(lambda: self.once(given))), None
        if letter == b"b":
            assert self.inputs is not None
            return 0.0, self.sealed().requests(self.inputs, self.function, *marshal.loads(body))
        if letter == b"e":
            if self.walked:
                self.sealed().again(self.walked, body)
                return 0.0, self.output
            self.wire.decode(body, tensors=True)
            if self.loops > 1 and self.sends:
                self.alike(marshal.dumps(self.output, 2), lambda: self.output)
            return 0.0, self.output
        if letter == b"t":
            return 0.0, self.cases
        if letter == b"k":
            self.output = self.wire.decode(body, tensors=True)
        return self.spared() if letter == b"s" else 0.0, None

    def call(self) -> Any:
        """Calls once, or a chain in which every input depends on the output before."""
        given = self.input
        output = self.once(given)
        links = self.options["links"]
        if links > 1:
            assert self.next is not None
            for _ in range(links - 1):
                given = self.next(given, output)
                output = self.once(given)
            self.last = given
        return output

    def sealed(self) -> Any:
        """The module sealed.py; few workloads need it."""
        self.module = self.module or _load("sealed", self.folder)
        return self.module

    def walk(self, body: bytearray) -> Any:
        """Calls in a loop whose inputs are sealed: how many, since a wrong output ends it, and the last output."""
        self.walked, self.last = self.sealed().walk(self.function, body)
        self.input = self.last
        return len(self.walked), self.walked[-1]

    def repeated(self, loops: int) -> Any:
        """So many calls with the kept input. ValueError if their outputs differ, where they are compared."""
        self.loops, output = loops, self.once(self.input)
        if self.sends:
            self.alike(marshal.dumps(output, 2), lambda: self.once(self.input))
        else:
            for _ in range(loops - 1):
                self.once(self.input)
        return output

    def alike(self, first: bytes, call: Callable[[], Any]) -> None:
        """The calls of a loop over one input but for its first; ValueError unless all give the output of that one."""
        for _ in range(self.loops - 1):
            if marshal.dumps(call(), 2) != first:
                raise ValueError("outputs: expected a loop over one input to give one output, got two that differ")

    def spared(self) -> float:
        """Seconds of a copy per call of the last request; all of a chain but one call is the judge's to count.

        A call that may not overwrite its arguments, and whose outputs last, can copy the former and has to make the
        latter. What that takes is what one spares that does not keep to it.
        """
        given, output = copier(self.last), copier(self.output)
        start = time.perf_counter()
        for _ in range(max(self.loops, len(self.walked))):
            given()
            output()
        return time.perf_counter() - start

    def once(self, given: Any) -> Any:
        """One call."""
        if isinstance(given, tuple):
            return self.function(*given)
        if isinstance(given, dict):
            return self.function(**given)
        return self.function(given)

    def on_device(self) -> tuple[float, Any]:
        """Seconds a call by CUDA events around all links, after one call that is not timed."""
        import torch

        links, graph = self.options["links"], None
        output = self.once(self.input)
        if self.options["graph"]:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(links):
                    output = self.once(self.input)
            graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        if graph is not None:
            graph.replay()
        else:
            for _ in range(links):
                output = self.once(self.input)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / links, output


def overwrite(value: Any) -> None:
    """Fills all arrays and tensors of a value with the byte 0x7f."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            overwrite(one)
    elif type(value).__module__ == "numpy" and value.nbytes and value.ndim:
        value.reshape(-1).view("uint8")[:] = 0x7F
    elif type(value).__module__ == "torch":
        value.view(-1).view(sys.modules["torch"].uint8).fill_(0x7F)


def copier(value: Any) -> Callable[[], Any]:
    """A function that copies a value, with all that can be written to; it need not look at what it copies."""
    if isinstance(value, (dict, list, tuple)):
        shallow: Any = dict if isinstance(value, dict) else list
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        inner = [(key, copier(one)) for key, one in pairs if not isinstance(one, (int, float, str, bytes, type(None)))]

        def copied() -> Any:
            found = shallow(value)
            for key, copy in inner:
                found[key] = copy()
            return found

        return copied
    name = {"numpy": "copy", "torch": "clone"}.get(type(value).__module__.partition(".")[0])
    copy: Callable[[], Any] = getattr(value, name) if name else lambda: value
    return copy


def serve(folder: str) -> None:
    """Answers until the judge closes the pipe."""
    wire = _load("wire", folder)
    with open(3, "rb", buffering=1 << 20) as requests, open(4, "wb", buffering=0) as replies:
        answers(wire, folder, requests, replies, None)


def answers(wire: Any, folder: str, requests: Any, replies: Any, workload: Workload | None) -> None:
    """Answers one request after another, with the workload once it is loaded."""
    while head := requests.read(wire.HEAD.size):
        size, letter, number, mark = wire.HEAD.unpack(head)
        body = bytearray(size)
        view, got = memoryview(body), 0
        while got < size:
            got += requests.readinto(view[got:])
        try:
            if letter == b"l":
                start = time.perf_counter()
                options = marshal.loads(body)
                sys.path[:0] = [os.path.abspath(path) for path in options["paths"] if os.path.isdir(path)]
                if options["kind"] == "pytest":
                    standing(wire, folder, requests, replies, options, mark)
                    return
                workload = Workload(wire, folder, options)
                reply = wire.frame(b"r", time.perf_counter() - start, mark, wire.encode(None))
            else:
                assert workload is not None
                seconds, value = workload.answer(letter, number, body)
                reply = wire.frame(b"r", seconds, mark, wire.encode(value))
        except Exception:
            import traceback

            words = traceback.format_exc().encode(errors="replace")
            reply = wire.frame(b"x", 0.0, mark, [words])
        send(replies, reply)


def standing(wire: Any, folder: str, requests: Any, replies: Any, options: dict[str, Any], mark: bytes) -> None:
    """Loads a benchmark of pytest and answers inside its test until nobody asks any more."""
    start, done = time.perf_counter(), []

    def loaded(function: Callable[[], Any]) -> None:
        send(replies, wire.frame(b"r", time.perf_counter() - start, mark, wire.encode(None)))
        done.append(True)
        answers(wire, folder, requests, replies, Workload(wire, folder, options, function))

    try:
        _load("benchmarks", folder).under_pytest(options["target"], loaded)
    except Exception:
        if not done:
            raise


def send(replies: Any, reply: list[Any]) -> None:
    """A frame, whole."""
    data = b"".join(reply) if len(reply) < 4 else None
    for part in reply if data is None else [data]:
        rest = memoryview(part).cast("B")
        while rest:
            rest = rest[os.write(replies.fileno(), rest) :]


if __name__ == "__main__":
    serve(sys.path.pop(0))
