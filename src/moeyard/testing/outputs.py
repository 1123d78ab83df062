"""Poisoned outputs: what an implementation leaves unwritten, or writes behind the end, is seen."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moeyard.values import Layout

GUARD = 64
"""Elements behind the end of a poisoned tensor."""
POISON = 0x7F7F7F7F
"""A poisoned element of four bytes, as an integer; as a float32 it is finite and about 3.4e38."""


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of which every byte is 0x7F, with `GUARD` such elements behind it in its storage."""
    count = torch.Size(shape).numel()
    whole = torch.empty(count + GUARD, dtype=dtype, device=device)
    whole.view(torch.uint8).fill_(0x7F)
    return whole[:count].view(shape)


def guard_broken(tensor: Tensor) -> bool:
    """Whether anything was written behind a tensor of `poisoned`."""
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return bool((whole[tensor.numel() :].view(torch.uint8) != 0x7F).any())


def poisoned_layout(like: Layout) -> Layout:
    """A layout of the sizes of another, with every tensor poisoned."""
    fields: dict[str, Any] = {
        name: poisoned(tuple(t.shape), t.dtype, t.device) for name, t in zip(Layout.TENSORS, like.tensors, strict=True)
    }
    return dataclasses.replace(like, **fields)
