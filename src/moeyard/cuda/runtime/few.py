"""Whether plans make do with fewer kernels, each of which then serves more sizes."""

import os

_CHOICES = ("all", "few")


def _asked(text: str) -> bool:
    if text not in _CHOICES:
        raise ValueError(f"MOEYARD_KERNELS: expected one of {_CHOICES}, got {text!r}")
    return text == "few"


FEW_KERNELS = _asked(os.environ.get("MOEYARD_KERNELS", "all"))
"""With MOEYARD_KERNELS=few a model needs about half as many kernels, so that first calls and `warmup` take less time.

It is read once. "all" has the kernel that measured best at each size.
"""
