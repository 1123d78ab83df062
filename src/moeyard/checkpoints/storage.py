"""How the linear layers of experts are stored: what reading a configuration gives, and what reading tensors takes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from moeyard.checkpoints import packing
from moeyard.checkpoints.packing import Stored
from moeyard.quant import QuantScheme

Config = Mapping[str, Any]
"""An object of JSON."""
OPTIONAL = ("shape", "order", "checked")
SKIPPED = frozenset(
    ("k_scale", "v_scale", "kv_scale", "q_scale", "output_scale", "output_zero_point", "input_zero_point")
)
"""Tensors that say nothing about weights: the scales of attention and of outputs, zero points of symmetric inputs."""


class Storage(NamedTuple):
    """How a linear layer is stored."""

    format: str
    """Its name, for errors."""
    scheme: QuantScheme | None
    weight: Stored
    scale: Stored | None = None
    zero: Stored | None = None
    names: Mapping[str, tuple[str, ...]] = {}
    """What the tensor of each role may be called. Roles without an entry have none.

    scale and zero: of blocks. global: the scale of a matrix. input: that of activations. shape: [N, K] before packing.
    order: the group of each column (g_idx). checked: zero points of a symmetric scheme, which have to be trivial."""
    weight_names: tuple[str, ...] = ("weight", "")
    divides: bool = False
    """Whether global scales divide, as compressed-tensors' do."""
    trivial: tuple[int, ...] = ()
    """What all zero points of "checked" may be, as the file has them."""
    orders: bool = False
    """Whether columns may belong to groups in any order (act-order); "order" has to be there then, and trivial."""
    note: str = ""
    """What is not as the configuration says, in words."""


UNQUANTISED = Storage("unquantised", None, packing.PLAIN)


def told(storage: Storage) -> str:
    """A storage in words."""
    return storage.format if storage.scheme is None else f"{storage.format} ({storage.scheme})"
