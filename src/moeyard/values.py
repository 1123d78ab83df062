"""The values that the operators pass to each other: frozen, with shape, dtype and sentinel beside each field."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

MAX_EXPERTS = 8192
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where every route goes: the one answer that alignment, permute, grouped GEMM and combine share.

    A *route* is one (token, k) pair, numbered `token * top_k + k`; there are n of them. A *slot* is a
    position in the expert-grouped order, in which every expert's segment is padded to a multiple of
    `block_size`. Inside an expert routes ascend, so the same ids always give the same bits.

    Worked example: ids [[2, 0], [2, 1], [0, 2]], 3 experts, block_size 2, so n = 6 and capacity = 10:

        sorted_token_ids        [1, 4 | 3, 6 | 0, 2 | 5, 6 | 6, 6]
        expert_ids              [  0  |   1  |   2  |   2  |  -1 ]
        num_tokens_post_padded  [8]
        expert_offsets          [0, 2, 4, 8]
        expert_counts           [2, 1, 3]
        route_rows              [4, 0, 5, 2, 1, 6]

    A stacked Layout (one layer a LoRA adapter) has the same fields with one more leading axis.
    """

    TENSORS: ClassVar[tuple[str, ...]] = (
        "sorted_token_ids",
        "expert_ids",
        "num_tokens_post_padded",
        "expert_offsets",
        "expert_counts",
        "route_rows",
    )

    sorted_token_ids: Tensor
    """[capacity] int32: the route of each slot; n marks padding."""
    expert_ids: Tensor
    """[capacity / block_size] int32: local expert of each block; -1 past the used blocks."""
    num_tokens_post_padded: Tensor
    """[1] int32: used slots, a multiple of block_size. It stays on the device."""
    expert_offsets: Tensor
    """[num_local_experts + 1] int64: first slot of each expert; the last entry equals num_tokens_post_padded."""
    expert_counts: Tensor
    """[num_local_experts] int32: valid routes of each expert."""
    route_rows: Tensor
    """[n] int32, the inverse: the slot of each route; -1 if the route is dropped."""
    num_experts: int
    """Global number of experts: ids outside [0, num_experts) are dropped."""
    num_local_experts: int
    block_size: int
    top_k: int
    _again: Any = field(default=None, init=False, repr=False)
    """(arguments of the call that filled this layout as `out=`, function that repeats it), or None (layout.py)."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor], sizes: tuple[int, int, int, int]) -> "Layout":
        """The layout of six tensors and (num_experts, num_local_experts, block_size, top_k)."""
        slots, blocks, total, offsets, counts, routes = tensors
        return cls(slots, blocks, total, offsets, counts, routes, *sizes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles carry the tensors and sizes alone."""
        return Layout, (*self.tensors, self.num_experts, self.num_local_experts, self.block_size, self.top_k)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The six tensors in the order of the fields."""
        return tuple(getattr(self, name) for name in self.TENSORS)

    @property
    def num_routes(self) -> int:
        """n: routes, dropped ones included."""
        return self.route_rows.shape[-1]

    @property
    def capacity(self) -> int:
        """Slots, used or not: a function of sizes alone."""
        return self.sorted_token_ids.shape[-1]

    def copy_(self, other: "Layout") -> "Layout":
        """Overwrites this layout's tensors with those of `other`, which has the same sizes."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)
        return self

    def __repr__(self) -> str:
        return (
            f"Layout(num_routes={self.num_routes}, capacity={self.capacity}, num_experts={self.num_experts}, "
            f"num_local_experts={self.num_local_experts}, block_size={self.block_size}, top_k={self.top_k}, "
            f"device={str(self.route_rows.device)!r})"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Permuted:
    """Rows grouped by expert, with the scales that rode along."""

    rows: Tensor
    """[capacity, hidden_size], dtype of the input; rows of padding slots are unwritten."""
    scales: Tensor | None
    """[capacity] or [capacity, groups], dtype of the input scales; None if none were given."""

    def copy_(self, other: "Permuted") -> "Permuted":
        """Overwrites these tensors with those of `other`, which has the same shapes."""
        self.rows.copy_(other.rows)
        if self.scales is not None and other.scales is not None:
            self.scales.copy_(other.scales)
        return self
