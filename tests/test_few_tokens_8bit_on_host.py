"""The kernels of few_tokens.cu with weights of 8 bits, lane by lane on a host, against float64 by the rule."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard import GPT_OSS_ACTIVATION, Activation, Routing
from moeyard.cuda.experts.few_tokens import few_tokens_defines
from moeyard.cuda.experts.few_tokens_plan import ExpertSizes, down_room, few_tokens_plan
from moeyard.cuda.runtime.parameters import float_bits
from moeyard.dispatch.schemes import refusal_of
from moeyard.quant import (
    FP8_BLOCK,
    FP8_BLOCK_WEIGHTS,
    FP8_CHANNEL,
    FP8_TENSOR,
    FP8_TENSOR_STATIC,
    FP8_WEIGHTS,
    INT8_CHANNEL,
    INT8_WEIGHTS,
    QuantScheme,
)
from moeyard.testing import guard_broken, poisoned
from moeyard.testing.budgets import judged_experts
from moeyard.testing.few_tokens import CARD, COMPILER, build, launch
from moeyard.testing.quantised import draw_quantised

HERE = Path(__file__).parent / "host_few_tokens"
pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
SCHEMES = (
    FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL, FP8_TENSOR, FP8_TENSOR_STATIC, FP8_WEIGHTS, FP8_BLOCK_WEIGHTS, INT8_WEIGHTS,
    QuantScheme("int8", activations="int8", static=True),
    QuantScheme("int8", (128, 128), activations="int8"),
    QuantScheme("e4m3", (1, 0), activations="e4m3", activation_group=128),
    QuantScheme("e4m3", (128, 128), activations="e4m3", static=True),
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "1 token": {"sizes": (1, 3, 272, 176), "experts": 4, "start": 48},
    "2 tokens, short rings": {
        "sizes": (2, 4, 144, 272), "experts": 5, "start": 120, "dtype": torch.float16, "bias": True, "mapped": True,
        "activation": GPT_OSS_ACTIVATION, "plan": {"warps": 2}, "scales": torch.bfloat16,
        "cut": {"up_segment": 8, "up_stages": 2, "down_segment": 16, "down_stages": 2, "down_rows": 1},
    },
    "5 tokens, weights on the input": {
        "sizes": (5, 2, 400, 48), "experts": 3, "start": 112, "wide": True, "on_input": True, "plan": {"warps": 3},
        "cut": {"up_stages": 3, "down_stages": 3, "down_rows": 4}, "scales": torch.float16,
    },
    "not gated": {
        "sizes": (3, 3, 256, 128), "experts": 4, "activation": Activation("relu2"), "gated": False,
        "plan": {"warps": 5, "trigger": 2}, "cut": {"up_segment": 32, "down_rows": 2},
    },
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "activation": Activation(), "dtype": torch.bfloat16, "gated": True, "start": 0, "scales": torch.float32
}  # fmt: skip


def prepared(name: str, scheme: QuantScheme) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    case = DEFAULTS | CASES[name]
    case["start"] %= scheme.period
    sizes = ExpertSizes(*case["sizes"], case["gated"], scheme, case["start"])
    plan = few_tokens_plan(sizes, CARD, **case.get("plan", {}))
    assert plan is not None
    plan = replace(plan, **case.get("cut", {}))
    assert down_room(plan, sizes, CARD) <= CARD.shared_limit
    biased = (case.get("bias", False),) * 2
    defines = few_tokens_defines(
        sizes, plan, CARD, case["dtype"], "i64" if case.get("wide") else "int", case.get("mapped", False), biased,
        case["activation"], case.get("on_input", False), case["scales"],
    )  # fmt: skip
    return case, defines


def drawn(case: dict[str, Any], scheme: QuantScheme) -> tuple[Any, ...]:
    """Rows, routing, weights, num_experts and expert_map."""
    tokens, top_k, hidden, size = case["sizes"]
    experts, dtype = case["experts"], case["dtype"]
    weights = draw_quantised(
        experts, hidden, size, scheme, dtype, gated=case["gated"], bias=case.get("bias", False),
        block_start=case["start"],
    )  # fmt: skip
    scales = weights.scales
    assert scales is not None
    weights = replace(
        weights, scales=replace(scales, w13=scales.w13.to(case["scales"]), w2=scales.w2.to(case["scales"]))
    )
    num_experts, mapping = experts, None
    if case.get("mapped"):
        num_experts = 2 * experts
        mapping = torch.where(torch.arange(num_experts) % 2 == 0, torch.arange(num_experts) // 2, -1).int()
    ids = torch.randint(-1, num_experts + 1, (tokens, top_k), dtype=torch.int64 if case.get("wide") else torch.int32)
    ids[0, 0] = 0  # somebody is held
    rows = torch.randn(tokens, hidden).to(dtype) * torch.exp2(torch.randint(-3, 4, (tokens, 1))).to(dtype)
    rows[:, -1] = 4 * rows.abs().amax(1)  # the largest magnitude is not among the words of the first warp
    return rows, Routing(torch.rand(tokens, top_k), ids), weights, num_experts, mapping


def computed(library: Any, case: dict[str, Any], at_once: bool, given: tuple[Any, ...]) -> torch.Tensor | str:
    """What both launches leave, or what went wrong."""
    rows, routing, weights, num_experts, mapping = given
    tokens, top_k, hidden, size = case["sizes"]
    ids, factors, scales = routing.topk_ids, routing.topk_weights, weights.scales
    act, out = poisoned((tokens * top_k, size), case["dtype"]), poisoned((tokens, hidden), case["dtype"])
    a, experts = case["activation"], case["experts"]
    constants = [float_bits(value) for value in (a.alpha, a.beta, a.limit or 0.0)]
    failure = launch(
        library, False, CARD.processors, at_once,
        [ids, mapping, factors, rows, weights.w13, weights.w13_bias, act, scales.w13, scales.w13_input],
        num_experts, experts, 2 * hidden, weights.w13[0].numel(), *constants,
    ) or launch(
        library, True, CARD.processors, at_once,
        [ids, mapping, factors, act, weights.w2, weights.w2_bias, out, scales.w2, scales.w2_input],
        num_experts, experts, hidden * size,
    )  # fmt: skip
    if failure is None and (guard_broken(act) or guard_broken(out)):
        failure = "something was written behind an output"
    return out if failure is None else failure


def wrong(library: Any, case: dict[str, Any], at_once: bool, given: tuple[Any, ...]) -> str | None:
    """What is wrong with an answer, or None."""
    rows, routing, weights, num_experts, mapping = given
    got = computed(library, case, at_once, given)
    judged = judged_experts(
        rows, routing, weights, activation=case["activation"], num_experts=num_experts, expert_map=mapping,
        apply_router_weight_on_input=case.get("on_input", False),
    )  # fmt: skip
    return got if isinstance(got, str) else judged.error(got)


ALL = [(name, scheme) for name in CASES for scheme in SCHEMES]
FEW = [("1 token", scheme) for scheme in SCHEMES[::2]] + [("2 tokens, short rings", scheme) for scheme in SCHEMES[2:3]]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [pytest.param(*one, marks=() if one in FEW else pytest.mark.full, id=f"{one[0]}; {one[1]}") for one in ALL],
)
def test_codes_are_multiplied_by_the_rule(name: str, scheme: QuantScheme, tmp_path: Path) -> None:
    assert refusal_of("cuda (few tokens)", scheme) is None
    case, defines = prepared(name, scheme)
    library = build(HERE, tmp_path, defines)
    for at_once in (True, False):
        assert wrong(library, case, at_once, drawn(case, scheme)) is None
    rows, *rest = given = drawn(case, scheme)
    rows[-1] = 0  # a row of zeros has the least scale
    assert wrong(library, case, True, given) is None
    for bad in (torch.nan, -torch.inf):
        strange = rows.clone()
        strange[0, -1] = bad
        assert wrong(library, case, True, (strange, *rest)) is None, "a bad value stays in its row"


MUTANTS: dict[str, tuple[QuantScheme, str, tuple[str, str]]] = {
    "gate's scale for up": (
        FP8_CHANNEL, "1 token", ("sums.scaled(1, own_scales[UpScales::COLUMNS]", "sums.scaled(1, own_scales[0]"),
    ),
    "the first block's scale for all columns": (
        FP8_BLOCK, "1 token", ("weight_scales[r * STRIDE + part(i, Scales::COLUMNS)]", "weight_scales[r * STRIDE]"),
    ),
    "blocks of a slice from its own first row": (
        FP8_BLOCK, "1 token", ("START = FIRST_ROW % SHARE", "START = 0 * SHARE"),
    ),
    "four lanes across the border of a block": (
        FP8_BLOCK, "2 tokens, short rings", ("SHIFT = FIRST_WORD % 4", "SHIFT = 0"),
    ),
    "another row's scale": (
        FP8_CHANNEL, "1 token", ("ROWS_A_SCALE == 1 ? r * TOP_K * DownScales::COLUMNS : 0", "0"),
    ),
    "words past the end": (INT8_CHANNEL, "1 token", ("if (at < held) {", "if (at < held || true) {")),
    "one warp's largest magnitude": (INT8_CHANNEL, "1 token", ("i < SHARE; ++i) largest =", "i < 1; ++i) largest =")),
    "codes cut off, not rounded": (INT8_CHANNEL, "1 token", ("__float2int_rn(value)", "static_cast<int>(value)")),
    "products before rows are quantised": (
        FP8_BLOCK, "1 token", ("  }\n  __syncthreads();\n  if constexpr (MEASURED && X_STATIC)",
                               "  }\n  if constexpr (MEASURED && X_STATIC)"),
    ),
    "a NaN that no byte is": (
        QuantScheme("int8", activations="int8", static=True), "1 token",
        ("if (largest != largest)", "if (largest == 0.5f)"),
    ),
    "sums beside the diagonal": (FP8_CHANNEL, "1 token", ("if (!BYTES && !has_diagonal())", "if (false)")),
    "static scales of another expert": (
        FP8_TENSOR_STATIC, "1 token", ("routes.expert + first_vector, vectors_held", "routes.route + first_vector, 1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "mutant", [name if i < 2 else pytest.param(name, marks=pytest.mark.full) for i, name in enumerate(MUTANTS)]
)
def test_wrong_kernels_are_found(mutant: str, tmp_path: Path) -> None:
    scheme, name, change = MUTANTS[mutant]
    case, defines = prepared(name, scheme)
    library = build(HERE, tmp_path, defines, change)
    rows, *rest = drawn(case, scheme)
    strange = rows.clone()
    strange[0, 0] = torch.nan
    found = [wrong(library, case, at_once, (rows, *rest)) for at_once in (True, False) for _ in range(2)]
    assert any((*found, wrong(library, case, True, (strange, *rest))))
