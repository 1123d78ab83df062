"""SGLang's own tests of its MoE operators, run against moeyard: `python benchmarks/sglang_tests.py CHECKOUT [OPTIONS]`.

CHECKOUT is a folder with SGLang's sources, of which the test files named in `FILES` are read, wherever they lie. No
SGLang is needed, and none is used: its modules hold moeyard's functions and, for all else, objects that refuse to be
called. So a test either compares moeyard's result with its own expectation or fails.

    python benchmarks/sglang_tests.py ~/sglang --device cuda
    python benchmarks/sglang_tests.py ~/sglang --device cpu -- -x

On a CPU the tests' "cuda" is read as "cpu", and Triton interprets the reference of the alignment's tests. That takes
seconds per test, so tests of more routes or experts than `--routes` and `--experts` are left out; how many is printed.
All after `--` goes to pytest.
"""

import argparse
import os
import sys
import types
from collections import Counter
from collections.abc import Iterator
from importlib import machinery
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard.integrations import sglang as ours
from vllm_tests import Absent, on_cpu

FILES = (
    "test_moe_align.py", "test_moe_topk_softmax.py", "test_moe_topk_sigmoid.py", "test_topk_softmax.py",
    "test_topk_sigmoid.py", "test_moe_sum_reduce.py",
)  # fmt: skip
PROVIDED = {name: getattr(ours, name) for name in ours.__all__}
"""What `sgl_kernel` and SGLang's modules of kernels hold here."""
_FACTORIES = ("randn", "rand", "randint", "randperm", "empty", "zeros", "ones", "full", "tensor", "arange", "linspace")
_ROUTES = ("num_tokens", "m", "token_num")


class Finder:
    """Finds and makes any module of SGLang."""

    def find_spec(self, name: str, *_: Any) -> machinery.ModuleSpec | None:
        """Of `sgl_kernel` and `sglang` alone."""
        if name.partition(".")[0] not in ("sgl_kernel", "sglang"):
            return None
        return machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, _: machinery.ModuleSpec) -> None:
        """An ordinary module."""

    def exec_module(self, module: types.ModuleType) -> None:
        """moeyard's names, and objects that refuse calls."""
        name = module.__name__
        vars(module).update(PROVIDED, get_ci_test_range=lambda whole, _: whole, should_run_full_tests=lambda: True)
        module.__getattr__ = lambda key: _missing(name, key)  # type: ignore[method-assign]


def _missing(module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Absent(f"{module}.{name}")


class Plugin:
    """Chooses tests, and counts what was left out."""

    def __init__(self, routes: float, experts: float) -> None:
        self.routes, self.experts = routes, experts
        self.left_out: Counter[str] = Counter()

    @pytest.hookimpl
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leaves tests out, in place."""
        kept, gone = [], []
        for item in items:
            reason = self._reason(item)
            (gone if reason else kept).append(item)
            self.left_out.update([reason] if reason else [])
        config.hook.pytest_deselected(items=gone)
        items[:] = kept

    def _reason(self, item: Any) -> str | None:
        if "vs_aot" in item.name:
            return "compares two builds of SGLang"
        given = item.callspec.params if hasattr(item, "callspec") else {}
        tokens = max((given[name] for name in _ROUTES if name in given), default=0)
        if tokens * given.get("topk", 1) > self.routes:
            return f"more than {self.routes:g} routes"
        if given.get("num_experts", 0) > self.experts:
            return f"more than {self.experts:g} experts"
        return None


def found_in(checkout: Path) -> Iterator[Path]:
    """The test files of a checkout."""
    for name in FILES:
        yield from sorted(checkout.rglob(name))


def main(argv: list[str]) -> int:
    """Runs the tests; returns pytest's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="SGLang's sources")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--routes", type=float, help="routes of a test at most (CPU: 64; cuda: all)")
    parser.add_argument("--experts", type=float, help="experts of a test at most (CPU: 64; cuda: all)")
    split = argv.index("--") if "--" in argv else len(argv)
    asked, rest = parser.parse_args(argv[:split]), argv[split + 1 :]
    found = [str(path) for path in found_in(asked.checkout)]
    if not found:
        parser.error(f"CHECKOUT: expected a folder with one of {FILES} in it, got {asked.checkout}")
    print(f"read: {', '.join(str(Path(path).relative_to(asked.checkout)) for path in found)}")
    on_gpu = asked.device == "cuda"
    sys.meta_path.insert(0, Finder())
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"
        for name in _FACTORIES:
            setattr(torch, name, on_cpu(getattr(torch, name)))
    most = float("inf") if on_gpu else 64.0
    plugin = Plugin(asked.routes or most, asked.experts or most)
    options = ["--noconftest", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(asked.checkout)]
    options += ["--import-mode=importlib"]
    status = pytest.main([*options, "-q", "-rs", *rest, *found], plugins=[plugin])
    for reason, count in plugin.left_out.items():
        print(f"left out: {count} tests ({reason})")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
