"""The driver's side of a thread: its current device, its context, its capture mode, the answers of calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from builds without CUDA
"""The raw stream of a device that this thread works on."""


def give_context(device: int) -> None:
    """Makes the primary context of the current device current, in a thread that has none yet.

    Calls of the CUDA runtime, which torch makes, do so by themselves; calls of the driver do not.
    """
    from cuda.bindings import driver

    _, context = check(driver.cuCtxGetCurrent())
    if not int(context):
        core().Device(device).set_current()


def core() -> Any:
    """The package cuda.core, which two threads may not import for the first time at once."""
    with _IMPORTING:
        import cuda.core

        return cuda.core


_IMPORTING = Lock()


@contextmanager
def at_work_on(device: int) -> Iterator[None]:
    """What this thread does inside may allocate and load on a device, even while it captures a graph; that is not
    captured.
    """
    from cuda.bindings import driver

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    with torch.cuda.device(device):
        give_context(device)
        _, before = check(driver.cuThreadExchangeStreamCaptureMode(relaxed))
        try:
            yield
        finally:
            check(driver.cuThreadExchangeStreamCaptureMode(before))


def check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The answer of a driver call; RuntimeError if it failed."""
    if int(result[0]):
        raise RuntimeError(f"CUDA driver: {result[0]}")
    return result
