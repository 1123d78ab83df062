"""moeyard as an experts implementation of transformers 5, which importing this module registers.

    import moeyard.integrations.transformers
    model.set_experts_implementation("moeyard")  # or from_pretrained(..., experts_implementation="moeyard")

Every class with transformers' experts interface is taken. One call of `fused_experts` is the whole layer where the
module's gate is one of our activations, which `transformers_gate.py` finds out by asking the gate. Other gates, and
norms after the second product, go with two calls of `grouped_gemm`. What neither can take is refused by name.
`load_quantised` gives a model the experts of a quantised checkpoint as they are stored.
"""

import os
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moeyard
from moeyard.dispatch.checks import FLOATS
from moeyard.integrations.transformers_gate import PRODUCTS, Gate, facts_of, gate_of
from moeyard.values import ExpertWeights, Routing

NAME = "moeyard"
"""What transformers calls this implementation."""
_GATE, _HALVES, _QUANTISED = "_moeyard_gate", "_moeyard_halves", "_moeyard_quantised"


class Way(NamedTuple):
    """How the experts of a layer are computed."""

    name: str
    """Of the module in its model."""
    kind: str
    """Its class."""
    way: str
    """"fused_experts", or "grouped_gemm" and why."""
    copied_bytes: int
    """What is kept beside the module's parameters."""

    def __str__(self) -> str:
        kept = f"; keeps {self.copied_bytes} bytes beside its parameters" if self.copied_bytes else ""
        return f"{self.name} ({self.kind}): {self.way}{kept}"


class Halves(NamedTuple):
    """A copy of a first matrix whose rows take turns, the gate half first."""

    of: tuple[Any, ...]
    """What the copied parameters were (`_stamp`): a copy of others is stale."""
    w13: Tensor
    """[num_experts, 2 * intermediate_size, hidden_size], contiguous."""
    bias: Tensor | None
    """[num_experts, 2 * intermediate_size]."""


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module, as transformers calls its implementations.

    Args:
        self: a module with transformers' experts interface (`use_experts_implementation`).
        hidden_states: [num_tokens, hidden_size].
        top_k_index: [num_tokens, top_k] int64; ids of `num_experts` and above add nothing.
        top_k_weights: [num_tokens, top_k] of a floating-point dtype.

    Returns [num_tokens, hidden_size] of the dtype of `hidden_states`, computed in the dtype of the weights with float32
    sums. Gradients flow to hidden states, router weights and parameters. Where they are wanted under torch.autocast,
    float32 parameters are masters: rows have autocast's dtype. Raises TypeError or ValueError naming class and
    parameter where weights are no plain tensors of a floating-point dtype.

    transformers' "grouped_mm" takes the call where torch.func or forward-mode derivatives are wanted, and a warning
    says so once.
    """
    held = getattr(self, _QUANTISED, None) if torch.compiler.is_compiling() else vars(self).get(_QUANTISED)
    if held is not None:
        codes, activation, dtype = held
        routing = Routing(top_k_weights.float(), top_k_index)
        rows = hidden_states.to(dtype)
        return moeyard.fused_experts(rows, routing, codes, activation=activation).to(hidden_states.dtype)
    trained = _wants_gradient(self, hidden_states, top_k_weights)
    refused = _refused_derivatives() if trained else ""
    if refused:
        _say(f"the experts implementation 'moeyard' has no {refused}: transformers' grouped_mm takes calls under them")
        result: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
        return result
    gate = _gate(self)
    weights, fused = _weights(self, gate, top_k_weights, trained)
    rows = hidden_states.to(_dtype_of_rows(weights.w13) if trained else weights.w13.dtype)
    if fused:
        routing = Routing(top_k_weights.float(), top_k_index)
        return moeyard.fused_experts(rows, routing, weights, activation=gate.activation).to(hidden_states.dtype)
    return _composed(self, rows, top_k_index, top_k_weights, weights).to(hidden_states.dtype)


def _composed(self: Any, rows: Tensor, ids: Tensor, factors: Tensor, weights: ExpertWeights) -> Tensor:
    """Two products around the module's own gate, and its norm behind them."""
    layout = moeyard.moe_align_block_size(ids, num_experts=weights.num_local_experts, block_size=1)
    moved, offsets = moeyard.permute(rows, layout).rows, layout.expert_offsets
    first = moeyard.grouped_gemm(moved, weights.w13, bias=weights.w13_bias, expert_offsets=offsets)
    middle = (self._apply_gate(first) if self.has_gate else self.act_fn(first)).to(rows.dtype)
    second = moeyard.grouped_gemm(middle, weights.w2, bias=weights.w2_bias, expert_offsets=offsets)
    if _has_norm(self):
        second = self.post_expert_norm(second).to(rows.dtype)
    if not _keeps_float64(second, factors):
        return moeyard.combine(second, layout, factors.float())
    routes = layout.sorted_token_ids.clamp(max=max(layout.num_routes - 1, 0)).long()
    return moeyard.combine(second * factors.reshape(-1, 1)[routes], layout)


def _keeps_float64(rows: Tensor, factors: Tensor) -> bool:
    """Whether router weights are float64 for rows of float64, which operators would round to float32."""
    return rows.dtype == factors.dtype == torch.float64


def prepare(model: nn.Module, *, copies: bool = False) -> list[Way]:
    """Readies the experts of a model ahead of their first call, and says how each layer is computed.

    Call it before `torch.compile` and before a graph is captured, where weights lie transposed. A first call outside of
    these does the same by itself, except for copies.

    Args:
        model: whose modules with transformers' experts interface are readied.
        copies: whether a first matrix whose gate and up rows take turns (gpt-oss) is copied, gate half first. The copy
            lets eager calls take one `fused_experts`. It stays beside the parameter: memory for that matrix doubles. It
            is made again when the parameter moves or counts a new version. Writes through `.data` do neither: call
            `prepare` again after these.

    Returns one `Way` per layer. Raises TypeError or ValueError as `experts_forward` does.
    """
    found = []
    for name, module in _experts_of(model):
        vars(module).pop(_HALVES, None)
        gate = _gate(module)
        if copies and gate.activation is not None and gate.in_turn and _QUANTISED not in vars(module):
            vars(module)[_HALVES] = _copied(module)
        found.append(Way(name, type(module).__name__, _way(module, gate), _copied_bytes(module)))
    return found


def load_quantised(
    model: nn.Module, path: str | os.PathLike[str], *, device: str | torch.device | None = None, packed: bool = False
) -> list[Way]:
    """Gives the experts of a model the weights of its quantised checkpoint, as they are stored (`load_experts`).

    From then on each layer is one `fused_experts` of these weights. Parameters that they replace go to the meta device,
    which frees their memory, so that the model cannot be saved or trained. The weights stay where they are when the
    model moves. Rows have the dtype that the parameters have.

    Args:
        model: whose modules with transformers' experts interface have the names that the checkpoint has for them.
        path: the checkpoint, as in `load_experts`.
        device: where weights go; where the parameters are unless given.
        packed: whether weights of 4 bits are put into tiles (`pack_experts`), as kernels on GPUs read them.

    Returns one `Way` per layer. Raises TypeError or ValueError as `load_experts` and `pack_experts` do, and naming the
    module whose gate is none of moeyard's activations, or whose sizes are others.
    """
    found = []
    for name, module in _experts_of(model):
        gate, kind = _gate(module), type(module).__name__
        if gate.activation is None or _has_norm(module):
            raise ValueError(f"{name} ({kind}): expected experts of one fused_experts, got {_way(module, gate)}")
        w13, w2, _, _ = _matrices(module)
        place = device or (vars(module)[_QUANTISED][0].w2 if _QUANTISED in vars(module) else w2).device
        if torch.device(place).type == "meta":
            raise ValueError(
                f"device: expected a device for the weights of {name}, got 'meta', where its parameters are"
            )
        weights = moeyard.load_experts(
            path, name, device=place, gated=module.has_gate, num_experts=len(w2), dtype=w2.dtype
        )
        if weights.scheme is None:
            raise ValueError(f"path: expected quantised experts {name}, got {weights.w13.dtype}")
        sizes = weights.num_local_experts, weights.hidden_size, weights.intermediate_size
        if sizes != tuple(w2.shape):
            raise ValueError(f"path: expected {name} of (experts, hidden_size, size) {tuple(w2.shape)}, got {sizes}")
        if packed and weights.scheme.per_byte == 2:
            weights = moeyard.pack_experts(weights, in_place=True)
        vars(module).pop(_HALVES, None)
        vars(module)[_QUANTISED] = (weights, gate.activation, w13.dtype)
        for part in PRODUCTS:
            held = module._parameters.get(part)
            if held is not None:
                module._parameters[part] = nn.Parameter(torch.empty_like(held, device="meta"), requires_grad=False)
        found.append(Way(name, kind, _way(module, gate), 0))
    return found


def _experts_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules with transformers' experts interface; the decorator of their classes sets the attribute."""
    return ((name, module) for name, module in model.named_modules() if "is_concatenated" in vars(module))


def _has_norm(module: nn.Module) -> bool:
    """Whether a norm follows the second product; transformers 5.7 knows of none."""
    return bool(getattr(module, "has_post_expert_norm", False))


def _way(module: Any, gate: Gate) -> str:
    if _QUANTISED in vars(module):
        return f"fused_experts: {gate.activation}, weights of {vars(module)[_QUANTISED][0].scheme}"
    if _has_norm(module):
        return "grouped_gemm: a norm follows the second product"
    if gate.activation is None:
        return "grouped_gemm: its gate is none of our activations"
    if gate.in_turn and _HALVES not in vars(module):
        return "grouped_gemm: its gate and up rows take turns (prepare(copies=True) keeps a copy in halves)"
    return f"fused_experts: {gate.activation}"


def _copied_bytes(module: nn.Module) -> int:
    halves = vars(module).get(_HALVES)
    return 0 if halves is None else halves.w13.nbytes + (0 if halves.bias is None else halves.bias.nbytes)


def _wants_gradient(module: nn.Module, *given: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t.requires_grad for t in given) or any(p.requires_grad for p in module.parameters())


def _refused_derivatives() -> str:
    """Which derivatives a caller asks for that operators do not have, in words; "" if it asks for none."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "derivatives by torch.func"
    return "forward-mode derivatives" if forward_ad._current_level >= 0 else ""


def _dtype_of_rows(weight: Tensor) -> torch.dtype:
    """That of the weights, or autocast's where float32 weights are its masters."""
    kind = weight.device.type
    if weight.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def _gate(module: nn.Module) -> Gate:
    """The module's gate, looked for where its facts are new; there, weights are checked and moved, too."""
    if torch.compiler.is_compiling():
        seen = getattr(module, _GATE, None)  # with it layers share a graph; without it each has a graph of its own
        gate: Gate = _gate_while_compiling(module) if seen is None else seen[1]
        if any(getattr(module, name) != value for name, value in gate.numbers):  # the compiler guards what it reads
            return gate._replace(activation=None)
        return gate if type(getattr(module, "act_fn", None)).__name__ == gate.curve else gate._replace(activation=None)
    facts, known = facts_of(module), vars(module).get(_GATE)
    if known is None or known[0] != facts:
        _refuse_weights(module)
        known = vars(module)[_GATE] = (facts, gate_of(module))
    if module.is_transposed:
        _move(module)
    found: Gate = known[1]
    return found


@torch.compiler.assume_constant_result
def _gate_while_compiling(module: nn.Module) -> Gate:
    """The gate of a module that was not asked before, for a compiler, which runs this while it traces."""
    if module.is_transposed and _matrices(module)[1].stride(2) != 1:
        _warn(
            f"{type(module).__name__}: a compiler reads its transposed weights as they lie, which is slow; "
            "moeyard.integrations.transformers.prepare(model) or an eager call moves them first"
        )
    return gate_of(module)


def _matrices(module: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Both matrices, [experts, rows, columns], and their biases."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    w13, w2 = getattr(module, first), module.down_proj
    if module.is_transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    if not module.has_bias:
        return w13, w2, None, None
    return w13, w2, getattr(module, f"{first}_bias"), module.down_proj_bias


def _weights(module: Any, gate: Gate, factors: Tensor, trained: bool) -> tuple[ExpertWeights, bool]:
    """The weights, and whether one call of `fused_experts` takes them with these router weights.

    A copy in halves serves no call that is `trained`: the gradient is the parameter's.
    """
    w13, w2, b13, b2 = _matrices(module)
    fused = gate.activation is not None and not _has_norm(module) and not _keeps_float64(w13, factors)
    if gate.in_turn and fused:
        halves = None if trained or torch.compiler.is_compiling() else vars(module).get(_HALVES)
        if halves is None:
            fused = False
        else:
            if halves.of != _stamp(module):
                halves = vars(module)[_HALVES] = _copied(module)
            w13, b13 = halves.w13, halves.bias
    return ExpertWeights(w13, w2, b13, b2, gated=module.has_gate), fused


def _stamp(module: nn.Module) -> tuple[Any, ...]:
    """What tells a parameter that has been moved or written since from what it was."""
    w13, _, b13, _ = _matrices(module)
    return tuple(
        (t.data_ptr(), t._version, t.dtype, t.device, t.shape, t.stride()) for t in (w13, b13) if t is not None
    )


def _copied(module: nn.Module) -> Halves:
    w13, _, b13, _ = _matrices(module)
    if w13.is_inference():
        raise ValueError(
            f"{type(module).__name__}.gate_up_proj: expected a parameter made outside of torch.inference_mode() for "
            "copies=True (one made inside counts no versions, so that a copy could be stale), got one made inside"
        )
    with torch.inference_mode(False), torch.no_grad():  # in this order: the first turns gradients on
        first = torch.cat((w13[:, 0::2], w13[:, 1::2]), 1).contiguous()
        bias = None if b13 is None else torch.cat((b13[:, 0::2], b13[:, 1::2]), 1)
    return Halves(_stamp(module), first, bias)


def _move(module: nn.Module) -> None:
    """Gives transposed parameters memory in the order that kernels read; shapes and values stay.

    A parameter [experts, columns, rows] keeps its shape and gets the strides of a transposed [experts, rows, columns].
    Its old memory is freed, so that no second copy stays. Left alone are parameters in training, those made in
    inference mode, shared or partly owned memory, and calls that a graph captures.
    """
    for name in PRODUCTS[:3]:
        held = module._parameters.get(name)
        if held is None or not held.is_contiguous() or min(held.shape[1:]) == 1:
            continue
        if type(held) is not nn.Parameter or held.is_inference() or held.is_meta:
            continue
        if module.training or held.grad is not None:
            continue
        if held.is_cuda and torch.cuda.is_current_stream_capturing():
            continue
        owned = held.untyped_storage().nbytes() == held.nbytes if held.is_cuda else not held.is_shared()
        if not owned:
            continue
        with torch.inference_mode(False), torch.no_grad():  # in this order: the first turns gradients on
            held.data = held.data.transpose(1, 2).contiguous().transpose(1, 2)


def _refuse_weights(module: Any) -> None:
    """TypeError or ValueError, naming class and parameter, for weights that no operator takes."""
    kind = type(module).__name__
    for name in PRODUCTS:
        tensor = getattr(module, name, None)
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) and not isinstance(tensor, torch._subclasses.FakeTensor):
            raise TypeError(f"{kind}.{name}: expected a plain tensor for moeyard, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise TypeError(f"{kind}.{name}: expected {wanted} for moeyard, got {tensor.dtype}")
    w13, w2, *_ = _matrices(module)
    experts, rows, columns = w13.shape
    shape = (experts, columns, rows // (1 + module.has_gate))
    if tuple(w2.shape) != shape:
        shape = (experts, shape[2], columns) if module.is_transposed else shape
        raise ValueError(
            f"{kind}.down_proj: expected shape {shape} (that of the first matrix), got {tuple(module.down_proj.shape)}"
        )


@cache
def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


@torch.compiler.assume_constant_result
def _say(text: str) -> bool:
    """Warns once per text, also while a compiler traces."""
    _warn(text)
    return True


def _refuse_fp8(self: nn.Module, *_: Any, **__: Any) -> Tensor:
    raise ValueError(
        f"experts_implementation: expected one that takes transformers' {type(self).__name__}, got 'moeyard' "
        "(moeyard.load_experts reads such checkpoints, and fused_experts takes them)"
    )


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, _refuse_fp8)
