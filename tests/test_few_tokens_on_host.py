"""The kernels of few_tokens.cu, lane by lane on a host: what they compute, and that nobody waits for ever."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Routing, reference
from moeyard.cuda.experts.few_tokens import few_tokens_defines
from moeyard.cuda.experts.few_tokens_plan import ExpertSizes, down_room, few_tokens_plan
from moeyard.cuda.runtime.parameters import float_bits
from moeyard.testing import draw_weights, guard_broken, no_worse, plain_experts, poisoned, wide_weights
from moeyard.testing.few_tokens import CARD, COMPILER, build, launch

HERE = Path(__file__).parent / "host_few_tokens"
pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


CASES: dict[str, dict[str, Any]] = {
    "plain": {"sizes": (1, 4, 256, 64), "experts": 6},
    "short rings": {
        "sizes": (1, 6, 264, 72), "experts": 8, "activation": GPT_OSS_ACTIVATION, "bias": True, "mapped": True,
        "plan": {"warps": 2},
        "cut": {"up_segment": 8, "up_stages": 2, "down_segment": 2, "down_stages": 2, "down_rows": 1},
    },
    "several tokens": {
        "sizes": (3, 5, 88, 40), "experts": 5, "dtype": torch.float16, "wide": True, "on_input": True,
        "plan": {"warps": 3}, "cut": {"up_segment": 16, "up_stages": 3, "down_stages": 3, "down_rows": 4},
    },
    "not gated": {
        "sizes": (2, 8, 136, 48), "experts": 7, "activation": Activation("relu2", limit=1.5), "gated": False,
        "bias": True, "plan": {"warps": 2, "trigger": 3}, "cut": {"up_stages": 2, "down_stages": 5},
    },
    "many units a warp": {"sizes": (1, 2, 64, 168), "experts": 3, "plan": {"warps": 1}, "blocks": 3},
    "fewer than at most": {
        "sizes": (2, 5, 88, 40), "most": 3, "experts": 5, "dtype": torch.float16, "wide": True, "bias": True,
        "plan": {"warps": 3}, "cut": {"up_segment": 16, "up_stages": 3, "down_stages": 3, "down_rows": 4},
    },
    "one of at most four": {"sizes": (1, 3, 72, 56), "most": 4, "experts": 6, "plan": {"warps": 2}, "mapped": True},
    "as many as at most": {"sizes": (4, 3, 72, 56), "most": 4, "experts": 6, "plan": {"warps": 2}},
    "a lane a token": {"sizes": (32, 1, 32, 8), "experts": 9, "plan": {"warps": 2}, "blocks": 5},
}  # fmt: skip


def prepared(name: str) -> tuple[dict[str, Any], ExpertSizes, Any, tuple[tuple[str, str], ...]]:
    case = {"activation": Activation(), "dtype": torch.bfloat16, "gated": True, "blocks": 4} | CASES[name]
    sizes = ExpertSizes(case.get("most", case["sizes"][0]), *case["sizes"][1:], case["gated"])
    plan = few_tokens_plan(sizes, CARD, **case.get("plan", {}))
    assert plan is not None
    plan = replace(plan, **case.get("cut", {}))
    assert down_room(plan, sizes, CARD) <= CARD.shared_limit
    biased = (case.get("bias", False),) * 2
    defines = few_tokens_defines(
        sizes, plan, CARD, case["dtype"], "i64" if case.get("wide") else "int", case.get("mapped", False), biased,
        case["activation"], case.get("on_input", False), tokens_given="most" in case,
    )  # fmt: skip
    return case, sizes, plan, defines


def computed(library: Any, case: dict[str, Any], at_once: bool) -> str | None:
    """Both launches on new inputs; what went wrong, or None."""
    tokens, top_k, hidden, size = case["sizes"]
    experts, dtype = case["experts"], case["dtype"]
    weights = draw_weights(experts, hidden, size, dtype, gated=case["gated"], bias=case.get("bias", False))
    rows, factors = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k)
    num_experts, mapping = experts, None
    if case.get("mapped"):
        num_experts = 2 * experts
        mapping = torch.where(torch.arange(num_experts) % 2 == 0, torch.arange(num_experts) // 2, -1).int()
    ids = torch.randint(-1, num_experts + 1, (tokens, top_k), dtype=torch.int64 if case.get("wide") else torch.int32)
    ids[0, 0] = 0  # somebody is held
    act, out = poisoned((tokens * top_k, size), dtype), poisoned((tokens, hidden), dtype)
    a, wide_rows = case["activation"], 2 * weights.w13[0].numel()
    given = [tokens] if "most" in case else []
    constants = [float_bits(value) for value in (a.alpha, a.beta, a.limit or 0.0)]
    failure = launch(
        library, False, case["blocks"], at_once, [ids, mapping, factors, rows, weights.w13, weights.w13_bias, act],
        num_experts, experts, 2 * hidden, wide_rows, *constants, *given,
    ) or launch(
        library, True, case["blocks"], at_once, [ids, mapping, factors, act, weights.w2, weights.w2_bias, out],
        num_experts, experts, 2 * hidden * size, *given,
    )  # fmt: skip
    if failure is None and (guard_broken(act) or guard_broken(out)):
        failure = "something was written behind an output"
    if failure is not None:
        return failure
    options = {"activation": a, "num_experts": num_experts, "expert_map": mapping}
    options["apply_router_weight_on_input"] = case.get("on_input", False)
    wide = reference.fused_experts(rows.double(), Routing(factors, ids), wide_weights(weights), **options)
    return None if right(out, wide, rows, Routing(factors, ids), weights, case, mapping) else "wrong values"


def right(
    out: torch.Tensor,
    wide: torch.Tensor,
    rows: torch.Tensor,
    routing: Routing,
    weights: ExpertWeights,
    case: dict[str, Any],
    mapping: torch.Tensor | None,
) -> bool:
    """No worse than plain torch; where that has no such function, within two roundings."""
    if case.get("on_input") or out.numel() < 200:
        return bool(((out.double() - wide).abs() <= 2 * torch.finfo(out.dtype).eps * wide.abs().max()).all())
    local = routing.topk_ids
    if mapping is not None:
        inside = (local >= 0) & (local < len(mapping))
        local = torch.where(inside, mapping[torch.where(inside, local, 0).long()], -1)
    honest = plain_experts(rows, Routing(routing.topk_weights, local), weights, case["activation"])
    return no_worse(out, honest, wide)


@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_experts_and_end(name: str, tmp_path: Path) -> None:
    case, _, _, defines = prepared(name)
    library = build(HERE, tmp_path, defines)
    for at_once in (True, False):
        assert computed(library, case, at_once) is None


MUTANTS = {
    "slots filled while they are read": ("__syncwarp();  // all lanes have read the slot", ""),
    "slots read before they are full": ("await_bytes(barriers + 8 * slot, parity);", ""),
    "tokens read before they are here": ("await_bytes(shared_address(vectors_here), 0);", ""),
    "parity that stays": ("parity ^= 1;", ""),
    "a launch let in too early": ("await_previous_launch();\n  if (warp == 0) {", "if (warp == 0) {"),
    "a unit too few": ("(last - begin + WARPS - 1) / WARPS", "(last - begin) / WARPS"),
    "another order of copies": ("if (++ahead_piece == UP_PIECES)", "if (++ahead_piece > UP_PIECES)"),
    "gate for up": ("add_products(words[UP_SEGMENT + i + lane], x, up)", "add_products(words[i + lane], x, up)"),
}


@pytest.mark.parametrize(
    "mutant", [name if i < 2 else pytest.param(name, marks=pytest.mark.full) for i, name in enumerate(MUTANTS)]
)
def test_wrong_kernels_are_found(mutant: str, tmp_path: Path) -> None:
    case, _, _, defines = prepared("short rings")
    library = build(HERE, tmp_path, defines, MUTANTS[mutant])
    found = [computed(library, case, at_once) for at_once in (True, False) for _ in range(2)]
    assert any(found), "at least one way of delivering copies shows it"
