"""The launches of one call, prepared together: a call writes its values into memory once, then starts all in turn."""

import ctypes
import struct
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from moeyard.cuda.runtime.driver import current_device, current_stream
from moeyard.cuda.runtime.launch import MAP_BYTES, Launch, Shape
from moeyard.cuda.runtime.planning import Noted

WORD = ctypes.sizeof(ctypes.c_uint64)
NOTHING = ""
"""The name of a parameter that is 0 in every call."""


class Step(NamedTuple):
    """A launch, its shape, and which values of a call it takes."""

    launch: Launch | Noted
    shape: Shape
    pointers: tuple[str, ...]
    """Names of values, in the order of the kernel's parameters; its sizes follow them."""
    maps: tuple[str, ...] = ()
    """Names of tensor maps, which come first."""


class _Packet(NamedTuple):
    """Memory of one call at a time: the driver reads it while other threads run."""

    words: Any
    starts: tuple[Any, ...]
    """What starts each launch."""
    configs: tuple[Any, ...]
    streams: list[int]
    """The one that configurations are set to."""
    launches: tuple[Launch, ...]
    kept: tuple[Any, ...]
    """What the driver reads through addresses."""


class Chain:
    """Launches with fixed shapes on a device. A call costs the packing of its values and one call of the driver each.

    A call may come from any thread, whatever device is current there. Its launches share memory for their parameters,
    in which each value lies once. As many calls as there are threads may be under way, each with memory of its own.
    """

    def __init__(self, device: int, maps: Sequence[str], names: Sequence[str], steps: Sequence[Step]) -> None:
        """`maps` and then `names` are what a call gives."""
        self.steps = tuple(steps)
        self._device, self._maps, self._names = device, tuple(maps), tuple(names)
        self._pack = struct.Struct(f"{MAP_BYTES}s" * len(maps) + f"{len(names)}N").pack_into
        self._spare: list[_Packet] = []

    def __call__(self, *values: Any) -> None:
        """Starts all on the current stream of the device, with tensor maps and then addresses."""
        device = self._device
        if device < 0:
            self._note(values)
            return
        if current_device() != device:
            with torch.cuda.device(device):
                self(*values)
            return
        stream = current_stream(device)
        try:
            packet = self._spare.pop()
        except IndexError:
            packet = self._make()
        words, starts, configs, streams, launches, _ = packet
        self._pack(words, 0, *values)
        if streams[0] != stream:
            streams[0] = stream
            for config in configs:
                config.hStream = stream
        for number, start in enumerate(starts):
            status = start()[0]
            if status:
                launches[number].again_or_raise(status, start, self.steps[number].shape)
        self._spare.append(packet)

    def _note(self, values: Sequence[Any]) -> None:
        given = dict(zip((*self._maps, *self._names, NOTHING), (*values, 0), strict=True))
        for launch, shape, pointers, maps in self.steps:
            addresses = [given[name] for name in pointers]
            if maps:
                launch.with_maps(shape, tuple(given[name] for name in maps), *addresses)
            else:
                launch(shape, *addresses)

    def _make(self) -> _Packet:
        """Memory for maps, then values, then sizes; and what points into it, the form in which the driver takes it."""
        sizes = [0, *(size for step in self.steps for size in step.shape.sizes)]
        values = MAP_BYTES * len(self._maps)
        constants = values + WORD * len(self._names)
        words = (ctypes.c_uint8 * (constants + WORD * len(sizes)))()
        struct.pack_into(f"{len(sizes)}Q", words, constants, *sizes)
        first = ctypes.addressof(words)
        places = {name: first + MAP_BYTES * i for i, name in enumerate(self._maps)}
        places |= {name: first + values + WORD * i for i, name in enumerate(self._names)}
        places[NOTHING], at = first + constants, first + constants + WORD
        starts, configs, launches, kept = [], [], [], []
        for launch, shape, pointers, maps in self.steps:
            assert isinstance(launch, Launch)
            addresses = [places[name] for name in (*maps, *pointers)]
            addresses += [at + WORD * i for i in range(len(shape.sizes))]
            at += WORD * len(shape.sizes)
            assert len(addresses) == launch.recipe.maps + launch.recipe.words, launch.recipe.name
            array = (ctypes.c_void_p * len(addresses))(*addresses)
            config = launch.configure(0)
            config.gridDimX, config.sharedMemBytes = shape.grid, shape.shared_bytes
            starts.append(partial(launch.start, config, launch.function, ctypes.addressof(array), 0))
            configs.append(config)
            launches.append(launch)
            kept.append(array)
        return _Packet(words, tuple(starts), tuple(configs), [0], tuple(launches), tuple(kept))
