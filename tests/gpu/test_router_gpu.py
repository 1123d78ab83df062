"""Routers on the GPU against the reference: choices bit by bit where logits rank, weights, what is not finite."""

from typing import Any

import pytest
import torch

import moeyard
from moeyard import Routing, reference
from moeyard.cuda.route.route_align import route_and_align_launch
from moeyard.cuda.runtime.launch import programmatic_launch
from moeyard.dispatch import table
from moeyard.testing import guard_broken, layout_difference, poisoned, poisoned_layout, routing_error, same_bits
from moeyard.values import Router

REFUSAL = table.explain("route", "cuda").reasons["cuda"]
pytestmark = pytest.mark.skipif(REFUSAL != "chosen", reason=f"cuda: {REFUSAL}")
CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 8, 2), (1, 4, 1), (1, 128, 8), (7, 60, 4), (33, 256, 8), (5, 12, 6), (3, 1024, 10), (70, 64, 6)]
SIZES += [(9, 512, 10), (2, 1, 1), (4, 8192, 8), (3, 1500, 40), (4, 200, 50), (6, 384, 8), (3, 2048, 33)]
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax renormalised": {"renormalize": True},
    "sigmoid": {"scoring": "sigmoid", "routed_scaling_factor": 2.5},
    "sigmoid renormalised": {"scoring": "sigmoid", "renormalize": True},
    "biased": {"selection_bias": True, "renormalize": True},
    "sqrtsoftplus": {"scoring": "sqrtsoftplus", "routed_scaling_factor": 1.5},
    "biased sqrtsoftplus": {"selection_bias": True, "scoring": "sqrtsoftplus", "renormalize": True},
    "biased sigmoid": {"selection_bias": True, "scoring": "sigmoid"},
}
GROUPED = [(64, 8, 4), (256, 8, 4), (60, 4, 2), (256, 1, 1), (96, 3, 2), (512, 64, 8), (40, 40, 12), (2048, 16, 4)]


def poisoned_routing(tokens: int, top_k: int) -> Routing:
    return Routing(poisoned((tokens, top_k), torch.float32, CUDA), poisoned((tokens, top_k), torch.int32, CUDA))


def check(logits: torch.Tensor, top_k: int, options: dict[str, Any]) -> None:
    """Against the reference; where scores and a bias rank, by what is sure in float64."""
    on_card = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out = poisoned_routing(len(logits), top_k)
    got = moeyard.route(logits.cuda(), top_k=top_k, out=out, impl="cuda", **on_card)
    assert got is out and not guard_broken(out.topk_ids) and not guard_broken(out.topk_weights)
    wanted = reference.route(logits, top_k=top_k, **options)
    if "selection_bias" not in options:
        assert torch.equal(got.topk_ids.cpu(), wanted.topk_ids)
        assert torch.allclose(got.topk_weights.cpu(), wanted.topk_weights, rtol=3e-6, atol=0)
    elif logits.isfinite().all() and len(logits):
        host = Routing(got.topk_weights.cpu(), got.topk_ids.cpu())
        assert routing_error(logits, host, **options) is None


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_choices_and_weights(name: str, dtype: torch.dtype) -> None:
    for tokens, experts, top_k in SIZES:
        options = dict(OPTIONS[name])
        if options.get("selection_bias"):
            options["selection_bias"] = torch.randn(experts) * 0.3
        whole = (torch.randn(tokens, experts + 3) * 2).to(dtype)
        for logits in (
            whole[:, :experts].contiguous(),
            whole[:, 1 : experts + 1],
            whole.t().contiguous().t()[:, :experts],
        ):
            check(logits, top_k, options)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(biased: bool, scoring: str, dtype: torch.dtype) -> None:
    for experts, groups, kept in GROUPED:
        top_k = min(8, kept * experts // groups)
        options: dict[str, Any] = {"num_groups": groups, "top_k_groups": kept, "scoring": scoring, "renormalize": True}
        if biased:
            options |= {"selection_bias": torch.randn(experts) * 0.3, "routed_scaling_factor": 2.5}
        check((torch.randn(37, experts) * 2).to(dtype), top_k, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", [8, 64, 256, 512, 4096])
def test_ties_go_to_the_lower_expert_and_nothing_is_chosen_twice(dtype: torch.dtype, experts: int) -> None:
    few = torch.randint(-2, 3, (40, experts)).to(dtype)
    few[0] = 1.0
    few[1, ::2], few[1, 1::2] = 0.0, -0.0
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus"):
        check(few, min(8, experts), {"scoring": scoring})
    bias = torch.zeros(experts)
    got = moeyard.route(few.cuda(), top_k=8, selection_bias=bias.cuda(), scoring="sigmoid", impl="cuda")
    wanted = reference.route(few, top_k=8, scoring="sigmoid")  # equal logits have equal scores
    assert torch.equal(got.topk_ids.cpu(), wanted.topk_ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", [8, 64, 300, 2048])
@pytest.mark.parametrize("options", [{}, {"scoring": "sigmoid"}, {"renormalize": True, "num_groups": 2}], ids=str)
def test_what_is_not_finite(dtype: torch.dtype, experts: int, options: dict[str, Any]) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.randn(9, experts).to(dtype)
    logits[0], logits[1, 3], logits[2, 5], logits[3, 1:] = nan, nan, inf, -inf
    logits[4], logits[5, ::2], logits[6, 0], logits[7, :4] = -inf, -inf, -inf, 60000.0
    logits[8, ::3], logits[8, 1::3] = nan, -inf
    check(logits, 4, options)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_keys_that_are_almost_the_same(scoring: str) -> None:
    """Float32 logits and biases that agree in all but the last bits, which the quick choice does not look at."""
    for experts in (64, 256, 512, 1000):
        base = torch.randn(60, experts)
        logits = base.clone()
        near = torch.randint(0, experts, (60, experts))
        logits = torch.where(torch.rand(60, experts) < 0.7, base.gather(1, near), logits)
        logits = (logits.view(torch.int32) + torch.randint(-3, 4, (60, experts), dtype=torch.int32)).view(torch.float32)
        check(logits, 8, {"scoring": scoring})
        check(logits, 8, {"scoring": scoring, "num_groups": 4, "top_k_groups": 2})
        bias = torch.full((experts,), 0.5)
        bias[::3] += 2.0**-24
        check(torch.zeros(3, experts), 8, {"scoring": scoring, "selection_bias": bias})


def test_padding_and_extremes() -> None:
    logits = torch.randn(50, 256)
    logits[3] *= 40  # weights down to the smallest floats
    padding = torch.rand(50) < 0.4
    for options in ({}, {"scoring": "sigmoid"}, {"renormalize": True}):
        check(logits, 8, options | {"is_padding": padding})
    got = moeyard.route(logits.cuda(), top_k=8, is_padding=padding.cuda(), impl="cuda")
    assert bool((got.topk_ids.cpu()[padding] == -1).all()) and not bool(got.topk_weights.cpu()[padding].any())


@pytest.mark.parametrize("experts", [64, 128, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_have_the_ids_of_torch_and_the_same_bits_every_time(experts: int, dtype: torch.dtype) -> None:
    for tokens in (1, 64, 131, 200, 4096):
        logits = torch.randn(tokens, experts, device="cuda").to(dtype)
        got = moeyard.route(logits, top_k=8, renormalize=True, impl="cuda")
        wanted = moeyard.route(logits, top_k=8, renormalize=True, impl="torch")
        assert torch.equal(got.topk_ids, wanted.topk_ids)
        assert torch.allclose(got.topk_weights, wanted.topk_weights, rtol=3e-6, atol=0)
        again = moeyard.route(logits, top_k=8, renormalize=True, impl="cuda")
        assert same_bits(got.topk_weights, again.topk_weights) and same_bits(got.topk_ids, again.topk_ids)


def test_graphs_and_programmatic_launches() -> None:
    logits = torch.randn(100, 256, device="cuda").bfloat16()
    wanted = moeyard.route(logits, top_k=8, impl="cuda")
    graph = torch.cuda.CUDAGraph()
    try:
        programmatic_launch(True)
        with torch.cuda.graph(graph):
            got = [moeyard.route(logits, top_k=8, impl="cuda") for _ in range(4)]
    finally:
        programmatic_launch(False)
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(one.topk_ids, wanted.topk_ids) for one in got)


DECODE = [(1, 256, 8), (2, 64, 6), (3, 128, 10), (4, 8, 2), (5, 256, 8), (8, 60, 4), (16, 512, 10), (17, 128, 8)]
DECODE += [(9, 256, 8), (33, 64, 6), (50, 384, 8), (64, 256, 8), (64, 512, 10), (64, 8, 2), (64, 256, 1), (7, 40, 32)]


@pytest.mark.parametrize("block", [1, 16, 48])
@pytest.mark.parametrize("name", ["softmax", "biased sigmoid"])
@pytest.mark.parametrize("mapped", [False, True])
def test_one_launch_gives_what_two_give(block: int, name: str, mapped: bool) -> None:
    for tokens, experts, top_k in DECODE:
        logits = torch.randn(tokens, experts, device="cuda").bfloat16()
        options: dict[str, Any] = {
            "top_k": top_k,
            "renormalize": True,
            "is_padding": torch.rand(tokens, device="cuda") < 0.2,
        }
        if name != "softmax":
            options |= {"scoring": "sigmoid", "selection_bias": torch.randn(experts, device="cuda")}
        call: dict[str, Any] = {"block_size": block}
        if mapped:
            mapping = torch.where(torch.arange(experts) % 2 == 0, torch.arange(experts) // 2, -1).int().cuda()
            call |= {"expert_map": mapping, "num_local_experts": (experts + 1) // 2}
        routing = moeyard.route(logits, impl="cuda", **options)
        layout = moeyard.moe_align_block_size(routing.topk_ids, num_experts=experts, impl="cuda", **call)
        empty = Routing(*(poisoned(tuple(t.shape), t.dtype, CUDA) for t in (routing.topk_weights, routing.topk_ids)))
        filled = poisoned_layout(layout)
        given = dict(options)
        bias, padding = given.pop("selection_bias", None), given.pop("is_padding", None)
        assert route_and_align_launch(logits, bias, padding, call.get("expert_map"), Router(**given), empty, filled)
        assert same_bits(empty.topk_ids, routing.topk_ids) and same_bits(empty.topk_weights, routing.topk_weights)
        assert layout_difference(filled, layout) is None, (tokens, experts, top_k)
        guarded = (empty.topk_ids, empty.topk_weights, *filled.tensors)
        assert not any(guard_broken(tensor) for tensor in guarded)
        public = moeyard.route_and_align(logits, **options, **call)
        assert same_bits(public[0].topk_weights, routing.topk_weights)
        assert layout_difference(public[1], layout) is None


def test_what_one_launch_does_not_do_takes_two() -> None:
    for tokens, experts, top_k, groups in (
        (0, 8, 2, 1),
        (257, 64, 8, 1),
        (3, 4096, 8, 1),
        (5, 80, 33, 1),
        (9, 128, 4, 64),
    ):
        logits = torch.randn(tokens, experts, device="cuda")
        options: dict[str, Any] = {"top_k": top_k, "num_groups": groups, "top_k_groups": max(groups // 2, 1)}
        routing, layout = moeyard.route_and_align(logits, block_size=4, **options)
        wanted = moeyard.route(logits, impl="torch", **options)
        assert same_bits(routing.topk_ids, wanted.topk_ids)
        alone = moeyard.moe_align_block_size(wanted.topk_ids, num_experts=experts, block_size=4, impl="torch")
        assert layout_difference(layout, alone) is None
    with pytest.raises(ValueError, match="top_k"):
        moeyard.route_and_align(torch.randn(3, 8, device="cuda"), block_size=4, top_k=9)
    with pytest.raises(TypeError, match="unknown"):
        moeyard.route_and_align(torch.randn(3, 8, device="cuda"), block_size=4, top_k=2, unknown=1)  # type: ignore[call-arg]


def test_one_launch_in_graphs_and_on_many_streams() -> None:
    for tokens in (1, 5, 12, 64, 256):
        logits = torch.randn(tokens, 128, device="cuda").bfloat16()
        routing, layout = moeyard.route_and_align(logits, top_k=8, block_size=16)
        graph = torch.cuda.CUDAGraph()
        try:
            programmatic_launch(True)
            with torch.cuda.graph(graph):
                got = [moeyard.route_and_align(logits, top_k=8, block_size=16) for _ in range(3)]
        finally:
            programmatic_launch(False)
        for _ in range(2):
            graph.replay()
        streams = [torch.cuda.Stream() for _ in range(3)]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got.append(moeyard.route_and_align(logits, top_k=8, block_size=16))
        torch.cuda.synchronize()
        for one in got:
            assert same_bits(one[0].topk_weights, routing.topk_weights) and layout_difference(one[1], layout) is None
