"""What becomes of an agent's run, and what never counts against the agent: the provider, the network, the sandbox."""

import re
from collections.abc import Sequence
from enum import StrEnum

from assay.agents.proxy import Connection

_TAIL = 8192
_SILENT_S = 60.0
_REFUSED = (401, 402, 403, 408, 409, 425, 429)
"""Replies of a provider that say nothing of the agent: keys, credit, limits, load."""


class Outcome(StrEnum):
    """How a run ended. An outcome `infra.PART` counts against nobody; of the others, what was changed is judged."""

    FINISHED = "finished"
    FAILED = "failed"
    TIME = "budget.time"
    TOKENS = "budget.tokens"
    MONEY = "budget.money"
    LIMITS = "budget.limits"
    PROVIDER = "infra.provider"
    NETWORK = "infra.network"
    SANDBOX = "infra.sandbox"
    COMMAND = "infra.command"

    @property
    def infra(self) -> bool:
        """Whether it counts against nobody."""
        return self.value.startswith("infra.")


def decided(
    status: int,
    cut: Outcome | None,
    words: str,
    *,
    output: bytes,
    connections: Sequence[Connection],
    errors: Sequence[str],
    changed: bool,
    seconds: float,
) -> tuple[Outcome, str]:
    """The outcome of a run and why.

    Args:
        status: its exit status.
        cut: why it was ended by the judge, or None.
        words: how it was cut, in words.
        output: what it printed.
        connections: the proxy's log.
        errors: the template's expressions for failures of its provider, looked for in the end of `output`.
        changed: whether it changed anything.
        seconds: how long it ran.
    """
    allowed = [one for one in connections if one.allowed]
    last = max(allowed, key=lambda one: one.at + one.seconds, default=None)
    found = next((match for one in errors if (match := re.search(one.encode(), output[-_TAIL:]))), None)
    if last is not None and last.words:
        return Outcome.NETWORK, f"{last.host}:{last.port} {last.words}"
    if last is not None and last.status is not None and (last.status in _REFUSED or last.status >= 500):
        return Outcome.PROVIDER, f"{last.host}:{last.port} answered {last.status} at last"
    if found is not None and (status != 0 or cut is not None or not changed):
        return Outcome.PROVIDER, f"it said: {found[0][:200].decode(errors='replace')}"
    if cut is Outcome.TIME and last is not None and last.silent_s >= min(_SILENT_S, seconds / 2):
        words = f"{last.host}:{last.port} had not answered for {last.silent_s:.0f} s when the time was over"
        return Outcome.PROVIDER, words
    if cut is not None:
        return cut, words
    if status == 127 and not connections:
        return Outcome.COMMAND, "the agent's program cannot be started"
    if status:
        return Outcome.FAILED, f"it ended with status {status}"
    return Outcome.FINISHED, "it ended by itself"
