"""What of an output is compared, where the task says so: by a function of its own, in the judge's process."""

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from assay.arms.inside import wire

UNREADABLE = b"unreadable"
"""In place of an output that the function cannot take; no encoded value begins so."""


@cache
def _function(name: str) -> Callable[[Any], Any]:
    file, _, called = name.partition(":")
    spec = importlib.util.spec_from_file_location(f"assay_canonical_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[Any], Any] = getattr(module, called)
    return found


def canonical(name: str, body: bytes) -> bytes:
    """The encoded output in the form that counts; `name` is `file.py:function`, nothing for the output as it is."""
    if not name:
        return body
    function = _function(name)
    try:
        return b"".join(bytes(part) for part in wire.encode(function(wire.decode(body))))
    except Exception:  # whatever an untrusted process sends, and whatever the function says of it
        return UNREADABLE
