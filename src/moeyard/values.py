"""The values that the operators pass to each other: frozen, with shape, dtype and sentinel beside each field."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Required, TypedDict

import torch
from torch import Tensor

from moeyard.quant import ExpertScales, QuantScheme

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

    A stacked Layout (one layout per LoRA adapter) has the same fields with one more leading axis.

    Operators allocate the six tensors as slices of one piece of memory. Who keeps one of them keeps all; `clone` gives
    tensors of their own.
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
    _notes: Any = field(default=None, init=False, repr=False)
    """None until an operator has made this layout or found its tensors to fit (dispatch/checks.py), then (). From its
    first use as `out=` on: what the next one may find (layout.py)."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor], sizes: tuple[int, int, int, int]) -> "Layout":
        """The layout of six tensors and (num_experts, num_local_experts, block_size, top_k)."""
        slots, blocks, total, offsets, counts, routes = tensors
        return cls(slots, blocks, total, offsets, counts, routes, *sizes)

    def trust(self) -> "Layout":
        """Marks this layout as one whose tensors fit, since an operator made or checked it; returns it."""
        object.__setattr__(self, "_notes", ())
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles carry sizes and tensors alone, each tensor in memory of its own."""
        tensors = (tensor.clone() for tensor in self.tensors)
        return Layout, (*tensors, self.num_experts, self.num_local_experts, self.block_size, self.top_k)

    def clone(self) -> "Layout":
        """A copy whose tensors have memory of their own: keeping one of them keeps no other."""
        sizes = (self.num_experts, self.num_local_experts, self.block_size, self.top_k)
        return Layout.of([tensor.clone() for tensor in self.tensors], sizes)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The six tensors in the order of the fields."""
        return (
            self.sorted_token_ids,
            self.expert_ids,
            self.num_tokens_post_padded,
            self.expert_offsets,
            self.expert_counts,
            self.route_rows,
        )

    @property
    def num_routes(self) -> int:
        """n: routes, dropped ones included."""
        return self.route_rows.shape[-1]

    @property
    def capacity(self) -> int:
        """Slots, used or not: a function of sizes alone."""
        return self.sorted_token_ids.shape[-1]

    def copy_(self, other: "Layout") -> "Layout":
        """Copies the tensors of `other`, whose sizes are equal, into this layout's."""
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
        """Copies the tensors of `other`, whose shapes are equal, into these."""
        self.rows.copy_(other.rows)
        if self.scales is not None and other.scales is not None:
            self.scales.copy_(other.scales)
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The router's choice: which experts each token goes to, and with what weight."""

    topk_weights: Tensor
    """[num_tokens, top_k] float32; 0 where the route is dropped."""
    topk_ids: Tensor
    """[num_tokens, top_k] int32, best first; -1 drops the route (rows of padding tokens)."""

    def copy_(self, other: "Routing") -> "Routing":
        """Copies the tensors of `other`, whose shapes are equal, into these."""
        self.topk_weights.copy_(other.topk_weights)
        self.topk_ids.copy_(other.topk_ids)
        return self


RouterOptions = TypedDict(  # noqa: UP013 - nothing inherits here
    "RouterOptions",
    {
        "top_k": Required[int],
        "scoring": str,
        "renormalize": bool,
        "selection_bias": Tensor | None,
        "num_groups": int,
        "top_k_groups": int,
        "routed_scaling_factor": float,
        "is_padding": Tensor | None,
    },
    total=False,
)
"""The keyword arguments of `route`, for functions that pass them on."""


class Router(NamedTuple):
    """How a router chooses: the arguments of `route` that are no tensors, in the order of its registered op."""

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = False
    num_groups: int = 1
    top_k_groups: int = 1
    routed_scaling_factor: float = 1.0


class Segments(NamedTuple):
    """Which rows of a grouped product belong to which expert.

    The rows of expert e are entries `first_rows[e]` to `first_rows[e] + row_counts[e]` of `slots`, or those rows
    themselves where `slots` is None. Entry r reads row `r // divisor` and writes row r.
    """

    first_rows: Tensor
    """[num_experts] int64."""
    row_counts: Tensor
    """[num_experts] int32."""
    slots: Tensor | None = None
    """[capacity] int32: the row of the result of each slot."""
    divisor: int = 1
    """Rows of the result per row that is read: top_k where a token's row serves all its routes."""
    num_experts: int = 0
    """Global number of experts that rows of the result are spread over, of which some are on other ranks; 0 where all
    rows are for the experts that are here."""
    batch_invariant: bool = False
    """Whether a row of the result may not depend on the others."""


class WeightedGradients(NamedTuple):
    """What a backward of `factors * activate(rows)` needs, where `grad` is the gradient of that."""

    rows: Tensor
    """[num_rows, 2 * intermediate_size] (without a gate intermediate_size): the gradient of the rows."""
    weighted: Tensor
    """[num_rows, intermediate_size]: `factors * activate(rows)`, dtype of the rows."""
    dots: Tensor
    """[num_rows]: the gradient of the factors, float32 (float64 rows: float64)."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """The weights of the experts of one layer on one rank, as model files that fuse gate and up have them.

    With a `scheme` w13 and w2 hold codes, and `scales` says what these are worth.
    """

    w13: Tensor
    """[num_local_experts, 2 * intermediate_size, hidden_size]: gate half first, then up; with `gated=False`
    [num_local_experts, intermediate_size, hidden_size]. Of codes of 4 bits two columns share a byte."""
    w2: Tensor
    """[num_local_experts, hidden_size, intermediate_size], dtype of w13; two columns in a byte as there."""
    w13_bias: Tensor | None = None
    """[num_local_experts, rows of w13], dtype of the hidden states."""
    w2_bias: Tensor | None = None
    """[num_local_experts, hidden_size], dtype of the hidden states."""
    gated: bool = True
    scheme: QuantScheme | None = None
    """How w13 and w2 are quantised, which then says their dtype; None: their dtype is that of the hidden states."""
    scales: ExpertScales | None = None
    """Beside a scheme."""

    @property
    def num_local_experts(self) -> int:
        """Experts of this rank."""
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.w2.shape[1]

    @property
    def intermediate_size(self) -> int:
        """Width between the two products, after the activation."""
        return self.w13.shape[1] // 2 if self.gated else self.w13.shape[1]


@dataclass(frozen=True, slots=True)
class Activation:
    """What stands between the two products of an expert.

    Of a row with gate half g and up half u: act(g) * (u + beta). A `limit` first clamps g from above and u on both
    sides. Without a gate: act(x), x clamped from above. The activations are silu,
    x * sigmoid(alpha * x); gelu by the error function; gelu_tanh by its tanh approximation; relu2, max(x, 0) squared.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("silu", "gelu", "gelu_tanh", "relu2")

    name: str = "silu"
    alpha: float = 1.0
    """Of silu alone."""
    beta: float = 0.0
    """Added to the up half; gated alone."""
    limit: float | None = None
    """Positive; None clamps nothing."""

    def __post_init__(self) -> None:
        """Refuses what is no activation."""
        for name in ("alpha", "beta", "limit"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, type(None) if name == "limit" else float)) or value is True:
                raise TypeError(f"{name}: expected a number, got {type(value).__name__} ({value!r})")
        if self.name not in self.NAMES:
            raise ValueError(f"name: expected one of {self.NAMES}, got {self.name!r}")
        if self.name != "silu" and self.alpha != 1.0:
            raise ValueError(f"alpha: expected 1.0 for {self.name} (silu alone has it), got {self.alpha}")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit: expected a positive number or None, got {self.limit}")


class ExpertCall(NamedTuple):
    """What a call of `fused_experts` is about, besides its tokens and their routing."""

    weights: ExpertWeights
    activation: Activation
    num_experts: int
    """Global number of experts."""
    expert_map: Tensor | None = None
    """[num_experts] int32: the local expert of each global one; None where they are equal."""
    weight_on_input: bool = False
    """Whether router weights multiply a token's row before its experts, not what comes out."""
    batch_invariant: bool = False
    """Whether a token's result may not depend on the others."""


GPT_OSS_ACTIVATION = Activation("silu", alpha=1.702, beta=1.0, limit=7.0)
"""gpt-oss's clamped SwiGLU: g * sigmoid(1.702 g) * (u + 1), g at most 7, u in [-7, 7]."""

torch.serialization.add_safe_globals([Layout, Permuted, Routing, ExpertWeights, Activation, QuantScheme, ExpertScales])
"""torch.load reads them with weights_only=True, the default."""
