"""Counts the interpreter's own instructions while a callable runs. Standard library only; runs inside an arm."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def counted(call: Callable[[], Any]) -> int:
    """How many bytecode instructions a call executes: of this thread before Python 3.12, from then on of all threads.

    What runs in C counts as the one instruction that calls it.
    """
    return _monitored(call) if sys.version_info >= (3, 12) else _traced(call)


def _monitored(call: Callable[[], Any]) -> int:
    """By sys.monitoring; ValueError if all its tools are in use."""
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined,unused-ignore]
    found = 0

    def note(*_: Any) -> None:
        nonlocal found
        found += 1

    tool = next(number for number in range(6) if monitoring.get_tool(number) is None)
    monitoring.use_tool_id(tool, "assay")
    try:
        monitoring.register_callback(tool, monitoring.events.INSTRUCTION, note)
        monitoring.set_events(tool, monitoring.events.INSTRUCTION)
        call()
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)
    return found


def _traced(call: Callable[[], Any]) -> int:
    """By a trace function, which the interpreter calls before each instruction of a frame that asks for it."""
    found = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal found
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        found += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return found
