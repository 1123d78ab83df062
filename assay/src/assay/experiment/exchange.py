"""What passes between judge and worker for a call: one protocol, while outputs are checked and while they are timed.

Half of all calls, drawn anew, are followed by questions. What are the arguments now? Are this output and the one before
it still what they were, and are they when the caller overwrites its arguments? A candidate that is right only while it
is asked them would have to know it at the time of the call.
"""

import random
import statistics
from dataclasses import dataclass

from assay.arms.handle import MOST_BYTES, Reply, Worker
from assay.arms.inside.wire import encode

NOTHING = b"".join(bytes(part) for part in encode(()))
"""The input of a call without arguments."""

_TIMES, _MORE, _ECHOES = 4, 1 << 20, 3


def asked(order: random.Random) -> bool:
    """Whether a call is followed by questions."""
    return order.random() < 0.5


@dataclass(frozen=True)
class After:
    """What the questions after a call were answered with."""

    arguments: bytes
    """As the call left them."""
    lasts: bool
    """Whether this output stayed what it was, and so did the one before it."""


class Exchange:
    """A worker, and the outputs that it gave for its last two calls."""

    def __init__(self, worker: Worker, expected: int | None = None) -> None:
        """`expected`: bytes of base's output. One that is many times as long is wrong, and is not even read."""
        self.worker = worker
        self._outputs: list[bytes] = []
        self.expect(expected)

    def expect(self, expected: int | None) -> None:
        """As at the start."""
        self._most = MOST_BYTES if expected is None else _TIMES * expected + _MORE

    def call(self, given: bytes | None, loops: int = 1) -> Reply:
        """A call with an input, or with the one that was kept; with `loops` many of them, whose inputs are sealed."""
        body, letter = ([], b"g") if given is None else ([given], b"c" if loops == 1 else b"w")
        reply = self.worker.ask(letter, float(loops), body, most=self._most)
        self._outputs = [bytes(reply.body), *self._outputs[:1]]
        return reply

    def keep(self, given: bytes) -> None:
        """Leaves an input for later calls."""
        self.worker.ask(b"i", 0.0, [given])

    def echo(self, given: bytes | None) -> float:
        """Seconds of sending an input and the last output, with no call between them."""
        self.worker.ask(b"k", 0.0, [self._outputs[0]])
        return statistics.median(
            self.worker.ask(b"e", 0.0, [NOTHING if given is None else given]).seconds for _ in range(_ECHOES)
        )

    def spared(self) -> float:
        """Seconds of a copy per call of the last request, by the worker's own clock: trust base's."""
        return self.worker.ask(b"s").inner

    def after(self) -> After:
        """Asks about the last call, and overwrites its arguments."""
        arguments = bytes(self.worker.ask(b"a").body)
        lasts = all(
            self.worker.ask(b"o", float(i)).body == output for i, output in reversed(list(enumerate(self._outputs)))
        )
        now = bytes(self.worker.ask(b"z").body)
        lasts = lasts and now == self._outputs[0]
        self._outputs[0] = now
        return After(arguments, lasts)
