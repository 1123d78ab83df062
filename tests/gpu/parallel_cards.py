"""What tests/gpu/test_parallel_gpu.py runs in one process per GPU, joined by NCCL.

    python tests/gpu/parallel_cards.py FOLDER RANKS CHECK...

With more ranks than GPUs, ranks share GPUs and are joined by gloo: for checks of pushed rows alone.
Rank r leaves FOLDER/r.json: for each check what went wrong, or "".
"""

import datetime
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import moeyard
from moeyard import ExpertWeights, Routing, parallel
from moeyard.parallel import Connection, Plan
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL
from moeyard.testing import draw_quantised, draw_routing, draw_weights, same_bits
from moeyard.testing.quantised import moved_to

CHECKS: dict[str, Callable[[int, int], None]] = {}


def check(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    CHECKS[function.__name__] = function
    return function


def counts_of(ranks: int, tokens: int) -> list[int]:
    """Other counts on every rank; none on the last one of several where tokens are few."""
    counts = [tokens + 13 * rank for rank in range(ranks)]
    return [*counts[:-1], 0] if tokens < 20 else counts


def drawn(counts: list[int], experts: int, hidden: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Routing]:
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), hidden).to(dtype).cuda()
    return rows, draw_routing(sum(counts), experts, top_k, "independent", device="cuda")


def part(rank: int, counts: list[int], tensor: Tensor) -> Tensor:
    return tensor[sum(counts[:rank]) : sum(counts[: rank + 1])]


def own(rank: int, counts: list[int], rows: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    mine = [part(rank, counts, t) for t in (rows, routing.topk_weights, routing.topk_ids)]
    return mine[0], Routing(mine[1], mine[2])


def held_by(rank: int, whole: ExpertWeights, plan: Plan, **options: object) -> tuple[ExpertWeights, Connection]:
    mine = parallel.slice_experts(whole, plan, rank)
    return mine, parallel.connect(mine, plan, top_k=4, **options)


def plan_of(experts: int, ranks: int) -> Plan:
    """Uneven, with a replica of expert 0 on the last rank."""
    parts = [list(part) for part in parallel.contiguous_plan(experts, ranks).experts]
    parts[-1].insert(0, parts[0][0])
    return Plan(experts, tuple(map(tuple, parts)))


@check
def sums_are_those_of_one_gpu(rank: int, ranks: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for tokens in (3, 64, 700):
            counts = counts_of(ranks, tokens)
            rows, routing = drawn(counts, 16, 512, 4, dtype)
            whole, plan = draw_weights(16, 512, 256, dtype, device="cuda"), plan_of(16, ranks)
            for options, order in (
                ({"way": "all_to_all"}, "grouped"), ({"way": "gathered", "max_tokens": max(counts)}, "grouped"),
                ({"way": "symmetric", "max_tokens": max(counts)}, "grouped"),
                ({"order": "exact"}, "exact"),
            ):  # fmt: skip
                told = {"tokens_per_rank": counts, "order": order, "max_tokens": options.get("max_tokens")}
                wanted = parallel.experts_in_order(rows, routing, whole, plan, **told)
                mine, connection = held_by(rank, whole, plan, **options)
                got = parallel.fused_experts(*own(rank, counts, rows, routing), mine, connection)
                again = parallel.fused_experts(*own(rank, counts, rows, routing), mine, connection)
                assert same_bits(got, again), ("again", dtype, tokens, options)
                torch.testing.assert_close(got, part(rank, counts, wanted))
                assert same_bits(got, part(rank, counts, wanted)), ("one GPU", dtype, tokens, options)


@check
def exact_sums_are_those_of_fused_experts(rank: int, ranks: int) -> None:
    """Of bfloat16 beyond a few tokens: rows rounded, weighted and added in k order."""
    counts = counts_of(ranks, 700)
    rows, routing = drawn(counts, 16, 512, 4, torch.bfloat16)
    whole, plan = draw_weights(16, 512, 256, torch.bfloat16, device="cuda"), plan_of(16, ranks)
    mine, connection = held_by(rank, whole, plan, order="exact")
    got = parallel.fused_experts(*own(rank, counts, rows, routing), mine, connection)
    assert same_bits(got, part(rank, counts, moeyard.fused_experts(rows, routing, whole)))


@check
def quantised_rows_cross(rank: int, ranks: int) -> None:
    for scheme in (FP8_BLOCK, FP8_CHANNEL):
        for tokens in (5, 300):
            counts = counts_of(ranks, tokens)
            rows, routing = drawn(counts, 8, 512, 4, torch.bfloat16)
            whole, plan = moved_to(draw_quantised(8, 512, 256, scheme), torch.device("cuda")), plan_of(8, ranks)
            for options in (
                {"way": "all_to_all"}, {"way": "gathered", "max_tokens": max(counts)},
                {"way": "symmetric", "max_tokens": max(counts)},
            ):  # fmt: skip
                told = {"tokens_per_rank": counts, "max_tokens": options.get("max_tokens")}
                wanted = parallel.experts_in_order(rows, routing, whole, plan, **told)
                mine, connection = held_by(rank, whole, plan, **options)
                assert connection.rows.quantised
                got = parallel.fused_experts(*own(rank, counts, rows, routing), mine, connection)
                torch.testing.assert_close(got, part(rank, counts, wanted))
                assert same_bits(got, part(rank, counts, wanted)), (scheme, tokens, options)


@check
def gradients_are_those_of_one_gpu(rank: int, ranks: int) -> None:
    counts = counts_of(ranks, 200)
    rows, routing = drawn(counts, 8, 256, 4, torch.float32)
    whole, plan = draw_weights(8, 256, 128, torch.float32, device="cuda"), parallel.contiguous_plan(8, ranks)
    upstream = torch.randn_like(rows)
    dist.broadcast(upstream, 0)
    given = [t.clone().requires_grad_() for t in (rows, routing.topk_weights, whole.w13, whole.w2)]
    answer = parallel.experts_in_order(given[0], Routing(given[1], routing.topk_ids), ExpertWeights(*given[2:]), plan)
    wanted = torch.autograd.grad(answer, given, upstream)
    my_rows, my_routing = own(rank, counts, rows, routing)
    for options in ({}, {}, {"way": "pushed", "max_tokens": max(counts)}, {"way": "pushed", "max_tokens": 999}):
        mine, connection = held_by(rank, whole, plan, training=True, **options)
        given = [t.clone().requires_grad_() for t in (my_rows, my_routing.topk_weights, mine.w13, mine.w2)]
        local = Routing(given[1], my_routing.topk_ids)
        answer = parallel.fused_experts(given[0], local, ExpertWeights(*given[2:]), connection)
        got = torch.autograd.grad(answer, given, part(rank, counts, upstream))
        experts = list(plan.experts_of(rank))
        theirs = [part(rank, counts, wanted[0]), part(rank, counts, wanted[1]), *(t[experts] for t in wanted[2:])]
        for one, other in zip(got, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@check
def graphs_replay_on_all_ranks(rank: int, ranks: int) -> None:
    replays(rank, ranks, "gathered")


@check
def graphs_replay_over_symmetric_memory(rank: int, ranks: int) -> None:
    replays(rank, ranks, "symmetric")


def replays(rank: int, ranks: int, way: str) -> None:
    """Such a call reads nothing back, so that it is captured; a replay has the bits of an eager call."""
    counts = [64] * ranks
    rows, routing = drawn(counts, 16, 512, 4, torch.bfloat16)
    whole, plan = draw_weights(16, 512, 256, torch.bfloat16, device="cuda"), plan_of(16, ranks)
    mine, connection = held_by(rank, whole, plan, way=way, max_tokens=64)
    my_rows, my_routing = own(rank, counts, rows, routing)
    held = my_rows.clone(), Routing(my_routing.topk_weights.clone(), my_routing.topk_ids.clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            parallel.fused_experts(*held, mine, connection)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = parallel.fused_experts(*held, mine, connection)
    for turn in range(3):
        held[0].copy_(my_rows * (1 + turn))
        held[1].topk_ids.copy_(my_routing.topk_ids.roll(turn, 0))
        for _ in range(50):  # ranks drift apart
            graph.replay()
        torch.cuda.synchronize()
        eager = parallel.fused_experts(held[0], held[1], mine, connection)
        assert same_bits(out, eager), turn


@check
def pushed_rows_are_those_of_one_gpu(rank: int, ranks: int) -> None:
    """Both orders, with ranks of other counts, a replica, ids of both widths, and calls in a row without a wait."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens in (3, 64, 700):
            counts = counts_of(ranks, tokens)
            rows, routing = drawn(counts, 16, 512, 4, dtype)
            whole, plan = draw_weights(16, 512, 256, dtype, device="cuda"), plan_of(16, ranks)
            my_rows, my_routing = own(rank, counts, rows, routing)
            for order in ("grouped", "exact"):
                told = {"tokens_per_rank": counts, "order": order, "max_tokens": max(counts)}
                wanted = part(rank, counts, parallel.experts_in_order(rows, routing, whole, plan, **told))
                mine, connection = held_by(rank, whole, plan, way="pushed", order=order, max_tokens=max(counts))
                for ids in (my_routing.topk_ids, my_routing.topk_ids.long()):
                    given = Routing(my_routing.topk_weights, ids)
                    many = [parallel.fused_experts(my_rows, given, mine, connection) for _ in range(20)]
                    assert all(same_bits(got, many[0]) for got in many), ("again", dtype, tokens, order)
                    torch.testing.assert_close(many[0], wanted)
                    if order == "grouped" or (tokens == 700 and dtype == torch.bfloat16):
                        assert same_bits(many[0], wanted), ("one GPU", dtype, tokens, order)
                shared = torch.randn(512, 512, device="cuda").to(dtype)
                beside = parallel.fused_experts(
                    my_rows, my_routing, mine, connection, meanwhile=lambda rows=my_rows, shared=shared: rows @ shared
                )
                assert same_bits(beside, many[0] + my_rows @ shared), ("meanwhile", dtype, tokens, order)


@check
def pushed_codes_are_those_of_one_gpu(rank: int, ranks: int) -> None:
    for scheme in (FP8_BLOCK, FP8_CHANNEL):
        for tokens in (5, 300):
            counts = counts_of(ranks, tokens)
            rows, routing = drawn(counts, 8, 512, 4, torch.bfloat16)
            whole, plan = moved_to(draw_quantised(8, 512, 256, scheme), torch.device("cuda")), plan_of(8, ranks)
            told = {"tokens_per_rank": counts, "max_tokens": max(counts)}
            wanted = part(rank, counts, parallel.experts_in_order(rows, routing, whole, plan, **told))
            mine, connection = held_by(rank, whole, plan, way="pushed", max_tokens=max(counts))
            assert connection.rows.quantised
            got = parallel.fused_experts(*own(rank, counts, rows, routing), mine, connection)
            torch.testing.assert_close(got, wanted)
            assert same_bits(got, wanted), (scheme, tokens)


@check
def graphs_replay_over_pushes(rank: int, ranks: int) -> None:
    replays(rank, ranks, "pushed")


@check
def a_rank_that_does_not_answer_is_an_error(rank: int, ranks: int) -> None:
    """Within the timeout of the group, in words; the others' GPUs work on."""
    group = dist.new_group(list(range(ranks)), timeout=datetime.timedelta(seconds=5), backend="gloo")
    whole, plan = draw_weights(8, 256, 128, torch.bfloat16, device="cuda"), plan_of(8, ranks)
    mine = parallel.slice_experts(whole, plan, rank)
    connection = parallel.connect(mine, plan, top_k=4, group=group, way="pushed", max_tokens=9)
    rows, routing = own(rank, [9] * ranks, *drawn([9] * ranks, 8, 256, 4, torch.bfloat16))
    parallel.fused_experts(rows, routing, mine, connection)
    torch.cuda.synchronize()
    dist.barrier(group)
    if rank == 1:
        time.sleep(15)
        torch.cuda.synchronize()
        return
    begin = time.monotonic()
    parallel.dispatch(rows, routing, connection)
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        assert 4 < time.monotonic() - begin < 12
    else:
        raise AssertionError("no error")
    connection.pushes.waiting = False
    try:
        parallel.dispatch(rows, routing, connection)
    except RuntimeError as error:
        assert "rank 1 of the group did not answer a dispatch" in str(error), error
    else:
        raise AssertionError("not told")


@check
def differences_are_refused(rank: int, ranks: int) -> None:
    mine = parallel.slice_experts(draw_weights(8, 64, 32, torch.bfloat16, device="cuda"), plan_of(8, ranks), rank)
    try:
        parallel.connect(mine, plan_of(8, ranks), top_k=4 if rank else 3)
    except ValueError as error:
        assert "top_k" in str(error) and "rank 1" in str(error), error
    else:
        raise AssertionError("not refused")


def run(rank: int, folder: Path, ranks: int, names: list[str]) -> None:
    said: dict[str, str] = {}
    try:
        crowded = ranks > torch.cuda.device_count()  # ranks share a GPU, which NCCL refuses
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        gloo = crowded or "a_rank_that_does_not_answer_is_an_error" in names  # NCCL ends a process whose GPU is lost
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group(
            "gloo" if gloo else "nccl", store=store, rank=rank, world_size=ranks,
            timeout=datetime.timedelta(seconds=60), device_id=None if gloo else device,
        )  # fmt: skip
        for name in names:
            said[name] = "did not end"
            CHECKS[name](rank, ranks)
            said[name] = ""
            dist.barrier()
    except BaseException:
        said[names[max(0, len(said) - 1)]] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(said))
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    folder, ranks, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(CHECKS)
    os.environ["NCCL_NVLS_ENABLE"], os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "0", "1"
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")  # for ranks that share a GPU
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
