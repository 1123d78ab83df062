"""Kernels started straight from Python: what does not change between calls is prepared once."""

import ctypes
import os
import struct
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from moeyard.cuda.runtime.cards import capability_of
from moeyard.cuda.runtime.driver import current_device, current_stream, give_context
from moeyard.cuda.runtime.kernels import Defines, kernel, prefer_shared_memory
from moeyard.cuda.runtime.planning import Noted

SETTINGS = {"programmatic": os.environ.get("MOEYARD_PDL", "") == "1"}


def programmatic_launch(enabled: bool | None = None) -> bool:
    """Whether launches prepared from now on may start before the one ahead of them in their stream has ended.

    With programmatic dependent launch (compute capability 9.0 and later) a kernel's blocks are placed while the one
    before drains, and wait there for its writes; results do not change. Off unless MOEYARD_PDL=1 is set or this is
    called with True. Returns the setting.
    """
    if enabled is not None:
        SETTINGS["programmatic"] = enabled
    return SETTINGS["programmatic"]


MAP_BYTES = 128
"""Of a tensor map."""
_MOST_STREAMS = 256


class Recipe(NamedTuple):
    """A kernel, and what no call of it changes. Few recipes serve all batch sizes, which are no part of them."""

    source: str
    name: str
    defines: Defines
    threads: int
    words: int
    """Parameters of 64 bits: pointers first, then sizes."""
    cluster: int = 1
    cooperative: bool = False
    maps: int = 0
    """Tensor maps, which come before the words."""
    programmatic: bool = False
    """Whether it may start before the launch ahead has ended, where the device can (`programmatic_launch`)."""
    overlapping: bool = False
    """Whether it always may, and shares multiprocessors with blocks of another kernel: both must have the same division
    of shared memory and L1 cache, since that only changes on an empty one. They get all shared memory that there is."""
    suffix: str = ""
    """Of the architecture."""

    @property
    def compiled(self) -> tuple[str, Defines, str]:
        """What machine code depends on: source, definitions, suffix of the architecture."""
        return self.source, self.defines, self.suffix


class Shape(NamedTuple):
    """What a call adds to a recipe besides pointers: plain integers."""

    grid: int
    """Blocks."""
    shared_bytes: int
    sizes: tuple[int, ...]


class Launch:
    """A kernel on a device; a call costs the packing of its arguments and one call of the driver.

    A call may come from any thread, whatever device is current there: the launch sees to both, so launchers need not.
    """

    def __init__(self, recipe: Recipe, device: int) -> None:
        """Compiles and loads the kernel."""
        from cuda.bindings import driver

        self.recipe, self._device = recipe, device
        self._kernel = kernel(recipe.source, recipe.name, recipe.defines, device, recipe.suffix)  # keeps it loaded
        self.function = driver.CUfunction(int(self._kernel.handle))
        self.start: Callable[..., Any] = driver.cuLaunchKernelEx
        self._no_context = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
        self._pack = struct.Struct(f"{recipe.words}N").pack_into  # of 64 bits, in half the time of "Q"
        self._local = threading.local()  # one thread's arguments: the driver reads them while others run
        self._programmatic = (recipe.overlapping or recipe.programmatic) and capability_of(device) >= (9, 0)
        if recipe.overlapping:
            prefer_shared_memory(self._kernel, device)

    def __call__(self, shape: Shape, *pointers: int) -> None:
        """Starts the kernel on the current stream of its device. Raises RuntimeError if the driver refuses."""
        device = self._device
        if current_device() != device:
            with torch.cuda.device(device):
                self(shape, *pointers)
            return
        mine = self._local.__dict__
        if not mine:
            self._make_arguments(mine)
        stream = current_stream(device)
        config = mine["configs"].get(stream) or self._add_config(mine["configs"], stream)
        grid, shared_bytes, sizes = shape
        config.gridDimX, config.sharedMemBytes = grid, shared_bytes
        self._pack(mine["words"], 0, *pointers, *sizes)
        status = self.start(config, self.function, mine["address"], 0)[0]
        if status:
            self.again_or_raise(status, partial(self.start, config, self.function, mine["address"], 0), shape)

    def again_or_raise(self, status: Any, start: Callable[[], Any], shape: Shape) -> None:
        """Starts it once more in a thread whose first work on a GPU it is. RuntimeError if the driver still refuses."""
        if status == self._no_context:
            give_context(self._device)
            status = start()[0]
        if status:
            tried = (shape.grid, self.recipe.threads, shape.shared_bytes)
            raise RuntimeError(f"launch of {self.recipe.name}: {status.name}, with {tried} (grid, threads, bytes)")

    def with_maps(self, shape: Shape, maps: tuple[bytes, ...], *pointers: int) -> None:
        """Starts a kernel that takes tensor maps (tensor_map.py)."""
        mine = self._local.__dict__
        if not mine:
            self._make_arguments(mine)
        for i, tensor_map in enumerate(maps):
            ctypes.memmove(mine["first_map"] + MAP_BYTES * i, tensor_map, MAP_BYTES)
        self(shape, *pointers)

    def _make_arguments(self, mine: dict[str, Any]) -> None:
        """Room for the arguments and pointers to them, the form in which the driver takes them."""
        count, maps_count = self.recipe.words, self.recipe.maps
        words, maps = (ctypes.c_uint64 * count)(), (ctypes.c_uint8 * (MAP_BYTES * maps_count))()
        first, size, first_map = ctypes.addressof(words), ctypes.sizeof(ctypes.c_uint64), ctypes.addressof(maps)
        addresses = [first_map + MAP_BYTES * i for i in range(maps_count)] + [first + size * i for i in range(count)]
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        mine.update(words=words, maps=maps, first_map=first_map, configs={})
        mine.update(pointers=pointers, address=ctypes.addressof(pointers))

    def _add_config(self, configs: dict[int, Any], stream: int) -> Any:
        """A configuration of this thread's; those of the oldest streams are forgotten."""
        while len(configs) >= _MOST_STREAMS:
            del configs[next(iter(configs))]
        configs[stream] = self.configure(stream)
        return configs[stream]

    def configure(self, stream: int) -> Any:
        """A configuration of a launch on a stream, whose grid and shared memory are still to be set."""
        from cuda.bindings import driver

        names = driver.CUlaunchAttributeID
        config = driver.CUlaunchConfig()
        config.blockDimX = self.recipe.threads
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.hStream = stream
        attributes = []
        if self.recipe.cluster > 1:
            attributes.append(_attribute(names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION))
            size = attributes[-1].value.clusterDim
            size.x, size.y, size.z = self.recipe.cluster, 1, 1
        if self.recipe.cooperative:
            attributes.append(_attribute(names.CU_LAUNCH_ATTRIBUTE_COOPERATIVE))
            attributes[-1].value.cooperative = 1
        if self._programmatic:
            attributes.append(_attribute(names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION))
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config


def _attribute(which: Any) -> Any:
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = which
    return attribute


def launch_of(recipe: Recipe, device: int) -> Launch | Noted:
    """The launch of a recipe on a device, made once; under `planning` what notes that it is wanted."""
    return _launch_of(recipe, device) if device >= 0 else Noted(recipe)


_launch_of = cache(Launch)
