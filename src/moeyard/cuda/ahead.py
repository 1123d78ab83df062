"""A layer's kernels made ahead of time: compiled without a GPU, loaded where there is one."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from moeyard.cuda.runtime.cards import Card, arch_for, card_of
from moeyard.cuda.runtime.compile import cubin, is_kept
from moeyard.cuda.runtime.launch import launch_of
from moeyard.cuda.runtime.planning import Plan, planning
from moeyard.cuda.walk import all_recipes
from moeyard.dispatch.call import LayerFacts
from moeyard.dispatch.processes import in_processes

Unit = tuple[str, tuple[tuple[str, str], ...], str]
"""What is compiled: source, definitions, architecture."""

CARDS = {
    (8, 0): Card(108, 166912, False),
    (8, 6): Card(84, 101376, False),
    (8, 9): Card(142, 101376, False),
    (9, 0): Card(132, 232448, True),
    (10, 0): Card(148, 232448, True),
    (12, 0): Card(188, 101376, True),
}
"""Compute capability -> its card with the most multiprocessors in use: A100, A40, L40S, H100 and H200, B200, RTX 5090
and its kin.
"""


def planning_on(capability: tuple[int, int]) -> AbstractContextManager[Plan]:
    """What meta tensors and devices without a number belong to inside: the card of `CARDS`.

    Raises ValueError for a compute capability that is not known.
    """
    if capability not in CARDS:
        known = ", ".join(f"{major}.{minor}" for major, minor in CARDS)
        raise ValueError(f"capability: expected one of {known}, got {'.'.join(map(str, capability))}")
    return planning(CARDS[capability])


def units_of(
    facts: LayerFacts,
    capability: tuple[int, int],
    max_tokens: int,
    *,
    experts: bool = True,
    device: int | None = None,
) -> tuple[Unit, ...]:
    """What has to be compiled for a layer of 1 to `max_tokens` tokens, on a device or on the card of `CARDS`; without
    `experts` routers, alignments and rows alone.

    Raises ValueError for a compute capability that is not known.
    """
    if device is None and capability not in CARDS:
        raise ValueError(f"arch: expected one of {sorted(map(_named, CARDS))}, got {_named(capability)}")
    card = CARDS[capability] if device is None else card_of(device)
    archs = {suffix: arch_for(capability, suffix) for suffix in ("", "a")}
    units: dict[Unit, None] = {}
    for recipe in all_recipes(facts, card, max_tokens, experts):
        source, defines, suffix = recipe.compiled
        arch = archs[suffix]
        if arch is None:
            raise ValueError(f"arch: expected one that NVRTC makes code for, got {_named(capability)}{suffix}")
        units[source, defines, arch] = None
    return tuple(units)


def compile_layer(
    facts: LayerFacts,
    capability: tuple[int, int],
    max_tokens: int,
    jobs: int,
    begun: Callable[[int], Callable[[], object]],
    *,
    experts: bool = True,
    device: int | None = None,
) -> int:
    """Compiles what the cache lacks of a layer; how many kernels that was. `begun(count)` gives what is called after
    each of so many.
    """
    units = units_of(facts, capability, max_tokens, experts=experts, device=device)
    missing = [unit for unit in units if not is_kept(*unit)]
    missing.sort(key=lambda unit: unit[0] != "experts.cu")  # the longest first
    if missing:
        in_processes("moeyard.cuda.ahead:compile_unit", missing, jobs, begun(len(missing)))
    return len(missing)


def compile_unit(source: str, defines: Sequence[Sequence[str]], arch: str) -> None:
    """Compiles a unit, whose definitions may be lists, into the cache."""
    cubin(source, tuple((name, value) for name, value in defines), arch)


def load_layer(facts: LayerFacts, device: int, max_tokens: int, *, experts: bool = True) -> list[int]:
    """Loads a layer's kernels on a device; returns numbers of tokens whose calls together use all of them."""
    recipes = all_recipes(facts, card_of(device), max_tokens, experts)
    with torch.cuda.device(device):
        for recipe in recipes:
            launch_of(recipe, device)
    return sorted(set(recipes.values()))


def _named(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"
