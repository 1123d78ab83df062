"""Calls a function from a program that nobody has seen before, and asks for outputs and arguments only afterwards.

A patch can know assay's worker, replace it, and say that arguments are what they were. It cannot know this program:
names in it are drawn, it loads nothing of assay's, and what reads its values is sent when all calls are over. To such
a caller a function shows what it shows to anybody.
"""

import json
import marshal
import secrets
import tempfile
import time
from collections.abc import Sequence
from typing import Any, BinaryIO

from assay.arms.channel import Channel
from assay.arms.inside.wire import decode
from assay.arms.process import PYTHON, Running
from assay.arms.sandbox import INSIDE
from assay.arms.trees import Trees
from assay.contract import traces
from assay.contract.errors import ArmError
from assay.contract.workload import Workload

_BOOT = "import marshal; {0} = open(3, 'rb'); exec(marshal.load({0}))"
_DONE, _SIZE, _WORDS = b"!", 8, 2000
_MOST = 1 << 30
"""Bytes of a value that are read."""
_CALLED = """
import os, sys
sys.path[:1] = [os.path.abspath(path) for path in {paths!r} if os.path.isdir(path)]
{imports}
{data} = marshal.load({source})
{given} = [{values}]
{outputs} = [{function}({stars}one) for one in {given}]
os.write(4, {done!r})
exec(marshal.load({source}))
"""
_FILE = """
import importlib.util
{file} = os.path.realpath({place!r})
{name} = importlib.util.spec_from_file_location({stem!r}, {file})
sys.path.append(os.path.dirname({file}))
{function} = sys.modules[{stem!r}] = importlib.util.module_from_spec({name})
{name}.loader.exec_module({function})
"""
_SENDS = """
for pair in zip({outputs}, {given}):
    for one in pair:
        data = b"".join(encode(one))
        data = len(data).to_bytes({size}, "little") + data
        while data: data = data[os.write(4, data):]
"""


class Stranger:
    """A process that calls a workload's function with each of some inputs, and ends."""

    def __init__(
        self, arm: str, workload: Workload, trees: Trees, hash_seed: int, timeout_s: float, given: Sequence[bytes]
    ) -> None:
        """Starts it; `given`: inputs as the wire holds them. ArmError if it cannot be started."""
        self.arm, self.workload, self.given, self.timeout_s = arm, workload, given, timeout_s
        self.names = _Names()
        self.log: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        try:
            self.channel = Channel(arm, timeout_s)
        except ArmError:
            self.log.close()
            raise
        try:
            self.running = Running(
                arm,
                [workload.python or PYTHON, "-c", _BOOT.format(self.names["source"])],
                trees.trees[arm],
                trees.place(arm),
                trees.environment(arm, hash_seed),
                log=self.log.fileno(),
                fds=self.channel.theirs,
                namespaces=trees.namespaces,
                wrap=trees.wrap(arm),
                limits=trees.limits(arm),
            )
        finally:
            self.channel.started()

    def answers(self) -> list[tuple[bytes, bytes]]:
        """Of each call the output, and the arguments as they are when all calls are over. ArmError if there are none.

        What the process sends may be no value.
        """
        stop = time.monotonic() + self.timeout_s
        self.running.release()
        try:
            values, data = _written(self.given, self.names["data"])
            self.channel.write(marshal.dumps(self._calling(values)), self.running, stop)
            self.channel.write(marshal.dumps(data), self.running, stop)
            if bytes(self.channel.read(1, self.running, stop)) != _DONE:
                raise ArmError(self.arm, "sent what was not asked for", tampered=True)
            self.channel.write(marshal.dumps(self._sending()), self.running, stop)
            return [(self._value(stop), self._value(stop)) for _ in self.given]
        except (BrokenPipeError, EOFError):
            raise self._last_words() from None

    def _value(self, stop: float) -> bytes:
        size = int.from_bytes(self.channel.read(_SIZE, self.running, stop), "little")
        if size > _MOST:
            raise ArmError(self.arm, f"announced a value of {size} bytes, more than {_MOST}")
        return bytes(self.channel.read(size, self.running, stop))

    def _calling(self, values: str) -> str:
        """The program up to the end of the calls."""
        place, _, path = self.workload.target.partition(":")
        if place.endswith(".py"):
            stem = place.rpartition("/")[2].removesuffix(".py")
            own = {"name": self.names["spec"], "file": self.names["file"], "function": self.names["function"]}
            imports = _FILE.format(stem=stem, place=place, **own)
            imports += f"{self.names['function']} = {self.names['function']}.{path}"
        else:
            imports = f"import {place}\n{self.names['function']} = sys.modules[{place!r}].{path}"
        keywords = self.given and isinstance(decode(self.given[0]), dict)
        return _CALLED.format(
            paths=self.workload.paths,
            imports=imports,
            values=values,
            stars="**" if keywords else "*",
            done=_DONE,
            **{name: self.names[name] for name in ("source", "data", "given", "outputs", "function")},
        )

    def _sending(self) -> str:
        """The rest of it."""
        names = {name: self.names[name] for name in ("outputs", "given")}
        return (INSIDE / "wire.py").read_text() + "import os\n" + _SENDS.format(size=_SIZE, **names)

    def _last_words(self) -> ArmError:
        try:
            problem = ArmError(self.arm, f"ended with status {self.running.wait(1).status}")
        except ArmError as seen:
            problem = seen
        self.log.seek(0)
        words = traces.brief(self.log.read().decode(errors="replace")).strip()[-_WORDS:]
        return ArmError(self.arm, f"{problem.words}: {words}", killed=problem.killed, infra=problem.infra)

    def end(self) -> None:
        """Kills it and whatever it started."""
        self.running.end()
        self.channel.close()
        self.log.close()


class _Names(dict[str, str]):
    """Names of the program's variables, which nobody can know before."""

    def __missing__(self, name: str) -> str:
        return self.setdefault(name, f"_{secrets.token_hex(6)}")


def _written(given: Sequence[bytes], data: str) -> tuple[str, bytes]:
    """Inputs as the text of a program's values, which read their arrays from `data`, and that data."""
    parts, texts, at = [], [], 0
    for body in given:
        size, _, rest = body.partition(b"\n")
        tree, raw = json.loads(rest[: int(size)]), rest[int(size) :]
        text = _Text(data, at)
        value = text.of(tree)
        texts.append(value if _is(tree, "tuple", "dict") else f"({value},)")
        parts.append(raw)
        at += len(raw)
    return ", ".join(texts), b"".join(parts)


def _is(node: Any, *kinds: str) -> bool:
    return isinstance(node, dict) and node["!"] in kinds


class _Text:
    """Python's text of one value on the wire; its arrays follow each other in `data`."""

    def __init__(self, data: str, at: int) -> None:
        self.data, self.at = data, at

    def of(self, node: Any) -> str:
        if not isinstance(node, dict):
            return f"float('{node}')" if isinstance(node, float) else repr(node)
        kind = node["!"]
        if kind in ("list", "tuple"):
            inner = "".join(f"{self.of(one)}, " for one in node["of"])
            return f"[{inner}]" if kind == "list" else f"({inner})"
        if kind == "dict":
            return "{" + "".join(f"{self.of(key)}: {self.of(one)}, " for key, one in node["of"]) + "}"
        raw = f"{self.data}[{self.at}:{self.at + node['size']}]"
        self.at += node["size"]
        if kind == "bytes":
            return raw
        if kind == "array":
            return f"__import__('numpy').frombuffer({raw}, {node['dtype']!r}).reshape({node['shape']}).copy()"
        flat = f"__import__('torch').tensor(list({raw}), dtype=__import__('torch').uint8)"
        if node["size"]:
            flat = f"__import__('torch').frombuffer(bytearray({raw}), dtype=__import__('torch').uint8)"
        return f"{flat}.view(__import__('torch').{node['dtype']}).reshape({node['shape']}).to({node['on']!r})"
