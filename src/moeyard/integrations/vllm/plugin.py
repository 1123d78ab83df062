"""The plugin that puts moeyard's operators into an installed vLLM: entry point of the group `vllm.general_plugins`.

vLLM calls `register` in each of its processes. Without `MOEYARD_VLLM` in the environment it does nothing:

    MOEYARD_VLLM=1 vllm serve MODEL             # all parts
    MOEYARD_VLLM=align,topk vllm serve MODEL    # some of align, permute, sum, topk, experts

Functions are replaced in their modules and wherever vLLM has imported them by name. What a function of ours refuses and
vLLM's takes (int4, LoRA, zero points, activations that are not ours) stays with vLLM; it is said once, with the reason,
through `logging`. Replaced routers are the operators below them, so that vLLM's own padding masks count.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from moeyard.dispatch.invariance import batch_invariance
from moeyard.integrations import vllm as ours
from moeyard.integrations.vllm import _custom_ops
from moeyard.integrations.vllm.activation import activation_of
from moeyard.integrations.vllm.experts.triton_moe import activation_of_layer, apply_experts
from moeyard.integrations.vllm.weights import expert_weights

PARTS = ("align", "permute", "sum", "topk", "experts")
VARIABLE = "MOEYARD_VLLM"
FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_OPS = "vllm._custom_ops"
_log = logging.getLogger(__name__)


class Target(NamedTuple):
    """A function of vLLM and what takes its place."""

    part: str
    module: str
    name: str
    """Of the function; with a dot that of a method or property of a class."""
    make: Callable[[Any], Any]
    """vLLM's -> ours."""

    @property
    def path(self) -> str:
        """Module and name."""
        return f"{self.module}.{self.name}"


def _put(function: Any) -> Callable[[Any], Any]:
    return lambda _: function


def _fused_experts(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `fused_experts`, which keeps the calls that ours refuses, as they were made."""
    signature = inspect.signature(ours.fused_experts)

    @functools.wraps(theirs)
    def fused_experts(*given: Any, **named: Any) -> Any:
        try:
            bound = signature.bind(*given, **named)
        except TypeError as problem:
            refusal: str | None = str(problem)
        else:
            bound.apply_defaults()
            call = bound.arguments
            act, config = call["activation"], call["quant_config"]
            rows = call["hidden_states"]
            refusal = _refusal_of(call["w1"], call["w2"], config, rows, lambda: activation_of(act, config))
        if refusal is not None:
            _say(f"fused_experts: {refusal}")
            return theirs(*given, **named)
        return ours.fused_experts(*bound.args, **bound.kwargs)

    return fused_experts


def _apply(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `TritonExperts.apply`, which keeps what ours refuses: by layer, never by what tensors hold."""

    @functools.wraps(theirs)
    def apply(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: object,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: object,
        apply_router_weight_on_input: bool,
    ) -> None:
        config, scope = self.quant_config, getattr(self, "activation_config", None)
        refusal = _not_plain(self)
        if refusal is None:
            refusal = _refusal_of(w1, w2, config, output, lambda: activation_of_layer(activation, config, scope))
        if refusal is not None:
            _say(f"TritonExperts: {refusal}")
            theirs(
                self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
                a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input,
            )  # fmt: skip
            return
        apply_experts(
            output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
            a1q_scale, apply_router_weight_on_input, config, scope,
        )  # fmt: skip

    return apply


def _unquantised(theirs: property) -> property:
    """`expects_unquantized_inputs`: ours quantise rows themselves, where all of them are on this rank."""

    def expects_unquantized_inputs(self: Any) -> bool:
        if theirs.fget is not None and theirs.fget(self):
            return True
        parallel = getattr(self.moe_config, "moe_parallel_config", None)
        spread = parallel is None or getattr(parallel, "use_all2all_kernels", True)
        coded = getattr(self.quant_config, "quant_dtype", None) in (torch.float8_e4m3fn, torch.int8)
        return coded and not spread and _not_plain(self) is None

    return property(expects_unquantized_inputs)


def _not_plain(layer: Any) -> str | None:
    """Why a layer's experts stay vLLM's whatever their weights are; None if they need not."""
    if type(layer).__name__ != "TritonExperts":
        return f"{type(layer).__name__} has steps of its own"
    if getattr(layer, "_lora_context", None) is not None:
        return "LoRA adapters"
    if getattr(layer, "quantization_emulation", False):
        return "emulated quantisation"
    return None


def _refusal_of(
    w1: torch.Tensor, w2: torch.Tensor, config: object, rows: torch.Tensor, activation: Callable[[], tuple[Any, bool]]
) -> str | None:
    """What ours would say to a call's weights and activation; None if it takes them."""
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0") and not batch_invariance(None):
        return "VLLM_BATCH_INVARIANT without MOEYARD_BATCH_INVARIANT=1"
    try:
        expert_weights(w1, w2, config, rows.dtype, gated=activation()[1])
    except (TypeError, ValueError) as problem:
        return str(problem)
    return None


@functools.cache
def _say(what: str) -> None:
    _log.warning("moeyard leaves calls to vLLM: %s", what)


def _same(part: str, module: str, source: Any, *names: str) -> tuple[Target, ...]:
    return tuple(Target(part, module, name, _put(getattr(source, name))) for name in names)


TARGETS = (
    *_same("align", f"{FUSED_MOE}.moe_align_block_size", ours, "moe_align_block_size", "batched_moe_align_block_size"),
    *_same(
        "align", _OPS, _custom_ops, "moe_align_block_size", "batched_moe_align_block_size", "moe_lora_align_block_size"
    ),
    *_same("permute", f"{FUSED_MOE}.moe_permute_unpermute", ours, "moe_permute", "moe_unpermute"),
    *_same("permute", _OPS, ours, "shuffle_rows"),
    *_same("sum", _OPS, ours, "moe_sum"),
    *_same("sum", f"{FUSED_MOE}.moe_fused_mul_sum", ours, "moe_fused_mul_sum"),
    *_same("topk", _OPS, _custom_ops, "topk_softmax", "topk_sigmoid", "topk_hash_softplus_sqrt"),
    *_same("topk", f"{FUSED_MOE}.router.grouped_topk_router", ours, "fused_grouped_topk"),
    Target("experts", f"{FUSED_MOE}.fused_moe", "fused_experts", _fused_experts),
    Target("experts", f"{FUSED_MOE}.experts.triton_moe", "TritonExperts.apply", _apply),
    Target("experts", f"{FUSED_MOE}.experts.triton_moe", "TritonExperts.expects_unquantized_inputs", _unquantised),
)
"""What is replaced, in the modules of vLLM 0.26 to 0.33. Releases lack some of the names; `activate` says which."""

_DONE: dict[str, str] = {}
"""By path: what `activate` did."""


def register() -> None:
    """The entry point: replaces the parts that `MOEYARD_VLLM` names. Calls after the first change nothing."""
    activate(parts_asked_for())


def parts_asked_for() -> tuple[str, ...]:
    """The parts that the environment asks for; ValueError for a name that is none."""
    text = os.environ.get(VARIABLE, "").strip()
    if text in ("", "0"):
        return ()
    if text in ("1", "all"):
        return PARTS
    asked = tuple(filter(None, (part.strip() for part in text.split(","))))
    unknown = [part for part in asked if part not in PARTS]
    if unknown:
        raise ValueError(f"{VARIABLE}: expected 1, all or some of {','.join(PARTS)}, got {unknown[0]!r}")
    return asked


def activate(parts: Iterable[str]) -> dict[str, str]:
    """Replaces the functions of some parts in the installed vLLM.

    Returns, by the path of each function of these parts, "active" or why it is not there to be replaced.
    """
    wanted = [target for target in TARGETS if target.part in tuple(parts)]
    for target in wanted:
        if target.path not in _DONE:
            _DONE[target.path] = _replace(target)
    return {target.path: _DONE[target.path] for target in wanted}


def _replace(target: Target) -> str:
    try:
        module = importlib.import_module(target.module)
    except ImportError as problem:
        return f"this vLLM has no such module ({problem})"
    owner, _, name = target.name.rpartition(".")
    if owner:
        holder = getattr(module, owner, None)
        if holder is None or name not in vars(holder):
            return "this vLLM has no such name"
        setattr(holder, name, target.make(vars(holder)[name]))
        return "active"
    theirs = getattr(module, name, None)
    if theirs is None:
        return "this vLLM has no such name"
    mine = target.make(theirs)
    for other in _modules_of_vllm():
        for alias in [key for key, value in vars(other).items() if value is theirs]:
            setattr(other, alias, mine)
    return "active"


def _modules_of_vllm() -> list[ModuleType]:
    return [module for path, module in list(sys.modules.items()) if path.partition(".")[0] == "vllm" and module]


def describe() -> list[str]:
    """What `moeyard doctor` says of the plugin, line by line; where it is turned on this imports vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return []
    parts = parts_asked_for()
    if not parts:
        return [f"plugin of vLLM: off ({VARIABLE}=1, or some of {','.join(PARTS)}, turns it on)"]
    states = activate(parts)
    return [f"plugin of vLLM: {','.join(parts)}", *(f"  {path}: {state}" for path, state in states.items())]
