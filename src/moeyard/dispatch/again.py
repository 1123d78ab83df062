"""Calls that repeat an earlier one with other tensors: what checks and choices look at is compared in one step.

A call that went straight leaves what repeats it, and a guard of torch's compiler (`TensorGuards`). In one call of C++ a
guard compares class, dtype, device, sizes, strides, lazy views and need of a gradient of all tensors. What it does not
see is in the key: everything else that callers give, and the types of what Python takes for equal.
"""

from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad
from torch.nn import Parameter

_is_compiling = torch.compiler.is_compiling
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_transform: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
_MOST = 512
"""Python's collector walks through what is kept: a server's sizes are few where the host's time counts."""


def watched() -> bool:
    """Whether anything has to see all calls: a compiler, a mode, a transform, forward-mode differentiation."""
    return bool(
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transform() is not None
        or forward_ad._current_level >= 0
    )


def plain(*tensors: Tensor | None) -> bool:
    """Whether tensors are no subclasses and no lazy views, and nobody wants their gradients."""
    for tensor in tensors:
        if tensor is not None:
            kind = type(tensor)
            if (kind is not Tensor and kind is not Parameter) or tensor.is_neg():
                return False
            if tensor.requires_grad and torch.is_grad_enabled():
                return False
    return True


Calling = tuple[tuple[Any, ...], list[Tensor]]
"""A key of a call, and its tensors."""


def calling_of(first: object, others: Sequence[object], asked: tuple[Any, ...]) -> Calling | None:
    """How a call on a GPU is known again: its first tensor, the others, of which some may be None, and what else was
    asked for. None where a call cannot be one that repeats another, and on other devices, where checks cost little
    beside the work.

    Python takes 1, 1.0 and True for equal, which checks tell apart: so types are part of the key.
    """
    if type(first) is not Tensor or not first.is_cuda or watched():
        return None
    given, tensors = 0, [first]
    for one in others:
        given += given
        if one is not None:
            given += 1
            tensors.append(one)  # type: ignore[arg-type]  # a guard fits tensors alone
    return (first.shape, given, asked, *map(type, asked)), tensors


class Repeat(NamedTuple):
    """What a call has left."""

    fits: Callable[..., bool]
    """Whether such tensors are like those of the call."""
    without_gradients: bool
    """Whether one of them asks for a gradient, which nobody wanted then."""
    extents: tuple[int, ...]
    """Bytes from the first element of each tensor to the end of its last one."""
    start: Callable[..., Any] | None
    """What repeats the call; None where nothing does."""

    def is_apart(self, out: Tensor, tensors: Sequence[Tensor]) -> bool:
        """Whether the bytes of `out`, which is dense, lie beside those between the ends of each of the tensors."""
        start = out.data_ptr()
        end = start + out.nbytes
        return all(
            tensor is out or end <= tensor.data_ptr() or tensor.data_ptr() + extent <= start
            for tensor, extent in zip(tensors, self.extents, strict=True)
        )


class Repeats:
    """What calls of one function have left, by their keys; a full one forgets its oldest for a new one.

    A call leaves something when its key comes for the second time, so that sizes that never come again cost nothing.
    """

    def __init__(self, most: int = _MOST) -> None:
        """Holds at most so many."""
        self._entries: dict[Hashable, Repeat] = {}
        self._met: dict[int, None] = {}  # hashes: integers are nothing that a collector walks through
        self._most, self._lock = most, Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def repeated(self, calling: Calling | None, *arguments: Any) -> Any:
        """What a call gives by `start(*arguments)` of an earlier one that it repeats; None where there is none."""
        if calling is None:
            return None
        found = self.find(*calling)
        return None if found is None or found.start is None else found.start(*arguments)

    def find(self, key: Hashable, tensors: Sequence[Any]) -> Repeat | None:
        """What a call of this key on such tensors has left, if nothing has to be looked at again."""
        try:
            found = self._entries.get(key)
        except TypeError:  # something that has no hash: no call took it
            return None
        if found is None or not found.fits(*tensors) or (found.without_gradients and torch.is_grad_enabled()):
            return None
        return found

    def add(self, calling: Calling | None, make: Callable[[], Callable[..., Any] | None]) -> None:
        """Keeps what `make` gives, which repeats a call that has been met: None where nothing does; then it is asked
        no more. Nothing is kept of calls that did not go straight, or of keys that come for the first time.
        """
        if calling is None or not plain(*calling[1]) or not self._comes_again(calling[0]):
            return
        found = self.find(*calling)
        if found is not None and found.start is None:
            return
        (key, tensors), start = calling, make()
        fits = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        extents = tuple(_extent(tensor) for tensor in tensors)
        asking = any(tensor.requires_grad for tensor in tensors)
        with self._lock:
            while len(self._entries) >= self._most and key not in self._entries:
                del self._entries[next(iter(self._entries))]
            self._entries[key] = Repeat(fits, asking, extents, start)

    def _comes_again(self, key: Hashable) -> bool:
        """Whether such a key came before, lately."""
        number = hash(key)
        if number in self._met:
            return True
        with self._lock:
            while len(self._met) >= 4 * self._most:
                del self._met[next(iter(self._met))]
            self._met[number] = None
        return False

    def clear(self) -> None:
        """Forgets all."""
        with self._lock:
            self._entries.clear()
            self._met.clear()


def _extent(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()
