"""Weights of experts to quantised ones and back, on the device where they are, some experts at a time."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moeyard.dispatch.checks import QUANTISED_ROWS, check_experts
from moeyard.quant import CODES, LEAST_MAGNITUDE, SCALES, ExpertScales, QuantScheme
from moeyard.values import ExpertWeights
from moeyard.vectorised.quant import CHUNK_BYTES, matrices_of

_LARGEST = {"e4m3": 448.0, "int8": 127.0, "int4": 7.0, "e2m1": 6.0}
"""What the largest magnitude of a block becomes."""
_LARGEST_SCALE = {"float": 1.0, "e4m3": 448.0, "e8m0": 1.0}
"""What the largest scale of a matrix becomes beside a global one."""
_LEAST_SCALE = 2.0**-9  # of e4m3


def quantize_experts(
    weights: ExpertWeights, scheme: QuantScheme, *, w13_input: Tensor | None = None, w2_input: Tensor | None = None
) -> ExpertWeights:
    """Rounds the weights of experts to a scheme: to the nearest code, ties to even, saturated.

    Args:
        weights: float32, bfloat16 or float16, of no scheme.
        scheme: what to round to.
        w13_input, w2_input: [num_local_experts] float32, scales of the rows of both products; of a scheme with static
            activations alone.

    A block's scale is its largest magnitude, 1e-10 at least, over the largest code (e4m3 448, int8 127, int4 7,
    e2m1 6). With zero points it is the range of the block and of 0, over 15. Scales of e8m0 are 2 to the power of
    floor(log2(largest magnitude)) less that of the largest code (OCP Microscaling), which saturates what is above.
    With global scales the largest scale of each matrix is 448 for scales of e4m3, else 1; codes are those of the scales
    as they are stored. A block with a NaN or an infinity becomes NaN.

    Returns weights with new w13, w2 and scales; biases are the ones given. Raises TypeError or ValueError naming the
    argument.
    """
    if not isinstance(scheme, QuantScheme):
        raise TypeError(f"scheme: expected a QuantScheme, got {type(scheme).__name__}")
    if scheme.weights not in _LARGEST:
        raise ValueError(f"scheme: expected codes of {tuple(_LARGEST)} to round to, got {scheme.weights!r}")
    _check_plain(weights, scheme)
    halves = 2 if weights.gated else 1
    first, second = _quantized(weights.w13, scheme, halves), _quantized(weights.w2, scheme, 1)
    scales = ExpertScales(
        first.scales, second.scales, first.zero_points, second.zero_points, first.global_scales, second.global_scales,
        w13_input, w2_input,
    )  # fmt: skip
    result = ExpertWeights(
        first.stored, second.stored, weights.w13_bias, weights.w2_bias, weights.gated, scheme, scales
    )
    check_experts(result, _rows_for(weights))
    return result


def dequantize_experts(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """The weights of a scheme as values of a float dtype: code times scales, in float32, rounded once.

    Args:
        weights: of a scheme.
        dtype: float32, bfloat16, float16 or float64 (then computed in float64); also that of the biases returned.

    Nothing else dequantises a whole layer. Raises TypeError or ValueError naming the argument.
    """
    if dtype not in (*QUANTISED_ROWS, torch.float64):
        raise ValueError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"weights: expected ExpertWeights, got {type(weights).__name__}")
    if weights.scheme is None:
        raise ValueError("weights.scheme: expected a QuantScheme (these are not quantised), got None")
    if weights.scheme.tiled:
        raise ValueError(f"weights.scheme: expected one in rows (unpack_experts comes first), got {weights.scheme}")
    bias = weights.w13_bias if weights.w13_bias is not None else weights.w2_bias
    columns = weights.w13.shape[-1] * weights.scheme.per_byte
    check_experts(weights, weights.w13.new_empty((0, columns), dtype=torch.float32 if bias is None else bias.dtype))
    values = [matrix.values(dtype) for matrix in matrices_of(weights)]
    biases = [None if bias is None else bias.to(dtype) for bias in (weights.w13_bias, weights.w2_bias)]
    return ExpertWeights(values[0], values[1], biases[0], biases[1], weights.gated)


def _check_plain(weights: object, scheme: QuantScheme) -> None:
    if not isinstance(weights, ExpertWeights):
        raise TypeError(f"weights: expected ExpertWeights, got {type(weights).__name__}")
    if weights.scheme is not None:
        raise ValueError(f"weights.scheme: expected None (dequantize_experts comes first), got {weights.scheme}")
    if weights.w13.dtype not in QUANTISED_ROWS:
        raise TypeError(f"weights.w13: expected dtype float32, bfloat16 or float16, got {weights.w13.dtype}")
    check_experts(weights, _rows_for(weights))
    sizes = weights.hidden_size, weights.intermediate_size
    if any(size % scheme.per_byte for size in sizes):
        raise ValueError(f"weights: expected even hidden_size and intermediate_size for {scheme}, got {sizes}")


def _rows_for(weights: ExpertWeights) -> Tensor:
    """No rows, of the dtype and width that unquantised weights take."""
    return weights.w13.new_empty((0, weights.w13.shape[-1]))


def _experts_at_once(values: int) -> int:
    return max(1, CHUNK_BYTES // max(1, 4 * values))


class _Quantized(NamedTuple):
    """A matrix of some experts, rounded."""

    stored: Tensor
    scales: Tensor
    zero_points: Tensor | None
    global_scales: Tensor | None


def _quantized(matrix: Tensor, scheme: QuantScheme, halves: int) -> _Quantized:
    """[E, R, C] of a float dtype, R rows of `halves` matrices one below the other."""
    step = _experts_at_once(matrix[0].numel())
    parts = [_rounded(some.float(), scheme, halves) for some in matrix.split(step)]

    def whole(tensors: list[Tensor]) -> Tensor:
        return (
            tensors[0]
            if len(tensors) == 1
            else torch.cat([t.view(torch.uint8) for t in tensors]).view(tensors[0].dtype)
        )

    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    global_scales = [part.global_scales for part in parts if part.global_scales is not None]
    return _Quantized(
        whole([part.stored for part in parts]), whole([part.scales for part in parts]),
        whole(zero_points) if zero_points else None, whole(global_scales) if global_scales else None,
    )  # fmt: skip


def _rounded(values: Tensor, scheme: QuantScheme, halves: int) -> _Quantized:
    experts, all_rows, columns = values.shape
    rows = all_rows // halves
    tall, wide = scheme.block[0] or max(rows, 1), scheme.block[1] or max(columns, 1)
    padded = functional.pad(values.view(experts, halves, rows, columns), (0, -columns % wide, 0, -rows % tall))
    blocks = padded.unflatten(3, (-1, wide)).unflatten(2, (-1, tall))  # [E, halves, rows', tall, columns', wide]
    low, high = blocks.amin((3, 5)).clamp(max=0), blocks.amax((3, 5)).clamp(min=0)
    largest = torch.maximum(high, -low)
    largest = torch.where(largest.isfinite(), largest, torch.nan).clamp(min=LEAST_MAGNITUDE)
    if scheme.zero_points:
        wanted = (high - low).clamp(min=LEAST_MAGNITUDE) / high.new_full((), 15.0)
        wanted = torch.where(wanted.isfinite(), wanted, torch.nan)
    else:
        wanted = largest / largest.new_full((), _LARGEST[scheme.weights])
    more = None
    if scheme.global_scales:
        more = wanted.amax((2, 3)) / wanted.new_full((), _LARGEST_SCALE[scheme.scales])
        wanted = wanted / more[:, :, None, None]
    scales = _as_scales(wanted, largest, scheme)
    factor = scales.float() if more is None else scales.float() * more[:, :, None, None]

    def spread(block: Tensor) -> Tensor:
        """[E, halves, rows', columns'] -> what `padded` has of it."""
        return block.repeat_interleave(tall, 2).repeat_interleave(wide, 3)[:, :, :rows, :columns]

    zero = (-low / factor).round().clamp(0, 15).nan_to_num(0) if scheme.zero_points else None
    quotients = (padded[:, :, :rows, :columns] / spread(factor)).reshape(experts, all_rows, columns)
    stored = _codes(quotients, scheme, None if zero is None else spread(zero).reshape(experts, all_rows, columns))
    return _Quantized(stored, scales.flatten(1, 2), None if zero is None else zero.to(torch.uint8).flatten(1, 2), more)


def _as_scales(wanted: Tensor, largest: Tensor, scheme: QuantScheme) -> Tensor:
    """Scales in their dtype."""
    if scheme.scales == "float":
        return wanted
    dtype = SCALES[scheme.scales][0]
    if scheme.scales == "e4m3":
        return wanted.clamp(_LEAST_SCALE, 448).to(dtype)
    # OCP: the exponent of the largest magnitude less that of the largest code
    ours, theirs = torch.frexp(largest)[1], torch.frexp(largest.new_full((), _LARGEST[scheme.weights]))[1]
    byte = (ours - theirs + 127).clamp(0, 254).to(torch.uint8)
    return byte.masked_fill(largest.isnan(), 255).view(dtype)


def _codes(quotients: Tensor, scheme: QuantScheme, zero: Tensor | None) -> Tensor:
    """Rounded quotients as they are stored."""
    if scheme.weights == "e4m3":
        return quotients.clamp(-448, 448).to(CODES["e4m3"].dtype)
    quotients = quotients.nan_to_num(0.0)  # of a block whose scale is NaN
    if scheme.weights == "int8":
        return quotients.round().clamp(-127, 127).to(torch.int8)
    if scheme.weights == "int4":
        codes = (quotients.round() + (8 if zero is None else zero)).clamp(0, 15).to(torch.uint8)
    else:
        size = quotients.abs().clamp(max=6)
        # steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6: codes of 2, 3, 4 are 4, 5, 6, that of 6 is 7
        codes = torch.where(
            size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4)
        )
        codes = codes.to(torch.uint8) | (quotients.signbit().to(torch.uint8) << 3)
    return codes[..., ::2] | codes[..., 1::2] << 4
