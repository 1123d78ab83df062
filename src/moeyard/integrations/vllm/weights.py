"""What vLLM's quantisation arguments mean: stored weights and a quant_config -> `ExpertWeights` with a scheme."""

from dataclasses import replace

import torch
from torch import Tensor

import moeyard
from moeyard.dispatch.checks import check_shape, check_tensor
from moeyard.quant import ExpertScales, QuantScheme

_CODES = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}
_SCALES = (torch.float32, torch.bfloat16, torch.float16)
_UNREAD = ("w1_zp", "w2_zp")


def expert_weights(
    w1: Tensor,
    w2: Tensor,
    quant_config: object,
    dtype: torch.dtype,
    *,
    gated: bool = True,
    row_scale: Tensor | None = None,
    prefix: str = "quant_config.",
) -> moeyard.ExpertWeights:
    """The weights of a call as moeyard's operators take them: what vLLM's arguments say, with nothing dequantised.

    Args:
        w1, w2: [E, 2I, H] (without a gate [E, I, H]) and [E, H, I]; float8_e4m3fn, int8, or the dtype of the rows.
        quant_config: None, a `FusedMoEQuantConfig` or vLLM's. Its float32 biases beside rows of 16 bits are rounded to
            the dtype of the rows; vLLM's kernel adds them as they are.
        dtype: of the rows.
        gated: whether `w1` has gate and up.
        row_scale: float32, one or one per expert: the first product's rows come as codes that it multiplies.
        prefix: what stands before the names of scales in errors.

    A per-tensor dynamic scale becomes one per row, as `vllm.fused_experts` says. Raises TypeError or ValueError naming
    the argument: also for zero points, for gate and up that do not consist of whole blocks, for a scale of rows
    that is not one number, and for `a2_scale` alone.
    """
    check_tensor("w1", w1, ndim=(3,))
    check_tensor("w2", w2, ndim=(3,), dtypes=(w1.dtype,), device=w1.device)
    unread = [name for name in _UNREAD if getattr(quant_config, name, None) is not None]
    if unread:
        raise ValueError(f"{prefix}{unread[0]}: expected None (not supported), got {getattr(quant_config, unread[0])}")
    biases = _bias(quant_config, "w1_bias", dtype), _bias(quant_config, "w2_bias", dtype)
    if w1.dtype not in _CODES:
        asked = [name for name in _ASKED if getattr(quant_config, name, None) is not None]
        if asked or not w1.is_floating_point() or w1.dtype.itemsize == 1:
            wanted = "float8_e4m3fn or int8" + (f" beside {prefix}{asked[0]}" if asked else "")
            raise TypeError(f"w1: expected dtype {wanted}, got {str(w1.dtype).removeprefix('torch.')}")
        return moeyard.ExpertWeights(w1, w2, *biases, gated=gated)
    if quant_config is None:
        raise ValueError(f"quant_config: expected one with w1_scale and w2_scale for {w1.dtype}, got None")
    block = _block_of(quant_config, prefix)
    halves = 2 if gated else 1
    if gated and w1.shape[1] % 2:
        raise ValueError(f"w1: expected an even number of rows (gate and up), got shape {tuple(w1.shape)}")
    if block is not None and w1.shape[1] // halves % block[0]:
        raise ValueError(f"w1: expected gate and up of whole blocks of {block[0]} rows, got {w1.shape[1] // halves}")
    granularity, first = _scales_of(f"{prefix}w1_scale", getattr(quant_config, "w1_scale", None), w1, block, halves)
    second_granularity, second = _scales_of(
        f"{prefix}w2_scale", getattr(quant_config, "w2_scale", None), w2, block, 1, granularity
    )
    if granularity != second_granularity:
        raise ValueError(f"{prefix}w2_scale: expected one scale per {_UNIT[granularity]}, got {tuple(second.shape)}")
    if getattr(quant_config, "per_out_ch_quant", False) and granularity == (0, 0):
        raise ValueError(f"{prefix}w1_scale: expected one scale per row (per output channel), got one per matrix")
    scheme = QuantScheme(_CODES[w1.dtype], granularity)
    scales = ExpertScales(first, second)
    if row_scale is not None:  # codes are rows whose scale is 1: their own goes into the weights'
        factor = row_scale.reshape(-1, 1, 1)
        scales = replace(scales, w13=scales.w13.float() * factor, w2=scales.w2.float())
    return moeyard.ExpertWeights(
        w1, w2, *biases, gated, *_with_activations(scheme, scales, quant_config, row_scale is not None, w1, prefix)
    )


_ASKED = ("quant_dtype", "w1_scale", "w2_scale", "a1_scale", "a2_scale")
_UNIT = {(0, 0): "matrix", (1, 0): "row"}


def _bias(quant_config: object, name: str, dtype: torch.dtype) -> Tensor | None:
    bias: Tensor | None = getattr(quant_config, name, None)
    if isinstance(bias, Tensor) and bias.dtype == torch.float32 and dtype.itemsize == 2:
        return bias.to(dtype)
    return bias


def _block_of(quant_config: object, prefix: str) -> tuple[int, int] | None:
    """The block of weights. vLLM's class has it with the weights alone where rows stay wide."""
    shape = getattr(quant_config, "block_shape", None)
    if shape is None:
        shape = getattr(getattr(quant_config, "_w1", None), "shape", None)
        if shape is None or min(shape) < 1:  # of vLLM's, -1 is all of a matrix
            return None
    if len(shape) != 2 or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"{prefix}block_shape: expected [rows, columns] of 1 and above, got {shape}")
    return int(shape[0]), int(shape[1])


def _scales_of(
    name: str,
    scale: object,
    weight: Tensor,
    block: tuple[int, int] | None,
    halves: int,
    preferred: tuple[int, int] = (0, 0),
) -> tuple[tuple[int, int], Tensor]:
    """(block, scales [E, blocks of rows, blocks of columns]) of a weight; shapes of both kinds are of `preferred`."""
    check_tensor(name, scale, dtypes=_SCALES, ndim=(1, 2, 3), device=weight.device)
    assert isinstance(scale, Tensor)
    experts, rows, columns = weight.shape
    if block is not None:
        shape = experts, -(-rows // block[0]), -(-columns // block[1])
        check_shape(name, scale, shape, f"blocks of {block[0]} x {block[1]}")
        return block, scale
    shapes = {
        (0, 0): ((experts,), (experts, 1), (experts, 1, 1)),
        (1, 0): ((experts, rows), (experts, rows, 1)),
    }
    for granularity in sorted(shapes, key=lambda one: one != preferred):
        if tuple(scale.shape) in shapes[granularity]:
            whole = scale.reshape(experts, -1, 1)
            return granularity, whole.expand(experts, halves, 1) if granularity == (0, 0) else whole
    raise ValueError(
        f"{name}: expected shape {(experts,)} (one per matrix) or {(experts, rows)} (one per row), "
        f"got {tuple(scale.shape)}"
    )


def _with_activations(
    scheme: QuantScheme, scales: ExpertScales, quant_config: object, coded: bool, w1: Tensor, prefix: str
) -> tuple[QuantScheme, ExpertScales]:
    """The scheme and scales of weights, and beside them those of rows."""
    wanted = getattr(quant_config, "quant_dtype", None)
    given = {name: getattr(quant_config, name, None) for name in ("a1_scale", "a2_scale")}
    own = getattr(quant_config, "per_act_token_quant", False)
    if wanted not in (None, w1.dtype):
        raise ValueError(f"{prefix}quant_dtype: expected None or {w1.dtype} (that of w1), got {wanted}")
    group = scheme.block[1]
    for name, scale in given.items():
        if scale is not None and (wanted is None or group or own):
            why = "rows are not quantised" if wanted is None else "scales are computed per row or group"
            raise ValueError(f"{prefix}{name}: expected None ({why}), got a tensor")
    if own and group:
        raise ValueError(f"{prefix}per_act_token_quant: expected False beside block_shape, got True")
    if wanted is None:
        return scheme, scales
    first, second = (_input_scale(f"{prefix}{name}", scale, w1) for name, scale in given.items())
    scheme = replace(scheme, activations=scheme.weights, activation_group=group)
    if coded:
        first = torch.ones(w1.shape[0], device=w1.device)
    if first is None and second is not None:
        raise ValueError(f"{prefix}a1_scale: expected a scale beside a2_scale, got None")
    if first is None:
        return scheme, scales
    scheme = replace(scheme, static=True, dynamic_second=second is None)
    return scheme, replace(scales, w13_input=first, w2_input=second)


def _input_scale(name: str, scale: object, w1: Tensor) -> Tensor | None:
    """One number for all experts -> [E]."""
    if scale is None:
        return None
    check_tensor(name, scale, dtypes=(torch.float32,), device=w1.device)
    assert isinstance(scale, Tensor)
    if scale.numel() != 1:
        raise ValueError(f"{name}: expected one scale for all rows, got shape {tuple(scale.shape)}")
    return scale.reshape(1).expand(w1.shape[0])
