"""Launches that are only noted: which kernels calls would ask for, found out with launchers as they are and no GPU.

Launchers are called with meta tensors, whose device has no number (-1). Under `planning` such a device is a card that
need not be there, and what would be launched on it is written down.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeyard.cuda.runtime.cards import Card
    from moeyard.cuda.runtime.launch import Recipe, Shape


class Plan:
    """A card, and the recipes that calls have asked for, in the order of their first use."""

    def __init__(self, card: "Card") -> None:
        """Nothing is asked for yet."""
        self.card = card
        self.recipes: dict[Recipe, None] = {}


@contextmanager
def planning(card: "Card") -> Iterator[Plan]:
    """What this thread launches on meta tensors inside is noted, as for `card`."""
    before, plan = current_plan(), Plan(card)
    _STATE.plan = plan
    try:
        yield plan
    finally:
        _STATE.plan = before


def current_plan() -> Plan | None:
    """That of this thread, if it plans."""
    found: Plan | None = getattr(_STATE, "plan", None)
    return found


def planned() -> Plan:
    """That of this thread. ValueError where tensors have no GPU and nothing is planned."""
    plan = current_plan()
    if plan is None:
        raise ValueError("device: expected tensors of an NVIDIA GPU, or a plan that they belong to")
    return plan


class Noted:
    """A launch that is written down each time it is called."""

    def __init__(self, recipe: "Recipe") -> None:
        """Writes nothing yet."""
        self._recipe = recipe

    def __call__(self, _shape: "Shape", *_pointers: int) -> None:
        """Notes the recipe."""
        planned().recipes[self._recipe] = None

    def with_maps(self, shape: "Shape", _maps: Any, *_pointers: int) -> None:
        """Notes the recipe of a kernel that takes tensor maps, which are not made."""
        self(shape)


_STATE = threading.local()
