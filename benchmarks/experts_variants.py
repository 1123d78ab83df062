"""Plans of one kernel side by side, for `moeyard bench experts --variants experts_variants:FUNCTION`.

This folder has to be on PYTHONPATH. A function takes a case and gives (label, run) pairs; a run takes the case's
inputs and gives the answer.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moeyard.bench.layers import activation
from moeyard.bench.operators import Case
from moeyard.values import ExpertCall, Segments

Runs = list[tuple[str, Callable[[Any], Tensor]]]
_DECODE: dict[str, dict[str, Any]] = {
    "default": {},
    "late": {"trigger": 0},
    "trigger 3": {"trigger": 3},
    "trigger 12": {"trigger": 12},
    "16 warps, 48 KB": {"warps": 16, "segment": 64, "ring_bytes": 48 << 10},
    "48 KB": {"ring_bytes": 48 << 10},
    "32 KB": {"ring_bytes": 32 << 10},
    "4 warps, 48 KB": {"warps": 4, "ring_bytes": 48 << 10},
    "4 warps, 32 KB": {"warps": 4, "ring_bytes": 32 << 10},
}
"""Label -> keyword arguments of `few_tokens_plan` of moeyard.cuda.experts.few_tokens_plan."""


def decode(case: Case) -> Runs:
    """Plans of the two launches for a few tokens; none for sizes that they do not take."""
    kernel = importlib.import_module("moeyard.cuda.experts.few_tokens")
    card = importlib.import_module("moeyard.cuda.runtime.cards").card_of(torch.cuda.current_device())
    keys = ("num_tokens", "top_k", "hidden_size", "intermediate_size")
    sizes = kernel.ExpertSizes(*(case[key] for key in keys), gated=True)
    plans = {label: kernel.few_tokens_plan(sizes, card, **options) for label, options in _DECODE.items()}
    return [
        (label, launched(kernel.fused_experts_launch, case, chosen=plan))
        for label, plan in plans.items()
        if plan is not None
    ]


_WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "prefill": {
        "gathered": {},
        "copied": {"copied": True},
        "128, gathered": {"rows": 128},
        "128, copied": {"copied": True, "rows": 128},
        "192, gathered": {"rows": 192},
        "192, copied": {"copied": True, "rows": 192},
        "192, copied, fine 32": {"copied": True, "rows": 192, "fine": 32},
        "192, gathered, fine 32": {"rows": 192, "fine": 32},
        "128, gathered, fine 32": {"rows": 128, "fine": 32},
    },
    "batches": {str(rows): {"rows": rows} for rows in (8, 16, 32, 64, 128)},
}
"""Label -> what of a `Way` (moeyard.cuda.experts.plan) is not as by default."""


def prefill(case: Case) -> Runs:
    """Many rows an expert: how they come into the order of experts, and tiles."""
    return ways("prefill", case)


def batches(case: Case) -> Runs:
    """Few rows an expert, where reading weights is the limit: tiles."""
    return ways("batches", case)


_TILES = (
    (16, 2, 2), (16, 2, 1), (32, 2, 2), (32, 1, 2), (48, 2, 2), (48, 1, 2), (64, 1, 2), (64, 2, 1), (128, 2, 1),
    (160, 2, 1),
)  # fmt: skip
"""Rows, products of a warpgroup, blocks per multiprocessor: tiles of moeyard.cuda.experts.four_bits_many_plan."""


def four_bits(case: Case) -> Runs:
    """Weights of 4 bits: by Triton, and by experts.cu as planned and in tiles that hold what an expert has on average.

    Where sums are scaled, registers do not hold those of `no_sums`.
    """
    quantised = importlib.import_module("moeyard.bench.quantised")
    plans = importlib.import_module("moeyard.cuda.experts.four_bits_many_plan")
    many = importlib.import_module("moeyard.cuda.experts.four_bits_many").fused_experts_launch
    triton = importlib.import_module("moeyard.triton.experts").fused_experts_launch
    mean = case["num_tokens"] * case["top_k"] / case["num_experts"]
    no_sums = ((32, 2, 2), (48, 2, 2), (64, 1, 2), (160, 2, 1))
    int4 = "int4" in str(dict(case.sizes)["scheme"])
    runs = [("triton", launched(triton, case)), ("many", launched(many, case))]
    for tile in _TILES:
        if min(mean / 4, 128) <= tile[0] <= 4 * mean + 16 and not (int4 and tile in no_sums):
            runs.append((f"many {' x '.join(map(str, tile))}", launched(many, case, tile=plans.Tile(*tile))))

    def tiled(run: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        return lambda x: run(replace(x, weights=quantised.as_kernels_read(x.weights)))

    return [(label, tiled(run)) for label, run in runs]


def ways(which: str, case: Case) -> Runs:
    """fused_experts as sizes choose, and in ways that they do not."""
    launch = importlib.import_module("moeyard.cuda.experts.launchers").fused_experts_launch
    way = importlib.import_module("moeyard.cuda.experts.plan").Way
    made = [(label, launched(launch, case, way=way(**options))) for label, options in _WAYS[which].items()]
    return [("chosen", launched(launch, case)), *made]


def launched(launch: Callable[..., None], case: Case, **keywords: Any) -> Callable[[Any], Tensor]:
    """A run that calls a launcher of fused_experts, or one of grouped_gemm on compact rows, with `keywords` added."""
    if case.op == "grouped_gemm":

        def multiply(x: Any) -> Tensor:
            out: Tensor = x.rows.new_empty(x.rows.shape[0], x.weight.shape[1])
            segments = Segments(x.layout.expert_offsets[:-1], x.layout.expert_counts)
            launch(x.rows, x.weight, None, None, segments, out=out, **keywords)
            return out

        return multiply
    act = activation(case)

    def experts(x: Any) -> Tensor:
        out = torch.empty_like(x.hidden_states)
        call = ExpertCall(x.weights, act, case["num_experts"])
        launch(x.hidden_states, x.routing.topk_weights, x.routing.topk_ids, call, out=out, **keywords)
        return out

    return experts
