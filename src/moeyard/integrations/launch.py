"""Puts moeyard's operators where a script's vLLM imports look for them, then runs the script."""

import importlib
import importlib.machinery
import importlib.util
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moeyard
from moeyard.integrations import vllm as ours
from moeyard.integrations.vllm.plugin import FUSED_MOE, PARTS, activate

_ALIGN = f"{FUSED_MOE}.moe_align_block_size"
_PACKAGE = "moeyard.integrations.vllm"
_ROUTERS = ("fused_topk", "grouped_topk")
_CONFIGS = (
    "FUSED_MOE_UNQUANTIZED_CONFIG", "FusedMoEQuantConfig", "biased_moe_quant_config", "fp8_w8a16_moe_quant_config",
    "fp8_w8a8_moe_quant_config", "int8_w8a16_moe_quant_config", "int8_w8a8_moe_quant_config",
)  # fmt: skip
PROVIDED = {
    "": (
        "fused_experts", "fused_topk", "grouped_topk", "MoEActivation", "FusedMoEQuantConfig", "TritonExperts",
        "activation_without_mul", "apply_moe_activation", "ApplyMoEActivationConfig",
    ),
    "activation": (
        "ApplyMoEActivationConfig", "MoEActivation", "activation_without_mul", "apply_moe_activation",
        "apply_moe_activation_supported",
    ),
    "config": _CONFIGS,
    "cutlass_moe": ("cutlass_moe_fp8", "run_cutlass_moe_fp8"),
    "expert_map_manager": ("determine_expert_map",),
    "experts.cutlass_moe": ("run_cutlass_moe_fp8",),
    "experts.triton_moe": ("TritonExperts",),
    "fused_moe": ("fused_experts", *_ROUTERS, "invoke_fused_moe_triton_kernel", "try_get_optimal_moe_config"),
    "layer": ("determine_expert_map",),
    "moe_align_block_size": ("batched_moe_align_block_size", "moe_align_block_size"),
    "moe_fused_mul_sum": ("moe_fused_mul_sum",),
    "moe_permute_unpermute": (
        "MoEPermuteScratch", "moe_permute", "moe_permute_unpermute_supported", "moe_unpermute",
    ),
    "router.fused_topk_bias_router": ("fused_topk_bias",),
    "router.fused_topk_router": ("fused_topk",),
    "router.grouped_topk_router": ("fused_grouped_topk", "grouped_topk"),
    "utils": ("count_expert_num_tokens",),
}  # fmt: skip
"""Modules below vLLM's `fused_moe` and the names in them that scripts import from there, in some release."""
CUSTOM_OPS = (
    "batched_moe_align_block_size", "grouped_topk", "moe_align_block_size", "moe_lora_align_block_size", "moe_sum",
    "shuffle_rows", "topk_hash_softplus_sqrt", "topk_sigmoid", "topk_softmax",
)  # fmt: skip
"""The names of `vllm._custom_ops`."""


class _CallableModule(types.ModuleType):
    """A module that can be called as the function of its own name: `fused_moe.moe_align_block_size` is both."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        function: Callable[..., Any] = getattr(self, self.__name__.rpartition(".")[2])
        return function(*arguments, **keywords)


class _Absent:
    """Answers, last of all, for modules and names below a `vllm` that is not installed: in words."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.startswith("vllm."):
            words = f"vLLM is not installed, and {name!r} is none of the names that moeyard provides in its place"
            raise ModuleNotFoundError(f"{words} (moeyard.integrations.launch.PROVIDED lists them)", name="vllm")


def install() -> str:
    """Makes vLLM's import paths of the MoE operators resolve to moeyard; says in words what it did.

    Where vLLM is installed its operators are replaced, as by the plugin; names that this release does not have are
    added. Where it is not, the import paths exist with nothing else in them.
    """
    if importlib.util.find_spec("vllm") is None:
        sys.meta_path.append(_Absent())
        _provide()
        done = "vLLM is not installed: its MoE operators' import paths now lead to moeyard"
    else:
        states = activate(PARTS)
        added = _provide()
        active = [path for path, state in states.items() if state == "active"]
        done = f"vLLM's MoE operators are replaced by moeyard's: {len(active)} of {len(states)}"
        done += f"; added, as this vLLM has none: {', '.join(added)}" if added else ""
    sys.modules[_ALIGN].__class__ = _CallableModule
    return done


def _provide() -> list[str]:
    """Adds modules and names of vLLM's that are not there; returns their paths."""
    paths = {f"{FUSED_MOE}.{place}".rstrip("."): names for place, names in PROVIDED.items()}
    custom_ops = importlib.import_module(f"{_PACKAGE}._custom_ops")
    added = []
    for path, names in (paths | {"vllm._custom_ops": CUSTOM_OPS}).items():
        module = _module_at(path)
        for name in names:
            if not hasattr(module, name):
                setattr(module, name, getattr(custom_ops if path == "vllm._custom_ops" else ours, name))
                added.append(f"{path}.{name}")
    return added


def _module_at(path: str) -> types.ModuleType:
    """vLLM's module, or an empty one where it has none."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as problem:
        if not f"{problem.name}.".startswith("vllm."):
            raise  # something else that vLLM's module needs
        return _make_module(path)


def _make_module(path: str) -> types.ModuleType:
    """An empty module at a dotted path, its parents packages; what exists is kept."""
    if path not in sys.modules:
        module = types.ModuleType(path, "Import path of vLLM, provided by moeyard.")
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
        sys.modules[path] = module
        parent, _, name = path.rpartition(".")
        if parent:
            setattr(_make_module(parent), name, module)
    return sys.modules[path]


def _load_runtime(device: str) -> None:
    """Imports what operators need, by one small call."""
    moeyard.moe_align_block_size(torch.zeros(1, dtype=torch.int32, device=device), num_experts=1, block_size=1)


def main(argv: list[str]) -> int:
    """`python -m moeyard.integrations.vllm SCRIPT [ARGUMENT ...]`."""
    usage = "usage: python -m moeyard.integrations.vllm SCRIPT [ARGUMENT ...]"
    if len(argv) < 2 or argv[1] in ("-h", "--help"):
        print(f"{usage}\\n\\nRuns SCRIPT with vLLM's MoE operators provided or replaced by moeyard's.")
        return 0 if len(argv) > 1 else 2
    script = Path(argv[1])
    if not script.is_file():
        print(f"{usage}\\nSCRIPT: expected a file, got {argv[1]!r}", file=sys.stderr)
        return 2
    print(f"moeyard {moeyard.__version__}: {install()}", file=sys.stderr)
    _load_runtime("cuda" if torch.cuda.is_available() else "cpu")  # as importing vLLM loads its library
    sys.argv = argv[1:]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0
