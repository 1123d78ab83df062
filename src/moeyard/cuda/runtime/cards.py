"""What plans need to know of a card, and whether this installation can run kernels on it."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from moeyard.cuda.runtime.compile import compile_source, compiler_capabilities, compiler_version, packaged_archs
from moeyard.cuda.runtime.driver import at_work_on, check, core
from moeyard.cuda.runtime.planning import planned

WARP = 32
RESERVED = 1024
"""Bytes of shared memory that the system keeps of every block's."""
_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Card:
    """What a plan depends on."""

    processors: int
    """Multiprocessors."""
    shared_limit: int
    """Bytes of shared memory that a block can have."""
    clusters: bool
    """Whether thread-block clusters can be launched (compute capability 9.0 and later)."""


def card_of(device: int | None) -> Card:
    """What plans need to know of a device; of none, of the card that is planned for."""
    return planned().card if device is None or device < 0 else _card_of(device)


@cache
def _card_of(device: int) -> Card:
    facts: Any = torch.cuda.get_device_properties(device)
    return Card(facts.multi_processor_count, facts.shared_memory_per_block_optin, facts.major >= 9)


capability_of = cache(torch.cuda.get_device_capability)
"""(major, minor) of a device."""


@cache
def arch_of(device: int, suffix: str = "") -> str:
    """The architecture that code for a device is made for: its own, or the last one before it that NVRTC knows.

    Code of the same major number and of no higher minor number runs on a card; code of an architecture with a suffix
    runs on no other. RuntimeError where there is none.
    """
    arch = arch_for(capability_of(device), suffix)
    if arch is None:
        raise RuntimeError(_unknown(capability_of(device)))
    return arch


def arch_for(capability: tuple[int, int], suffix: str = "") -> str | None:
    """The architecture that code for a compute capability is made for; None where there is none.

    Without NVRTC those count that the package has cubins for.
    """
    major, minor = capability
    lowest = minor if suffix else 0
    try:
        capabilities = compiler_capabilities()
    except (ImportError, OSError, RuntimeError):
        capabilities = _packaged_capabilities()
    known = [least for of, least in capabilities if of == major and lowest <= least <= minor]
    return f"sm_{major}{max(known)}{suffix}" if known else None


def _packaged_capabilities() -> tuple[tuple[int, int], ...]:
    return tuple(divmod(int(arch[len("sm_") :].rstrip("a")), 10) for arch in packaged_archs())


def _unknown(capability: tuple[int, int]) -> str:
    return f"NVRTC {_dotted(compiler_version())} makes no code for compute capability {_dotted(capability)}"


@cache
def refusal(device: int) -> str | None:
    """Why kernels of this package cannot run on a device, in words; None if they can.

    Neither the card nor the installation is to blame for what passes: a compute capability of 8.0 or later, an NVRTC
    that can be loaded and knows it, and a driver that loads what NVRTC makes. The last is tried, once per process,
    where NVRTC is newer than the driver.
    """
    try:
        version = compiler_version()
    except (ImportError, OSError, RuntimeError) as problem:
        if arch_for(capability_of(device)) is not None:  # the package has cubins
            return None
        return f"NVRTC cannot be loaded (pip install 'moeyard[gpu]'): {_first_line(problem)}"
    capability = capability_of(device)
    if capability < _LEAST_CAPABILITY:
        return f"needs compute capability {_dotted(_LEAST_CAPABILITY)}, got {_dotted(capability)}"
    arch = arch_for(capability)
    if arch is None:
        return _unknown(capability)
    if version > driver_version():
        try:
            _load_something(device, arch)
        except Exception as problem:  # what cuda.core raises differs between its versions
            return (
                f"the driver, of CUDA {_dotted(driver_version())}, does not load what NVRTC {_dotted(version)} makes "
                f"(update the driver, or install an older NVRTC): {_first_line(problem)}"
            )
    return None


def driver_version() -> tuple[int, int]:
    """(major, minor) of the CUDA version that the driver is of."""
    from cuda.bindings import driver

    _, number = check(driver.cuDriverGetVersion())
    return number // 1000, number % 1000 // 10


def _load_something(device: int, arch: str) -> None:
    code = compile_source('extern "C" __global__ void nothing_kernel() {}', (), arch)
    with at_work_on(device):
        core().ObjectCode.from_cubin(code).get_kernel("nothing_kernel")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
