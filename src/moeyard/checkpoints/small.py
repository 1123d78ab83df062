"""Small tensors beside weights, read on the host: scales of whole matrices, and what has to be trivial."""

import torch
from torch import Tensor

from moeyard.checkpoints.files import DTYPES, Entry, Reader
from moeyard.checkpoints.layer import Layer
from moeyard.checkpoints.names import Linear
from moeyard.checkpoints.packing import nibbles
from moeyard.checkpoints.plan import Share

_FLOATS = ("F32", "BF16", "F16", "F64")


def matrix_scales(reader: Reader, layer: Layer, share: Share, role: str) -> tuple[Tensor, Tensor]:
    """The scales of role "global" or "input", float32: [experts, halves] of w13 and [experts, 1] of w2."""
    halves = 2 if layer.gated else 1
    first, second = torch.zeros(share.num_experts, halves), torch.zeros(share.num_experts, 1)
    for linear, roles in layer.linears:
        if not has(share, linear):
            continue
        entry = roles[role]
        values = _values(reader, layer, share, entry)
        if role == "global" and layer.storage.divides:
            values = torch.div(torch.ones_like(values), values)
        if not bool((values.isfinite() & (values > 0)).all()):
            raise ValueError(f"{entry}: expected positive numbers, got {values.flatten()[:3].tolist()}")
        mine = slice(None) if linear.expert is None else linear.expert - share.first_expert
        if linear.part == "down":
            second[mine, 0] = values
        elif linear.part == "gate_up":
            first[mine] = values if linear.expert is not None else values[:, None]
        else:
            first[mine, int(linear.part == "up" and layer.gated)] = values
    return first, second


def has(share: Share, linear: Linear) -> bool:
    """Whether a rank has (part of) a linear layer."""
    expert = linear.expert
    return expert is None or share.first_expert <= expert < share.first_expert + share.num_experts


def _values(reader: Reader, layer: Layer, share: Share, entry: Entry) -> Tensor:
    """One value, or one per expert of this rank, float32."""
    wanted = (layer.num_experts,) if layer.stacked else ()
    if entry.dtype not in _FLOATS:
        raise ValueError(f"{entry}: expected dtype {' or '.join(_FLOATS)}, got {entry.dtype}")
    shape = entry.shape
    while len(shape) > len(wanted) and shape[-1] == 1:
        shape = shape[:-1]
    if shape != wanted:
        raise ValueError(f"{entry}: expected shape {(*wanted, 1)} or {wanted}, got {entry.shape}")
    values = reader.host(entry).to(torch.float32).view(wanted)
    return values[share.first_expert : share.first_expert + share.num_experts] if layer.stacked else values


def check_small(reader: Reader, layer: Layer, linear: Linear, roles: dict[str, Entry]) -> None:
    """Shapes before packing, orders of columns and zero points are what the scheme lets them be."""
    hidden_size, size = layer.hidden_size, layer.intermediate_size
    rows, columns = (hidden_size, size) if linear.part == "down" else (size, hidden_size)
    rows *= 2 if linear.part == "gate_up" else 1
    scheme = layer.storage.scheme
    assert scheme is not None
    if "shape" in roles:
        told = _host(reader, roles["shape"], ("I64", "I32")).view(-1, 2)
        if not bool((told == torch.tensor([rows, columns])).all()):
            raise ValueError(f"{roles['shape']}: expected {[rows, columns]}, got {told.tolist()[:2]}")
    if "order" in roles:
        order = _host(reader, roles["order"], ("I32", "I64"))
        plain = torch.arange(columns) // (scheme.block[1] or columns)
        if order.shape[-1:] != (columns,) or not bool(((order == plain) | (order == -1).all()).all()):
            raise ValueError(
                f"{roles['order']}: expected columns in the order of their groups; columns in the order of activations "
                "(act-order) are not supported"
            )
    if "checked" in roles:
        entry = roles["checked"]
        stored = _host(reader, entry, ("I32", "I8", "U8", "F8_E4M3", "F32", "F16", "BF16"))
        if entry.dtype == "I32":
            codes = nibbles(stored) if scheme.weights == "int4" else stored.contiguous().view(torch.uint8)
            found, allowed = codes.unique().tolist(), layer.storage.trivial
        else:
            found, allowed = stored.to(torch.float32).unique().tolist(), (0,)
        if len(found) != 1 or found[0] not in allowed:
            raise ValueError(
                f"{entry}: expected {' or '.join(map(str, allowed))} in all zero points of a symmetric scheme, got "
                f"{found[:4]}"
            )


def _host(reader: Reader, entry: Entry, dtypes: tuple[str, ...]) -> Tensor:
    if entry.dtype not in dtypes or entry.dtype not in DTYPES:
        raise ValueError(f"{entry}: expected dtype {' or '.join(dtypes)}, got {entry.dtype}")
    return reader.host(entry)
