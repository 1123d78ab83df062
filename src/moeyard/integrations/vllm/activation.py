"""vLLM's names of activations, and what moeyard computes for them."""

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

import moeyard
from moeyard.dispatch.checks import check_out, check_tensor


class MoEActivation(Enum):
    """vLLM's activations of experts. Those that moeyard does not compute have their names here, too."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"
    SWIGLUOAI = "swigluoai"
    SITU = "situ"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SWIGLUSTEP = "swiglustep"
    SILU_NO_MUL = "silu_no_mul"
    GELU_NO_MUL = "gelu_no_mul"
    GELU_TANH_NO_MUL = "gelu_tanh_no_mul"
    RELU2_NO_MUL = "relu2_no_mul"

    @property
    def is_gated(self) -> bool:
        """Whether rows hold gate and up."""
        return not self.value.endswith("_no_mul")

    def without_mul(self) -> "MoEActivation":
        """The member without a gate; itself where there is none."""
        name = f"{self.value}_no_mul"
        return MoEActivation(name) if name in {member.value for member in MoEActivation} else self

    @classmethod
    def from_str(cls, s: str) -> "MoEActivation":
        """The member of a value; "gelu_pytorch_tanh" is gelu_tanh. Raises ValueError for others."""
        values = [member.value for member in cls]
        name = "gelu_tanh" if s == "gelu_pytorch_tanh" else s
        if name not in values:
            raise ValueError(f"s: expected one of {values}, got {s!r}")
        return cls(name)


def activation_without_mul(activation: str) -> str:
    """The value of `MoEActivation.without_mul`."""
    return str(MoEActivation.from_str(activation).without_mul().value)


@dataclass(frozen=True)
class ApplyMoEActivationConfig:
    """vLLM's parameters of an activation: of silu the limit, of swigluoai_uninterleave limit, alpha and beta."""

    clamp_limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0


_PLAIN = ("silu", "gelu", "gelu_tanh")
_TAKEN = (*_PLAIN, *(f"{name}_no_mul" for name in moeyard.Activation.NAMES), "swigluoai_uninterleave")
_PARAMETERS = ("gemm1_clamp_limit", "gemm1_alpha", "gemm1_beta")


def activation_of(activation: object, quant_config: object = None) -> tuple[moeyard.Activation, bool]:
    """(activation, whether there is a gate) of vLLM's name or member and of a quant_config's `gemm1_*` parameters.

    silu takes `gemm1_clamp_limit`: the gate is clamped from above, up on both sides. swigluoai_uninterleave takes all
    three: with none of them it is gpt-oss's (1.702, 1.0, 7.0); beside a limit alpha is 1 and beta 0 unless given.
    Raises ValueError for other activations, and for a parameter that the activation does not have.
    """
    name = str(getattr(activation, "value", activation))
    if name not in _TAKEN:
        raise ValueError(f"activation: expected one of {sorted(_TAKEN)}, got {name!r}")
    limit, alpha, beta = (getattr(quant_config, key, None) for key in _PARAMETERS)
    return parametrised(name, limit, alpha, beta, tuple(f"quant_config.{key}" for key in _PARAMETERS))


def parametrised(
    name: str, limit: float | None, alpha: float | None, beta: float | None, names: tuple[str, ...]
) -> tuple[moeyard.Activation, bool]:
    """(activation, whether there is a gate) of a name and parameters, which errors call by `names`."""
    if name == "swigluoai_uninterleave":
        if limit is alpha is beta is None:
            return moeyard.GPT_OSS_ACTIVATION, True
        if limit is None:
            raise ValueError(f"{names[0]}: expected a number beside alpha or beta of {name}, got None")
        return moeyard.Activation("silu", 1.0 if alpha is None else alpha, 0.0 if beta is None else beta, limit), True
    accepted = (limit if name == "silu" else None, None, None)
    for key, value, taken, neutral in zip(names, (limit, alpha, beta), accepted, (None, 1.0, 0.0), strict=True):
        if value is not None and value is not taken and value != neutral:
            raise ValueError(f"{key}: expected {neutral} beside activation {name!r}, got {value}")
    return moeyard.Activation(name.removesuffix("_no_mul"), limit=limit), not name.endswith("_no_mul")


def apply_moe_activation_supported(activation: object) -> bool:
    """Whether `apply_moe_activation` computes it."""
    return str(getattr(activation, "value", activation)) in _TAKEN


def apply_moe_activation(
    activation: object,
    output: Tensor,
    input: Tensor,
    *,
    activation_config: ApplyMoEActivationConfig | None = None,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> Tensor:
    """vLLM's `apply_moe_activation`: output [rows, d] = activation of input [rows, 2d], without a gate [rows, d].

    `activation_config` is an `ApplyMoEActivationConfig` or vLLM's, read as `activation_of` reads a quant_config. vLLM
    skips rows of other ranks by `topk_ids` and `expert_map`; here they are computed as all others, and both are not
    read. Unlike vLLM's relu2_no_mul this leaves `input` as it is. Returns `output`.
    """
    name = str(getattr(activation, "value", activation))
    if name not in _TAKEN:
        raise ValueError(f"activation: expected one of {sorted(_TAKEN)}, got {name!r}")
    keys = ("clamp_limit", "alpha", "beta")
    limit, alpha, beta = (getattr(activation_config, key, None) for key in keys)
    if limit is None and (alpha, beta) == (1.0, 0.0):  # vLLM's defaults
        alpha = beta = None
    act, gated = parametrised(name, limit, alpha, beta, tuple(f"activation_config.{key}" for key in keys))
    check_tensor("input", input, ndim=(2,))
    check_out("output", output, (input.shape[0], input.shape[1] // (1 + gated)), input.dtype, input.device)
    return moeyard.activate(input, act, gated=gated, out=output)
