"""vLLM's own tests of its MoE operators, run against moeyard: `python benchmarks/vllm_tests.py CHECKOUT [OPTIONS]`.

CHECKOUT is a folder with vLLM's sources, of which `tests/kernels` alone is read. No vLLM is needed, and none is used:
modules of that name lead to moeyard's integration, to plain torch for what prepares a test's inputs, and to objects
that refuse to be called for all else. So a test either compares moeyard's result with its own expectation or fails.

    python benchmarks/vllm_tests.py ~/vllm --device cuda
    python benchmarks/vllm_tests.py ~/vllm --device cpu --largest 2e8 -- -x

On a CPU the tests' "cuda" is read as "cpu". Tests of more weights or products than `--largest` are left out, and so are
those that are about vLLM's classes or need streams; how many, and why, is printed. All after `--` goes to pytest.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.machinery
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moeyard.integrations import vllm as ours
from moeyard.integrations.launch import CUSTOM_OPS
from moeyard.integrations.launch import PROVIDED as INSTEAD
from moeyard.integrations.vllm import _custom_ops

FILES = (
    "test_moe_align_block_size.py", "test_moe_permute_unpermute.py", "test_fused_topk.py", "test_grouped_topk.py",
    "test_topk_softplus_sqrt.py", "test_count_expert_num_tokens.py", "test_cutlass_moe.py", "test_pplx_cutlass_moe.py",
    "test_block_fp8.py", "test_block_int8.py",
)  # fmt: skip
LEFT_OUT = {
    "test_grouped_topk[": "about vLLM's classes",
    "dsv4_fast_topk": "about vLLM's kernel for one model",
    "routing_method": "about vLLM's classes",
    "scratch": "about vLLM's scratch",
    "activation_metadata": "about vLLM's classes",
    "forwards_shared_activation": "about vLLM's classes",
    "nvfp4_clamp": "about vLLM's classes",
}
"""Parts of names of tests that ask vLLM's classes and no operator."""
_FACTORIES = (
    "randn", "rand", "randint", "randperm", "empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange",
)  # fmt: skip
_E4M3 = torch.float8_e4m3fn
_MOE = "vllm.model_executor.layers.fused_moe"


class Capability(NamedTuple):
    """A card's compute capability."""

    major: int
    minor: int

    def to_int(self) -> int:
        """As one number: 90."""
        return 10 * self.major + self.minor


class Absent:
    """A name of vLLM that nothing here provides: it can be imported, and says so when it is called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{self._name} is vLLM's own and not provided")

    def __or__(self, _: object) -> "Absent":
        return self

    __ror__ = __or__


class QuantConfig:
    """The parts of vLLM's FusedMoEQuantConfig that its tests read and change."""

    def __init__(self, quant_dtype: Any = None, **given: Any) -> None:
        self.quant_dtype = quant_dtype
        self.per_act_token_quant = given.get("per_act_token_quant", False)
        self.per_out_ch_quant = given.get("per_out_ch_quant", False)
        self.block_shape = given.get("block_shape")
        self.a1_scale, self.a2_scale = given.get("a1_scale"), given.get("a2_scale")
        self.w1_bias, self.w2_bias = given.get("w1_bias"), given.get("w2_bias")
        self._w1 = SimpleNamespace(scale=given.get("w1_scale"), shape=None)
        self._w2 = SimpleNamespace(scale=given.get("w2_scale"), shape=None)

    @staticmethod
    def make(quant_dtype: Any = None, **given: Any) -> "QuantConfig":
        """vLLM's builder."""
        return QuantConfig(quant_dtype, **given)

    @property
    def w1_scale(self) -> Tensor | None:
        """Of w1."""
        return self._w1.scale

    @property
    def w2_scale(self) -> Tensor | None:
        """Of w2."""
        return self._w2.scale


class Kernel:
    """vLLM's FusedMoEKernel: something prepares the rows, a class of experts computes. Here moeyard does both."""

    def __init__(self, prepare_finalize: object = None, fused_experts: Any = None) -> None:
        del prepare_finalize
        self._experts = fused_experts

    def apply(self, hidden_states: Tensor, w1: Tensor, w2: Tensor, *rest: Any, **given: Any) -> Tensor:
        """One layer, by the names of vLLM's arguments."""
        given["quant_config"] = self._experts.quant_config
        if not self._experts.cutlass:
            return ours.fused_experts(hidden_states, w1, w2, *rest, **given)
        strides = dict.fromkeys(("ab_strides1", "ab_strides2", "c_strides1", "c_strides2"))
        for theirs, name in (("topk_weights", 0), ("topk_ids", 1)):
            if len(rest) > name:
                given[theirs] = rest[name]
        return ours.cutlass_moe_fp8(hidden_states, w1, w2, **strides, **given)

    __call__ = apply


def experts(cutlass: bool) -> Callable[..., SimpleNamespace]:
    """One of vLLM's classes of experts: it keeps a quantisation."""

    def made(moe_config: object = None, quant_config: object = None, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(cutlass=cutlass, moe_config=moe_config, quant_config=quant_config)

    return made


class Activation(Enum):
    """vLLM's MoEActivation, as far as tests name it."""

    SILU = "silu"
    GELU = "gelu"

    @property
    def is_gated(self) -> bool:
        """Whether there is a gate."""
        return True


class SiluAndMul:
    """vLLM's layer, as its tests' expectation calls it."""

    def forward_native(self, rows: Tensor) -> Tensor:
        """silu(gate) * up at the dtype of the rows."""
        gate, up = rows.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    __call__ = forward_native


def quantised(rows: Tensor, code: torch.dtype, scale: Tensor) -> Tensor:
    """value / scale as codes, saturated."""
    largest = 448.0 if code == _E4M3 else 127.0
    quotients = (rows.float() / scale).clamp(-largest, largest)
    return quotients.to(code) if code == _E4M3 else quotients.round().to(code)


def scaled_quant(
    code: torch.dtype, rows: Tensor, scale: Tensor | None = None, use_per_token_if_dynamic: bool = False, **_: Any
) -> tuple[Tensor, Tensor]:
    """vLLM's scaled_fp8_quant and scaled_int8_quant of rows [T, C]: a given scale, one of all rows, or one of each."""
    if scale is None:
        wide = rows.float().abs()
        amax = wide.amax(-1, keepdim=True) if use_per_token_if_dynamic else wide.amax().reshape(1)
        scale = (amax / (448.0 if code == _E4M3 else 127.0)).clamp(min=1 / (448.0 * 512))
    return quantised(rows, code, scale), scale


def per_group(rows: Tensor, group_size: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """vLLM's per_token_group_quant_fp8: codes, and a scale per group of columns."""
    groups = rows.float().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1).clamp(min=1e-10) / 448.0
    return quantised(groups, _E4M3, scale.unsqueeze(-1)).flatten(-2), scale


def per_block(weight: Tensor, block_size: Sequence[int] = (128, 128), **_: Any) -> tuple[Tensor, Tensor]:
    """vLLM's per_block_cast_to_fp8 of a matrix."""
    rows, columns = weight.shape
    high, wide = block_size
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % wide, 0, -rows % high))
    blocks = padded.view(-(-rows // high), high, -(-columns // wide), wide)
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-4) / 448.0
    codes = quantised(blocks, _E4M3, scale).view(padded.shape)[:rows, :columns].contiguous()
    return codes, scale.view(scale.shape[0], scale.shape[2])


def quantise_input(rows: Tensor, scale: Tensor | None, code: Any, per_token: bool, block: Any = None) -> Any:
    """vLLM's moe_kernel_quantize_input of fp8 rows."""
    if block is not None:
        return per_group(rows, block[1])
    return scaled_quant(code, rows, scale, per_token)


@contextlib.contextmanager
def nothing(*_: Any, **__: Any) -> Iterator[None]:
    """A context without effect, as a configuration that is set is here."""
    yield


def config(*_: Any, **given: Any) -> SimpleNamespace:
    """A configuration that nothing reads."""
    return SimpleNamespace(**given, scheduler_config=SimpleNamespace())


PLATFORM = SimpleNamespace(
    get_device_capability=lambda *_: Capability(9, 0), fp8_dtype=lambda: _E4M3, is_fp8_fnuz=lambda: False,
    is_rocm=lambda: False, is_cuda=lambda: True, is_cuda_alike=lambda: True, is_xpu=lambda: False,
    seed_everything=torch.manual_seed, has_device_capability=lambda *_: True,
)  # fmt: skip
_TOPK = {"fused_experts": ours.fused_experts, "fused_topk": ours.fused_topk}
_MADE_HERE = {"FusedMoEQuantConfig", "TritonExperts", "MoEActivation"}
"""Names that tests use as vLLM's own classes are used; something simpler stands for them below."""
_CUTLASS = {"CutlassExpertsFp8": experts(True), "run_cutlass_moe_fp8": ours.run_cutlass_moe_fp8}
PROVIDED: dict[str, dict[str, Any]] = {
    "vllm": {"__version__": "0"},
    "vllm._custom_ops": {
        "scaled_fp8_quant": functools.partial(scaled_quant, _E4M3),
        "scaled_int8_quant": functools.partial(scaled_quant, torch.int8),
        "cutlass_group_gemm_supported": lambda _: True,
        **{name: getattr(_custom_ops, name) for name in CUSTOM_OPS},
    },
    "vllm.config": {"VllmConfig": config, "ParallelConfig": config, "set_current_vllm_config": nothing},
    "vllm.platforms": {"current_platform": PLATFORM},
    "vllm.scalar_type": {"scalar_types": SimpleNamespace(float4_e2m1f=SimpleNamespace(max=lambda: 6.0))},
    "vllm.utils": {"cdiv": lambda a, b: -(-a // b)},
    "vllm.utils.torch_utils": {"set_random_seed": torch.manual_seed},
    "vllm.utils.math_utils": {"round_up": lambda a, b: -(-a // b) * b, "cdiv": lambda a, b: -(-a // b)},
    "vllm.utils.import_utils": {"has_deep_gemm": lambda: False},
    "vllm.utils.deep_gemm": {"per_block_cast_to_fp8": per_block, "is_deep_gemm_e8m0_used": lambda: False},
    "vllm.model_executor.layers.activation": {"SiluAndMul": SiluAndMul},
    "vllm.model_executor.layers.quantization.utils.fp8_utils": {"per_token_group_quant_fp8": per_group},
    "vllm.model_executor.layers.quantization.utils.quant_utils": {"get_fp8_min_max": lambda: (-448.0, 448.0)},
    _MOE: _TOPK,
    f"{_MOE}.fused_moe": _TOPK,
    f"{_MOE}.router.fused_topk_router": _TOPK,
    f"{_MOE}.activation": {"MoEActivation": Activation, "apply_moe_activation_supported": lambda _: True},
    f"{_MOE}.all2all_utils": {"maybe_make_prepare_finalize": nothing},
    f"{_MOE}.config": {
        "FUSED_MOE_UNQUANTIZED_CONFIG": None, "FusedMoEQuantConfig": QuantConfig, "FusedMoEConfig": config,
        "FusedMoEParallelConfig": SimpleNamespace(make_no_parallel=lambda: None),
        "fp8_w8a8_moe_quant_config": functools.partial(QuantConfig, _E4M3),
    },
    f"{_MOE}.modular_kernel": {"FusedMoEKernel": Kernel, "FusedMoEModularKernel": Kernel},
    f"{_MOE}.cutlass_moe": _CUTLASS,
    f"{_MOE}.experts.cutlass_moe": _CUTLASS,
    f"{_MOE}.experts.triton_moe": {"TritonExperts": experts(False)},
    f"{_MOE}.moe_permute_unpermute": {
        "moe_permute": ours.moe_permute, "moe_unpermute": ours.moe_unpermute,
        "moe_permute_unpermute_supported": lambda: True,
    },
    f"{_MOE}.utils": {"moe_kernel_quantize_input": quantise_input},
}  # fmt: skip
"""What vLLM's modules hold here: moeyard's functions, and what makes inputs and expectations of tests."""
for place, names in INSTEAD.items():
    held = PROVIDED.setdefault(f"{_MOE}.{place}".rstrip("."), {})
    held |= {name: getattr(ours, name) for name in names if name not in held and name not in _MADE_HERE}


class Finder:
    """Finds and makes any module of vLLM."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """Of vLLM's names alone."""
        if name.partition(".")[0] != "vllm":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, _: importlib.machinery.ModuleSpec) -> None:
        """An ordinary module."""

    def exec_module(self, module: types.ModuleType) -> None:
        """What is provided, and else objects that refuse calls."""
        name = module.__name__
        vars(module).update(PROVIDED.get(name, {}))
        module.__getattr__ = lambda key: _missing(name, key)  # type: ignore[method-assign]


def _missing(module: str, name: str) -> Any:
    """A module that is provided, imported by `from`, or what refuses calls."""
    if name.startswith("__"):
        raise AttributeError(name)
    if any(f"{path}.".startswith(f"{module}.{name}.") for path in PROVIDED):
        return importlib.import_module(f"{module}.{name}")
    return Absent(f"{module}.{name}")


class Plugin:
    """Chooses tests, gives the fixture that vLLM's conftest would, and counts what was left out."""

    def __init__(self, on_gpu: bool, largest: float) -> None:
        self.on_gpu, self.largest = on_gpu, largest
        self.left_out: Counter[str] = Counter()

    @pytest.fixture
    def workspace_init(self) -> None:
        """There is no workspace."""

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leaves tests out, in place."""
        reasons = [self._reason(item) for item in items]
        self.left_out.update(reason for reason in reasons if reason)
        gone = [item for item, reason in zip(items, reasons, strict=True) if reason]
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item, reason in zip(items, reasons, strict=True) if not reason]

    def _reason(self, item: Any) -> str | None:
        for part, reason in LEFT_OUT.items():
            if part in item.name:
                return reason
        if not self.on_gpu and "graph" in item.name and "no_graph" not in item.name:
            return "needs a GPU's streams"
        given = item.callspec.params if hasattr(item, "callspec") else {}
        sizes = {key.lower(): value for key, value in given.items() if isinstance(value, int)}
        if {"m", "n", "k", "e"} <= sizes.keys():
            matrix, experts = 3 * sizes["n"] * sizes["k"], sizes["e"]
            if max(experts, sizes["m"] * sizes.get("topk", 1)) * matrix > self.largest:
                return f"larger than {self.largest:g}"
        rows = sizes.get("n_token", 0) * sizes.get("topk", 1)
        if 20 * rows * sizes.get("n_hidden", 0) > self.largest:
            return f"larger than {self.largest:g}"
        return None


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """A factory of torch for which "cuda" is "cpu"."""

    @functools.wraps(function)
    def made(*arguments: Any, **given: Any) -> Any:
        if str(given.get("device", "")).startswith("cuda"):
            given["device"] = "cpu"
        return function(*("cpu" if isinstance(one, str) and one == "cuda" else one for one in arguments), **given)

    return made


def main(argv: list[str]) -> int:
    """Runs the tests; returns pytest's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="vLLM's sources, of which tests/kernels is read")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--largest", type=float, help="weights, or products of weights, of a test at most (CPU: 2e8; cuda: 1e15)"
    )
    split = argv.index("--") if "--" in argv else len(argv)
    asked, rest = parser.parse_args(argv[:split]), argv[split + 1 :]
    folder = asked.checkout / "tests" / "kernels" / "moe"
    found = [str(folder / name) for name in FILES if (folder / name).is_file()]
    if not found:
        parser.error(f"CHECKOUT: expected a folder with one of {FILES} in tests/kernels/moe, got {asked.checkout}")
    absent = [name for name in FILES if not (folder / name).is_file()]
    print(f"read: {', '.join(Path(name).name for name in found)}; not there: {', '.join(absent) or 'none'}")
    on_gpu = asked.device == "cuda"
    sys.meta_path.insert(0, Finder())
    sys.path.insert(0, str(asked.checkout))
    if not on_gpu:
        for name in _FACTORIES:
            setattr(torch, name, on_cpu(getattr(torch, name)))
        torch.Tensor.to = on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
        torch.set_default_device = lambda _: None
    plugin = Plugin(on_gpu, asked.largest or (1e15 if on_gpu else 2e8))
    options = ["--noconftest", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(asked.checkout)]
    status = pytest.main([*options, "-q", "-rs", *rest, *found], plugins=[plugin])
    for reason, count in plugin.left_out.items():
        print(f"left out: {count} tests ({reason})")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
