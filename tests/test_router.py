"""Routers: choices bit by bit where logits rank, by float64 keys where float32 scores do; ties, NaN, padding."""

from typing import Any

import pytest
import torch

import moeyard
from moeyard import Routing, reference
from moeyard.testing import CPU, guard_broken, impls_on, poisoned, routing_error, same_bits, wide_scores

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax renormalised": {"renormalize": True},
    "sigmoid": {"scoring": "sigmoid", "routed_scaling_factor": 2.5},
    "sigmoid renormalised": {"scoring": "sigmoid", "renormalize": True},
    "sqrtsoftplus": {"scoring": "sqrtsoftplus", "routed_scaling_factor": 1.5},
    "deepseek-v4": {"scoring": "sqrtsoftplus", "selection_bias": True, "renormalize": True},
    "biased": {"selection_bias": True, "renormalize": True},
    "grouped": {"num_groups": 4, "top_k_groups": 2},
    "deepseek-v3": {
        "scoring": "sigmoid", "selection_bias": True, "num_groups": 4, "top_k_groups": 2, "renormalize": True,
        "routed_scaling_factor": 2.5,
    },
}  # fmt: skip
SIZES = [(0, 8, 2), (1, 4, 1), (1, 128, 8), (7, 60, 4), (33, 256, 8), (5, 12, 6), (3, 1024, 10)]


def options_of(name: str, experts: int) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    if options.get("selection_bias"):
        options["selection_bias"] = torch.randn(experts) * 0.3
    return options


def poisoned_routing(tokens: int, top_k: int) -> Routing:
    return Routing(poisoned((tokens, top_k), torch.float32), poisoned((tokens, top_k), torch.int32))


IMPLS = impls_on("route", CPU, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_choices_and_weights(impl: str, name: str, dtype: torch.dtype) -> None:
    for tokens, experts, top_k in SIZES:
        options = options_of(name, experts)
        whole = (torch.randn(tokens, experts + 3) * 2).to(dtype)
        for logits in (whole[:, 1 : experts + 1], whole.t().contiguous().t()[:, :experts]):
            wanted = reference.route(logits, top_k=top_k, **options)
            out = poisoned_routing(tokens, top_k)
            got = moeyard.route(logits, top_k=top_k, out=out, impl=impl, **options)
            assert got is out and not guard_broken(out.topk_ids) and not guard_broken(out.topk_weights)
            if "selection_bias" not in options:
                assert torch.equal(got.topk_ids, wanted.topk_ids)
                assert torch.allclose(got.topk_weights, wanted.topk_weights, rtol=3e-6, atol=0)
            if tokens and not (dtype != torch.float32 and logits.sort(1).values.diff(dim=1).eq(0).any()):
                assert routing_error(logits, got, **options) is None
            again = moeyard.route(logits, top_k=top_k, impl=impl, **options)
            assert same_bits(again.topk_ids, got.topk_ids) and same_bits(again.topk_weights, got.topk_weights)
            assert again.topk_ids.dtype == torch.int32 and again.topk_weights.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_ties_go_to_the_lower_id(impl: str, scoring: str, biased: bool, groups: int) -> None:
    """Few distinct values, so that ties are everywhere, among groups too; -0 and 0 are the same key."""
    logits = torch.randint(-1, 2, (200, 32)).float()
    logits[logits == 0] *= torch.tensor([1.0, -1.0])[torch.randint(0, 2, (int((logits == 0).sum()),))]
    if scoring == "softmax" and biased:
        logits = logits.abs().sort(1).values  # every row has its own few scores, computed from equal logits alike
    bias = torch.zeros(32) if biased else None
    options = {
        "top_k": 6,
        "scoring": scoring,
        "selection_bias": bias,
        "num_groups": groups,
        "top_k_groups": groups // 2,
    }
    options["top_k_groups"] = max(groups // 2, 1)
    got, wanted = moeyard.route(logits, impl=impl, **options), reference.route(logits, **options)
    assert torch.equal(got.topk_ids, wanted.topk_ids)
    if groups == 1:
        assert got.topk_ids[:, 0].tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("renormalize", [False, True])
def test_values_that_are_no_numbers(impl: str, renormalize: bool) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [
        [nan, 1, 2, 3, 4, 5], [nan] * 6, [inf, 1, 2, 3, 4, 5], [-inf] * 6, [-inf, 1, -inf, 3, -inf, -inf],
        [inf, -inf, nan, 0, inf, 1], [3e38, -3e38, 0, 1, 2, 3], [-60, -80, 50, -60, 0, -1e30],
    ]  # fmt: skip
    logits = torch.tensor(rows)
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus"):
        for bias in (None, torch.zeros(6), torch.tensor([-inf, 0.5, nan, inf, 0, 0])):
            for groups in (1, 3):
                options = {"scoring": scoring, "renormalize": renormalize, "selection_bias": bias, "num_groups": groups}
                options["top_k_groups"] = 1 if groups == 1 else 2
                for top_k in (1, 3, 4):
                    got = moeyard.route(logits, top_k=top_k, impl=impl, **options)
                    wanted = reference.route(logits, top_k=top_k, **options)
                    assert torch.equal(got.topk_ids, wanted.topk_ids), (options, top_k)
                    assert torch.allclose(got.topk_weights, wanted.topk_weights, rtol=3e-6, atol=1e-37)
                    assert all(len(set(row)) == top_k for row in got.topk_ids.tolist())
    undefined = moeyard.route(logits[:4], top_k=3, renormalize=renormalize, impl=impl)
    assert undefined.topk_ids.tolist() == [[0, 1, 2]] * 4 and not undefined.topk_weights.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_rows_are_dropped(impl: str) -> None:
    logits, padding = torch.randn(9, 16), torch.tensor([0, 1, 0, 0, 1, 1, 0, 0, 1]).bool()
    plain = moeyard.route(logits, top_k=3, impl=impl)
    logits[padding] = float("nan")
    got = moeyard.route(logits, top_k=3, is_padding=padding, out=poisoned_routing(9, 3), impl=impl)
    assert got.topk_ids[padding].eq(-1).all() and not got.topk_weights[padding].any()
    assert same_bits(got.topk_ids[~padding], plain.topk_ids[~padding])
    assert same_bits(got.topk_weights[~padding], plain.topk_weights[~padding])


def test_the_check_of_routings_rejects_mutants() -> None:
    logits, bias = torch.randn(20, 16), torch.randn(16) * 0.1
    for options in (
        {"renormalize": True},
        {"scoring": "sigmoid", "selection_bias": bias, "num_groups": 4, "top_k_groups": 2},
    ):
        right = moeyard.route(logits, top_k=4, **options)
        assert routing_error(logits, right, **options) is None
        ids, weights = right.topk_ids, right.topk_weights
        worst = torch.full_like(ids, 0)
        worst[:] = logits.argsort(1)[:, :4].int()
        twice = ids.clone()
        twice[3, 1] = twice[3, 0]
        mutants = [
            Routing(weights.flip(1), ids.flip(1)), Routing(weights, worst), Routing(weights, twice),
            Routing(weights * 1.0001, ids), Routing(weights.flip(1), ids), Routing(weights * float("nan"), ids),
            Routing(weights, ids - 1), Routing(weights, ids + 100),
        ]  # fmt: skip
        assert all(routing_error(logits, mutant, **options) for mutant in mutants)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name: str) -> None:
    options = options_of(name, 12)
    logits = torch.randn(5, 12, requires_grad=True)
    factor = torch.randn(5, 3)
    padding = torch.tensor([False, True, False, False, False])
    got = moeyard.route(logits, top_k=3, is_padding=padding, **options)
    (mine,) = torch.autograd.grad((got.topk_weights * factor).sum(), logits)
    wide = logits.double()
    scores = wide_scores(wide, options.get("scoring", "softmax"))
    weights = scores.gather(1, got.topk_ids.clamp(min=0).long())
    if options.get("renormalize"):
        weights = weights / weights.sum(1, keepdim=True)
    plain = weights * options.get("routed_scaling_factor", 1.0) * factor * ~padding.unsqueeze(1)
    (theirs,) = torch.autograd.grad(plain.sum(), logits)
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6) and not mine[1].any()


def test_registered_op() -> None:
    bias, padding = torch.randn(16), torch.rand(6) < 0.3
    for arguments in (
        (None, None, 3, "softmax", True, 1, 1, 1.0, "auto"),
        (bias, padding, 4, "sigmoid", False, 4, 2, 2.5, "torch"),
    ):
        logits = torch.randn(6, 16, requires_grad=True)
        torch.library.opcheck(torch.ops.moeyard.route.default, (logits, *arguments))
    compiled = torch.compile(lambda x: moeyard.route(x, top_k=3, renormalize=True).topk_weights, fullgraph=True)
    logits = torch.randn(6, 16)
    assert torch.equal(compiled(logits), moeyard.route(logits, top_k=3, renormalize=True).topk_weights)


def test_bad_input_names_the_argument() -> None:
    logits = torch.zeros(4, 12)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"router_logits": logits.int()}, TypeError, "router_logits: expected dtype float32 or bfloat16"),
        ({"router_logits": logits[0]}, ValueError, "router_logits: expected a 2-D tensor"),
        ({"router_logits": logits[:, :0]}, ValueError, r"router_logits.shape\[1\]: expected an integer in \[1, 8192\]"),
        ({"top_k": 0}, ValueError, r"top_k: expected an integer in \[1, 12\], got 0"),
        ({"top_k": 13}, ValueError, r"top_k: expected an integer in \[1, 12\], got 13"),
        ({"top_k": True}, TypeError, "top_k: expected an int, got bool"),
        ({"top_k": 7, "num_groups": 4, "top_k_groups": 2}, ValueError, r"top_k: expected an integer in \[1, 6\]"),
        ({"scoring": "relu"}, ValueError, "scoring: expected one of"),
        ({"num_groups": 5}, ValueError, "num_groups: expected a divisor of num_experts=12, got 5"),
        ({"num_groups": 4, "top_k_groups": 5}, ValueError, r"top_k_groups: expected an integer in \[1, 4\], got 5"),
        ({"selection_bias": torch.zeros(11)}, ValueError, r"selection_bias: expected shape \(12,\)"),
        ({"selection_bias": torch.zeros(12).half()}, TypeError, "selection_bias: expected dtype float32"),
        ({"selection_bias": torch.zeros(12, requires_grad=True)}, ValueError, "selection_bias: expected a tensor that"),
        ({"is_padding": torch.zeros(4)}, TypeError, "is_padding: expected dtype bool"),
        ({"is_padding": torch.zeros(3).bool()}, ValueError, r"is_padding: expected shape \(4,\)"),
        ({"out": logits}, TypeError, "out: expected a Routing, got Tensor"),
        ({"out": Routing(torch.zeros(4, 2), torch.zeros(4, 2))}, TypeError, "out.topk_ids: expected dtype int32"),
        ({"impl": "warp"}, ValueError, "impl: expected 'auto' or one of"),
    ]
    for change, kind, message in bad:
        with pytest.raises(kind, match=message):
            moeyard.route(**{"router_logits": logits, "top_k": 2, **change})


@pytest.mark.parametrize("impl", impls_on("route", CPU))
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("low", [-60.0, -88.0, -95.0])
def test_tiny_scores_are_renormalised(impl: str, scoring: str, low: float) -> None:
    """A bias may choose experts whose scores float32 exponentials flush to 0: their ratio is still known."""
    logits = torch.full((3, 40), low - 9)
    logits[:, 0] = 0.0 if scoring == "softmax" else low - 9
    logits[:, 7], logits[:, 11] = low, low - 0.5
    bias = torch.zeros(40)
    bias[7], bias[11] = 3.0, 2.0
    options: Any = {"top_k": 2, "scoring": scoring, "renormalize": True, "selection_bias": bias}
    got = moeyard.route(logits, impl=impl, **options)
    assert got.topk_ids.tolist() == [[7, 11]] * 3
    wanted = torch.softmax(torch.tensor([0.0, -0.25 if scoring == "sqrtsoftplus" else -0.5]), 0)
    assert torch.allclose(got.topk_weights, wanted.expand(3, 2), atol=2e-3)
