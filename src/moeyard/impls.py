"""Which implementation meets a call: one table, loaded lazily, whose row order is the preference.

Every implementation is a *launcher*: it receives checked inputs and outputs that are already allocated,
fills every valid element of the outputs and returns nothing. Launchers of one op share a signature.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch


class Call(NamedTuple):
    """What a refusal may depend on."""

    device: str
    """Device type, as in `torch.device.type`."""
    dtype: torch.dtype
    """Dtype of the ids (layout) or rows (permute, combine)."""


@dataclass(frozen=True)
class Impl:
    """One row of the table."""

    name: str
    target: str
    """"module:function" of the launcher."""
    refusal: Callable[[Call], str | None]
    """Why this implementation cannot meet a call, in words; None if it can."""
    by_name_only: bool = False
    first_outputs: str = ""
    """"module:function" of a launcher of the op's first outputs alone, where that is quicker."""
    repeater: str = ""
    """"module:function" that prepares the same call again, for other ids and the same outputs."""
    with_layout: str = ""
    """"module:function" of a launcher that fills a layout as well; it says False where it would not be quicker."""
    unfit: str = ""
    """"module:function" that says from a launcher's arguments, in words, why they do not fit; None if they do."""


@dataclass(frozen=True)
class Explanation:
    """What `auto` would choose for a call, and why the others are not chosen."""

    op: str
    call: Call
    chosen: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        dtype = str(self.call.dtype).removeprefix("torch.")
        lines = [f"{self.op} on {self.call.device} ({dtype}): {self.chosen}"]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


@cache
def installed(module: str) -> bool:
    """Whether a package is there to be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent is
        return False


def _anywhere(_: Call) -> str | None:
    return None


def _cpu(call: Call) -> str | None:
    if call.device != "cpu":
        return f"takes CPU tensors, got {call.device}"
    if not installed("numba"):
        return "numba is not installed (pip install 'moeyard[cpu]')"
    return None


def _cuda(call: Call) -> str | None:
    if call.device != "cuda" or torch.version.hip is not None:
        return f"takes tensors of NVIDIA GPUs, got {call.device}"
    if not installed("cuda.core") or not installed("cuda.bindings"):
        return "cuda-core or cuda-bindings is not installed (pip install 'moeyard[gpu]')"
    return None


def _sums(call: Call) -> str | None:
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32: takes float32, bfloat16 and float16, got {str(call.dtype).removeprefix('torch.')}"
    return None


def _cpu_sums(call: Call) -> str | None:
    return _sums(call) or _cpu(call)


def _cuda_sums(call: Call) -> str | None:
    return _sums(call) or _cuda(call)


def _cuda_products(call: Call) -> str | None:
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {str(call.dtype).removeprefix('torch.')}"
    return _cuda(call)


def _triton(call: Call) -> str | None:
    if not installed("triton"):
        return "triton is not installed (pip install 'moeyard[gpu]')"
    if call.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "takes tensors of NVIDIA GPUs, got cpu (which it takes under TRITON_INTERPRET=1, to be tested)"
    if call.device not in ("cuda", "cpu") or torch.version.hip is not None:
        return f"takes tensors of NVIDIA GPUs, got {call.device}"
    if call.device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return f"needs compute capability 8.0, got {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    return _sums(call)


def _shared(target: str, reference: str = "reference") -> tuple[Impl, ...]:
    """The rows that every op has: `torch`, and `reference` only by name."""
    return (
        Impl("torch", f"moeyard.vectorised.{target}", _anywhere),
        Impl("reference", f"moeyard.{reference}:{target.partition(':')[2]}", _anywhere, by_name_only=True),
    )


def _layer(launcher: str, *others: Impl) -> tuple[Impl, ...]:
    """The rows of products, activations and experts, `others` before those of every device."""
    return (
        Impl("cpu", f"moeyard.cpu.{launcher}", _cpu_sums),
        *others,
        Impl("triton", f"moeyard.triton.experts:{launcher.partition(':')[2]}", _triton),
        *_shared(f"experts:{launcher.partition(':')[2]}", "reference_layer"),
    )


def _hopper(launcher: str) -> Impl:
    """The row of products and experts on Hopper."""
    target, function = "moeyard.cuda.experts.launchers:", launcher.removesuffix("_launch")
    return Impl("cuda", target + launcher, _cuda_products, unfit=f"{target}unfit_for_{function}")


TABLE: dict[str, tuple[Impl, ...]] = {
    # cpu before torch: benchmarks/results/cpu-2core; cuda before torch: benchmarks/results/h200
    "moe_align_block_size": (
        Impl("cpu", "moeyard.cpu.layout:align_launch", _cpu),
        Impl(
            "cuda",
            "moeyard.cuda.align.launchers:align_launch",
            _cuda,
            first_outputs="moeyard.cuda.align.launchers:triple_launch",
            repeater="moeyard.cuda.align.launchers:align_again",
            unfit="moeyard.cuda.align.launchers:unfit_for_align",
        ),
        *_shared("layout:align_launch"),
    ),
    "batched_moe_align_block_size": (
        Impl("cpu", "moeyard.cpu.layout:batched_align_launch", _cpu),
        Impl("cuda", "moeyard.cuda.align.launchers:batched_align_launch", _cuda),
        *_shared("layout:batched_align_launch"),
    ),
    "route": (
        Impl("cpu", "moeyard.cpu.router:route_launch", _cpu_sums),
        Impl(
            "cuda",
            "moeyard.cuda.route.launchers:route_launch",
            _cuda_sums,
            with_layout="moeyard.cuda.route.route_align:route_and_align_launch",
        ),
        *_shared("router:route_launch"),
    ),
    "grouped_gemm": _layer("products:grouped_gemm_launch", _hopper("grouped_gemm_launch")),
    "activate": _layer("experts:activate_launch"),
    "fused_experts": _layer("experts:fused_experts_launch", _hopper("fused_experts_launch")),
    "moe_lora_align_block_size": _shared("layout:lora_align_launch"),
    "permute": (
        Impl("cpu", "moeyard.cpu.rows:permute_launch", _cpu),
        Impl("cuda", "moeyard.cuda.rows.launchers:permute_launch", _cuda),
        *_shared("rows:permute_launch"),
    ),
    "permute_to_fp8": (
        Impl("cuda", "moeyard.cuda.rows.launchers:permute_to_fp8_launch", _cuda_sums),
        *_shared("rows:permute_to_fp8_launch"),
    ),
    "shuffle_rows": (
        Impl("cpu", "moeyard.cpu.rows:shuffle_rows_launch", _cpu),
        Impl("cuda", "moeyard.cuda.rows.launchers:shuffle_rows_launch", _cuda),
        *_shared("rows:shuffle_rows_launch"),
    ),
    "combine": (
        Impl("cpu", "moeyard.cpu.rows:combine_launch", _cpu_sums),
        Impl("cuda", "moeyard.cuda.rows.launchers:combine_launch", _cuda_sums),
        *_shared("rows:combine_launch"),
    ),
    "moe_sum": (
        Impl("cpu", "moeyard.cpu.rows:moe_sum_launch", _cpu_sums),
        Impl("cuda", "moeyard.cuda.rows.launchers:moe_sum_launch", _cuda_sums),
        *_shared("rows:moe_sum_launch"),
    ),
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


def impl_names(op: str) -> tuple[str, ...]:
    """The implementations of `op`, most preferred first."""
    return tuple(row.name for row in TABLE[op])


@cache
def launcher(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> Callable[..., None]:
    """The launcher that meets a call: `impl` by name, or the first row that does not refuse for "auto".

    An implementation asked for by name is met or refused with its reason, never replaced (ValueError). Where one
    refuses arguments as well, its launcher comes with the next one's behind it.
    """
    return _whole(op, impl, _choose(op, impl, device, dtype), device, dtype)


def _whole(op: str, impl: str, row: Impl, device: torch.device, dtype: torch.dtype) -> Callable[..., None]:
    launch = _load(row.target)
    if not row.unfit:
        return launch
    unfit = _load(row.unfit)
    named = row.name in (impl, _OVERRIDE.get(op) if impl == "auto" else None)
    following = None if named else _choose(op, impl, device, dtype, after=row)
    otherwise = None if following is None else _whole(op, impl, following, device, dtype)

    def choose(*arguments: Any, **named_arguments: Any) -> None:
        reason = unfit(*arguments, **named_arguments)
        if reason is None:
            launch(*arguments, **named_arguments)
        elif otherwise is None:
            raise ValueError(f"impl: {row.name!r} refuses {op}: {reason}")
        else:
            otherwise(*arguments, **named_arguments)

    return choose


@cache
def first_outputs_launcher(op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., None] | None:
    """The launcher of the first outputs alone that goes with what "auto" chooses; None if it has none."""
    target = _choose(op, "auto", device, dtype).first_outputs
    return _load(target) if target else None


@cache
def repeater(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """What prepares the same call again for the implementation that `launcher` finds; None if it has nothing."""
    target = _choose(op, impl, device, dtype).repeater
    return _load(target) if target else None


@cache
def with_layout_launcher(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> Callable[..., bool] | None:
    """The launcher of a routing and its layout together for the implementation that `launcher` finds, or None."""
    target = _choose(op, impl, device, dtype).with_layout
    return _load(target) if target else None


def _load(target: str) -> Callable[..., Any]:
    module, function = target.split(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


def _choose(op: str, impl: str, device: torch.device, dtype: torch.dtype, after: Impl | None = None) -> Impl:
    call = Call(device.type, dtype)
    if impl == "auto":
        impl = _OVERRIDE.get(op, impl)
    for row in TABLE[op] if after is None else TABLE[op][TABLE[op].index(after) + 1 :]:
        if impl == row.name or (impl == "auto" and not row.by_name_only):
            reason = row.refusal(call)
            if reason is None:
                return row
            if impl == row.name:
                raise ValueError(f"impl: {impl!r} refuses {op}: {reason}")
    raise ValueError(f"impl: expected 'auto' or one of {list(impl_names(op))} for {op}, got {impl!r}")


def explain(op: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Explanation:
    """Which implementation of `op` "auto" chooses on `device` for `dtype`, and why not the others.

    `dtype` is that of the ids (layout; int32 by default) or of the rows (permute, combine; bfloat16 by
    default). Printing the result gives one line an implementation. ValueError for an unknown op.
    """
    if op not in TABLE:
        raise ValueError(f"op: expected one of {sorted(TABLE)}, got {op!r}")
    if dtype is None:
        dtype = torch.int32 if "align" in op else torch.bfloat16
    call = Call(torch.device(device).type, dtype)
    forced: Any = _OVERRIDE.get(op)
    chosen, reasons = "", {}
    for row in TABLE[op]:
        reason = row.refusal(call)
        if reason is None and row.by_name_only and row.name != forced:
            reason = "only chosen by name"
        elif reason is None and forced not in (None, row.name):
            reason = f"MOEYARD_IMPL asks for {forced}"
        elif reason is None and chosen:
            reason = f"comes after {chosen}"
        if reason is None:
            chosen, reason = row.name, "chosen"
        reasons[row.name] = reason
    return Explanation(op, call, chosen or "none", reasons)
