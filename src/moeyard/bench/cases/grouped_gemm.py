"""The grouped product alone: rows sorted by expert times gate and up, addressed in every way there is."""

import importlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

import moeyard
from moeyard.bench.layers import SIZES, sets_and_calls, weights_of
from moeyard.bench.operators import Case, Operator, Provider, Run, able, generator_on
from moeyard.bench.peers import peer_version
from moeyard.testing import ROUTINGS, disagreement_error
from moeyard.values import Layout

WAYS = ("offsets", "layout", "counts")
"""How moeyard is told whose a row is: compact rows, tokens through a Layout, a batch an expert."""
_DEEP_GEMM_ROWS = 128  # an expert's rows begin at multiples of this in its contiguous layout
_BATCHES_BYTES = 6 << 30  # batches of experts of very uneven load would mostly be padding
_CHECKED_ROWS = 64
_LARGEST = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-12}
"""The error of a row that is let through, by its root mean square relative to the row's."""


@dataclass(frozen=True)
class ProductInputs:
    """What a case hands to every provider."""

    case: Case
    hidden_states: Tensor
    """[num_tokens, hidden_size]"""
    layout: Layout
    """Of block_size 1, so its rows are compact; no route is dropped."""
    weight: Tensor
    """[num_experts, 2 * intermediate_size, hidden_size]"""

    @cached_property
    def order(self) -> Tensor:
        """[routes] int64: the route of each compact row."""
        return self.layout.sorted_token_ids.long()

    @cached_property
    def expert(self) -> Tensor:
        """[routes] int64: the expert of each compact row."""
        return self.layout.expert_ids.long()

    @cached_property
    def rows(self) -> Tensor:
        """[routes, hidden_size]: compact."""
        return self.hidden_states[self.order // self.layout.top_k]

    @cached_property
    def place(self) -> Tensor:
        """[routes] int64: the place of each compact row among those of its expert."""
        return torch.arange(len(self.order), device=self.order.device) - self.layout.expert_offsets[self.expert]

    @cached_property
    def most(self) -> int:
        """Rows of the busiest expert."""
        return int(self.layout.expert_counts.max())

    @cached_property
    def batches(self) -> Tensor:
        """[num_experts, most, hidden_size]: NaN past an expert's rows."""
        shape = (self.weight.shape[0], self.most, self.rows.shape[1])
        filled = self.rows.new_full(shape, torch.nan)
        filled[self.expert, self.place] = self.rows
        return filled

    @cached_property
    def ends(self) -> Tensor:
        """[num_experts] int32: one past the last row of each expert, as torch wants it."""
        return self.layout.expert_offsets[1:].int()

    @cached_property
    def padded(self) -> Tensor:
        """[routes] int64: where each compact row lies when every expert begins at a multiple of DeepGEMM's rows."""
        sizes = (self.layout.expert_counts.long() + _DEEP_GEMM_ROWS - 1) // _DEEP_GEMM_ROWS * _DEEP_GEMM_ROWS
        return (sizes.cumsum(0) - sizes)[self.expert] + self.place

    @cached_property
    def wide(self) -> tuple[Tensor, Tensor]:
        """(some compact rows, their products in float64)."""
        some = torch.arange(0, len(self.order), max(1, len(self.order) // _CHECKED_ROWS), device=self.order.device)
        products = [self.weight[self.expert[i]].double() @ self.rows[i].double() for i in some]
        return some, torch.stack(products)


def inputs(case: Case, device: torch.device, generator: Generator) -> ProductInputs:
    """Fresh tokens on the weights of the case's sizes."""
    generator = generator_on(device, generator)
    experts, hidden_size = case["num_experts"], case["hidden_size"]
    ids = ROUTINGS[case.routing](case["num_tokens"], experts, case["top_k"], generator)
    hidden = torch.randn(case["num_tokens"], hidden_size, generator=generator, device=device).to(case.dtype)
    bias = bool(case.model.get("bias"))
    weights = weights_of(experts, hidden_size, case["intermediate_size"], case.dtype, bias, device)
    layout = moeyard.moe_align_block_size(ids, num_experts=experts, block_size=1)
    return ProductInputs(case, hidden, layout, weights.w13)


def providers(case: Case, device: torch.device) -> list[Provider]:
    """moeyard in each of `WAYS`, torch's grouped product, on a GPU DeepGEMM's."""
    found = [
        Provider("moeyard", f"{impl} by {way}", _moeyard(impl, way))
        for impl in able(case.op, case, device)
        for way in (WAYS if _even(case) else WAYS[:2])
    ]
    if case["dtype"] == "bfloat16":
        found.append(Provider("torch", "grouped_mm", _torch))
        if device.type == "cuda" and peer_version("deep_gemm"):
            found.append(Provider("deep_gemm", peer_version("deep_gemm"), _deep_gemm()))
    return found


def error(_: Case, provider: Provider, given: ProductInputs, got: Tensor) -> str | None:
    """Some rows against float64."""
    answer, (some, wide) = compact(provider, given, got), given.wide
    if answer.dtype != given.rows.dtype:
        return f"dtype {answer.dtype}, not {given.rows.dtype}"
    return disagreement_error(wide, answer[some], _LARGEST[answer.dtype])


def compact(provider: Provider, given: ProductInputs, got: Tensor) -> Tensor:
    """An answer's rows in the compact order."""
    if provider.impl.endswith(" by layout"):
        return got[given.order]
    if provider.impl.endswith(" by counts"):
        return got[given.expert, given.place]
    return got[given.padded] if len(got) != len(given.order) else got


def bytes_moved(case: Case) -> int:
    """The bytes that any answer must read and write; all experts are taken to have rows."""
    routes, columns = case["num_tokens"] * case["top_k"], 2 * case["intermediate_size"]
    values = (case["num_experts"] * columns + routes) * case["hidden_size"] + routes * columns
    return int(values * case.dtype.itemsize)


def operations(case: Case) -> int:
    """Floating-point operations of the product."""
    return int(4 * case["num_tokens"] * case["top_k"] * case["hidden_size"] * case["intermediate_size"])


OPERATOR = Operator(
    SIZES,
    inputs,
    providers,
    error,
    bytes_moved,
    operations=operations,
    calls=lambda case: sets_and_calls(case)[1],
    rows=compact,
)


def _even(case: Case) -> bool:
    """Whether batches of experts are of even sizes, so that they hold little padding."""
    rows = case["num_tokens"] * case["top_k"] * case["hidden_size"] * case.dtype.itemsize
    return case.routing in ("equal", "uniform") and 2 * rows <= _BATCHES_BYTES


def _moeyard(impl: str, way: str) -> Run:
    if way == "offsets":
        return lambda x: moeyard.grouped_gemm(x.rows, x.weight, expert_offsets=x.layout.expert_offsets, impl=impl)
    if way == "layout":
        return lambda x: moeyard.grouped_gemm(x.hidden_states, x.weight, layout=x.layout, impl=impl)
    return lambda x: moeyard.grouped_gemm(x.batches, x.weight, expert_num_tokens=x.layout.expert_counts, impl=impl)


def _torch(x: ProductInputs) -> Tensor:
    return torch._grouped_mm(x.rows, x.weight.transpose(1, 2), offs=x.ends)


def _deep_gemm() -> Run:
    """DeepGEMM's contiguous grouped product; padding its rows is not timed, nor is the allocation of its result."""
    multiply = importlib.import_module("deep_gemm").m_grouped_bf16_gemm_nt_contiguous
    alignment = importlib.import_module("deep_gemm.utils.layout").get_mk_alignment_for_contiguous_layout
    made: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def run(x: ProductInputs) -> Tensor:
        if id(x) not in made:
            if _DEEP_GEMM_ROWS % alignment():
                raise ValueError(f"expected an alignment that divides {_DEEP_GEMM_ROWS}, got {alignment()}")
            where = x.padded
            total = int(-(-int(where.max() + 1) // _DEEP_GEMM_ROWS) * _DEEP_GEMM_ROWS)
            rows = x.rows.new_zeros(total, x.rows.shape[1]).index_copy_(0, where, x.rows)
            experts = torch.full((total,), -1, dtype=torch.int32, device=rows.device)
            experts[where] = x.expert.int()
            made[id(x)] = rows, experts, rows.new_empty(total, x.weight.shape[1])
        rows, experts, out = made[id(x)]
        multiply(rows, x.weight, out, experts)
        return out

    return run
