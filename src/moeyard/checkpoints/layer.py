"""The experts of a layer as a checkpoint holds them: what is known before any tensor is read."""

from pathlib import Path
from typing import NamedTuple

from moeyard.checkpoints import packing
from moeyard.checkpoints.config import Model, read_model, storage_of
from moeyard.checkpoints.files import DTYPES, Entry, entries_under
from moeyard.checkpoints.names import ORDERS, Linear, check_complete, goes_by, linears_under, roles_of
from moeyard.checkpoints.packing import Stored
from moeyard.checkpoints.storage import Storage, told
from moeyard.values import MAX_EXPERTS


class Layer(NamedTuple):
    """The experts of a layer, none left out."""

    storage: Storage
    linears: list[tuple[Linear, dict[str, Entry]]]
    """Each with its tensors by their roles."""
    stacked: bool
    gated: bool
    order: str
    """How gate and up lie where they are fused, of `names.ORDERS`."""
    num_experts: int
    hidden_size: int
    intermediate_size: int

    def of(self, part: str, role: str) -> Entry:
        """A tensor of the first linear layer of a part."""
        return next(roles[role] for linear, roles in self.linears if linear.part == part)

    @property
    def first(self) -> str:
        """The part that w13 begins with."""
        parts = {linear.part for linear, _ in self.linears}
        return next(part for part in ("gate_up", "gate", "up") if part in parts)


def read_layer(path: Path, prefix: str, *, gated: bool, gate_up_order: str | None, num_experts: int | None) -> Layer:
    """What the files and their configuration say about the experts under `prefix`."""
    entries = entries_under(path, prefix)
    if not entries:
        raise ValueError(f"prefix: expected tensors in {path} whose names begin with '{prefix}.', got none")
    model = read_model(path)
    linears = linears_under(prefix, entries)
    number = model.num_experts() if num_experts is None else num_experts
    stacked, experts = check_complete(linears, gated, number, str(path), prefix)
    storage = storage_of(model, [goes_by(linear, prefix) for linear in linears])
    with_roles = [(linear, roles_of(linear, storage)) for linear in linears]
    layer = Layer(storage, with_roles, stacked, gated, "", experts, 0, 0)
    return _ordered(_sized(layer, number), model, gate_up_order)


def matrix_of(entry: Entry, stored: Stored, stacked: bool) -> tuple[int, int]:
    """The (rows, columns) of the items in a file, per expert."""
    shape = entry.shape[1:] if stacked else entry.shape
    if stored.last and len(shape) == 3 and shape[2] == stored.last:
        shape = (shape[0], shape[1] * shape[2])
    if len(shape) != 2:
        wanted = 2 + stacked + bool(stored.last)
        raise ValueError(f"{entry}: expected {wanted} axes, got shape {entry.shape}")
    return shape[0], shape[1]


def _sized(layer: Layer, num_experts: int | None) -> Layer:
    """The layer with its sizes, read off the first weights; the others are compared with them when they are planned."""
    first, down = layer.of(layer.first, "weight"), layer.of("down", "weight")
    for entry in (first, down):
        if entry.dtype not in layer.storage.weight.dtypes:
            check_dtype(entry, layer.storage.weight, layer.storage)
    weight, halves = layer.storage.weight, 2 if layer.first == "gate_up" else 1
    one, two = matrix_of(first, weight, layer.stacked), matrix_of(down, weight, layer.stacked)
    fits, fits_turned = one == (halves * two[1], two[0]), one == (two[1], halves * two[0])
    if weight is packing.PLAIN and layer.stacked and fits_turned and not fits:
        weight = packing.TURNED
        layer = layer._replace(storage=layer.storage._replace(weight=weight))
    (n13, k13), (n2, k2) = (one[::-1], two[::-1]) if weight.turned else (one, two)
    if weight.per_n == 1:
        wide, hidden_size = n13, n2
    else:
        wide, hidden_size = halves * k2, k13
    if wide % halves:
        raise ValueError(f"{first}: expected an even number of gate and up rows, got shape {first.shape}")
    experts = layer.num_experts
    if layer.stacked:
        experts = first.shape[0]
        if num_experts is not None and experts != num_experts:
            raise ValueError(f"{first}: expected {num_experts} experts, got shape {first.shape}")
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"{first}: expected 1 to {MAX_EXPERTS} experts, got {experts}")
    scheme, size = layer.storage.scheme, wide // halves
    if scheme is not None and (size % scheme.per_byte or hidden_size % scheme.per_byte):
        raise ValueError(f"{first}: expected even sizes for {scheme}, got {hidden_size} and {size}")
    return layer._replace(num_experts=experts, hidden_size=hidden_size, intermediate_size=size)


def check_dtype(entry: Entry, stored: Stored, storage: Storage) -> None:
    """The file's dtype is one that the configuration lets a tensor have."""
    if entry.dtype in stored.dtypes:
        return
    why = f"the configuration says {told(storage)}"
    if entry.dtype.endswith("FNUZ"):
        why += "; floats of another bias (fnuz) stand for half of what their bits say, convert the checkpoint first"
    elif entry.dtype not in DTYPES:
        why += "; this dtype is not known"
    raise ValueError(f"{entry}: expected dtype {' or '.join(stored.dtypes)}, got {entry.dtype} ({why})")


def _ordered(layer: Layer, model: Model, wanted: str | None) -> Layer:
    """The layer with the order of gate and up."""
    if wanted not in (None, *ORDERS):
        raise ValueError(f"gate_up_order: expected one of {ORDERS}, got {wanted!r}")
    if layer.first != "gate_up":
        if wanted is not None:
            raise ValueError(f"gate_up_order: expected None for gate and up that are stored apart, got {wanted!r}")
        return layer._replace(order="gate first")
    kind = model.text.get("model_type") or model.config.get("model_type")
    in_turn = layer.storage.weight is packing.BLOCKS or kind == "gpt_oss"
    turned_with_bias = layer.storage.weight is packing.TURNED and "bias" in layer.linears[0][1]
    if wanted is None and kind is None and turned_with_bias:
        raise ValueError(
            f"gate_up_order: expected one of {ORDERS} for stacked weights with biases, as {model.file} "
            "has no model_type"
        )
    return layer._replace(order=wanted or ("in turn" if in_turn else "gate first"))
