"""Which implementations a test covers."""

import torch

import moeyard

CPU = torch.device("cpu")
_only: set[str] = set()


def impls_on(op: str, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
    """The implementations of an op that meet calls on a device, `reference` included; see `restrict_to`."""
    reasons = moeyard.explain(op, device, dtype).reasons
    meets = ("chosen", "comes after", "only chosen")
    taken = [label.partition(" ")[0] for label, reason in reasons.items() if reason.startswith(meets)]
    return [name for name in dict.fromkeys(taken) if not _only or name in _only]


def restrict_to(*names: str) -> None:
    """From now on `impls_on` gives these implementations alone; without names, all again."""
    _only.clear()
    _only.update(names)
