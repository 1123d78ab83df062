"""Pushed rows of two ranks that are two streams of one process and share a GPU: kernels, graphs, waits that end."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moeyard import ExpertWeights, Routing, moe_align_block_size, parallel
from moeyard.cuda.push.launchers import back_recipe, lost_rank, push_recipe
from moeyard.cuda.push.plan import places_of
from moeyard.cuda.runtime.launch import launch_of
from moeyard.dispatch import table
from moeyard.parallel import Connection, Plan
from moeyard.parallel.plan import map_of, tables_of
from moeyard.parallel.pushed import Pushes, launch_tables, push_sizes
from moeyard.parallel.ways import format_of_rows
from moeyard.testing import draw_routing, draw_weights, python, same_bits

REFUSAL = table.explain("permute", "cuda").reasons["cuda"]
pytestmark = pytest.mark.skipif(REFUSAL != "chosen", reason=f"cuda: {REFUSAL}")
PLAN = Plan(7, ((0, 1, 2), (3, 4, 5, 6, 0)))
COUNTS, TOP_K, HIDDEN = (37, 11), 4, 512


def connections(whole: ExpertWeights, order: str, timeout_ms: int = 30_000) -> list[Connection]:
    """Two ranks whose memory is that of one GPU; their kernels are loaded, as that may wait for running ones."""
    device, dtype = torch.device("cuda", torch.cuda.current_device()), whole.w13.dtype
    form = format_of_rows(None, HIDDEN, dtype, False, True)
    sizes = push_sizes(2, TOP_K, HIDDEN, dtype, form, max(COUNTS), order)
    for recipe in (push_recipe(torch.int32), back_recipe(sizes, True, dtype)):
        launch_of(recipe, torch.cuda.current_device())
    moe_align_block_size(
        torch.zeros(2 * max(COUNTS), TOP_K, dtype=torch.int32, device=device), num_experts=8, block_size=1,
        expert_map=torch.zeros(8, dtype=torch.int32, device=device), num_local_experts=1,
    )  # fmt: skip
    places = places_of(sizes)
    memory = [torch.zeros(places.total, dtype=torch.uint8, device=device) for _ in range(2)]
    tables, made = tables_of(PLAN, device), []
    for rank in range(2):
        mapping = map_of(PLAN, rank, device)
        launches = launch_tables(memory, PLAN, rank, timeout_ms, device)
        here = torch.where(mapping >= 0, 0, -1).int()
        none: Any = None
        side = torch.cuda.Stream()
        pushes = Pushes(none, memory, sizes, places, PLAN, tables, rank, dtype, launches, side, here, timeout_ms)
        told = parallel.explain(
            PLAN, top_k=TOP_K, hidden_size=HIDDEN, dtype=dtype, max_tokens=max(COUNTS), order=order, way="pushed"
        )
        made.append(Connection(
            none, rank, PLAN, TOP_K, HIDDEN, dtype, device, None, order, max(COUNTS), False, False, form, told, tables,
            mapping, None, pushes,
        ))  # fmt: skip
    return made


def drawn(dtype: torch.dtype) -> tuple[Tensor, Routing, ExpertWeights, list[ExpertWeights]]:
    torch.manual_seed(0)
    rows = torch.randn(sum(COUNTS), HIDDEN, device="cuda").to(dtype)
    routing = draw_routing(sum(COUNTS), 7, TOP_K, "independent", device="cuda")
    whole = draw_weights(7, HIDDEN, 256, dtype, device="cuda")
    return rows, routing, whole, [parallel.slice_experts(whole, PLAN, rank) for rank in range(2)]


def own(rank: int, rows: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    mine = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    return rows[mine], Routing(routing.topk_weights[mine], routing.topk_ids[mine])


def by_phase(made: list[Connection], rows: Tensor, routing: Routing, held: list[ExpertWeights]) -> list[Tensor]:
    """Both ranks' dispatch side by side, then experts, then both ranks' combine."""
    streams = [torch.cuda.Stream() for _ in made]
    outs = [torch.empty(count, HIDDEN, dtype=rows.dtype, device="cuda") for count in COUNTS]
    given = [own(rank, rows, routing) for rank in range(2)]
    torch.cuda.synchronize()
    sent = []
    for rank, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            sent.append(parallel.dispatch(*given[rank], made[rank]))
    torch.cuda.synchronize()
    parts = [parallel.local_experts(sent[rank], held[rank]).contiguous() for rank in range(2)]
    torch.cuda.synchronize()
    for rank, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            parallel.combine(parts[rank], sent[rank], out=outs[rank])
    torch.cuda.synchronize()
    return outs


@pytest.mark.parametrize("order", ["grouped", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_two_streams(dtype: torch.dtype, order: str) -> None:
    rows, routing, whole, held = drawn(dtype)
    made = connections(whole, order)
    for turn in range(3):
        given = Routing(routing.topk_weights, routing.topk_ids.roll(turn, 0))
        wanted = parallel.experts_in_order(
            rows * (1 + turn), given, whole, PLAN, tokens_per_rank=COUNTS, max_tokens=max(COUNTS), order=order
        )
        got = torch.cat(by_phase(made, rows * (1 + turn), given, held))
        torch.testing.assert_close(got, wanted)
        if order == "grouped":
            assert same_bits(got, wanted), turn


def test_graphs_of_two_streams() -> None:
    """Replayed many times without a wait in between: epochs take the place of resets."""
    rows, routing, whole, held = drawn(torch.bfloat16)
    made = connections(whole, "grouped")
    wanted = by_phase(made, rows, routing, held)
    graphs, outs, streams = [], [], [torch.cuda.Stream() for _ in made]
    given = [own(rank, rows.clone(), routing) for rank in range(2)]
    for rank in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append(parallel.fused_experts(*given[rank], held[rank], made[rank]))
        graphs.append(graph)
    for turn in range(3):
        for rank in range(2):
            given[rank][0].copy_(own(rank, rows * (1 + turn), routing)[0])
        torch.cuda.synchronize()
        for _ in range(100):
            for rank, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    graphs[rank].replay()
        torch.cuda.synchronize()
        if not turn:
            assert all(map(same_bits, outs, wanted))
    wanted = by_phase(made, rows * 3, routing, held)
    assert all(map(same_bits, outs, wanted))


def lonely() -> None:
    """A rank whose peer does not answer: an error on the host, in words."""
    rows, routing, whole, _ = drawn(torch.bfloat16)
    connection = connections(whole, "grouped", 500)[0]
    parallel.dispatch(*own(0, rows, routing), connection)
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        words = lost_rank(connection.pushes.launches)
        print("told:", words, "|", str(error).splitlines()[0])


def test_a_rank_alone_ends_in_an_error() -> None:
    """In a process of its own, whose GPU is of no use behind it."""
    done = python("-c", f"import sys; sys.path.insert(0, {str(__file__.rpartition('/')[0])!r})\n"
                        "import test_push_gpu; test_push_gpu.lonely()")  # fmt: skip
    assert "told: rank 1 of the group did not answer a dispatch of rank 0 within" in done.stdout, done.stderr
