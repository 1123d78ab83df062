"""Recorded traffic: the expert ids of a running model, in a small file that the benchmark takes as a workload.

    with moeyard.bench.traces.record("traffic.trace"):
        model.generate(...)

or `moeyard trace SCRIPT`. Recorded are eager calls of this thread to moeyard's `fused_experts` and
`moe_align_block_size`, by whatever name they are called (`moeyard.integrations` too). What a compiler has compiled and
what a CUDA graph replays is not seen. While recording, calls go through torch's dispatcher; results do not change.

A file is gzip: one line of JSON (`TRACE`: version, calls, layers, machine), then the ids of all calls as little-endian
int16, in the order of the calls. An id below -1 or of 32768 and above is stored as -1: it was dropped.
"""

import gzip
import json
import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moeyard
from moeyard.bench.operators import Case
from moeyard.testing import ROUTINGS

TRACE = 1
"""The version of the format."""
SUFFIX = ".trace"
_MOST_SIZES = 8


@dataclass(frozen=True)
class Call:
    """One recorded call."""

    op: str
    layer: int
    """Layers are numbered as they first came; -1 for an alignment, which has no weights to be known by."""
    num_experts: int
    ids: Tensor
    """[num_tokens, top_k] int16 on the CPU, -1 for dropped routes."""


@dataclass
class Trace:
    """The calls of a file, or of a recording that runs."""

    calls: list[Call] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    """Per layer hidden_size, intermediate_size and dtype."""
    machine: dict[str, str] = field(default_factory=dict)

    def loads(self, op: str) -> tuple[Tensor, str]:
        """(routes per expert [rows, num_experts] int64, what the rows are): layers, or the calls of an only layer."""
        mine = [call for call in self.calls if call.op == op]
        layers = sorted({call.layer for call in mine})
        most = max(call.num_experts for call in mine)
        rows = [layers.index(call.layer) for call in mine] if len(layers) > 1 else list(range(len(mine)))
        counts = torch.zeros(max(rows) + 1, most, dtype=torch.int64)
        for row, call in zip(rows, mine, strict=True):
            taken = call.ids[(call.ids >= 0) & (call.ids < most)].long()
            counts[row] += torch.bincount(taken.view(-1), minlength=most)
        return counts, "layer" if len(layers) > 1 else "call"


class NothingRecordedError(ValueError):
    """A recording that ended without a call."""


class _Recorder(TorchDispatchMode):
    """Keeps the ids of moeyard's calls, on their device until the end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, int, int, Tensor]] = []
        self.layers: dict[tuple[int, int], int] = {}
        self.sizes: list[dict[str, Any]] = []

    def __torch_dispatch__(
        self, function: Any, _types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        name = function._schema.name
        if name in ("moeyard::fused_experts", "moeyard::moe_align_block_size"):
            given = {one.name: value for one, value in zip(function._schema.arguments, arguments, strict=False)}
            self._keep(name.removeprefix("moeyard::"), given)
        return function(*arguments, **(keywords or {}))

    def _keep(self, op: str, given: dict[str, Any]) -> None:
        layer, ids = -1, given["topk_ids"]
        if "w13" in given:
            first, second = given["w13"], given["w2"]
            key = first.data_ptr(), second.data_ptr()
            layer = self.layers.setdefault(key, len(self.layers))
            if layer == len(self.sizes):
                rows, size = given["hidden_states"], first.shape[1] // (2 if given["gated"] else 1)
                dtype = str(rows.dtype).removeprefix("torch.")
                self.sizes.append({"hidden_size": rows.shape[1], "intermediate_size": size, "dtype": dtype})
        if ids.dtype == torch.uint32:
            ids = ids.view(torch.int32)
        ids = ids.reshape(-1, ids.shape[1] if ids.dim() == 2 else int(given["top_k"]))
        kept = torch.where((ids >= 0) & (ids < 2**15), ids, -1).to(torch.int16)
        self.calls.append((op, layer, int(given["num_experts"]), kept))


@contextmanager
def record(path: str | Path) -> Iterator[None]:
    """Records the calls of the block's thread, and writes `path` at its end, also where the block raises.

    Args:
        path: of the file to write; it ends in .trace. A file that is there is replaced.

    Raises ValueError for another ending, and `NothingRecordedError` at the end where nothing was recorded.
    """
    target = Path(path)
    if target.suffix != SUFFIX:
        raise ValueError(f"path: expected a name that ends in {SUFFIX}, got {str(path)!r}")
    recorder = _Recorder()
    try:
        with recorder:
            yield
    finally:
        if recorder.calls:
            calls = [Call(op, layer, experts, ids.cpu()) for op, layer, experts, ids in recorder.calls]
            write(target, Trace(calls, recorder.sizes, _machine(recorder.calls[0][3].device)))
    if not recorder.calls:
        raise NothingRecordedError(
            "record: expected calls of moeyard.fused_experts or moeyard.moe_align_block_size in this thread, got none"
        )


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    date = datetime.now(UTC).date().isoformat()
    return {"device": name, "date": date, "torch": torch.__version__, "moeyard": moeyard.__version__}


def write(path: Path, trace: Trace) -> None:
    """Writes a trace."""
    calls = [[call.op, call.layer, call.num_experts, *call.ids.shape] for call in trace.calls]
    head = {"trace": TRACE, "calls": calls, "layers": trace.layers, "machine": trace.machine}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.write(json.dumps(head).encode() + b"\n")
        for call in trace.calls:
            body = bytearray(2 * call.ids.numel())
            if body:
                torch.frombuffer(body, dtype=torch.int16).copy_(call.ids.reshape(-1))
            file.write(body)


def read(path: str | Path) -> Trace:
    """The trace of a file; ValueError says what is wrong with it."""
    try:
        with gzip.open(path, "rb") as file:
            line, body = file.readline(), bytearray(file.read())
        head = json.loads(line)
        version = head["trace"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{path}: expected a file of `moeyard trace`, got {problem}") from None
    if version != TRACE:
        raise ValueError(f"{path}: expected a trace of version {TRACE}, got {version}")
    wanted = 2 * sum(tokens * top_k for *_, tokens, top_k in head["calls"])
    if not head["calls"] or len(body) != wanted:
        raise ValueError(f"{path}: expected {wanted} bytes of ids, at least one call, got {len(body)}")
    ids, calls, start = torch.frombuffer(body, dtype=torch.int16) if body else torch.empty(0).short(), [], 0
    for op, layer, experts, tokens, top_k in head["calls"]:
        calls.append(Call(op, layer, experts, ids[start : start + tokens * top_k].view(tokens, top_k)))
        start += tokens * top_k
    return Trace(calls, head["layers"], head["machine"])


def cases(path: Path, scale: int, shrink: Any) -> list[Case]:
    """What the benchmark measures of a trace: alignment (blocks of 64) and, where layers were recorded, their experts.

    There is one case per operator and size, of the sizes that most calls have (at most 8). Its inputs are recorded
    calls of that size, drawn at random. `shrink` divides hidden sizes by `scale`, as workloads do.
    """
    trace = read(path)
    routing = f"recorded {path.stem}"
    sized: dict[tuple[int, int, int], list[Tensor]] = {}
    for call in trace.calls:
        if call.ids.numel():
            sized.setdefault((*call.ids.shape, call.num_experts), []).append(call.ids)
    if not sized:
        raise ValueError(f"{path}: expected a call of at least one token, got none")

    def recorded(num_tokens: int, num_experts: int, top_k: int, generator: Generator) -> Tensor:
        held = sized[num_tokens, top_k, num_experts]
        which = int(torch.randint(len(held), (), generator=generator, device=generator.device))
        return held[which].int().to(generator.device)

    ROUTINGS[routing] = recorded
    common = Counter({size: len(held) for size, held in sized.items()}).most_common(_MOST_SIZES)
    layer = trace.layers[0] if trace.layers else None
    found = []
    for tokens, top_k, experts in sorted(size for size, _ in common):
        sizes = (("num_tokens", tokens), ("num_experts", experts), ("top_k", top_k))
        found.append(Case(path.stem, "moe_align_block_size", routing, (*sizes, ("block_size", 64))))
        if layer is not None:
            wide = tuple((key, shrink(key, layer[key], scale)) for key in ("hidden_size", "intermediate_size"))
            found.append(Case(path.stem, "fused_experts", routing, (*sizes, *wide, ("dtype", layer["dtype"]))))
    return found
