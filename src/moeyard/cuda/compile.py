"""CUDA C++ compiled at first use with NVRTC, kept on disk as cubin, loaded once a process."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
_STANDARD = "c++17"


def cache_folder() -> Path:
    """Where cubins are kept: $MOEYARD_CACHE, or the user's cache folder."""
    chosen = os.environ.get("MOEYARD_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeyard"


def cubin(source: str, defines: tuple[tuple[str, str], ...], arch: str) -> bytes:
    """The machine code of a source file of this folder for `arch` ("sm_90"), from the cache if it is there.

    The key is the source, the headers, the definitions, the architecture, the language standard and the compiler's
    version. Files are replaced whole, so processes may compile the same at once; one whose digest is wrong is compiled
    again; a folder that cannot be written costs the compilation every time and nothing else.
    """
    from cuda.bindings import nvrtc

    text = (_FOLDER / source).read_text()
    headers = [path.read_text() for path in sorted(_FOLDER.glob("*.cuh"))]
    _, major, minor = nvrtc.nvrtcVersion()
    key = hashlib.sha256(repr((text, headers, defines, arch, _STANDARD, major, minor)).encode()).hexdigest()[:32]
    path = cache_folder() / f"{Path(source).stem}-{arch}-{key}.cubin"
    code = _read(path)
    if code is None:
        code = compile_source(text, defines, arch)
        _write(path, code)
    return code


def compile_source(text: str, defines: tuple[tuple[str, str], ...], arch: str) -> bytes:
    """The machine code of a text; what cuda.core raises, the compiler's log in it, if it does not compile."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch=arch, std=_STANDARD, define_macro=list(defines) or None, include_path=str(_FOLDER))
    program = Program(text, "c++", options)
    try:
        code: bytes = program.compile("cubin").code
    finally:
        program.close()
    return code


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        part = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        part.replace(path)
    except OSError:  # a full disk, say: leave no half behind
        if part is not None:
            part.unlink(missing_ok=True)


@cache
def kernel(source: str, name: str, defines: tuple[tuple[str, str], ...], device: int) -> Any:
    """A loaded `cuda.core.Kernel` that may use all the shared memory a block of the device can have."""
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    here = Device(device)
    here.set_current()
    major, minor = here.compute_capability
    code = cubin(source, defines, f"sm_{major}{minor}")
    with outside_capture():
        loaded = ObjectCode.from_cubin(code).get_kernel(name)
        limit = here.properties.max_shared_memory_per_block_optin
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        function = driver.CUkernel(int(loaded.handle))
        check(driver.cuKernelSetAttribute(attribute, limit, function, driver.CUdevice(device)))
    return loaded


def prefer_shared_memory(loaded: Any, device: int) -> None:
    """Multiprocessors that run this kernel give up as much L1 cache for shared memory as they can."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    with outside_capture():
        check(driver.cuKernelSetAttribute(attribute, 100, driver.CUkernel(int(loaded.handle)), driver.CUdevice(device)))


@contextmanager
def outside_capture() -> Iterator[None]:
    """What this thread does inside may allocate and load, even while it captures a graph; it is not captured."""
    from cuda.bindings import driver

    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    _, mode = check(driver.cuThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        check(driver.cuThreadExchangeStreamCaptureMode(mode))


def check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The answer of a driver call; RuntimeError if it failed."""
    if int(result[0]):
        raise RuntimeError(f"CUDA driver: {result[0]}")
    return result
