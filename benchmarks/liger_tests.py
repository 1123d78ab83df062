"""Liger's own tests of its fused experts, run against moeyard: `python benchmarks/liger_tests.py CHECKOUT [-- ...]`.

CHECKOUT is a folder with Liger's sources, of which `test_fused_moe.py` is read, wherever it lies. No Liger is needed,
and none is used: the modules that the tests import hold adapters of moeyard. So a test either compares moeyard's
output, gradients and layouts with its own expectation or fails. They run on a GPU where there is one. All after `--`
goes to pytest.
"""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard import ExpertWeights, Routing

FILE = "test_fused_moe.py"


class LigerFusedMoEFunction:
    """Liger's autograd function, by its one method that callers use."""

    @staticmethod
    def apply(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Router weights may have the dtype of rows there; here they are float32."""
        routing = Routing(top_k_weights.float(), top_k_index)
        return moeyard.fused_experts(x, routing, ExpertWeights(gate_up_proj, down_proj))


def compute_routing_metadata(topk_indices: Tensor, num_experts: int) -> tuple[Any, ...]:
    """Counts, offsets, tokens of slots, routes of slots, slots of routes; and no tiles, which moeyard does not have."""
    layout = moeyard.moe_align_block_size(topk_indices, num_experts=num_experts, block_size=1)
    routes, top_k = layout.sorted_token_ids, layout.top_k
    return (
        layout.expert_counts, layout.expert_offsets.int(), routes // top_k, routes, layout.route_rows, None, None,
    )  # fmt: skip


def provide() -> None:
    """Puts modules of Liger's names where Python finds them first."""
    held: dict[str, dict[str, Any]] = {
        "liger_kernel": {},
        "liger_kernel.ops": {"LigerFusedMoEFunction": LigerFusedMoEFunction},
        "liger_kernel.ops.fused_moe": {"compute_routing_metadata": compute_routing_metadata},
        "liger_kernel.utils": {"infer_device": lambda: "cuda" if torch.cuda.is_available() else "cpu"},
    }
    for name, names in held.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(names)
        sys.modules[name] = module


def main(argv: list[str]) -> int:
    """Runs the tests; returns pytest's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="Liger's sources")
    split = argv.index("--") if "--" in argv else len(argv)
    asked, rest = parser.parse_args(argv[:split]), argv[split + 1 :]
    found = sorted(asked.checkout.rglob(FILE))
    if not found:
        parser.error(f"CHECKOUT: expected a folder with {FILE} in it, got {asked.checkout}")
    provide()
    options = ["--noconftest", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(asked.checkout)]
    return int(pytest.main([*options, "--import-mode=importlib", "-q", "-rs", *rest, *map(str, found)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
