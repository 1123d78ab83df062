"""Layers of others that train: `python benchmarks/training_peers.py` holds those that are there against the reference.

ScatterMoE (Tan et al., arXiv:2403.08245; `scattermoe`) and Liger's fused experts (`liger_kernel`) are no dependencies.
They are taken where Python finds them, and in the folders that MOEYARD_TRAINING_PEERS lists: a folder holds packages as
site-packages does. A package that is no distribution may hold a file COMMIT, which says which source it is.

The script computes outputs and gradients of tiny layers, on a GPU or by Triton's interpreter (TRITON_INTERPRET=1), and
ends with 1 if one errs more than `BOUND` times an honest computation of its dtype, or raises. On a CPU dtypes are
float32 and float16, as the interpreter does not know the arithmetic of bfloat16.
"""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import moeyard
from moeyard import ExpertWeights, Routing
from moeyard.bench import peers
from moeyard.testing.layers import plain_experts

FOLDERS = "MOEYARD_TRAINING_PEERS"
PACKAGES = {"scattermoe": "scattermoe", "liger": "liger_kernel"}
"""By provider."""
BOUND = 4.0
"""Times the error of an honest computation. Liger adds up router gradients in the dtype of rows, tile by tile."""
_COMPILERS = min(os.cpu_count() or 1, 16)
_TRIAL_MS = 10
"""How long Triton's autotuner tries a configuration, instead of 100 ms: they differ by more than a trial does."""


class Inputs(NamedTuple):
    """A layer and a batch; the first four want gradients."""

    rows: Tensor
    factors: Tensor
    w13: Tensor
    w2: Tensor
    ids: Tensor
    upstream: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return self[:4]


Provider = Callable[[Inputs], Tensor]


def torch_grouped(given: Inputs) -> Tensor:
    """What one writes with torch's grouped product: sort, gather, multiply, multiply, put back, weigh, sum."""
    top_k = given.ids.shape[1]
    experts, order = torch.sort(given.ids.flatten(), stable=True)
    offsets = torch.searchsorted(experts, torch.arange(given.w13.shape[0], device=experts.device), right=True).int()
    first = functional.grouped_mm(given.rows[order // top_k], given.w13.transpose(1, 2), offs=offsets)
    gate, up = first.chunk(2, 1)
    second = functional.grouped_mm(functional.silu(gate) * up, given.w2.transpose(1, 2), offs=offsets)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    of_routes = second[back].view(*given.ids.shape, -1)
    return (of_routes * given.factors.to(of_routes.dtype).unsqueeze(2)).sum(1)


def scattermoe(given: Inputs) -> Tensor:
    room = importlib.import_module("scattermoe.parallel_experts")
    where = room.flatten_sort_count(given.ids.long(), num_experts=given.w13.shape[0])
    first = room.parallel_linear(given.rows, given.w13.permute(0, 2, 1), given.ids.shape[1], *where, grouped_out=True)
    gate, up = first.chunk(2, -1)
    middle, factors = functional.silu(gate) * up, given.factors.to(given.rows.dtype)
    result: Tensor = room.parallel_linear(middle, given.w2.permute(0, 2, 1), 1, *where, grouped_in=True, gates=factors)
    return result


def liger(given: Inputs) -> Tensor:
    room = importlib.import_module("liger_kernel.ops.fused_moe")
    result: Tensor = room.LigerFusedMoEFunction.apply(given.rows, given.w13, given.w2, given.ids, given.factors)
    return result


def add_folders() -> None:
    """Makes what MOEYARD_TRAINING_PEERS lists importable, behind what is installed. ValueError for no folder."""
    for folder in filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)):
        if not Path(folder).is_dir():
            raise ValueError(f"{FOLDERS}: expected folders of packages, got {folder!r}")
        if folder not in sys.path:
            sys.path.append(folder)


def found() -> dict[str, Provider]:
    """The peers that can be imported, by provider."""
    add_folders()
    adapters: dict[str, Provider] = {"scattermoe": scattermoe, "liger": liger}
    return {name: call for name, call in adapters.items() if peers.installed(PACKAGES[name])}


def versions() -> dict[str, str]:
    """Package -> version of the peers that can be imported: that of the distribution, or what COMMIT says."""
    known: dict[str, str] = {}
    for package in (PACKAGES[name] for name in found()):
        try:
            known[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            spec = importlib.util.find_spec(package)
            commit = Path(spec.origin).with_name("COMMIT") if spec and spec.origin else Path()
            known[package] = commit.read_text().strip() if commit.is_file() else "unknown"
    return known


@contextmanager
def tuning_in_parallel() -> Iterator[None]:
    """Triton's autotuner has a kernel's configurations compiled side by side, and tries each for `_TRIAL_MS`.

    Liger has some 240 configurations per model. One after the other they take minutes.
    """
    import triton
    from triton.runtime._async_compile import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner

    before = Autotuner.prune_configs

    def compiled(self: Any, kwargs: dict[str, Any]) -> Any:
        configs = before(self, kwargs)
        given = {name: value for name, value in kwargs.items() if name not in ("grid", "warmup")}
        with ThreadPoolExecutor(_COMPILERS) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                self.fn.warmup(*self.nargs.values(), grid=(1,), **given, **config.all_kwargs())
        self._do_bench = functools.partial(triton.testing.do_bench, warmup=2, rep=_TRIAL_MS)
        return configs

    Autotuner.prune_configs = compiled
    try:
        yield
    finally:
        Autotuner.prune_configs = before


# Whether they are right


def _drawn(device: torch.device, dtype: torch.dtype) -> Inputs:
    """A layer whose sizes are no multiples of tiles, and a routing with an expert that has no tokens."""
    tokens, top_k, experts, hidden, inside = 75, 2, 5, 96, 160
    torch.manual_seed(3)
    chosen = torch.topk(torch.rand(tokens, experts - 1), top_k)
    w13 = torch.randn(experts, 2 * inside, hidden) * hidden**-0.5
    w2 = torch.randn(experts, hidden, inside) * inside**-0.5
    given = (torch.randn(tokens, hidden), w13, w2, torch.randn(tokens, hidden))
    rows, w13, w2, upstream = (t.to(device, dtype) for t in given)
    factors = torch.softmax(chosen.values, 1).to(device)
    leaves = (t.requires_grad_() for t in (rows, factors, w13, w2))
    return Inputs(*leaves, chosen.indices.int().to(device), upstream)


def _results(call: Provider, given: Inputs) -> list[Tensor]:
    """Output and gradients."""
    output = call(given)
    return [output, *torch.autograd.grad(output, given.leaves, given.upstream.to(output.dtype))]


def _by_reference(given: Inputs) -> Tensor:
    weights = ExpertWeights(given.w13, given.w2)
    return moeyard.fused_experts(given.rows, Routing(given.factors, given.ids), weights, impl="reference")


def _plain(given: Inputs) -> Tensor:
    return plain_experts(given.rows, Routing(given.factors, given.ids), ExpertWeights(given.w13, given.w2))


def errors_of(call: Provider, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Of output and gradients: (error, an honest computation's error), root mean squares against float64."""
    given = _drawn(device, dtype)
    wide = Inputs(*(t.detach().double().requires_grad_() if i in (0, 2, 3) else t for i, t in enumerate(given)))
    exact, honest, theirs = _results(_by_reference, wide), _results(_plain, given), _results(call, given)
    names = ("output", "rows", "factors", "w13", "w2")
    of = [
        tuple(float((t.double() - e.double()).square().mean().sqrt()) for t in (a, h))
        for a, h, e in zip(theirs, honest, exact, strict=True)
    ]
    return {name: (one[0], one[1]) for name, one in zip(names, of, strict=True)}


def main() -> int:
    """Prints what each peer errs, per dtype."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        importlib.import_module("moeyard.testing.interpreted")  # what Triton's interpreter lacks
        os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")  # its autotuner needs a GPU
    kinds = (torch.float32, torch.float16, *((torch.bfloat16,) if device.type == "cuda" else ()))
    said, failed = versions(), False
    for name, call in found().items():
        for dtype in kinds:
            try:
                off = errors_of(call, device, dtype)
                worst = max(mine / max(honest, 1e-30) for mine, honest in off.values())
                verdict = f"{worst:.2f} times an honest computation's error at most"
            except Exception as problem:  # theirs: whatever it is, it is said
                worst, verdict = float("inf"), f"{type(problem).__name__}: {problem}"[:300]
            failed |= not worst <= BOUND
            print(f"{name} ({said[PACKAGES[name]]}), {str(dtype).removeprefix('torch.')}: {verdict}")
    absent = [package for name, package in PACKAGES.items() if name not in found()]
    if absent:
        print(f"not importable: {', '.join(absent)} ({FOLDERS} lists folders of packages)")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
