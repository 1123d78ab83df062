"""TileKernels' tests of MoE operators, run against moeyard.

    python benchmarks/tile_kernels_tests.py CHECKOUT [-- OPTIONS]

CHECKOUT is a folder with the sources of TileKernels, of which the tests in `FILES`, their helpers and their references
in plain torch are read. Neither TileKernels nor TileLang is installed: the module of kernels that the tests call holds
adapters of moeyard, and the rest of it is absent. On a CPU tests have fewer tokens, one hidden size and no compiler,
and their "cuda" is read as "cpu". All after `--` goes to pytest.
"""

import argparse
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard.combine import combine_routes
from vllm_tests import on_cpu

FILES = (
    "test_topk_gate.py", "test_group_count.py", "test_get_fused_mapping.py", "test_expand_to_fused.py",
    "test_reduce_fused.py", "test_aux_fi.py",
)  # fmt: skip
LEFT_OUT = ("benchmark", "fused_with_sf", "with_sf=True", "out_dtype=e4m3")
"""Timings; rows with scales of their own layouts and results in 8 bits, for which moeyard has other operators."""
_FACTORIES = ("randn", "rand", "randint", "randperm", "empty", "zeros", "ones", "full", "tensor", "arange")
_TOKENS, _HIDDEN = 61, 576  # of a test on a CPU


def topk_gate(scores: Tensor, num_topk: int) -> Tensor:
    """Experts by score, the lower one first on ties."""
    return moeyard.route(scores, top_k=num_topk).topk_ids.long()


def _layout(ids: Tensor, num_experts: int, alignment: int) -> moeyard.Layout:
    return moeyard.moe_align_block_size(ids, num_experts=num_experts, block_size=max(1, alignment))


def group_count(group_idx: Tensor, num_groups: int) -> Tensor:
    """Routes of each expert."""
    return _layout(group_idx, num_groups, 1).expert_counts


def aux_fi(topk_idx: Tensor, num_experts: int, num_aux_topk: int) -> Tensor:
    """What the load-balancing loss counts."""
    counts = group_count(topk_idx, num_experts).float()
    return counts * num_experts / (max(1, topk_idx.shape[0]) * num_aux_topk)


def get_fused_mapping(topk_idx: Tensor, num_experts: int, num_expanded_tokens: int, alignment: int) -> tuple[Any, ...]:
    """Expert, token and route of each slot (−1 for padding), slot of each route, bounds and padded counts."""
    if num_expanded_tokens:
        raise ValueError(f"num_expanded_tokens: expected 0 (its length is computed), got {num_expanded_tokens}")
    layout, top_k = _layout(topk_idx, num_experts, alignment), topk_idx.shape[1]
    bounds = layout.expert_offsets.int()
    route = layout.sorted_token_ids[: int(bounds[-1])]
    held = route < topk_idx.numel()
    expert = topk_idx.flatten()[route.clamp(max=topk_idx.numel() - 1).long()].int()
    padded = (bounds[1:] - bounds[:-1]).int()
    slots = (torch.where(held, value, -1).int() for value in (expert, route // top_k, route))
    return (*slots, layout.route_rows.view_as(topk_idx), bounds[:-1], bounds[1:], padded, padded.tolist())


def expand_to_fused(x: Tensor, token_topk_to_pos: Tensor, pos_to_expert: Tensor) -> Tensor:
    """Each slot's token, zeros for padding."""
    tokens, top_k = token_topk_to_pos.shape
    positions = token_topk_to_pos.flatten()
    source = torch.full((pos_to_expert.shape[0] + 1,), -1, dtype=torch.int32, device=x.device)
    token = torch.arange(tokens * top_k, dtype=torch.int32, device=x.device) // top_k
    source.scatter_(0, torch.where(positions >= 0, positions, pos_to_expert.shape[0]).long(), token)
    return moeyard.shuffle_rows(x, source[:-1])


def reduce_fused(
    x: Tensor,
    topk_weights: Tensor | None,
    token_topk_to_pos: Tensor,
    fp8_format: str = "",
    sf: Any = None,
    out: Any = None,
) -> Tensor:
    """The rows of each token added up, weighted."""
    if fp8_format or sf is not None or isinstance(x, tuple):
        raise NotImplementedError("moeyard has no sums of rows with scales, and none into 8 bits")
    top_k = token_topk_to_pos.shape[1]
    return combine_routes(x, token_topk_to_pos.flatten(), topk_weights, top_k, out=out, impl="auto")


class Plugin:
    """Leaves tests out."""

    @pytest.hookimpl
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Those of `LEFT_OUT`, in place."""
        gone = [item for item in items if any(word in item.name for word in LEFT_OUT)]
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]


def provide(checkout: Path, on_gpu: bool) -> None:
    """Puts `tile_kernels` where Python finds it first: helpers of the checkout, kernels of moeyard."""
    folder = checkout / "tile_kernels"

    def module(name: str, path: Path | None = None, **names: Any) -> Any:
        made: Any = types.ModuleType(name)
        made.__path__ = [] if path is None else [str(path)]
        vars(made).update(names)
        sys.modules[name] = made
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, made)
        return made

    processors = torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 21
    module("tile_kernels", folder)
    for name in ("quant", "torch", "testing"):  # whose own __init__ import TileLang
        module(f"tile_kernels.{name}", folder / name)
    module("tile_kernels.config", get_device_num_sms=lambda: processors, set_num_sms=lambda _: None)
    ours = (topk_gate, group_count, aux_fi, get_fused_mapping, expand_to_fused, reduce_fused)
    module("tile_kernels.moe", **{one.__name__: one for one in ours})
    module("tile_kernels.moe.scoring", ScoringFunc=None)  # of references that no test here takes
    if not on_gpu:
        _make_small()
    for name in ("topk", "moe", "reduce_fused", "expand_to_fused"):
        held = vars(importlib.import_module(f"tile_kernels.torch.{name}"))
        vars(sys.modules["tile_kernels.torch"]).update({key: one for key, one in held.items() if callable(one)})


def _make_small() -> None:
    """Tests on a CPU: no compiler, few tokens, one hidden size."""
    torch.compile = lambda call=None, **_: call if call is not None else lambda one: one  # type: ignore[assignment]
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    generator = importlib.import_module("tile_kernels.testing.generator")
    whole: Callable[..., Iterator[dict[str, int]]] = generator.generate_moe_params
    generator.generate_moe_params = lambda **given: [{**one, "num_send_tokens": _TOKENS} for one in whole(**given)]
    generator.generate_hidden_sizes = lambda *_: [_HIDDEN]
    generator.generate_num_tokens = lambda *_, **_given: [_TOKENS]


def main(argv: list[str]) -> int:
    """Runs the tests; returns pytest's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="TileKernels' sources")
    split = argv.index("--") if "--" in argv else len(argv)
    asked, rest = parser.parse_args(argv[:split]), argv[split + 1 :]
    found = [path for name in FILES for path in sorted(asked.checkout.rglob(name))]
    if not found:
        parser.error(f"CHECKOUT: expected a folder with one of {FILES} in it, got {asked.checkout}")
    provide(asked.checkout, torch.cuda.is_available())
    options = ["--noconftest", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(asked.checkout)]
    options += ["--import-mode=importlib", "-q"]
    return int(pytest.main([*options, *rest, *map(str, found)], plugins=[Plugin()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
