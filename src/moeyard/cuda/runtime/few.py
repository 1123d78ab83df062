"""Which plans make do with fewer kernels, each of which then serves more sizes."""

import os

_CHOICES = ("all", "few")
KINDS = ("align", "route", "rows", "experts")
"""Folders of cuda whose plans have both choices: alignments, routers, rows (permute, combine and the like), experts."""
BY_DEFAULT: frozenset[str] = frozenset()
"""Those that make do with few unless MOEYARD_KERNELS says otherwise."""


def _asked(text: str) -> frozenset[str]:
    """The kinds that make do with few: "few" or "all" for every kind, or "kind=few,kind=all" for some."""
    few = set(BY_DEFAULT)
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, _, choice = part.rpartition("=")
        if choice not in _CHOICES:
            raise ValueError(f"MOEYARD_KERNELS: expected one of {_CHOICES}, got {choice!r}")
        if kind and kind not in KINDS:
            raise ValueError(f"MOEYARD_KERNELS: expected one of {KINDS} before '=', got {kind!r}")
        named = {kind} if kind else set(KINDS)
        few = few | named if choice == "few" else few - named
    return frozenset(few)


FEW_KERNELS = _asked(os.environ.get("MOEYARD_KERNELS", ""))
"""The kinds whose plans make do with few kernels. It is read once.

With MOEYARD_KERNELS=few, of all kinds, a model needs about half as many kernels, so that first calls and `warmup` take
less time. "all" has the kernel that measured best at each size. "experts=few" has few of the experts alone.
"""
