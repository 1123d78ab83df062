"""Kernels, compiled and loaded once per process."""

from functools import cache
from threading import Lock
from typing import Any

from moeyard.cuda.runtime.cards import arch_of
from moeyard.cuda.runtime.compile import cubin
from moeyard.cuda.runtime.driver import at_work_on, check, core

Defines = tuple[tuple[str, str], ...]


@cache
def kernel(source: str, name: str, defines: Defines, device: int, suffix: str = "") -> Any:
    """A loaded `cuda.core.Kernel` that may use all the shared memory a block of the device can have.

    `suffix` is that of the architecture: "a" for one whose own instructions no later one has.
    """
    from cuda.bindings import driver

    with at_work_on(device):
        loaded = _module(source, defines, arch_of(device, suffix)).get_kernel(name)
        limit = core().Device(device).properties.max_shared_memory_per_block_optin
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        function = driver.CUkernel(int(loaded.handle))
        check(driver.cuKernelSetAttribute(attribute, limit, function, driver.CUdevice(device)))
    return loaded


_MODULES: dict[tuple[str, Defines, str], Any] = {}
_LOCKS: dict[tuple[str, Defines, str], Lock] = {}


def _module(source: str, defines: Defines, arch: str) -> Any:
    """The machine code that all kernels of a source and all devices of an architecture share."""
    key = (source, defines, arch)
    with _LOCKS.setdefault(key, Lock()):  # a second thread waits instead of compiling it again
        if key not in _MODULES:
            _MODULES[key] = core().ObjectCode.from_cubin(cubin(source, defines, arch))
        return _MODULES[key]


def prefer_shared_memory(loaded: Any, device: int) -> None:
    """Multiprocessors that run this kernel give up as much L1 cache for shared memory as they can."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    with at_work_on(device):
        check(driver.cuKernelSetAttribute(attribute, 100, driver.CUkernel(int(loaded.handle)), driver.CUdevice(device)))
