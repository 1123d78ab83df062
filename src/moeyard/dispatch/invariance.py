"""Results that do not depend on the batch around a token: who asks for them, and which rows of the table promise them.

A result is batch-invariant if each of its sums has one order, whatever the number of tokens (Horace He and Thinking
Machines Lab, "Defeating Nondeterminism in LLM Inference", 2025; vLLM's `VLLM_BATCH_INVARIANT`).
"""

import os

from moeyard.quant import QuantScheme

OPERATORS = ("fused_experts", "grouped_gemm", "route", "activate_backward", "weighted_activate_backward")
"""Those whose implementations may differ in it. The others move rows and integers, or add up a token's own rows."""

_OF_TORCH = "promises no batch-invariant result: torch chooses the order of its sums by the sizes of tensors"
VARIES = {
    "torch": _OF_TORCH,
    "reference": _OF_TORCH,
    "cuda (few tokens)": "promises no batch-invariant result: its sums have another order than those of more tokens",
    "cuda (few tokens of 4 bits)": "promises no batch-invariant result: more tokens than it takes go to another kernel",
}
"""By the labels of rows: why a token's result may depend on the batch, in words. All others promise that it does not.
"""


_OF_TILES = "promises no batch-invariant result for weights of 4 bits: tiles of other sizes sum in another order"


def dependence(label: str, scheme: QuantScheme | None) -> str | None:
    """Why a row of the table gives a token results that may depend on the batch, in words; None if they do not."""
    return VARIES.get(label) or (_OF_TILES if scheme is not None and scheme.tiled else None)


def _read(text: str) -> bool:
    if text not in ("", "0", "1"):
        raise ValueError(f"MOEYARD_BATCH_INVARIANT: expected 0 or 1, got {text!r}")
    return text == "1"


_DEFAULT = _read(os.environ.get("MOEYARD_BATCH_INVARIANT", ""))  # once, as MOEYARD_IMPL


def batch_invariance(asked: object, op: str = OPERATORS[0]) -> bool:
    """What a caller asked for; None takes the default of `MOEYARD_BATCH_INVARIANT`, for operators that have a choice.

    TypeError for what is no bool, ValueError for an operator that has no choice.
    """
    if asked is None:
        return _DEFAULT and op in OPERATORS
    if not isinstance(asked, bool):
        raise TypeError(f"batch_invariant: expected a bool or None, got {type(asked).__name__} ({asked!r})")
    if asked and op not in OPERATORS:
        raise ValueError(f"batch_invariant: expected None or False for {op} (of {OPERATORS} it is an option), got True")
    return asked
