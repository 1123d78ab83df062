"""Notes which lines of a tree run. Python itself loads it in every process of an arm, as its folder is on the path.

Lines go to a file as they run for the first time, so that nothing is lost when a process is killed. Standard library
alone; never there while anything is timed. The tree is the folder in which the first process starts.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType, FrameType
    from typing import Any

_ROOT = os.environ.setdefault("ASSAY_REACH_ROOT", os.getcwd()) + os.sep
_OUT = os.open(os.environ["ASSAY_REACH_OUT"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
_SEEN: set[tuple[str, int]] = set()
_PATHS: dict[str, str] = {}


def _inside(file: str) -> str:
    """The path of a file in the tree; "" of any other. As it was at first: a process may go elsewhere later."""
    found = _PATHS.get(file)
    if found is None:
        whole = file if os.path.isabs(file) else os.path.join(os.getcwd(), file)
        there = whole.startswith(_ROOT) and not file.startswith("<")
        found = _PATHS[file] = whole[len(_ROOT) :] if there else ""
    return found


def _note(file: str, line: int) -> None:
    if (file, line) not in _SEEN:
        _SEEN.add((file, line))
        os.write(_OUT, f"{_inside(file)}\t{line}\n".encode(errors="replace"))


def _monitor(monitoring: Any) -> None:
    """Python 3.12 and later: each line is told once, and costs nothing after."""

    def on_line(code: CodeType, line: int) -> Any:
        if _inside(code.co_filename):
            _note(code.co_filename, line)
        return monitoring.DISABLE

    tool = next(number for number in range(6) if monitoring.get_tool(number) is None)
    monitoring.use_tool_id(tool, "assay")
    monitoring.register_callback(tool, monitoring.events.LINE, on_line)
    monitoring.set_events(tool, monitoring.events.LINE)


def _trace() -> None:
    """Earlier versions: every line of the tree's own frames is told."""
    import threading

    def in_frame(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            _note(frame.f_code.co_filename, frame.f_lineno)
        return in_frame

    def on_call(frame: FrameType, _event: str, _: Any) -> Any:
        return in_frame if _inside(frame.f_code.co_filename) else None

    threading.settrace(on_call)
    sys.settrace(on_call)


_monitoring = getattr(sys, "monitoring", None)
os.write(_OUT, f"#\t{'sys.monitoring' if _monitoring else 'sys.settrace'}\n".encode())
if _monitoring:
    _monitor(_monitoring)
else:
    _trace()
