"""The names of experts' tensors -> the linear layers of a layer's experts, and what each of their tensors is for."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from moeyard.checkpoints.files import Entry
from moeyard.checkpoints.storage import OPTIONAL, SKIPPED, Storage

PARTS = {
    "gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "gate_up_proj": "gate_up", "w13": "gate_up",
    "down_proj": "down", "w2": "down",
}  # fmt: skip
"""What a linear layer is, by its name: w1 is gate, w3 up, w2 down, as Mixtral has them."""
ORDERS = ("gate first", "up first", "in turn")
"""How rows of gate and up lie in a fused matrix: one half, then the other; or gate 0, up 0, gate 1, ..."""
_NAME = re.compile(r"(?:(\d+)\.)?(gate_up_proj|gate_proj|up_proj|down_proj|w13|w1|w2|w3)(?:[._](.+))?")
SHOWN = 3


class Linear(NamedTuple):
    """A linear layer of one expert, or of all of them, stacked."""

    name: str
    """Its name in the checkpoint."""
    part: str
    """gate, up, gate_up or down."""
    expert: int | None
    """None: all experts, along the first axis."""
    tensors: Mapping[str, Entry]
    """What stands behind the name -> tensor."""


def linears_under(prefix: str, entries: Mapping[str, Entry]) -> list[Linear]:
    """The linear layers of the experts under `prefix`; ValueError for a tensor that belongs to none."""
    found: dict[tuple[int | None, str], Linear] = {}
    strange = []
    for name, entry in entries.items():
        match = _NAME.fullmatch(name[len(prefix) + 1 :])
        if match is None:
            strange.append(entry)
            continue
        expert, word, what = match.groups()
        number = None if expert is None else int(expert)
        own = f"{prefix}.{word}" if expert is None else f"{prefix}.{expert}.{word}"
        linear = found.setdefault((number, PARTS[word]), Linear(own, PARTS[word], number, {}))
        if linear.name != own:
            raise ValueError(f"{entry}: expected one {linear.part} layer per expert, got {linear.name}, too")
        linear.tensors[what or ""] = entry  # type: ignore[index]
    if strange:
        raise ValueError(f"{_some(strange)}: expected tensors of experts alone under {prefix!r}")
    order = list(PARTS.values())
    return sorted(found.values(), key=lambda linear: (linear.expert or 0, order.index(linear.part)))


def goes_by(linear: Linear, prefix: str) -> list[str]:
    """The names that a configuration may have for a linear layer, its own first: as if apart, as if per expert."""
    words = {word for word, part in PARTS.items() if part in (("gate", "up") if linear.part == "gate_up" else ())}
    if linear.expert is not None:
        return [linear.name, *(f"{prefix}.{linear.expert}.{word}" for word in sorted(words))]
    words |= {word for word, part in PARTS.items() if part == linear.part}
    return [linear.name, prefix, *(f"{prefix}.0.{word}" for word in sorted(words))]


def check_complete(
    linears: Sequence[Linear], gated: bool, num_experts: int | None, where: str, prefix: str
) -> tuple[bool, int]:
    """(whether stacked, experts of the checkpoint or 0 if a stacked tensor says it); ValueError for what is missing."""
    stacked = {linear.expert is None for linear in linears}
    if len(stacked) > 1:
        names = next(linear.name for linear in linears if linear.expert is None)
        raise ValueError(f"{where}: expected experts stacked or one by one under {prefix!r}, got both ({names})")
    parts = {linear.part for linear in linears}
    fused = "gate_up" in parts
    wanted = {"down", *(("gate_up",) if fused else ("gate", "up") if gated else ("up",))}
    if parts - wanted:
        extra = next(linear for linear in linears if linear.part not in wanted)
        raise ValueError(f"{_first(extra)}: expected {sorted(wanted)} of experts alone (gated is {gated})")
    if not gated and fused:
        raise ValueError(f"{where}: expected up_proj for gated=False under {prefix!r}, got gate and up in one")
    if stacked == {True}:
        missing = wanted - parts
        if missing:
            raise ValueError(f"{where}: {missing.pop()} of the experts under {prefix!r} is missing")
        return True, 0
    there = {(linear.expert, linear.part): linear for linear in linears}
    most = max(linear.expert for linear in linears if linear.expert is not None)
    experts = most + 1 if num_experts is None else num_experts
    if most >= experts:
        extra = next(linear for linear in linears if linear.expert == most)
        raise ValueError(f"{_first(extra)}: expected experts below {experts}")
    for expert in range(experts):
        for part in sorted(wanted - {part for part in wanted if (expert, part) in there}):
            like = next(linear for linear in linears if linear.part == part) if part in parts else None
            word = part if like is None else like.name.rpartition(".")[2]
            raise ValueError(f"{where}: tensor {prefix}.{expert}.{word}.* is missing")
    return False, experts


def roles_of(linear: Linear, storage: Storage) -> dict[str, Entry]:
    """The tensors of a linear layer by their roles: "weight", "bias" and those of `Storage.names`.

    ValueError for a tensor that is missing, that no role of the storage takes, or that is there under two names.
    """
    roles: dict[str, Entry] = {}
    wanted = {"weight": storage.weight_names, "bias": ("bias",), **storage.names}
    for what, entry in linear.tensors.items():
        role = next((role for role, names in wanted.items() if what in names), None)
        if role is None:
            if what not in SKIPPED:
                raise ValueError(f"{entry}: expected no such tensor beside weights of {storage.format}")
        elif role in roles:
            raise ValueError(f"{entry}: expected one {role} per layer, got {roles[role].name}, too")
        else:
            roles[role] = entry
    static = storage.scheme is not None and storage.scheme.static
    for role, names in wanted.items():
        needed = role not in (*OPTIONAL, "bias", "input") or (role == "input" and static)
        needed = needed or (role == "order" and storage.orders)
        if needed and role not in roles:
            name = f"{linear.name}.{names[0]}".rstrip(".")
            file = next(iter(linear.tensors.values())).file
            raise ValueError(f"{file}: tensor {name} is missing, which {storage.format} has beside weights")
    if not static:
        roles.pop("input", None)
    return roles


def _first(linear: Linear) -> str:
    return str(next(iter(linear.tensors.values())))


def _some(entries: Iterable[Entry]) -> str:
    every = list(entries)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return f"{every[0].file}: {', '.join(f'tensor {entry.name}' for entry in every[:SHOWN])}{more}"
