"""What several test files need: implementations, poisoned outputs, comparisons that can fail."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import moeyard
from moeyard import Layout
from moeyard.dispatch import table

SOURCE = Path(moeyard.__file__).parents[1]
GUARD = 64
POISON = 0x7F7F7F7F
CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def impls_on(op: str, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
    """The implementations of an op that meet calls on a device, `reference` included."""
    reasons = table.explain(op, device, dtype).reasons
    return [name for name, reason in reasons.items() if reason.startswith(("chosen", "comes after", "only chosen"))]


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """A tensor full of poison, with poisoned guard elements behind it in its storage."""
    count = torch.Size(shape).numel()
    whole = torch.empty(count + GUARD, dtype=dtype, device=device)
    whole.view(torch.uint8).fill_(0x7F)
    return whole[:count].view(shape)


def guard_broken(tensor: Tensor) -> bool:
    """Whether anything was written behind a poisoned tensor."""
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return bool((whole[tensor.numel() :].view(torch.uint8) != 0x7F).any())


def poisoned_layout(like: Layout) -> Layout:
    """A poisoned layout of the sizes of another."""
    fields = {
        name: poisoned(tuple(t.shape), t.dtype, t.device) for name, t in zip(Layout.TENSORS, like.tensors, strict=True)
    }
    return dataclasses.replace(like, **fields)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bits (NaN payloads and signs of zero included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().cpu().view(-1).view(torch.uint8), b.contiguous().cpu().view(-1).view(torch.uint8))


def layout_difference(got: Layout, wanted: Layout) -> str | None:
    """The first field in which two layouts differ; None if they are the same bits."""
    for name in (f.name for f in dataclasses.fields(Layout) if f.init):
        a, b = getattr(got, name), getattr(wanted, name)
        if not (same_bits(a, b) if isinstance(a, Tensor) else a == b):
            return f"{name}: {a} instead of {b}"
    return None


def largest_and_rms(got: Tensor, wide: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square error against a float64 answer."""
    error = got.double() - wide
    return (float(error.abs().max()), float(error.square().mean().sqrt())) if error.numel() else (0.0, 0.0)


def no_worse(got: Tensor, honest: Tensor, wide: Tensor) -> bool:
    """Whether errors are at most 1.1 times those of an honest computation at the same dtype."""
    mine, theirs = largest_and_rms(got, wide), largest_and_rms(honest, wide)
    return all(a <= 1.1 * b + 1e-12 for a, b in zip(mine, theirs, strict=True))


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds this moeyard, wherever it runs."""
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "160", "NO_COLOR": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=300)
