"""Triton kernels started straight from Python: compiled once for what they are specialised for, then called with
addresses.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, NamedTuple

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


def card(device: torch.device) -> Card:
    """The card of a device; an H200 for the CPU, where the interpreter runs the kernels; of meta tensors a plan's."""
    return planned().card if device.type == "meta" else _card(device)


@cache
def _card(device: torch.device) -> Card:
    if device.type == "cpu":
        return Card((9, 0), 132, 232448)
    of: Any = torch.cuda.get_device_properties(device)  # whose stub lacks the last attribute
    return Card((of.major, of.minor), of.multi_processor_count, of.shared_memory_per_block_optin)


class Asked(NamedTuple):
    """What a compiled kernel depends on: plain values, which JSON can hold."""

    kernel: str
    dtypes: tuple[str | None, ...]
    """Of pointers, None where there is none."""
    sizes: tuple[str, ...]
    """What Triton specialises each size for."""
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int


class Plan:
    """A card, and what calls on meta tensors have asked for on it, each with sizes that stand for all of its kind."""

    def __init__(self, of: Card) -> None:
        """Nothing is asked for yet."""
        self.card = of
        self.asked: dict[Asked, tuple[int, ...]] = {}


@contextmanager
def planning(of: Card) -> Iterator[Plan]:
    """What this thread starts on meta tensors inside is noted, as for a card."""
    before, plan = getattr(_STATE, "plan", None), Plan(of)
    _STATE.plan = plan
    try:
        yield plan
    finally:
        _STATE.plan = before


def planned() -> Plan:
    """That of this thread. ValueError where tensors have no GPU and nothing is planned."""
    plan: Plan | None = getattr(_STATE, "plan", None)
    if plan is None:
        raise ValueError("device: expected tensors of a GPU, or a plan that they belong to")
    return plan


_STATE = threading.local()


class Step:
    """A kernel with everything but its pointers.

    A kernel's parameters are pointers, then sizes, then constants. A step takes pointers of the dtypes of its first
    call; it looks at no dtype after that. The compiled kernel assumes that pointers are
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
        self._asked: Asked | None = None
        self._kinds: tuple[torch.dtype | None, ...] | None = None
        """Under the interpreter: of the first call. A compiled kernel would read others wrongly, and say nothing."""
        self._tail: tuple[Any, ...] = (*sizes, *constants.values())

    def __call__(self, *tensors: Tensor | None) -> None:
        """Starts the kernel on the current stream of the current device."""
        if self._interpreted:
            kinds = dtypes_of(tensors)
            if self._kinds not in (None, kinds):
                raise ValueError(f"step: expected the dtypes {self._kinds} of its first call, got {kinds}")
            self._kinds = kinds
            self.kernel[self.grid](*tensors, *self.sizes, **self.constants)
            return
        if tensors[0] is not None and tensors[0].is_meta:
            planned().asked.setdefault(self.asked(*dtypes_of(tensors)), self.sizes)
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
            ready = self._compiled[device] = self._loaded(device, dtypes_of(tensors))
        ready.run(
            *self.grid, current_stream(device), ready.function, ready.packed_metadata, None, None, None,
            *addresses, *self._tail,
        )  # fmt: skip

    def asked(self, *dtypes: torch.dtype | None) -> Asked:
        """What the compiled kernel for pointers to such elements depends on."""
        if self._asked is None:
            first = len(self.kernel.params) - len(self.sizes) - len(self.constants)
            kinds = tuple(map(_kind, self.sizes, self.kernel.params[first:]))
            names = tuple(None if dtype is None else str(dtype).removeprefix("torch.") for dtype in dtypes)
            self._asked = Asked(
                self.kernel.fn.__name__, names, kinds, tuple(self.constants.items()), self.options["num_warps"],
                self.options["num_stages"],
            )  # fmt: skip
        return self._asked

    def _loaded(self, device: int, dtypes: tuple[torch.dtype | None, ...]) -> Any:
        """The compiled kernel on a device, which steps of other sizes share."""
        key = (device, self.asked(*dtypes))
        ready = _LOADED.get(key)
        if ready is None:
            with relaxed_capture():
                ready = self.compile(*dtypes)
                assert ready.run  # loads the kernel
            _LOADED[key] = ready
        return ready

    def compile(self, *dtypes: torch.dtype | None) -> Any:
        """The compiled kernel for pointers to such elements, None where there is no pointer."""
        pointers = (None if dtype is None else MockTensor(dtype) for dtype in dtypes)
        return self.kernel.warmup(*pointers, *self.sizes, grid=self.grid, **self.constants, **self.options)


def dtypes_of(tensors: tuple[Tensor | None, ...]) -> tuple[torch.dtype | None, ...]:
    """What a step is compiled for; what prepares a step has it among its arguments, or facts that it follows from."""
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def _kind(size: int, parameter: Any) -> str:
    """What Triton specialises a size for: its width, and unless the kernel says otherwise whether it is 1 or divisible
    by 16.
    """
    if not parameter.do_not_specialize and size == 1:
        return "1"
    width = "i32" if size < 1 << 31 else "i64"
    if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment or size % 16:
        return width
    return f"{width}:16"


_LOADED: dict[tuple[int, Asked], Any] = {}
