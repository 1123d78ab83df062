"""What the experts of a checkpoint are, in words: `moeyard inspect`."""

import re
from pathlib import Path
from typing import NamedTuple

from moeyard.checkpoints.files import names_of, shards_of
from moeyard.checkpoints.layer import read_layer

_EXPERT = re.compile(
    r"((?:.+[.])?experts)[.](?:\d+[.])?(?:gate_up_proj|gate_proj|up_proj|down_proj|w13|w1|w2|w3)(?:[._].+)?"
)


class Described(NamedTuple):
    """The experts of one layer."""

    prefix: str
    scheme: str
    format: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    stored: str
    """How: one by one or stacked, gate and up apart or in one."""
    files: tuple[str, ...]
    gigabytes: float
    note: str


def prefixes_in(path: Path) -> list[str]:
    """What stands before experts' names, layer by layer, in the order of numbers."""
    found = {match[1] for file in shards_of(path)[0] for name in names_of(file) if (match := _EXPERT.fullmatch(name))}
    return sorted(found, key=lambda name: [int(part) if part.isdecimal() else -1 for part in name.split(".")])


def describe(path: Path, prefix: str) -> Described:
    """What the experts under `prefix` are; the errors of `load_experts` for what their names and configuration say."""
    gates = re.compile(re.escape(prefix) + r"[.](\d+[.])?(gate|w1)")
    gated = any(gates.match(name) for file in shards_of(path)[0] for name in names_of(file))
    layer = read_layer(path, prefix, gated=gated, gate_up_order=None, num_experts=None)
    entries = [entry for _, roles in layer.linears for entry in roles.values()]
    how = ["stacked" if layer.stacked else "one by one"]
    if gated:
        how.append("gate and up apart" if layer.first == "gate" else f"gate and up in one, {layer.order}")
    storage = layer.storage
    return Described(
        prefix, str(storage.scheme or layer.of("down", "weight").dtype), storage.format, layer.num_experts,
        layer.hidden_size, layer.intermediate_size, ", ".join(how),
        tuple(sorted({entry.file.name for entry in entries})), sum(entry.size for entry in entries) / 1e9, storage.note,
    )  # fmt: skip
