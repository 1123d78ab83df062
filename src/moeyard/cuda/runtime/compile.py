"""CUDA C++ compiled at first use with NVRTC and kept on disk as cubin; a wheel may bring cubins along."""

import hashlib
import os
import secrets
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from moeyard.cuda.runtime.sources import SOURCES, headers_of

_STANDARD = "c++17"


def cache_folder() -> Path | None:
    """Where cubins are kept: $MOEYARD_CACHE, or the user's cache folder; None for a user without a home."""
    chosen = os.environ.get("MOEYARD_CACHE")
    if chosen:
        return Path(chosen)
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen) / "moeyard"
    if os.environ.get("HOME") == "":
        return None
    try:
        return Path.home() / ".cache" / "moeyard"
    except RuntimeError:  # neither HOME nor an entry in the user database
        return None


@cache
def compiler_version() -> tuple[int, int]:
    """(major, minor) of NVRTC. Raises RuntimeError or OSError where its library cannot be loaded."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


@cache
def compiler_capabilities() -> tuple[tuple[int, int], ...]:
    """The compute capabilities that NVRTC makes code for."""
    from cuda.bindings import nvrtc

    return tuple(divmod(number, 10) for number in nvrtc.nvrtcGetSupportedArchs()[1])


PACKAGED = Path(__file__).parents[1] / "cubins"
"""Cubins that came with the package (`make wheel`). The folder is absent where none did."""


def cubin(source: str, defines: tuple[tuple[str, str], ...], arch: str) -> bytes:
    """The machine code of a source of this package for `arch` ("sm_90"): what came with the package, or the cache has.

    What came with it has a key of its own, without the compiler's version: it is used whatever NVRTC is installed, and
    where none is. Sources that were edited since have other keys and never meet it.

    The key is the source, the headers that it includes, the definitions, the architecture, the language standard and
    the compiler's version. Files are replaced whole, so processes may compile the same source at once. A file whose
    digest is wrong, or that cannot be read, is compiled again. A folder that cannot be written costs the compilation in
    every process, and a RuntimeWarning says so once.
    """
    code = _read(packaged_path(source, defines, arch))
    if code is not None:
        return code
    try:
        path = _cached_path(source, defines, arch)
    except (ImportError, OSError, RuntimeError) as problem:
        raise RuntimeError(
            f"{source} for {arch}: the cubins of this package lack it, and NVRTC cannot be loaded "
            f"(pip install 'moeyard[gpu]'): {problem}"
        ) from problem
    code = _read(path) if path else None
    if code is None:
        code = compile_source(SOURCES[source], defines, arch)
        reason = _write(path, code) if path else "the user has no home folder"
        if reason is not None:
            _warn_once(reason)
    return code


def is_kept(source: str, defines: tuple[tuple[str, str], ...], arch: str) -> bool:
    """Whether nothing has to be compiled: the package or the cache has this machine code, whole."""
    if _read(packaged_path(source, defines, arch)) is not None:
        return True
    path = _cached_path(source, defines, arch)
    return path is not None and _read(path) is not None


def packaged_path(source: str, defines: tuple[tuple[str, str], ...], arch: str, *, folder: Path | None = None) -> Path:
    """Where the package has a cubin, if it has it; `folder` is `PACKAGED` unless given."""
    return (folder or PACKAGED) / _name(source, defines, arch)


@cache
def packaged_archs() -> tuple[str, ...]:
    """The architectures that the package has cubins for."""
    return tuple(sorted({path.name.split("-")[1] for path in PACKAGED.glob("*.cubin")}))


def _cached_path(source: str, defines: tuple[tuple[str, str], ...], arch: str) -> Path | None:
    folder = cache_folder()
    return folder / _name(source, defines, arch, compiler_version()) if folder else None


def _name(source: str, defines: tuple[tuple[str, str], ...], arch: str, *compiler: tuple[int, int]) -> str:
    text = SOURCES[source]
    known = (text, headers_of(text), defines, arch, _STANDARD, *compiler)
    return f"{Path(source).stem}-{arch}-{hashlib.sha256(repr(known).encode()).hexdigest()[:32]}.cubin"


def write_cubin(path: Path, code: bytes) -> None:
    """Writes machine code as the cache has it. Raises OSError where that fails."""
    reason = _write(path, code)
    if reason is not None:
        raise OSError(reason)


def compile_source(text: str, defines: tuple[tuple[str, str], ...], arch: str) -> bytes:
    """The machine code of a text, which may include any header of this package.

    Raises RuntimeError with the compiler's log if the text does not compile.
    """
    from cuda.bindings import nvrtc

    headers = headers_of(text)
    texts, names = ([part.encode() for part in parts] for parts in (headers.values(), headers))
    program = _answer(nvrtc.nvrtcCreateProgram(text.encode(), b"moeyard.cu", len(headers), texts, names))
    try:
        options = [f"-arch={arch}", f"--std={_STANDARD}", *(f"-D{name}={value}" for name, value in defines)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if int(status):
            log = bytes(_answer(nvrtc.nvrtcGetProgramLogSize(program)))
            _answer(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"NVRTC, {' '.join(options)}: {log.decode(errors='replace').rstrip(chr(0))}")
        code = bytes(_answer(nvrtc.nvrtcGetCUBINSize(program)))
        _answer(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code


def _answer(result: tuple[Any, ...]) -> Any:
    """The answer of a call of NVRTC, if it has one; RuntimeError if it failed."""
    if int(result[0]):
        raise RuntimeError(f"NVRTC: {result[0].name}")
    return result[1] if len(result) > 1 else None


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> str | None:
    """Keeps machine code, readable for everyone whom the process's umask lets read; says why it could not."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        part.replace(path)
    except OSError as problem:
        _remove(part)
        return str(problem)
    return None


def _remove(part: Path) -> None:
    """A full disk, say, leaves no half behind."""
    with suppress(OSError):
        part.unlink(missing_ok=True)


_WARNED: list[str] = []


def _warn_once(reason: str) -> None:
    if not _WARNED:
        _WARNED.append(reason)
        warnings.warn(
            f"moeyard compiles its CUDA kernels anew in every process, since they cannot be kept: {reason} "
            "(set MOEYARD_CACHE to a folder that can be written)",
            RuntimeWarning,
            stacklevel=2,
        )
