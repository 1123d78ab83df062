"""Kernels started straight from Python: what does not change between calls is prepared once."""

import ctypes
import os
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch

from moeyard.cuda.runtime.cards import capability_of
from moeyard.cuda.runtime.driver import current_device, give_context
from moeyard.cuda.runtime.kernels import Defines, kernel, prefer_shared_memory
from moeyard.cuda.runtime.ready import Ready

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


class Launch:
    """A kernel and its launch configuration; a call costs the packing of its arguments and one call of the driver.

    A call may come from any thread, whatever device is current there: the launch sees to both, so launchers need not.
    """

    def __init__(
        self,
        source: str,
        name: str,
        defines: Defines,
        device: int,
        *,
        pointers: int,
        sizes: tuple[int, ...],
        grid: int,
        threads: int,
        shared_bytes: int = 0,
        cluster: int = 1,
        cooperative: bool = False,
        maps: int = 0,
        programmatic: bool | None = None,
        overlapping: bool = False,
        suffix: str = "",
    ) -> None:
        """The kernel's parameters are 64 bits wide: so many `pointers`, then `sizes`. `grid` counts blocks.

        Before them come so many tensor `maps`. `programmatic` is the answer of `programmatic_launch` unless given;
        `suffix` that of the architecture.

        An `overlapping` kernel is always placed as `programmatic_launch` says, where the device can, and shares
        multiprocessors with blocks of another: both must have the same division of shared memory and L1 cache, since
        it only changes on an empty one. They get all shared memory that there is.
        """
        from cuda.bindings import driver

        self._device = device
        self._kernel = kernel(source, name, defines, device, suffix)  # keeps the module loaded
        self._function = driver.CUfunction(int(self._kernel.handle))
        self._start: Callable[..., Any] = driver.cuLaunchKernelEx
        self._success = driver.CUresult.CUDA_SUCCESS
        self._no_context = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
        self._pack = struct.Struct(f"{pointers}Q").pack_into
        self._pointers, self._sizes, self._maps = pointers, sizes, maps
        self._local = threading.local()  # one thread's arguments: the driver reads them while others run
        self._name = name
        self._shape = (grid, threads, shared_bytes)
        self._cluster, self._cooperative = cluster, cooperative
        wanted = overlapping or (programmatic_launch() if programmatic is None else programmatic)
        self._programmatic = wanted and capability_of(device) >= (9, 0)
        if overlapping:
            prefer_shared_memory(self._kernel, device)
        self._configs = Ready(_MOST_STREAMS)

    def __call__(self, stream: int, *pointers: int) -> None:
        """Starts the kernel on a raw stream of its device. Raises RuntimeError if the driver refuses."""
        if current_device() != self._device:
            with torch.cuda.device(self._device):
                self(stream, *pointers)
            return
        config = self._configs.get(stream)
        if config is None:
            config = self._configs.add(stream, self._configure(stream))
        mine = self._local.__dict__
        if not mine:
            self._make_arguments(mine)
        self._pack(mine["words"], 0, *pointers)
        status = self._start(config, self._function, mine["address"], 0)[0]
        if status is self._success:
            return
        if status == self._no_context:  # the thread's first work on a GPU
            give_context(self._device)
            status = self._start(config, self._function, mine["address"], 0)[0]
        if status != self._success:
            raise RuntimeError(f"launch of {self._name}: {status.name}, with {self._shape} (grid, threads, bytes)")

    def with_maps(self, stream: int, maps: tuple[bytes, ...], *pointers: int) -> None:
        """Starts a kernel that takes tensor maps (tensor_map.py)."""
        mine = self._local.__dict__
        if not mine:
            self._make_arguments(mine)
        for i, tensor_map in enumerate(maps):
            ctypes.memmove(mine["first_map"] + MAP_BYTES * i, tensor_map, MAP_BYTES)
        self(stream, *pointers)

    def _make_arguments(self, mine: dict[str, Any]) -> None:
        """Room for the arguments and pointers to them, the form in which the driver takes them."""
        count = self._pointers + len(self._sizes)
        words = (ctypes.c_uint64 * count)(*(0,) * self._pointers, *self._sizes)
        maps = (ctypes.c_uint8 * (MAP_BYTES * self._maps))()
        first, size, first_map = ctypes.addressof(words), ctypes.sizeof(ctypes.c_uint64), ctypes.addressof(maps)
        addresses = [first_map + MAP_BYTES * i for i in range(self._maps)] + [first + size * i for i in range(count)]
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        mine.update(words=words, maps=maps, first_map=first_map)
        mine.update(pointers=pointers, address=ctypes.addressof(pointers))

    def _configure(self, stream: int) -> Any:
        from cuda.bindings import driver

        names = driver.CUlaunchAttributeID
        config = driver.CUlaunchConfig()
        config.gridDimX, config.blockDimX, config.sharedMemBytes = self._shape
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.hStream = stream
        attributes = []
        if self._cluster > 1:
            attributes.append(_attribute(names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION))
            size = attributes[-1].value.clusterDim
            size.x, size.y, size.z = self._cluster, 1, 1
        if self._cooperative:
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
