"""CUDA C++ compiled at first use with NVRTC and kept on disk as cubin."""

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


def cubin(source: str, defines: tuple[tuple[str, str], ...], arch: str) -> bytes:
    """The machine code of a source of this package for `arch` ("sm_90"), from the cache if it is there.

    The key is the source, the headers that it includes, the definitions, the architecture, the language standard and
    the compiler's version. Files are replaced whole, so processes may compile the same source at once. A file whose
    digest is wrong, or that cannot be read, is compiled again. A folder that cannot be written costs the compilation in
    every process, and a RuntimeWarning says so once.
    """
    text = SOURCES[source]
    known = (text, headers_of(text), defines, arch, _STANDARD, compiler_version())
    key = hashlib.sha256(repr(known).encode()).hexdigest()[:32]
    folder = cache_folder()
    path = folder / f"{Path(source).stem}-{arch}-{key}.cubin" if folder else None
    code = _read(path) if path else None
    if code is None:
        code = compile_source(text, defines, arch)
        reason = _write(path, code) if path else "the user has no home folder"
        if reason is not None:
            _warn_once(reason)
    return code


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
