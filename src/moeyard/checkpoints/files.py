"""safetensors files: which tensors they hold, and reading parts of them.

The format: eight bytes with the length of the header, the header (JSON: name -> dtype, shape, data_offsets), the data
(https://github.com/huggingface/safetensors). It is read with `preadv`, not through a memory map: pages of a map count
as memory of the process until the file is closed.
"""

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WORDS = {dtype: word for word, dtype in DTYPES.items()}
"""What safetensors calls a dtype."""
INDEX = "model.safetensors.index.json"
MOST_HEADER = 100_000_000
READ = 1 << 25
"""Bytes per read, so that an interrupt is answered soon."""


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""
    size: int
    """Bytes."""

    def __str__(self) -> str:
        """The words that errors begin with."""
        return f"{self.file}: tensor {self.name}"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; a name that comes twice is an error."""
    try:
        found = json.loads(file.read_bytes(), object_pairs_hook=lambda pairs: _once(pairs, file))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise ValueError(f"{file}: expected JSON, got {problem}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found


def _once(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{file}: expected {name} once, got it twice")
        found[name] = value
    return found


def shards_of(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a checkpoint, and what its index says: the file of each tensor (None without an index)."""
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise ValueError(f"path: expected a folder or a safetensors file, got {path}")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(f"path: expected one index, got {' and '.join(map(str, indices))}")
    if not indices:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"path: expected *.safetensors in the folder, got none in {path}")
        return files, None
    home = read_json(indices[0]).get("weight_map")
    if not isinstance(home, dict) or not all(isinstance(name, str) for name in home.values()):
        raise ValueError(f"{indices[0]}: expected weight_map, the file of each tensor, got {type(home).__name__}")
    files = [path / name for name in sorted(set(home.values()))]
    for file in files:
        if not file.is_file():
            tensor = next(name for name, where in home.items() if path / where == file)
            raise ValueError(f"{indices[0]}: tensor {tensor} is said to be in {file}, which does not exist")
    return files, home


def entries_under(path: Path, prefix: str) -> dict[str, Entry]:
    """The tensors whose names begin with `prefix` and a dot; every file is asked, so that none comes twice."""
    files, home = shards_of(path)
    found: dict[str, Entry] = {}
    for file in files:
        for entry in _entries(file, prefix + "."):
            if entry.name in found:
                raise ValueError(f"{entry}: is in {found[entry.name].file}, too")
            if home is not None and home.get(entry.name) != file.name:
                raise ValueError(f"{entry}: the index has it in {home.get(entry.name, 'no file')}")
            found[entry.name] = entry
    for name, where in (home or {}).items():
        if name.startswith(prefix + ".") and name not in found:
            raise ValueError(f"{path / where}: tensor {name} is missing, which the index has there")
    return found


def names_of(file: Path) -> list[str]:
    """The tensors of a file."""
    return [entry.name for entry in _entries(file, "")]


def _entries(file: Path, start: str) -> list[Entry]:
    """Tensors of a file whose names begin with `start`, in the order of the file."""
    with file.open("rb") as stream:
        total = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if total < 8 or length > min(MOST_HEADER, total - 8):
            raise ValueError(f"{file}: expected a safetensors file, got {total} bytes and a header of {length}")
        text = stream.read(length)
    if start.isascii() and start.replace(".", "").replace("_", "").isalnum() and start.encode() not in text:
        return []
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, file))
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise ValueError(f"{file}: expected a header in JSON, got {problem}") from None
    found = [
        _entry(file, name, told, 8 + length, total)
        for name, told in header.items()
        if name != "__metadata__" and name.startswith(start)
    ]
    found.sort(key=lambda entry: entry.start)
    for one, two in pairwise(found):
        if one.start + one.size > two.start:
            raise ValueError(f"{two}: begins inside tensor {one.name}")
    return found


def _entry(file: Path, name: str, told: Any, data: int, total: int) -> Entry:
    try:
        dtype, shape, (begin, end) = told["dtype"], tuple(told["shape"]), told["data_offsets"]
        fits = all(type(size) is int and size >= 0 for size in (*shape, begin, end)) and data + end <= total
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file}: tensor {name}: expected dtype, shape and data_offsets, got {told!r}") from None
    if not fits:
        raise ValueError(f"{file}: tensor {name}: expected bytes inside a file of {total}, got {told} (is it cut off?)")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{file}: tensor {name}: expected {end - begin} bytes to hold {dtype} of shape {shape}")
    return Entry(file, name, dtype, shape, data + begin, end - begin)


class Span(NamedTuple):
    """Bytes of a file."""

    file: Path
    start: int
    size: int


class Reader:
    """Reads spans of files into tensors. A context: at its end, however it comes, the files are closed."""

    def __init__(self, device: torch.device, largest: int) -> None:
        """`largest`: bytes of the largest tensor that will be read; no more host memory than that is taken."""
        self._device = device
        self._files: dict[Path, int] = {}
        self._slots: list[tuple[Tensor, torch.cuda.Event]] = []
        self._turn = 0
        if device.type == "cuda":
            size = max(4096, min(READ // 2, largest // 2))
            for _ in range(2):
                slot = torch.empty(size, dtype=torch.uint8, pin_memory=True)
                self._slots.append((slot, torch.cuda.Event()))

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._files.values():
            os.close(number)
        self._files.clear()

    def read(self, span: Span, target: Tensor) -> None:
        """Fills `target`, a contiguous uint8 tensor of the span's length on the host or on the reader's device."""
        if target.is_cpu:
            self._read(span, target)
            return
        if not self._slots:
            host = torch.empty(span.size, dtype=torch.uint8)
            self._read(span, host)
            target.copy_(host)
            return
        size = self._slots[0][0].numel()
        for at in range(0, span.size, size):
            slot, copied = self._slots[self._turn]
            self._turn = 1 - self._turn
            copied.synchronize()
            piece = slot[: min(size, span.size - at)]
            self._read(Span(span.file, span.start + at, piece.numel()), piece)
            target[at : at + piece.numel()].copy_(piece, non_blocking=True)
            copied.record(torch.cuda.current_stream(self._device))

    def host(self, entry: Entry) -> Tensor:
        """A small tensor, on the host."""
        raw = torch.empty(entry.size, dtype=torch.uint8)
        self._read(Span(entry.file, entry.start, entry.size), raw)
        return raw.view(DTYPES[entry.dtype]).view(entry.shape)

    def _open(self, file: Path) -> int:
        if file not in self._files:
            # Spans come in order, and the system reads ahead by itself. To be told of spans made it twice as slow.
            self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[file]

    def _read(self, span: Span, target: Tensor) -> None:
        number, at = self._open(span.file), 0
        memory = memoryview((ctypes.c_char * span.size).from_address(target.data_ptr()))
        while at < span.size:
            got = os.preadv(number, [memory[at : at + READ]], span.start + at)
            if not got:
                raise ValueError(f"{span.file}: expected {span.size} bytes at {span.start}, the file ends before them")
            at += got


class Part(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[], Tensor]
    """Gives it when its turn comes, on any device."""

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Part":
        """A tensor that is there already."""
        return cls(name, tensor.dtype, tensor.shape, lambda: tensor)

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A file to write to; it takes the place of `file` at the end, and goes if there is an error or an interrupt."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield draft
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def write_file(file: Path, parts: Sequence[Part]) -> None:
    """Writes a safetensors file, one tensor after the other, wide dtypes first, so that each is aligned."""
    header, at = {}, 0
    parts = sorted(parts, key=lambda part: -part.dtype.itemsize)
    for part in parts:
        if part.name in header:
            raise ValueError(f"{file}: expected {part.name} once, got it twice")
        place = {"data_offsets": [at, at + part.size]}
        header[part.name] = {"dtype": WORDS[part.dtype], "shape": list(part.shape), **place}
        at += part.size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(file) as draft, draft.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            raw = part.make().detach().cpu().contiguous().view(-1).view(torch.uint8)
            assert raw.numel() == part.size, part.name
            stream.write(memoryview((ctypes.c_char * part.size).from_address(raw.data_ptr())))
