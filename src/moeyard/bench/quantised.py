"""Quantised experts of cases: schemes by name, random codes and scales, their bytes, the check of answers."""

from functools import lru_cache

import torch
from torch import Tensor

from moeyard import quant
from moeyard.bench.operators import Case
from moeyard.pack import pack_experts
from moeyard.quant import QuantScheme, scheme_of
from moeyard.testing import Judged, draw_quantised, judged_experts
from moeyard.testing.budgets import FLOAT32_UNIT
from moeyard.values import Activation, ExpertWeights, Routing

SCHEMES: dict[str, QuantScheme] = {
    "fp8 tensor": quant.FP8_TENSOR,
    "fp8 channel": quant.FP8_CHANNEL,
    "fp8 block": quant.FP8_BLOCK,
    "fp8 weights": quant.FP8_WEIGHTS,
    "int8 channel": quant.INT8_CHANNEL,
    "int8 weights": quant.INT8_WEIGHTS,
    "int4 weights": quant.int4_scheme(),
    "mxfp4 weights": quant.MXFP4,
    "nvfp4 weights": quant.NVFP4,
}
"""What a workload calls schemes; it may also write one as `str` of a `QuantScheme` does."""
_TENSOR_CORE_UNIT = 2.0**-14
"""What tensor cores round of a sum of products of fp8, as a share: they align them to about 14 bits."""
_MIDDLE = 2.0**-8
"""On a GPU gate and up may be rounded to bfloat16 before the activation, as peers do."""


def scheme_named(name: object) -> QuantScheme:
    """A scheme by its name here or in its own words; ValueError lists the names."""
    if isinstance(name, str) and name in SCHEMES:
        return SCHEMES[name]
    try:
        return scheme_of(str(name))
    except ValueError:
        raise ValueError(
            f"scheme: expected one of {tuple(SCHEMES)} or words as {str(quant.FP8_BLOCK)!r}, got {name!r}"
        ) from None


def scheme_of_case(case: Case) -> QuantScheme | None:
    """How the weights of a case are quantised; None unless its sizes have a scheme."""
    name = dict(case.sizes).get("scheme")
    return None if name is None else scheme_named(name)


@lru_cache(maxsize=1)
def weights_of(
    experts: int, hidden_size: int, size: int, scheme: QuantScheme, dtype: torch.dtype, bias: bool, device: torch.device
) -> ExpertWeights:
    """Random codes, scales and biases that keep rows near 1, drawn where they are needed; one set is kept."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(11)
        weights = draw_quantised(experts, hidden_size, size, scheme, dtype, bias=bias)
    if weights.scales is not None and weights.scales.w13_global is not None:
        weights.scales.w13_global.copy_(weights.scales.w13_global[:, :1])  # peers have one for gate and up
    return weights


def as_kernels_read(weights: ExpertWeights) -> ExpertWeights:
    """Weights of 4 bits on a GPU in tiles, where tiles hold them; others as they are. One set is kept."""
    scheme = weights.scheme
    if scheme is None or not weights.w13.is_cuda or scheme.per_byte != 2 or scheme.activations != "none":
        return weights
    sizes = weights.hidden_size, weights.intermediate_size
    whole = quant.groups_fit_tiles(scheme.block) and not any(size % quant.TILE_COLUMNS for size in sizes)
    return _tiled(weights) if whole else weights


_tiled = lru_cache(maxsize=1)(pack_experts)


def bytes_per_weight(scheme: QuantScheme) -> float:
    """Bytes of a code, with its share of the scales of a block that does not grow with the matrix."""
    rows, columns = scheme.block
    shared = rows * columns
    scales = quant.SCALES[scheme.scales][0].itemsize + scheme.zero_points
    return 1 / scheme.per_byte + (scales / shared if shared else 0)


def judged(rows: Tensor, routing: Routing, weights: ExpertWeights, activation: Activation) -> Judged:
    """What some tokens give in float64, and the budget of `judged_experts`, on the CPU.

    The bound per row: one code of the quantised rows of the second product, and what sums round over their length. Sums
    of fp8 on a GPU are held to 14 bits.
    """
    on_gpu = rows.is_cuda
    coded = weights.scheme is not None and weights.scheme.activations == "e4m3"
    with torch.device(rows.device):
        found = judged_experts(
            rows,
            routing,
            weights,
            activation=activation,
            unit=_TENSOR_CORE_UNIT if on_gpu and coded else FLOAT32_UNIT,
            middle=_MIDDLE if on_gpu else 0.0,
        )
    return Judged(found.wide.cpu(), found.budget.cpu())
