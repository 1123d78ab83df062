"""Which tensors share memory: outputs may share none with inputs, nor with each other."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor


def refuse_overlap(outputs: Sequence[tuple[str, Tensor]], inputs: Iterable[tuple[str, Any]]) -> None:
    """ValueError naming an output and what it overlaps. Parts of one storage that do not overlap are fine.

    `outputs` are contiguous. Inputs that are no tensors, and tensors without memory (meta, empty), do not matter.
    """
    spans = []
    for name, tensor in outputs:
        address = tensor.data_ptr()
        spans.append((address, address + tensor.nbytes, name))
    if len(spans) > 1:
        for (_, end, name), (start, _, other) in pairwise(sorted(spans)):
            if 0 < start < end:
                raise ValueError(f"{other}: expected memory apart from {name}, got a tensor that overlaps it")
    for name, value in inputs:
        if isinstance(value, Tensor):
            low = value.data_ptr()
            for start, end, output in spans:
                if low < end and overlaps(value, start, end):
                    raise ValueError(f"{output}: expected memory apart from {name}, got a tensor that overlaps it")


def overlaps(tensor: Tensor, start: int, end: int) -> bool:
    """Whether an element of a strided tensor lies in the bytes [start, end)."""
    low = tensor.data_ptr()
    if tensor.is_contiguous():
        return start < low + tensor.nbytes and low < end and low > 0 and tensor.nbytes > 0
    if not tensor.numel() or not low:
        return False
    width = tensor.element_size()
    dims = [(size, stride * width) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    dims = sorted((dim for dim in dims if dim[0] > 1 and dim[1]), key=lambda dim: -dim[1])
    return _meets(low, dims, width, start, end)


def _meets(low: int, dims: list[tuple[int, int]], width: int, start: int, end: int) -> bool:
    extent = sum((size - 1) * stride for size, stride in dims) + width
    if not (start < low + extent and low < end):
        return False
    if not dims:
        return True
    (size, stride), inner = dims[0], dims[1:]
    within = extent - (size - 1) * stride
    first = max(0, (start - low - within) // stride + 1)  # the first index whose elements reach beyond `start`
    last = min(size - 1, (end - 1 - low) // stride)  # the last one whose elements begin before `end`
    if last - first >= 2 and within <= stride:  # all of an index in between lies inside
        return True
    return any(_meets(low + i * stride, inner, width, start, end) for i in range(first, last + 1))
