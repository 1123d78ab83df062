"""What runs where, as Markdown tables: computed from the table of implementations, never typed.

A cell asks the table as `moeyard.explain` does, for cards that need not be there. Packages of implementations count as
installed only if they are.
"""

from dataclasses import replace

import torch

from moeyard import quant
from moeyard.dispatch.op import REGISTERED
from moeyard.dispatch.refusals import installed
from moeyard.dispatch.schemes import TAKES
from moeyard.dispatch.table import TABLE, explain

PACKAGES = ("numba", "cuda.core", "cuda.bindings", "triton")
"""Without one of these the tables would say less than the library can do."""
_PLACES: dict[str, tuple[str, tuple[int, int] | None]] = {
    "CPU": ("cpu", None), "NVIDIA GPU, 8.0 and later": ("cuda", (8, 0)), "Hopper": ("cuda", (9, 0)),
}  # fmt: skip
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_INSIDE = ("grouped_outer", "activate_backward", "weighted_activate_backward")
"""Operators that only backwards call."""
_SCHEMES = {
    "FP8 per tensor": quant.FP8_TENSOR, "FP8 per channel": quant.FP8_CHANNEL, "FP8 blocks": quant.FP8_BLOCK,
    "FP8 weights": quant.FP8_WEIGHTS, "INT8": quant.INT8_CHANNEL, "INT8 weights": quant.INT8_WEIGHTS,
    "INT4 groups": quant.int4_scheme(128), "INT4 with zero points": quant.int4_scheme(128, zero_points=True),
    "INT4 with FP8 rows": quant.int4_scheme(128, activations="e4m3"),
    "MXFP4": quant.MXFP4, "MXFP4 with FP8 rows": quant.MXFP4_FP8, "NVFP4": quant.NVFP4,
}  # fmt: skip


def missing() -> list[str]:
    """The packages of implementations that are not installed."""
    return [name for name in PACKAGES if not installed(name)]


def operators() -> str:
    """One line per operator: the implementation that "auto" takes by place and dtype, gradients, torch.compile."""
    if missing():
        raise ValueError(f"tables: expected numba, cuda-core and triton to be installed, got no {', '.join(missing())}")
    lines = [f"| operator | {' | '.join(_PLACES)} | gradients | compile |", "|---" * (len(_PLACES) + 3) + "|"]
    for name in TABLE:
        if name in _INSIDE:
            continue
        cells = [_cell(name, *place) for place in _PLACES.values()]
        compiles = "yes" if name in REGISTERED else "no"
        lines.append(f"| `{name}` | {' | '.join(cells)} | {_gradients(name)} | {compiles} |")
    return "\n".join([*lines, ""])


def _cell(op: str, device: str, capability: tuple[int, int] | None) -> str:
    if "align" in op:
        return f"`{explain(op, device, torch.int32, capability=capability).chosen}`"
    chosen: dict[str, list[str]] = {}
    for dtype, word in _DTYPES.items():
        chosen.setdefault(explain(op, device, dtype, capability=capability).chosen, []).append(word)
    if len(chosen) == 1:
        return f"`{next(iter(chosen))}`"
    return "; ".join(f"`{impl}`: {', '.join(words)}" for impl, words in sorted(chosen.items()))


def _gradients(op: str) -> str:
    names = REGISTERED[op].gradients
    return ", ".join(f"`{name}`" for name in names) if names else "none"


def _mark(label: str, scheme: quant.QuantScheme) -> str:
    return "yes" if label in TAKES and TAKES[label](scheme) else ""


def schemes() -> str:
    """One line per scheme in use: which implementations of `fused_experts` take it, as it is or in tiles.

    Those that "auto" never chooses say so.
    """
    rows = TABLE["fused_experts"]
    labels = [row.label for row in rows]
    heads = [f"{row.label}, by name alone" if row.by_name_only else row.label for row in rows]
    lines = [f"| weights of experts | {' | '.join(heads)} |", "|---|" + ":-:|" * len(labels)]
    for name, scheme in _SCHEMES.items():
        tiled = replace(scheme, tiled=True) if scheme.per_byte == 2 else scheme
        marks = [_mark(label, scheme) or ("tiles" if _mark(label, tiled) else "") for label in labels]
        lines.append(f"| {name}: `{scheme}` | {' | '.join(marks)} |")
    return "\n".join([*lines, ""])
