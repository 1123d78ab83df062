"""Frames and values on the pipes between the judge and its workers. Standard library only; arrays if they are there.

A frame is its length (8 bytes, little endian), one letter, a number (8 bytes, a double), a mark (8 bytes) and a body.
The judge draws a mark for every request, and the reply to it bears the same. The body of a value is one line of JSON,
which describes the structure, and the bytes of its arrays one after another. Nothing is pickled: decoding what an
untrusted process sent runs none of its code. The judge decodes with numpy alone; a worker gets back tensors where
tensors were sent.
"""

from __future__ import annotations

import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # a worker's start is part of every sample's cost
    from typing import Any

HEAD = struct.Struct("<Qcd8s")
_AS_IS = (type(None), bool, int, float, str)
_READS = {
    list: ("__iter__", "__len__", "__getitem__"),
    tuple: ("__iter__", "__len__", "__getitem__"),
    dict: ("__iter__", "__len__", "__getitem__", "items", "keys", "values"),
}
"""A subclass that changes one of these could give something else to whom reads it in another way."""
_NO_NUMPY_DTYPE = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


_NOTHING = b'21\n{"!":"tuple","of":[]}'
"""What every call without arguments is given."""


def frame(letter: bytes, number: float, mark: bytes, body: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """The buffers of one frame."""
    return [HEAD.pack(sum(len(part) for part in body), letter, number, mark), *body]


def encode(value: Any) -> list[bytes | memoryview]:
    """A value as buffers: None, bool, int, float, str, bytes, list, tuple, dict, dataclass, arrays and tensors of them.

    Raises TypeError for anything else. Dataclasses and named tuples arrive as dicts and tuples.
    """
    if value is None:
        return [b"4\nnull"]
    import json

    buffers: list[bytes | memoryview] = []
    tree = json.dumps(_node(value, buffers), separators=(",", ":")).encode()
    return [b"%d\n" % len(tree), tree, *buffers]


def dtypes(body: bytes) -> list[str]:
    """The dtypes of a body's arrays, as their sender named them: numpy has no bfloat16."""
    import json

    size, _, rest = body[:24].partition(b"\n")
    start = len(size) + 1
    found: list[str] = []

    def note(node: dict[str, Any]) -> dict[str, Any]:
        found.extend([node["dtype"]] if "dtype" in node else [])
        return node

    json.loads(rest and body[start : start + int(size)], object_hook=note)
    return found


def decode(body: bytes | bytearray | memoryview, *, tensors: bool = False) -> Any:
    """The value in a body. Tensors become numpy arrays unless `tensors`; ValueError for what is no value."""
    view = memoryview(body).toreadonly()
    start = bytes(view[:24]).find(b"\n")
    if start < 0:
        raise ValueError("body: expected the length of its description in the first line")
    end = start + 1 + int(bytes(view[:start]))
    if bytes(view[:end]) == _NOTHING:
        return ()
    import json

    reader = _Reader(view[end:], tensors)
    return reader.value(json.loads(bytes(view[start + 1 : end])))


def _node(value: Any, buffers: list[bytes | memoryview]) -> Any:
    if type(value) in _AS_IS:
        return value
    for base, reads in _READS.items():
        if isinstance(value, base) and any(getattr(type(value), name) is not getattr(base, name) for name in reads):
            words = f"a {base.__name__} that reads like one in every way, got {type(value).__name__}"
            raise TypeError(f"value: expected {words}, a subclass that does not")
    if isinstance(value, (list, tuple)):
        return {"!": "tuple" if isinstance(value, tuple) else "list", "of": [_node(one, buffers) for one in value]}
    if isinstance(value, dict):
        return {"!": "dict", "of": [[_node(key, buffers), _node(one, buffers)] for key, one in value.items()]}
    if hasattr(type(value), "__dataclass_fields__"):
        names = list(type(value).__dataclass_fields__)
        return {"!": "dict", "of": [[name, _node(getattr(value, name), buffers)] for name in names]}
    if isinstance(value, (bytes, bytearray)):
        buffers.append(memoryview(value))
        return {"!": "bytes", "size": len(value)}
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"value: expected torch's own tensors, got {type(value).__name__}, a subclass")
        return _tensor(value, buffers)
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        if type(value) is not numpy.ndarray and not isinstance(value, numpy.generic):
            raise TypeError(f"value: expected numpy's own arrays, got {type(value).__name__}, a subclass")
        array = numpy.ascontiguousarray(value)
        if array.dtype.hasobject or array.dtype.names:
            raise TypeError(f"value: expected arrays of numbers, got dtype {array.dtype}")
        buffers.append(memoryview(array.reshape(-1).view(numpy.uint8)))
        return {"!": "array", "dtype": array.dtype.str, "shape": list(numpy.shape(value)), "size": array.nbytes}
    raise TypeError(f"value: expected numbers, text, bytes, arrays or containers of them, got {type(value).__name__}")


def _tensor(tensor: Any, buffers: list[bytes | memoryview]) -> dict[str, Any]:
    torch = sys.modules["torch"]
    raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    buffers.append(memoryview(raw))
    name = str(tensor.dtype).removeprefix("torch.")
    return {"!": "tensor", "dtype": name, "shape": list(tensor.shape), "size": raw.nbytes, "on": tensor.device.type}


class _Reader:
    """Rebuilds a tree; buffers follow each other in the order in which the tree names them."""

    def __init__(self, rest: memoryview, tensors: bool) -> None:
        self.rest, self.tensors = rest, tensors

    def value(self, node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        kind = node["!"]
        if kind in ("list", "tuple"):
            values = [self.value(one) for one in node["of"]]
            return tuple(values) if kind == "tuple" else values
        if kind == "dict":
            return {self.value(key): self.value(one) for key, one in node["of"]}
        raw, self.rest = self.rest[: node["size"]], self.rest[node["size"] :]
        if len(raw) != node["size"]:
            raise ValueError(f"body: expected {node['size']} more bytes, got {len(raw)}")
        return bytes(raw) if kind == "bytes" else self.array(node, raw)

    def array(self, node: dict[str, Any], raw: memoryview) -> Any:
        if node["!"] == "tensor" and self.tensors:
            import torch

            flat = torch.empty(node["size"], dtype=torch.uint8)
            flat.numpy()[:] = raw
            return flat.view(getattr(torch, node["dtype"])).reshape(node["shape"]).to(node["on"])
        import numpy

        dtype = node["dtype"]
        if dtype == "bfloat16":  # the upper half of a float32
            upper = numpy.frombuffer(raw, numpy.uint16).astype(numpy.uint32) << 16
            return upper.view(numpy.float32).reshape(node["shape"])
        dtype = "uint8" if dtype in _NO_NUMPY_DTYPE else dtype
        array = numpy.frombuffer(raw, dtype).reshape(node["shape"])
        return array.copy() if self.tensors else array
