"""What tests/test_parallel.py runs in several processes that are joined by gloo.

    python tests/parallel_ranks.py FOLDER RANKS CHECK...

Torch is imported once, then the process forks. Rank r leaves FOLDER/r.json: for each check what went wrong, or "". A
rank that fails ends, and so do then the others, whose connections close.
"""

import copy
import datetime
import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import moeyard
from moeyard import ExpertWeights, Routing, parallel
from moeyard.parallel import Connection, Plan
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR_STATIC, INT8_CHANNEL, QuantScheme
from moeyard.testing import draw_quantised, draw_routing, draw_weights, same_bits

CHECKS: dict[str, Callable[[int], None]] = {}
COUNTS = (5, 0, 17, 9)
UNEVEN = Plan(10, ((0, 1, 2, 3, 4), (5,), (6, 7), (8, 9)))
TIMEOUT = datetime.timedelta(seconds=20)


def check(function: Callable[[int], None]) -> Callable[[int], None]:
    CHECKS[function.__name__] = function
    return function


def drawn(experts: int, hidden: int, top_k: int, dtype: torch.dtype, seed: int = 0, routing: str = "dropped"):
    """Tokens of all ranks and their routing, alike on every rank."""
    torch.manual_seed(seed)
    tokens = sum(COUNTS)
    rows = torch.randn(tokens, hidden).to(dtype)
    return rows, draw_routing(tokens, experts, top_k, routing)


def own(rank: int, rows: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    mine = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    return rows[mine], Routing(routing.topk_weights[mine], routing.topk_ids[mine])


def part(rank: int, tensor: Tensor) -> Tensor:
    return tensor[sum(COUNTS[:rank]) : sum(COUNTS[: rank + 1])]


def refused(call: Callable[[], object], *words: str) -> None:
    try:
        call()
    except (TypeError, ValueError) as error:
        assert all(word in str(error) for word in words), f"{error} has not {words}"
        return
    raise AssertionError(f"not refused: {words}")


def answers(
    rank: int, whole: ExpertWeights, plan: Plan, rows: Tensor, routing: Routing, impl: str = "auto", **options: object
) -> tuple[Tensor, Connection]:
    """What a rank computes of its own tokens."""
    mine = parallel.slice_experts(whole, plan, rank)
    connection = parallel.connect(mine, plan, top_k=routing.topk_ids.shape[1], dtype=rows.dtype, **options)
    result = parallel.fused_experts(*own(rank, rows, routing), mine, connection, impl=impl)
    again = parallel.fused_experts(*own(rank, rows, routing), mine, connection, impl=impl)
    assert same_bits(result, again)
    return result, connection


def pushed_rows_are_those_of_one_process(
    rank: int, whole: ExpertWeights, plan: Plan, rows: Tensor, routing: Routing
) -> None:
    """That way adds in float32, where others are checked in float64."""
    tensors = (whole.w13, whole.w2, whole.w13_bias, whole.w2_bias)
    whole = ExpertWeights(*(None if t is None else t.float() for t in tensors), gated=whole.gated)
    rows = rows.float()
    wanted = parallel.experts_in_order(rows, routing, whole, plan, tokens_per_rank=COUNTS, max_tokens=17)
    got, _ = answers(rank, whole, plan, rows, routing, way="pushed", max_tokens=17)
    assert same_bits(got, part(rank, wanted))


def leftovers() -> list[Path]:
    """Files of memory that ranks share, which have no name once all have mapped them."""
    return list(Path("/dev/shm").glob(f"moeyard-{os.getpid()}-*"))


@check
def sums_are_those_of_one_process(rank: int) -> None:
    """Both ways and both orders give the bits of one process, with ranks of other counts, experts and no tokens."""
    for dtype, impl in ((torch.float32, "torch"), (torch.bfloat16, "auto"), (torch.float16, "auto")):
        rows, routing = drawn(10, 24, 3, dtype)
        whole = draw_weights(10, 24, 20, dtype, bias=True)
        told = {"tokens_per_rank": COUNTS, "impl": impl}
        padded = [parallel.experts_in_order(rows, routing, whole, UNEVEN, max_tokens=most, **told) for most in (17, 19)]
        grouped = parallel.experts_in_order(rows, routing, whole, UNEVEN, **told)
        exact = parallel.experts_in_order(rows, routing, whole, UNEVEN, order="exact", **told)
        for options, wanted in (
            ({"way": "all_to_all"}, grouped), ({"way": "gathered", "max_tokens": 19}, padded[1]),
            ({"max_tokens": 17}, padded[0]),
            ({"way": "symmetric", "max_tokens": 17}, padded[0]), ({"order": "exact", "way": "all_to_all"}, exact),
            ({"way": "pushed", "max_tokens": 17}, padded[0]),
            ({"order": "exact", "way": "pushed", "max_tokens": 18}, exact),
        ):  # fmt: skip
            got, connection = answers(rank, whole, UNEVEN, rows, routing, impl, **options)
            assert same_bits(got, part(rank, wanted)), (dtype, options)
            assert connection.way == options.get("way", "gathered") and not leftovers()
        assert same_bits(grouped, padded[0]) and not same_bits(grouped, exact)


@check
def exact_sums_are_those_of_any_plan(rank: int) -> None:
    """Of float32 and ids that ascend they are `fused_experts` on the CPU, which adds in the order of experts."""
    rows, routing = drawn(10, 24, 3, torch.float32, routing="uniform")
    order = routing.topk_ids.sort(1)
    routing = Routing(routing.topk_weights.gather(1, order.indices), order.values.int())
    whole = draw_weights(10, 24, 20, torch.float32)
    impl = "reference" if os.environ.get("MOEYARD_IMPL") else "cpu"
    wanted = moeyard.fused_experts(rows, routing, whole, impl=impl)
    for plan in (UNEVEN, parallel.contiguous_plan(10, 4)):
        got, _ = answers(rank, whole, plan, rows, routing, impl, order="exact")
        exact = parallel.experts_in_order(rows, routing, whole, plan, order="exact", impl=impl)
        assert same_bits(got, part(rank, exact))
        if impl == "cpu":
            assert same_bits(got, part(rank, wanted))
        torch.testing.assert_close(got, part(rank, wanted))


@check
def replicas_share_tokens(rank: int) -> None:
    """A plan from load with replicas: the same bits; replicas take turns; every answer is near the plain one."""
    rows, routing = drawn(6, 24, 2, torch.float64, routing="zipf")
    routing = Routing(routing.topk_weights, routing.topk_ids.long())
    whole = draw_weights(6, 24, 16, torch.float64, bias=True)
    load = torch.bincount(routing.topk_ids.flatten(), minlength=6)
    plan = parallel.plan_experts(load, 4, slots=[3, 2, 2, 3])
    assert max(plan.replicas) > 1
    wanted = parallel.experts_in_order(rows, routing, whole, plan, tokens_per_rank=COUNTS)
    plain = moeyard.fused_experts(rows, routing, whole)
    for options in ({"way": "all_to_all"}, {"way": "gathered", "max_tokens": 17}):
        got, _ = answers(rank, whole, plan, rows, routing, **options)
        assert same_bits(got, part(rank, wanted))
        torch.testing.assert_close(got, part(rank, plain), rtol=0, atol=1e-12)
    pushed_rows_are_those_of_one_process(rank, whole, plan, rows, routing)
    refused(lambda: answers(rank, whole, plan, rows, routing, training=True), "training", "replicas")


@check
def ranks_split_experts(rank: int) -> None:
    """Expert parallelism times tensor parallelism: two shares of two ranks each, and one share of four."""
    for tensor in (2, 4):
        rows, routing = drawn(5, 24, 3, torch.float64)
        for gated in (True, False):
            whole = draw_weights(5, 24, 16, torch.float64, bias=True, gated=gated)
            plan = parallel.contiguous_plan(5, 4, tensor=tensor)
            wanted = parallel.experts_in_order(rows, routing, whole, plan, tokens_per_rank=COUNTS)
            plain = moeyard.fused_experts(rows, routing, whole)
            for options in ({"way": "all_to_all"}, {"way": "gathered", "max_tokens": 17}):
                got, _ = answers(rank, whole, plan, rows, routing, **options)
                assert same_bits(got, part(rank, wanted))
                torch.testing.assert_close(got, part(rank, plain), rtol=0, atol=1e-12)
            pushed_rows_are_those_of_one_process(rank, whole, plan, rows, routing)
        refused(lambda plan=plan, whole=whole, rows=rows, routing=routing: answers(
            rank, whole, plan, rows, routing, order="exact"), "order", "tensor")  # fmt: skip


@check
def quantised_rows_cross(rank: int) -> None:
    """Codes and scales cross where all experts quantise alike; results are those of the rows as they were."""
    cases: list[tuple[QuantScheme, torch.dtype, bool]] = [
        (FP8_BLOCK, torch.bfloat16, True), (FP8_BLOCK, torch.float32, True), (FP8_CHANNEL, torch.bfloat16, True),
        (INT8_CHANNEL, torch.bfloat16, False), (FP8_TENSOR_STATIC, torch.bfloat16, False),
    ]  # fmt: skip
    plan = parallel.contiguous_plan(6, 4)
    for scheme, dtype, crosses in cases:
        rows, routing = drawn(6, 256, 2, dtype)
        rows = rows * torch.exp2(torch.randint(-30, 6, (rows.shape[0], 1))).to(dtype)
        whole = draw_quantised(6, 256, 128, scheme, dtype)
        wanted = parallel.experts_in_order(rows, routing, whole, plan, tokens_per_rank=COUNTS)
        ways = [{"way": way, "max_tokens": 17} for way in ("all_to_all", "gathered", "symmetric", "pushed")]
        plain = {"way": "all_to_all", "send_codes": False}
        for options in [*ways, plain] if dtype == torch.float32 else ways[:2]:
            got, connection = answers(rank, whole, plan, rows, routing, **options)
            assert same_bits(got, part(rank, wanted)), (scheme, dtype, options)
            assert connection.rows.quantised == (crosses and options != plain)
    refused(lambda: answers(rank, whole, plan, rows, routing, training=True), "training", "gradients")


@check
def weights_on_the_input(rank: int) -> None:
    rows, routing = drawn(10, 24, 3, torch.bfloat16)
    routing = Routing(routing.topk_weights, routing.topk_ids.view(torch.uint32))
    whole = draw_weights(10, 24, 20, torch.bfloat16)
    options = {"apply_router_weight_on_input": True}
    for order in ("grouped", "exact"):
        wanted = parallel.experts_in_order(
            rows, routing, whole, UNEVEN, tokens_per_rank=COUNTS, order=order, **options
        )  # fmt: skip
        got, _ = answers(rank, whole, UNEVEN, rows, routing, order=order, **options)
        assert same_bits(got, part(rank, wanted))


@check
def batches_have_the_rows_of_each_expert(rank: int) -> None:
    """Products of batches give what local experts give, in every way; a token that crowds an expert is NaN."""
    drawn_rows, routing = drawn(10, 24, 3, torch.float64, routing="uniform")
    drawn_experts = draw_weights(10, 24, 20, torch.float64)
    for way in ("pushed", "all_to_all", "gathered", "symmetric"):
        dtype = torch.float32 if way == "pushed" else torch.float64
        whole = ExpertWeights(drawn_experts.w13.to(dtype), drawn_experts.w2.to(dtype))
        mine = parallel.slice_experts(whole, UNEVEN, rank)
        my_rows, my_routing = own(rank, drawn_rows.to(dtype), routing)
        connection = parallel.connect(mine, UNEVEN, top_k=3, way=way, max_tokens=17)
        sent = parallel.dispatch(my_rows, my_routing, connection)
        batches = parallel.to_batches(sent)
        held = torch.tensor(UNEVEN.experts_of(rank))
        assert torch.equal(batches.counts.long(), (routing.topk_ids.view(1, -1) == held.view(-1, 1)).sum(1))
        first = moeyard.grouped_gemm(batches.rows, mine.w13, expert_num_tokens=batches.counts)
        middle = moeyard.activate(first.flatten(0, 1)).view(*first.shape[:2], -1)
        second = moeyard.grouped_gemm(middle, mine.w2, expert_num_tokens=batches.counts)
        unread = torch.arange(second.shape[1]).view(1, -1, 1) >= batches.counts.view(-1, 1, 1)
        total = parallel.from_batches(second.masked_fill(unread, torch.nan), batches)
        error = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(total, parallel.local_experts(sent, mine), rtol=0, atol=error)
        parallel.combine(total, sent)
    same = Routing(my_routing.topk_weights, torch.zeros_like(my_routing.topk_ids))
    connection = parallel.connect(mine, UNEVEN, top_k=3)
    sent = parallel.dispatch(my_rows, same, connection)
    answer = parallel.combine(parallel.from_batches(parallel.to_batches(sent).rows, parallel.to_batches(sent)), sent)
    assert bool(answer.isnan().any()) == (rank >= 2) and not bool(answer[:5].isnan().any() and rank == 2)
    refused(lambda: parallel.to_batches(sent.rows), "sent")
    refused(lambda: parallel.from_batches(sent.rows, sent), "batches")


@check
def shared_experts_run_meanwhile(rank: int) -> None:
    """Their rows are added, whichever way tokens take; gradients flow to both."""
    rows, routing = drawn(10, 24, 3, torch.float32)
    whole = draw_weights(10, 24, 20, torch.float32)
    mine = parallel.slice_experts(whole, UNEVEN, rank)
    my_rows, my_routing = own(rank, rows, routing)
    shared = torch.randn(24, 24)
    for way in ("all_to_all", "gathered", "symmetric", "pushed"):
        connection = parallel.connect(mine, UNEVEN, top_k=3, way=way, max_tokens=17)
        apart = parallel.fused_experts(my_rows, my_routing, mine, connection) + my_rows @ shared
        got = parallel.fused_experts(my_rows, my_routing, mine, connection, meanwhile=lambda: my_rows @ shared)
        assert same_bits(got, apart)
    training = parallel.connect(mine, UNEVEN, top_k=3, training=True)
    shared.requires_grad_()
    answer = parallel.fused_experts(my_rows, my_routing, mine, training, meanwhile=lambda: my_rows @ shared)
    answer.sum().backward()
    torch.testing.assert_close(shared.grad, my_rows.sum(0).unsqueeze(1).expand(24, 24))


@check
def differences_are_refused_on_every_rank(rank: int) -> None:
    """One rank's other top_k, dtype, size, plan or wrong weights: all ranks raise before any row moves."""
    whole = draw_weights(10, 24, 20, torch.float32)
    mine = parallel.slice_experts(whole, UNEVEN, rank)
    odd = rank == 2

    def connecting(weights: ExpertWeights = mine, plan: Plan = UNEVEN, top_k: int = 3, **options: object):
        return lambda: parallel.connect(weights, plan, top_k=top_k, **options)

    told = "" if odd else "rank 2"
    refused(connecting(top_k=4 if odd else 3), "top_k", "'4' on rank 2")
    refused(connecting(dtype=torch.bfloat16 if odd else torch.float32), "dtype", "bfloat16")
    refused(connecting(max_tokens=8 if odd else 9, way="gathered"), "max_tokens", "rank 2")
    other = parallel.slice_experts(draw_weights(10, 24, 22, torch.float32), UNEVEN, rank)
    refused(connecting(other if odd else mine), "intermediate_size", "'22' on rank 2")
    swapped = Plan(10, ((0, 1, 2, 3, 9), (5,), (6, 7), (8, 4)))
    refused(connecting(plan=swapped if odd else UNEVEN), "plan", "rank 2")
    refused(connecting(plan=parallel.contiguous_plan(10, 5) if odd else UNEVEN), "plan", "expected one for the 4", told)
    refused(connecting(whole if odd else mine), "weights", "expected 2 experts", told)
    refused(connecting(None if odd else mine), "weights", "got NoneType", told)
    refused(connecting(order="any" if odd else "grouped"), "order", told)
    if odd:
        sharded = DTensor.from_local(mine.w13, init_device_mesh("cpu", (4,)), [Shard(0)], run_check=False)
        mine_sharded = ExpertWeights(sharded, mine.w2)
    refused(connecting(mine_sharded if odd else mine), "weights.w13", "DTensor", "Shard", told)
    rows, routing = own(rank, *drawn(10, 24, 3, torch.float32))
    connection = parallel.connect(mine, UNEVEN, top_k=3)
    wrong = rows.double() if odd else rows
    refused(lambda: parallel.fused_experts(wrong, routing, mine, connection), "dtype" if odd else "rank 2")
    gradients = [rows, *(tensor for tensor in (mine.w13,))]
    for tensor in gradients:
        tensor.requires_grad_()
    refused(lambda: parallel.fused_experts(rows, routing, mine, connection), "training")
    parallel.dispatch(rows.detach(), routing, connection)  # which still works
    shared = parallel.connect(mine, UNEVEN, top_k=3, way="symmetric", max_tokens=17)
    with torch.no_grad():
        sent = parallel.dispatch(rows, routing, shared)
        refused(lambda: parallel.dispatch(rows, routing, shared), "connection", "combine after each dispatch")
        refused(lambda: parallel.combine(sent.rows[1:], sent), "rows: expected shape")
        refused(lambda: parallel.combine(sent.rows.double(), sent), "rows: expected dtype")
        refused(lambda: parallel.combine(sent.rows, sent.rows), "sent: expected what dispatch returned")
        refused(lambda: parallel.combine(sent.rows, sent, out=rows[:, :3]), "out: expected shape")
        parallel.combine(parallel.local_experts(sent, mine), sent)


def with_gradients(
    tensors: tuple[Tensor | None, ...], routing: Routing, connection: Connection, upstream: Tensor, save: str
) -> list[Tensor]:
    """The answer, then the gradients of hidden states, router weights and weights."""
    given = [t.clone().requires_grad_() for t in tensors if t is not None]
    local, experts = Routing(given[1], routing.topk_ids), ExpertWeights(*given[2:])
    answer = parallel.fused_experts(given[0], local, experts, connection, save=save)
    return [answer.detach(), *torch.autograd.grad(answer, given, upstream)]


@check
def gradients_are_those_of_one_process(rank: int) -> None:
    """Of hidden states, router weights, weights and biases; also of a rank without tokens."""
    for order, way in (
        ("grouped", "all_to_all"), ("grouped", "gathered"), ("grouped", "pushed"), ("exact", "all_to_all"),
    ):  # fmt: skip
        rows, routing = drawn(10, 24, 3, torch.float32)
        whole = draw_weights(10, 24, 20, torch.float32, bias=True)
        upstream = torch.randn_like(rows)
        kept = [whole.w13, whole.w2, whole.w13_bias, whole.w2_bias]
        given = [t.clone().requires_grad_() for t in (rows, routing.topk_weights, *kept)]
        answer = parallel.experts_in_order(
            given[0], Routing(given[1], routing.topk_ids), ExpertWeights(*given[2:]), UNEVEN, tokens_per_rank=COUNTS,
            order=order,
        )  # fmt: skip
        wanted = torch.autograd.grad(answer, given, upstream)
        mine = parallel.slice_experts(whole, UNEVEN, rank)
        connection = parallel.connect(mine, UNEVEN, top_k=3, order=order, way=way, max_tokens=17, training=True)
        my_rows, my_routing = own(rank, rows, routing)
        tensors = (my_rows, my_routing.topk_weights, mine.w13, mine.w2, mine.w13_bias, mine.w2_bias)

        held = list(UNEVEN.experts_of(rank))
        of_mine = [part(rank, answer), part(rank, wanted[0]), part(rank, wanted[1]), *(t[held] for t in wanted[2:])]
        for save in ("product", "inputs"):
            got, again = (with_gradients(tensors, my_routing, connection, part(rank, upstream), save) for _ in range(2))
            names = ("out", "rows", "factors", "w13", "w2", "b13", "b2")
            for name, mine_, theirs in zip(names, got, of_mine, strict=True):
                torch.testing.assert_close(
                    mine_, theirs.detach(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
            assert all(map(same_bits, got, again))
        with torch.no_grad():
            assert same_bits(parallel.fused_experts(my_rows, my_routing, mine, connection), got[0])
        if way == "pushed":
            leaf = my_rows.clone().requires_grad_()
            sent = parallel.dispatch(leaf, my_routing, connection)
            parallel.combine(parallel.local_experts(sent, mine), sent)
            refused(lambda leaf=leaf, sent=sent: torch.autograd.grad(sent.rows.sum(), leaf), "what was dispatched last")


def steps(rank: int, count: int) -> None:
    """Random counts, every rank its own, zero included; memory and objects stay what they were."""
    whole = draw_weights(10, 16, 8, torch.float32)
    mine = parallel.slice_experts(whole, UNEVEN, rank)
    ways = [
        parallel.connect(mine, UNEVEN, top_k=2, order="exact"),
        parallel.connect(mine, UNEVEN, top_k=2, way="gathered", max_tokens=12),
        parallel.connect(mine, UNEVEN, top_k=2, way="all_to_all"),
        parallel.connect(mine, UNEVEN, top_k=2, way="symmetric", max_tokens=12),
        parallel.connect(mine, UNEVEN, top_k=2, way="pushed", max_tokens=12),
        parallel.connect(mine, UNEVEN, top_k=2, way="pushed", max_tokens=12, order="exact"),
    ]
    dice = random.Random(rank)
    seen, early = [], max(1, count // 4)
    for step in range(count):
        tokens = dice.randrange(13)
        rows, routing = torch.randn(tokens, 16), draw_routing(tokens, 10, 2, "independent")
        answer = parallel.fused_experts(rows, routing, mine, ways[step % 6], impl="torch")
        if step % 10 == 0:
            wanted = moeyard.fused_experts(rows, routing, whole, impl="torch")
            torch.testing.assert_close(answer, wanted, rtol=0, atol=1e-5)
        if step in (early, count - 1):
            gc.collect()
            held = sum(type(thing) is Tensor for thing in gc.get_objects())
            seen.append((held, int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")))
    assert seen[-1][0] <= seen[0][0] + 2 and seen[-1][1] <= seen[0][1] + 16 * 2**20, seen


@check
def steps_of_random_counts(rank: int) -> None:
    steps(rank, 16)


@check
def many_steps_of_random_counts(rank: int) -> None:
    steps(rank, 10_000)


def model_of(seed: int = 0):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=6, num_experts_per_tok=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


@check
def a_model_is_sharded(rank: int) -> None:
    """On two groups of two ranks: logits of the whole model; each rank keeps half of the experts; gradients flow."""
    groups = [dist.new_group([0, 1], timeout=TIMEOUT), dist.new_group([2, 3], timeout=TIMEOUT)]
    tokens = torch.randint(64, (rank + 1, 11), generator=torch.Generator().manual_seed(rank))
    whole, model = model_of(), model_of()
    other = {"model.layers.1.mlp.experts": Plan(6, ((0, 1, 2), (5, 4, 3)))}
    refused(
        lambda: parallel.shard_model(model, groups[rank // 2], plans=other if rank % 2 else None), "plans", "rank 1"
    )
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == 6  # nothing was changed
    trained = {"training": True, "way": "pushed", "max_tokens": 44} if rank >= 2 else {}
    found = parallel.shard_model(model, groups[rank // 2], **trained)
    assert found[0].connection is found[1].connection
    assert len(found) == 2 and "3 of 6 experts" in str(found[0]), list(map(str, found))
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape[0] == 3 == experts.down_proj.shape[0]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, rtol=0, atol=1e-5)
    refused(lambda: parallel.shard_model(model, groups[rank // 2]), "sharded already")
    if rank >= 2:
        both = [torch.randint(64, (r + 1, 11), generator=torch.Generator().manual_seed(r)) for r in (2, 3)]
        model(tokens).logits.square().sum().backward()
        sum(whole(batch).logits.square().sum() for batch in both).backward()
        wanted = whole.model.layers[0].mlp.experts.down_proj.grad[3 * (rank - 2) : 3 * (rank - 1)]
        torch.testing.assert_close(experts.down_proj.grad, wanted, rtol=1e-4, atol=1e-5)


@check
def a_model_whose_rows_take_turns_is_sharded(rank: int) -> None:
    """gpt-oss: transposed weights with gate and up rows in turn, biases, a clamped gate; five experts on four ranks."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=5, num_experts_per_tok=2, sliding_window=16,
    )  # fmt: skip
    whole, model = GptOssForCausalLM(copy.deepcopy(config)).eval(), GptOssForCausalLM(config).eval()
    for name, parameter in whole.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    model.load_state_dict(whole.state_dict())
    tokens = torch.randint(64, (1, 9 + rank), generator=torch.Generator().manual_seed(rank))
    parallel.shard_model(model, way="symmetric", max_tokens=12)
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (2 if rank == 0 else 1, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, rtol=1e-5, atol=1e-5)


@check
def a_rank_dies(rank: int) -> None:
    """Rank 1 is killed in its 20th step: the others get an error, and soon."""
    endless(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


@check
def a_rank_stalls(rank: int) -> None:
    """Rank 1 stops taking part: the others get an error after the timeout of the group."""
    endless(rank, lambda: time.sleep(15))


def endless(rank: int, last: Callable[[], None]) -> None:
    group = dist.new_group(timeout=datetime.timedelta(seconds=5))
    whole = draw_weights(10, 16, 8, torch.float32)
    mine = parallel.slice_experts(whole, UNEVEN, rank)
    connection = parallel.connect(mine, UNEVEN, top_k=2, group=group)
    rows, routing = torch.randn(6, 16), draw_routing(6, 10, 2, "independent")
    start = time.monotonic()
    for step in range(1_000_000):
        if rank == 1 and step == 20:
            last()
            return
        start = time.monotonic()
        try:
            parallel.fused_experts(rows, routing, mine, connection, impl="torch")
        except RuntimeError as error:
            assert step >= 20 and time.monotonic() - start < 15, error
            return


def run(rank: int, folder: Path, ranks: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    said: dict[str, str] = {}
    try:
        for name in names:
            start = time.monotonic()
            CHECKS[name](rank)
            said[name] = ""
            if rank == 0:
                print(f"{name}: {time.monotonic() - start:.2f} s")
    except BaseException:
        said[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(said))
    sys.stdout.flush()
    os._exit(0)  # without waiting for ranks that have failed


def main() -> None:
    folder, ranks, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "a_model_is_sharded" in names:  # once for all ranks
        import transformers.models.gpt_oss.modeling_gpt_oss
        import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            run(rank, folder, ranks, names)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
