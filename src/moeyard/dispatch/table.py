"""Which implementation meets a call: one table, loaded lazily, whose row order is the preference.

Every implementation is a *launcher*: it receives checked inputs and outputs that are already allocated,
fills every valid element of the outputs and returns nothing. Launchers of one op share a signature.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from moeyard.dispatch.call import Call, Explanation, facts_of_experts
from moeyard.dispatch.invariance import batch_invariance, dependence
from moeyard.dispatch.refusals import (
    NO_NUMBA,
    anywhere,
    in_triton,
    load,
    on_cpu,
    on_cuda,
    products_on_hopper,
    sums_on_cpu,
    sums_on_cuda,
)
from moeyard.dispatch.schemes import refusal_of
from moeyard.values import ExpertWeights


@dataclass(frozen=True)
class Impl:
    """One row of the table."""

    name: str
    target: str
    """"module:function" of the launcher."""
    refusal: Callable[[Call], str | None]
    """Why this implementation cannot meet a call, in words; None if it can."""
    by_name_only: bool = False
    way: str = ""
    """Which of an implementation's rows this is, where it has several for an operator."""
    unfit: str = ""
    """"module:function" of a second refusal, for what only the implementation's own folder knows."""
    companions: Mapping[str, str] = field(default_factory=dict)
    """"module:function" of launchers that go with this one, by what they are for."""

    @property
    def label(self) -> str:
        """The name, and which way."""
        return f"{self.name} ({self.way})" if self.way else self.name


def _everywhere(target: str) -> tuple[Impl, ...]:
    """The rows that every operator has: `torch`, and `reference` only by name."""
    return (
        Impl("torch", f"moeyard.vectorised.{target}", anywhere),
        Impl("reference", f"moeyard.reference.{target}", anywhere, by_name_only=True),
    )


def _rows(launcher: str, cuda: Impl, refusal: Callable[[Call], str | None] = on_cpu) -> tuple[Impl, ...]:
    """The rows of what moves or sums rows."""
    by_cpu = Impl("cpu", f"moeyard.cpu.rows:{launcher}", refusal)
    return (by_cpu, cuda, *_everywhere(f"rows:{launcher}"))


def _cuda_rows(launcher: str, refusal: Callable[[Call], str | None] = on_cuda) -> Impl:
    return Impl("cuda", f"moeyard.cuda.rows.launchers:{launcher}", refusal)


def _layer(launcher: str, *cuda: Impl) -> tuple[Impl, ...]:
    """The rows of products, activations and experts."""
    return (
        Impl("cpu", f"moeyard.cpu.experts:{launcher}", sums_on_cpu),
        *cuda,
        Impl("triton", f"moeyard.triton.experts:{launcher}", in_triton),
        *_everywhere(f"experts:{launcher}"),
    )


def _no_kernel(gradient: str) -> Callable[[Call], str | None]:
    """The refusal of an implementation whose forward has kernels, and whose backward goes through another."""
    return lambda _: f"has no kernel for {gradient} yet: the next row computes it"


def _gradient(launcher: str, gradient: str, *first: Impl) -> tuple[Impl, ...]:
    """The rows of what a backward is made of; who has no kernel says so."""
    have = {row.name for row in first}
    none = [Impl(name, "", _no_kernel(gradient)) for name in ("cpu", "cuda") if name not in have]
    by_triton = Impl("triton", f"moeyard.triton.gradients:{launcher}", in_triton)
    return (*first, *none, by_triton, *_everywhere(f"gradients:{launcher}"))


_PRODUCTS, _FEW_TOKENS = "moeyard.cuda.experts.launchers", "moeyard.cuda.experts.few_tokens"
_FOUR_BITS = "moeyard.cuda.experts.four_bits"
_MANY_OF_FOUR_BITS = "moeyard.cuda.experts.four_bits_many"
_OUTER = "moeyard.cuda.experts.outer"

TABLE: dict[str, tuple[Impl, ...]] = {
    # cpu before torch: benchmarks/results/cpu-2core; cuda before torch: benchmarks/results/h200
    "moe_align_block_size": (
        Impl("cpu", "moeyard.cpu.layout:align_launch", on_cpu),
        Impl(
            "cuda",
            "moeyard.cuda.align.launchers:align_launch",
            on_cuda,
            unfit="moeyard.cuda.align.launchers:unfit_for_align",
            companions={
                "first outputs": "moeyard.cuda.align.launchers:triple_launch",
                "again": "moeyard.cuda.align.launchers:align_again",
                "anew": "moeyard.cuda.align.launchers:align_anew",
            },
        ),
        *_everywhere("layout:align_launch"),
    ),
    "batched_moe_align_block_size": (
        Impl("cpu", "moeyard.cpu.layout:batched_align_launch", on_cpu),
        Impl("cuda", "moeyard.cuda.align.launchers:batched_align_launch", on_cuda),
        *_everywhere("layout:batched_align_launch"),
    ),
    "moe_lora_align_block_size": _everywhere("layout:lora_align_launch"),
    "route": (
        Impl("cpu", "moeyard.cpu.router:route_launch", sums_on_cpu),
        Impl(
            "cuda",
            "moeyard.cuda.route.launchers:route_launch",
            sums_on_cuda,
            companions={
                "with layout": "moeyard.cuda.route.route_align:route_and_align_launch",
                "anew": "moeyard.cuda.route.launchers:route_anew",
                "with layout anew": "moeyard.cuda.route.route_align:route_and_align_anew",
            },
        ),
        *_everywhere("router:route_launch"),
    ),
    "grouped_gemm": _layer(
        "grouped_gemm_launch",
        Impl(
            "cuda",
            f"{_PRODUCTS}:grouped_gemm_launch",
            products_on_hopper,
            unfit=f"{_PRODUCTS}:unfit_for_products",
        ),
    ),
    "activate": _layer("activate_launch"),
    "grouped_outer": _gradient(
        "grouped_outer_launch",
        "the gradients of weights",
        Impl("cpu", "moeyard.cpu.gradients:grouped_outer_launch", sums_on_cpu),
        # It runs lane by lane on a host, and has not run on a GPU yet.
        Impl(
            "cuda",
            f"{_OUTER}:grouped_outer_launch",
            products_on_hopper,
            by_name_only=True,
            unfit=f"{_OUTER}:unfit",
        ),
    ),
    **{
        name: _gradient(
            f"{name}_launch",
            "the derivative of activations",
            Impl("cpu", f"moeyard.cpu.derivatives:{name}_launch", sums_on_cpu),
        )
        for name in ("activate_backward", "weighted_activate_backward")
    },
    "fused_experts": _layer(
        "fused_experts_launch",
        Impl(
            "cuda",
            f"{_FEW_TOKENS}:fused_experts_launch",
            products_on_hopper,
            way="few tokens",
            unfit=f"{_FEW_TOKENS}:unfit",
            companions={"anew": f"{_FEW_TOKENS}:fused_experts_anew"},
        ),
        Impl(
            "cuda",
            f"{_FOUR_BITS}:fused_experts_launch",
            products_on_hopper,
            way="few tokens of 4 bits",
            unfit=f"{_FOUR_BITS}:unfit",
        ),
        # It runs lane by lane on a host, and has not run on a GPU yet.
        Impl(
            "cuda",
            f"{_MANY_OF_FOUR_BITS}:fused_experts_launch",
            products_on_hopper,
            by_name_only=True,
            way="many tokens of 4 bits",
            unfit=f"{_MANY_OF_FOUR_BITS}:unfit",
        ),
        Impl(
            "cuda",
            f"{_PRODUCTS}:fused_experts_launch",
            products_on_hopper,
            way="products",
            unfit=f"{_PRODUCTS}:unfit_for_experts",
            companions={"anew": f"{_PRODUCTS}:fused_experts_anew"},
        ),
    ),
    "permute": _rows("permute_launch", _cuda_rows("permute_launch")),
    "permute_to_fp8": (
        _cuda_rows("permute_to_fp8_launch", sums_on_cuda),
        *_everywhere("rows:permute_to_fp8_launch"),
    ),
    "shuffle_rows": _rows("shuffle_rows_launch", _cuda_rows("shuffle_rows_launch")),
    "combine": _rows("combine_launch", _cuda_rows("combine_launch", sums_on_cuda), sums_on_cpu),
    "moe_sum": _rows("moe_sum_launch", _cuda_rows("moe_sum_launch", sums_on_cuda), sums_on_cpu),
}


def _read_override(text: str) -> dict[str, str]:
    """`MOEYARD_IMPL`: "torch" for every op, or "op=impl,op=impl"; "" overrides nothing."""
    chosen: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, _, impl = part.rpartition("=")
        if op and op not in TABLE:
            raise ValueError(f"MOEYARD_IMPL: expected an op of {sorted(TABLE)}, got {op!r}")
        known = {row.name for name in ([op] if op else TABLE) for row in TABLE[name]}
        if impl not in known:
            raise ValueError(f"MOEYARD_IMPL: expected an implementation of {sorted(known)}, got {impl!r}")
        chosen.update({name: impl for name in ([op] if op else TABLE) if impl in {row.name for row in TABLE[name]}})
    return chosen


_OVERRIDE = _read_override(os.environ.get("MOEYARD_IMPL", ""))  # once: a read on every call costs 1 us


def for_gradients(impl: str) -> str:
    """What computes the backward of what `impl` answered: itself where it has all kernels for it, else "auto"."""
    return impl if impl in ("torch", "reference", "triton") else "auto"


def among(op: str, impl: str) -> str:
    """`impl` for an operator that has it, else "auto": not every implementation has all operators."""
    return impl if impl in impl_names(op) else "auto"


def impl_names(op: str) -> tuple[str, ...]:
    """The implementations of `op`, most preferred first."""
    return tuple(dict.fromkeys(row.name for row in TABLE[op]))


@lru_cache(maxsize=16384)
def launcher(
    op: str, impl: str, device: torch.device, dtype: torch.dtype, facts: Call | None = None
) -> Callable[..., None]:
    """The launcher that meets a call: `impl` by name, or the first row that does not refuse for "auto".

    An implementation asked for by name is met or refused with its reasons, never replaced (ValueError). `facts` is the
    whole call where more than device and dtype matters.
    """
    return load(_choose(op, impl, facts or Call(device, dtype)).target)


@lru_cache(maxsize=16384)
def companion(
    op: str, kind: str, impl: str, device: torch.device, dtype: torch.dtype, facts: Call | None = None
) -> Callable[..., Any] | None:
    """The launcher of a kind that goes with what `launcher` finds; None if it has none."""
    target = _choose(op, impl, facts or Call(device, dtype)).companions.get(kind)
    return load(target) if target else None


def _refusal(row: Impl, call: Call) -> str | None:
    scheme = None if call.weights is None else call.weights.scheme
    reason = refusal_of(row.label, scheme) or row.refusal(call)
    reason = reason or (dependence(row.label, scheme) if call.batch_invariant else None)
    if reason is None and row.unfit and call.capability is not None:
        with load("moeyard.cuda.ahead:planning_on")(call.capability):
            reason = load(row.unfit)(call)
    elif reason is None and row.unfit and (call.device.type != "cuda" or torch.cuda.is_available()):
        reason = load(row.unfit)(call)
    return reason


def _choose(op: str, impl: str, call: Call) -> Impl:
    wanted = _OVERRIDE.get(op, impl) if impl == "auto" else impl
    if wanted != "auto" and wanted not in impl_names(op):
        raise ValueError(f"impl: expected 'auto' or one of {list(impl_names(op))} for {op}, got {impl!r}")
    said: dict[str, str] = {}
    for row in TABLE[op]:
        if row.name == wanted or (wanted == "auto" and not row.by_name_only):
            reason = _refusal(row, call)
            if reason is None:
                _say_slow(op, row, said, call)
                return row
            said[row.label] = reason
    reasons = list(said.values()) if len(said) == 1 else [f"{row}: {why}" for row, why in said.items()]
    raise ValueError(f"impl: {wanted!r} refuses {op}: {'; '.join(reasons)}")


def _say_slow(op: str, row: Impl, said: dict[str, str], call: Call) -> None:
    """Says once what keeps a quicker implementation away: a package that is not installed, weights that lie badly."""
    if row.name == "torch" and said.get("cpu") == NO_NUMBA:
        warnings.warn(f"{op}: torch takes calls that cpu would answer sooner: {NO_NUMBA}", stacklevel=2)
    if call.weights is None or not call.weights.readable:
        return
    for label, reason in said.items():
        if reason == call.weights.readable:
            warnings.warn(f"{op}: {label} refuses: {reason}; {row.label} takes the call", stacklevel=2)


def explain(
    op: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    num_tokens: int | None = None,
    top_k: int = 1,
    weights: ExpertWeights | None = None,
    capability: tuple[int, int] | None = None,
    batch_invariant: bool | None = None,
) -> Explanation:
    """Which implementation of `op` "auto" chooses on `device` for `dtype`, and why not the others.

    Args:
        op: an operator by name.
        device: a device; of "cuda" the current one, if there is one.
        dtype: that of the ids (layout; int32 by default) or of the rows (all others; bfloat16 by default).
        num_tokens, top_k, weights: of a call of `fused_experts`, whose choice depends on sizes; of any size unless
            given.
        capability: the compute capability of a GPU that need not be there, such as (9, 0); None asks the device.
        batch_invariant: as in `fused_experts`.

    Printing the result gives one line per implementation. Raises ValueError for an unknown op, for a compute capability
    that is not known, and for `batch_invariant` of an operator without. Without a GPU and a capability, what depends on
    a card's sizes is not asked.
    """
    if op not in TABLE:
        raise ValueError(f"op: expected one of {sorted(TABLE)}, got {op!r}")
    if dtype is None:
        dtype = torch.int32 if "align" in op else torch.bfloat16
    facts = None if weights is None else facts_of_experts(weights)
    experts = 0 if weights is None else weights.num_local_experts
    place = torch.device(device)
    if capability is not None and (place.type != "cuda" or place.index is not None):
        raise ValueError(f"capability: expected None beside device {str(device)!r} (it needs 'cuda'), got {capability}")
    if place.type == "cuda" and place.index is None and capability is None and torch.cuda.is_available():
        place = torch.device("cuda", torch.cuda.current_device())
    asked: dict[str, Any] = {"capability": capability, "batch_invariant": batch_invariance(batch_invariant, op)}
    call = Call(place, dtype, facts, num_tokens, top_k, experts, **asked)
    forced = _OVERRIDE.get(op)
    chosen, reasons = "", {}
    for row in TABLE[op]:
        reason = _refusal(row, call)
        if reason is None and row.by_name_only and row.name != forced:
            reason = "only chosen by name"
        elif reason is None and forced not in (None, row.name):
            reason = f"MOEYARD_IMPL asks for {forced}"
        elif reason is None and chosen:
            reason = f"comes after {chosen}"
        if reason is None:
            chosen, reason = row.name, "chosen"
        reasons[row.label] = reason
    return Explanation(op, call, chosen or "none", reasons)
