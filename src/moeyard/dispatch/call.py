"""What a choice between implementations may depend on: plain values, so that a choice is made once per kind of call."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeyard.quant import QuantScheme
from moeyard.values import Activation, ExpertWeights, Router


class WeightFacts(NamedTuple):
    """What a choice may depend on of the weights of experts."""

    dtype: torch.dtype
    scheme: QuantScheme | None
    """How values are quantised (`ExpertWeights.scheme`)."""
    num_local_experts: int
    columns: int
    """Rows of an expert's first matrix: results per row of a product; 2 * intermediate_size of gated experts."""
    size: int
    """Columns of that matrix: hidden_size."""
    gated: bool
    readable: str
    """Why kernels that read 16 bytes at once cannot read them as they lie, in words; "" if they can."""
    block_start: int = 0
    """Where in a block of a scheme the first rows of w13 lie (`ExpertScales`)."""
    turned: bool = False
    """Whether matrices of a product lie transposed (`lies_turned`)."""


class Call(NamedTuple):
    """What a choice may depend on."""

    device: torch.device
    dtype: torch.dtype
    """Dtype of the ids (layout) or rows (permute, combine, products, experts)."""
    weights: WeightFacts | None = None
    """Products and experts."""
    num_tokens: int | None = None
    """Tokens of experts; rows of the result of a product; routes of an alignment of very many experts."""
    top_k: int = 1
    num_experts: int = 0
    """Global number of experts, of an alignment the local one; 0 where it is unknown."""
    weight_on_input: bool = False
    batch_invariant: bool = False
    """Whether a token's result may not depend on the batch around it (`invariance.py`)."""
    capability: tuple[int, int] | None = None
    """The compute capability of a GPU that need not be there, which `explain` asks about; None: that of the device."""


@dataclass(frozen=True)
class Explanation:
    """What `auto` would choose for a call, and why the others are not chosen."""

    op: str
    call: Call
    chosen: str
    """The implementation; "none" where all refuse."""
    reasons: dict[str, str]
    """By row of the table: an implementation, and which way where it has several."""

    @property
    def able(self) -> tuple[str, ...]:
        """The implementations that "auto" may choose for such a call, the preferred one first."""
        rows = [row for row, reason in self.reasons.items() if reason.startswith(("chosen", "comes after"))]
        return tuple(dict.fromkeys(row.partition(" (")[0] for row in rows))

    def __str__(self) -> str:
        dtype = str(self.call.dtype).removeprefix("torch.")
        lines = [f"{self.op} on {self.call.device.type} ({dtype}): {self.chosen}"]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


class LayerFacts(NamedTuple):
    """What the kernels of a layer depend on besides the number of tokens. Of tensors only dtypes and sizes count."""

    weights: ExpertWeights
    router: Router
    num_experts: int
    """Global number of experts."""
    activation: Activation = Activation()
    dtype: torch.dtype = torch.bfloat16
    """Of hidden states; and of logits."""
    selection_bias: bool = False
    mapped: bool = False
    """Whether calls have an expert map."""
    shared: ExpertWeights | None = None
    """One expert that every token goes through."""
    block_sizes: tuple[int, ...] = (1, 16)
    """Of alignments."""
    batch_invariant: bool = False
    """Of calls of experts and layers."""


def call_of_alignment(topk_ids: Tensor, num_local_experts: int) -> Call | None:
    """What an alignment is chosen by. None for few experts: then device and dtype are enough, and choices are few."""
    if num_local_experts <= _MANY_EXPERTS:
        return None
    return Call(topk_ids.device, topk_ids.dtype, num_tokens=topk_ids.numel(), num_experts=num_local_experts)


_MANY_EXPERTS = 2048
"""Tables of so many fit a block of every GPU that has kernels here."""


def facts_of_experts(weights: ExpertWeights) -> WeightFacts:
    """The facts of both matrices of experts."""
    first, second = weights.w13, weights.w2
    experts, columns, _ = first.shape
    readable = unreadable(first, "weights.w13") or unreadable(second, "weights.w2")
    start = 0 if weights.scales is None else weights.scales.block_start
    return WeightFacts(
        first.dtype, weights.scheme, experts, columns, weights.hidden_size, weights.gated, readable, start
    )


def facts_of_matrices(weight: Tensor, dtype: torch.dtype, *, alone: bool) -> WeightFacts:
    """The facts of matrices [experts, columns, size] that rows of `dtype` meet, `alone` without bias and weights."""
    experts, columns, size = weight.shape
    turned = lies_turned(weight)
    readable = unreadable_turned(weight, "weight", alone) if turned else unreadable(weight, "weight")
    return WeightFacts(dtype, None, experts, columns, size, False, readable, turned=turned)


def call_of_sums(grads: Tensor, rows: Tensor, *rest: Any) -> Call | None:
    """What sums of outer products are chosen by: the sizes of their matrices, but on a CPU."""
    if grads.is_cpu:
        return None
    experts = rest[-2].shape[0]
    facts = WeightFacts(grads.dtype, None, experts, grads.shape[1], rows.shape[1], False, "")
    return Call(grads.device, grads.dtype, facts)


def lies_turned(weight: Tensor) -> bool:
    """Whether matrices [experts, columns, size] lie as [experts, size, columns], so that columns are side by side."""
    return weight.stride(1) == 1 and weight.stride(2) >= weight.shape[1] > 1 and weight.shape[2] > 1


def unreadable_turned(weight: Tensor, name: str, alone: bool) -> str:
    """Why such a kernel cannot read transposed matrices in place, in words; "" if it can. `alone`: without a bias and
    without router weights.
    """
    if not alone:
        return f"{name}: expected a contiguous tensor beside bias or topk_weights, got a transposed one"
    if weight.data_ptr() % 16 or any(weight.stride(i) * weight.itemsize % 16 for i in (0, 2)):
        return f"{name}: expected a transposed tensor whose address and strides are multiples of 16 bytes"
    return ""


def unreadable(weight: Tensor, name: str) -> str:
    """Why a kernel that reads 16 bytes of a dense matrix at once cannot read `weight`, in words; "" if it can."""
    if not weight.is_contiguous():
        return f"{name}: expected a contiguous tensor, got strides {weight.stride()}"
    if weight.data_ptr() % 16:
        return f"{name}: expected an address that is a multiple of 16 bytes"
    return ""
