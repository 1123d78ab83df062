"""A GPU that is not there: eager calls take their whole way on the host, up to the driver, on a machine without one.

Inside `pretended_gpu` tensors on the CPU say that they are on cuda:0, an H200. Launches are prepared and packed as
ever, and the driver answers that they have started. Nothing is computed. So results are what their memory held before.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from moeyard.cuda.runtime.launch import MAP_BYTES, Launch, Recipe
from moeyard.dispatch import refusals, table
from moeyard.dispatch.again import Repeats
from moeyard.testing.processes import SOURCE

STREAM = 1


class Started(NamedTuple):
    """A launch as the driver was given it."""

    name: str
    grid: int
    shared_bytes: int
    stream: int
    maps: tuple[bytes, ...]
    words: tuple[int, ...]


class Driver:
    """What stands where the driver is: it counts the launches that it is asked for, and reads them if it is to."""

    def __init__(self, success: Any) -> None:
        self.launches = 0
        self.recipes: list[Recipe] = []
        self.started: list[Started] | None = None
        """What was started, once a list is there."""
        self.pause_s = 0.0
        """How long a launch takes, while which other threads run."""
        self.changed: list[Started] = []
        """Launches whose parameters changed meanwhile."""
        self.refusals: list[Any] = []
        """Answers of the next launches, which do not start."""
        self._answer = (success,)

    def start(self, config: Any, function: Any, address: int, _: int) -> tuple[Any]:
        """The answer of a launch."""
        if self.refusals:
            return (self.refusals.pop(0),)
        self.launches += 1
        if self.pause_s:
            before = self.read(config, function, address)
            time.sleep(self.pause_s)
            if self.read(config, function, address) != before:
                self.changed.append(before)
        if self.started is not None:
            self.started.append(self.read(config, function, address))
        return self._answer

    def read(self, config: Any, function: Any, address: int) -> Started:
        """A launch by what its addresses lead to."""
        recipe = self.recipes[int(function) - 1]
        places = (ctypes.c_void_p * (recipe.maps + recipe.words)).from_address(address)
        maps = tuple(ctypes.string_at(place or 0, MAP_BYTES) for place in places[: recipe.maps])
        words = tuple(ctypes.c_uint64.from_address(place or 0).value for place in places[recipe.maps :])
        return Started(recipe.name, config.gridDimX, config.sharedMemBytes, int(config.hStream), maps, words)

    def launch(self, recipe: Recipe, device: int) -> Launch:
        """A launch whose kernel is known by its number."""
        self.recipes.append(recipe)
        return Launch(recipe, device)

    def kernel(self, *_: Any) -> Any:
        """A kernel that is loaded: that of the last recipe."""
        return SimpleNamespace(handle=len(self.recipes))


@contextmanager
def pretended_gpu() -> Iterator[Driver]:
    """Inside, CPU tensors are on an H200, as far as Python sees. RuntimeError where a GPU is there.

    What is prepared for it is forgotten at the end.
    """
    if torch.cuda.is_available():
        raise RuntimeError("pretended_gpu: expected a machine without a GPU, got one with")
    from cuda.bindings import driver as bindings

    from moeyard.cuda.runtime import barriers, cards, chain, launch, tensor_map
    from moeyard.cuda.runtime.ready import Ready

    thread = {"current_device": int, "current_stream": STREAM.__pow__}
    driver = Driver(bindings.CUresult.CUDA_SUCCESS)
    kept: tuple[Any, ...] = (table.launcher, table.companion, refusals.capability_of)

    def forget() -> None:
        for one in kept:
            one.cache_clear()
        for name, module in list(sys.modules.items()):
            if name.startswith("moeyard."):
                for value in vars(module).values():
                    if isinstance(value, (Ready, Repeats)):
                        value.clear()

    with ExitStack() as stack:
        for place, names in (
            (torch.Tensor, {"device": torch.device("cuda", 0), "is_cuda": True, "is_cpu": False, "get_device": int}),
            (torch.cuda, {"is_available": lambda: True, "get_device_capability": lambda *_: (9, 0)}),
            (cards, {"refusal": lambda _: None, "_card_of": lambda _: cards.Card(132, 232448, True)}),
            (launch, thread | {"kernel": driver.kernel, "_launch_of": cache(driver.launch)}),
            (launch, {"capability_of": lambda _: (9, 0), "prefer_shared_memory": _nothing}),
            (chain, thread),
            (barriers, thread | {"is_capturing": bool, "_new_barrier": lambda _: 1 << 20}),
            (tensor_map, {"_driver": lambda: SimpleNamespace(cuTensorMapEncodeTiled=_nothing)}),
            (bindings, {"cuLaunchKernelEx": driver.start}),
        ):
            for name, value in names.items():
                stack.enter_context(patch.object(place, name, value))
        forget()
        stack.callback(forget)
        yield driver


def _nothing(*_: Any) -> int:
    return 0


def calls_of(call: Callable[[], Any]) -> tuple[int, int]:
    """How many functions of moeyard a call enters, and how many functions written in C these call."""
    own, in_c = 0, 0

    def see(frame: FrameType, event: str, _: Any) -> None:
        nonlocal own, in_c
        if frame.f_code.co_filename.startswith(_PACKAGE) and not frame.f_code.co_filename.startswith(_TESTING):
            own += event == "call"
            in_c += event == "c_call"

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(before)
    return own, in_c


_PACKAGE = str(SOURCE / "moeyard")
_TESTING = str(SOURCE / "moeyard" / "testing")
