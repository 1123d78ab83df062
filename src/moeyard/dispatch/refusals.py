"""Why an implementation cannot meet a call, in words, as far as device, dtype and installed packages say it."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from moeyard.dispatch.call import Call


@cache
def installed(module: str) -> bool:
    """Whether a package is there to be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent is
        return False


NO_NUMBA = "numba is not installed (pip install 'moeyard[cpu]')"


def anywhere(_: Call) -> str | None:
    return None


def on_cpu(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"takes CPU tensors, got {call.device.type}"
    if not installed("numba"):
        return NO_NUMBA
    return None


def on_cuda(call: Call) -> str | None:
    if call.device.type != "cuda" or torch.version.hip is not None:
        return f"takes tensors of NVIDIA GPUs, got {call.device.type}"
    if not installed("cuda.core") or not installed("cuda.bindings"):
        return "cuda-core or cuda-bindings is not installed (pip install 'moeyard[gpu]')"
    if call.capability is not None:
        return too_old(call.capability)
    if torch.cuda.is_available():
        reason: str | None = load("moeyard.cuda.runtime.cards:refusal")(call.device.index)
        return reason
    return None


def too_old(capability: tuple[int, int] | None) -> str | None:
    if capability is not None and capability < (8, 0):
        return f"needs compute capability 8.0, got {'.'.join(map(str, capability))}"
    return None


def sums(call: Call) -> str | None:
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in float32: takes float32, bfloat16 and float16, got {str(call.dtype).removeprefix('torch.')}"
    return None


def sums_on_cpu(call: Call) -> str | None:
    return sums(call) or on_cpu(call)


def sums_on_cuda(call: Call) -> str | None:
    return sums(call) or on_cuda(call)


def products_on_hopper(call: Call) -> str | None:
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {str(call.dtype).removeprefix('torch.')}"
    reason, capability = on_cuda(call), capability_for(call)
    if reason is None and capability not in (None, (9, 0)):
        return f"is written for compute capability 9.0, got {'.'.join(map(str, capability or ()))}"
    return reason


def in_triton(call: Call) -> str | None:
    if not installed("triton"):
        return "triton is not installed (pip install 'moeyard[gpu]')"
    if call.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "takes tensors of NVIDIA GPUs, got cpu (which it takes under TRITON_INTERPRET=1, to be tested)"
    if call.device.type not in ("cuda", "cpu") or torch.version.hip is not None:
        return f"takes tensors of NVIDIA GPUs, got {call.device.type}"
    return too_old(capability_for(call)) or sums(call)


def capability_for(call: Call) -> tuple[int, int] | None:
    """The compute capability that a call names or its device has; None for other devices, and with no GPU to ask."""
    return call.capability or capability_of(call.device)


@cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.cuda.is_available() else None


def load(target: str) -> Callable[..., Any]:
    module, function = target.split(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded
