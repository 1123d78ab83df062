"""Puts moeyard's operators where a script's vLLM imports look for them, then runs the script."""

import importlib
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

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_ALIGN = f"{_FUSED_MOE}.moe_align_block_size"
OPERATORS = {
    _ALIGN: ("moe_align_block_size", "batched_moe_align_block_size"),
    f"{_FUSED_MOE}.moe_permute_unpermute": ("moe_permute", "moe_unpermute"),
    "vllm._custom_ops": ("moe_sum", "shuffle_rows"),
}
"""vLLM's modules and the operators in them that are provided or replaced."""

_LAYERS = ("fused_topk", "grouped_topk", "fused_experts")
LAYER = {
    _FUSED_MOE: _LAYERS,
    f"{_FUSED_MOE}.fused_moe": _LAYERS,
    f"{_FUSED_MOE}.config": (
        "FusedMoEQuantConfig", "fp8_w8a16_moe_quant_config", "fp8_w8a8_moe_quant_config", "int8_w8a8_moe_quant_config",
    ),
    f"{_FUSED_MOE}.cutlass_moe": ("cutlass_moe_fp8", "run_cutlass_moe_fp8"),
    f"{_FUSED_MOE}.experts.cutlass_moe": ("run_cutlass_moe_fp8",),
}  # fmt: skip
"""What is provided where vLLM is not installed. Its own are kept: they take schemes that are not provided here."""


class _CallableModule(types.ModuleType):
    """A module that can be called as the function of its own name: `fused_moe.moe_align_block_size` is both."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        function: Callable[..., Any] = getattr(self, self.__name__.rpartition(".")[2])
        return function(*arguments, **keywords)


def install() -> str:
    """Makes vLLM's import paths of the MoE operators resolve to moeyard; says in words what it did."""
    if importlib.util.find_spec("vllm") is None:
        for path, names in (OPERATORS | LAYER).items():
            module = _make_module(path)
            for name in names:
                setattr(module, name, getattr(ours, name))
        done = "vLLM is not installed: its MoE operators' import paths now lead to moeyard"
    else:
        for path, names in OPERATORS.items():
            module = importlib.import_module(path)
            for name in names:
                _replace(module, name, getattr(ours, name))
        done = "vLLM's MoE operators are replaced by moeyard's"
    sys.modules[_ALIGN].__class__ = _CallableModule
    return done


def _make_module(path: str) -> types.ModuleType:
    """An empty module at a dotted path, its parents packages; what exists is kept."""
    if path not in sys.modules:
        module = types.ModuleType(path, "Import path of vLLM, provided by moeyard.")
        module.__path__ = []
        sys.modules[path] = module
        parent, _, name = path.rpartition(".")
        if parent:
            setattr(_make_module(parent), name, module)
    return sys.modules[path]


def _replace(module: types.ModuleType, name: str, function: Callable[..., Any]) -> None:
    """Sets an operator in its module and wherever vLLM has imported it by name already."""
    original = getattr(module, name)
    for other in [m for path, m in sys.modules.items() if path.partition(".")[0] == "vllm"]:
        for alias in [key for key, value in vars(other).items() if value is original]:
            setattr(other, alias, function)


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
