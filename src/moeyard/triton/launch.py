"""Triton kernels started straight from Python: compiled once for sizes and dtypes, then called with addresses."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import MockTensor

from moeyard.triton.plan import Card

current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from builds without CUDA


def on_its_device(launcher: Callable[..., None]) -> Callable[..., None]:
    """A launcher that makes the device of its first tensor current while it runs."""

    @wraps(launcher)
    def launch(first: Tensor, *arguments: Any, **options: Any) -> None:
        if not first.is_cuda or first.get_device() == current_device():
            launcher(first, *arguments, **options)
        else:
            with torch.cuda.device(first.device):
                launcher(first, *arguments, **options)

    return launch


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Lets this thread load kernels while one of its streams is captured into a graph."""
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@cache
def card(device: torch.device) -> Card:
    """The card of a device; an H200 for the CPU, where the interpreter runs the kernels."""
    if device.type == "cpu":
        return Card((9, 0), 132, 232448)
    of: Any = torch.cuda.get_device_properties(device)  # whose stub lacks the last attribute
    return Card((of.major, of.minor), of.multi_processor_count, of.shared_memory_per_block_optin)


class Step:
    """A kernel with everything but its pointers.

    A kernel's parameters are pointers, then sizes, then constants. The compiled kernel assumes that pointers are
    aligned to 16 bytes; a call with others goes through Triton's own launcher, which compiles for what it is given.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int], sizes: tuple[int, ...], warps: int = 4, stages: int = 1,
        **constants: Any,
    ) -> None:  # fmt: skip
        """`grid` counts programs; constants are in the order of the kernel's parameters."""
        self.kernel, self.grid = kernel, (*grid, 1)
        self.sizes, self.constants = sizes, constants
        self.options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
        if constants.get("PDL"):
            self.options["launch_pdl"] = True
        self._interpreted = isinstance(kernel, InterpretedFunction)
        self._compiled: dict[int, Any] = {}
        """By device: a kernel that is loaded on one device cannot run on another."""
        self._tail: tuple[Any, ...] = (*sizes, *constants.values())

    def __call__(self, *tensors: Tensor | None) -> None:
        """Starts the kernel on the current stream of the current device."""
        if self._interpreted:
            self.kernel[self.grid](*tensors, *self.sizes, **self.constants)
            return
        addresses: list[int | None] = []
        bits = 0
        for tensor in tensors:
            address = None if tensor is None else tensor.data_ptr()
            addresses.append(address)
            bits |= address or 0
        if bits % 16:
            self.kernel[self.grid](*tensors, *self.sizes, **self.constants, **self.options)
            return
        device = current_device()
        ready = self._compiled.get(device)
        if ready is None:
            with relaxed_capture():
                ready = self.compile(*(None if tensor is None else tensor.dtype for tensor in tensors))
                assert ready.run  # loads the kernel
            self._compiled[device] = ready
        ready.run(
            *self.grid, current_stream(device), ready.function, ready.packed_metadata, None, None, None,
            *addresses, *self._tail,
        )  # fmt: skip

    def compile(self, *dtypes: torch.dtype | None) -> Any:
        """The compiled kernel for pointers to such elements, None where there is no pointer."""
        pointers = (None if dtype is None else MockTensor(dtype) for dtype in dtypes)
        return self.kernel.warmup(*pointers, *self.sizes, grid=self.grid, **self.constants, **self.options)
