"""Measures experts over several GPUs, beside torch's all_to_all_single and beside one GPU with all experts.

    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py [--out FILE] [--seconds N]
    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py --device cpu --small      # a trial without GPUs

Without --out GPUs write to benchmarks/results/<card>x<ranks>/parallel.json. Sections run in order until the time is
over; what is left out is named. Times are medians over rounds, in microseconds, of the slowest rank. A whole layer is
compared with one GPU's answer before it is timed, and so are rows that arrive by pushes. Calls are made in a row. What
the host takes to launch them is part of the time, but for rows that say "graph": a graph holds 10 such calls. `goals`
of the file says what is to be reached on two H200, and whether it was.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import moeyard
from moeyard import ExpertWeights, Routing, parallel
from moeyard.bench.results import commit_of
from moeyard.parallel.scaling import LAYERS, Layer, predict
from moeyard.quant import FP8_BLOCK, ExpertScales, scale_shapes

ROUNDS = 7
IN_GRAPH = 10
"""Calls of a graph."""
RESULTS = Path(__file__).parent / "results"
MANY = "4096 tokens x 4096 bf16, top_k 8"
FEW = "64 tokens x 4096 bf16, top_k 8"
GOALS = {
    (MANY, "dispatch, pushed, graph"): 90.0, (MANY, "combine, pushed, graph"): 95.0,
    (MANY, "combine, exact, pushed, graph"): 330.0, (FEW, "dispatch, pushed, graph"): 8.0,
}  # fmt: skip
"""Microseconds, on two H200. Layers: 1.8 times one GPU."""
LEAST_OVER_ONE_GPU = 1.8
WAIT = timedelta(seconds=90)
"""For a rank that does not answer."""


class Bench(NamedTuple):
    """A rank, and what it found."""

    device: torch.device
    rank: int
    ranks: int
    deadline: float
    rows: list[dict[str, Any]]
    pushes: bool
    """Whether pushed rows are measured, too."""

    def over(self) -> bool:
        """Whether the time of rank 0 is over, which all ranks hear."""
        told = torch.tensor([time.monotonic() > self.deadline], dtype=torch.int32, device=self.device)
        dist.broadcast(told, 0)
        return bool(told)

    def time_us(self, call: Callable[[], object], calls: int) -> float:
        """The median over rounds of the mean of `calls` calls in a row, of the slowest rank."""
        times = []
        call()
        for _ in range(ROUNDS):
            dist.barrier()
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                for _ in range(calls):
                    call()
                end.record()
                torch.cuda.synchronize()
                spent = 1e3 * start.elapsed_time(end) / calls
            else:
                begin = time.perf_counter()
                for _ in range(calls):
                    call()
                spent = 1e6 * (time.perf_counter() - begin) / calls
            slowest = torch.tensor([spent], dtype=torch.float64, device=self.device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            times.append(float(slowest))
        return statistics.median(times)

    def graph_us(self, call: Callable[[], object], calls: int) -> float:
        """The time of a call in a CUDA graph."""
        return self.time_us(captured(call), max(1, calls // 4)) / IN_GRAPH

    def note(self, section: str, name: str, time_us: float | None, **more: Any) -> None:
        """One row of the result."""
        row = {"section": section, "name": name, "time_us": None if time_us is None else round(time_us, 2), **more}
        self.rows.append(row)
        if self.rank == 0:
            print(f"{section}: {name}: {row['time_us']} us {more or ''}", flush=True)

    @contextmanager
    def said(self, section: str, name: str) -> Iterator[None]:
        """Notes what could not be measured, which is then so on every rank, and goes on."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError) as error:
            self.note(section, f"{name}: failed", None, error=str(error)[:500])


def captured(call: Callable[[], object], calls: int = IN_GRAPH) -> Callable[[], object]:
    """A CUDA graph of so many calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


def draw_experts(layer: Layer, chosen: tuple[int, ...], device: torch.device) -> ExpertWeights:
    """Experts drawn one by one, each from its own seed: every rank draws an expert alike."""
    shapes = (2 * layer.size, layer.hidden), (layer.hidden, layer.size)
    dtype = torch.float8_e4m3fn if layer.fp8 else torch.bfloat16
    w13, w2 = (torch.empty((len(chosen), *shape), dtype=dtype, device=device) for shape in shapes)
    for place, expert in enumerate(chosen):
        generator = torch.Generator(device).manual_seed(expert)
        for held, (rows, columns) in zip((w13, w2), shapes, strict=True):
            drawn = torch.randn(rows, columns, generator=generator, device=device)
            drawn = (drawn * 100).clamp_(-448, 448) if layer.fp8 else drawn / columns**0.5
            held[place] = drawn.to(dtype)
    if not layer.fp8:
        return ExpertWeights(w13, w2)
    first, second = scale_shapes(FP8_BLOCK, layer.hidden, layer.size, True)
    scales = ExpertScales(
        torch.full((len(chosen), *first), 0.01 / layer.hidden**0.5, device=device),
        torch.full((len(chosen), *second), 0.01 / layer.size**0.5, device=device),
    )
    return ExpertWeights(w13, w2, scheme=FP8_BLOCK, scales=scales)


def draw_tokens(layer: Layer, tokens: int, bench: Bench) -> tuple[Tensor, Routing]:
    """The tokens of all ranks and where they go, alike on every rank: experts are chosen evenly."""
    generator = torch.Generator(bench.device).manual_seed(1)
    rows = torch.randn(tokens * bench.ranks, layer.hidden, generator=generator, device=bench.device)
    scores = torch.rand(tokens * bench.ranks, layer.experts, generator=generator, device=bench.device)
    chosen = scores.topk(layer.top_k)
    return rows.to(torch.bfloat16), Routing(torch.softmax(chosen.values, 1), chosen.indices.int())


def own(bench: Bench, tokens: int, rows: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """The tokens of this rank."""
    mine = slice(bench.rank * tokens, (bench.rank + 1) * tokens)
    return rows[mine], Routing(routing.topk_weights[mine], routing.topk_ids[mine])


def dispatch(rows: Tensor, routing: Routing, connection: parallel.Connection) -> parallel.Dispatched:
    """A dispatch alone, over and over, which a connection with shared memory else refuses: ranks may read old rows."""
    for shared in (connection.window, connection.pushes):
        if shared is not None:
            shared.waiting = False
    return parallel.dispatch(rows, routing, connection)


def ways(tokens: int) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Ways by name, with what `connect` is told; the pushed one last, as its errors end a process."""
    fixed = {"max_tokens": tokens}
    return (
        ("all_to_all", {"way": "all_to_all"}),
        ("gathered", {"way": "gathered", **fixed}),
        ("symmetric", {"way": "symmetric", **fixed}),
        ("pushed", {"way": "pushed", **fixed}),
    )


def moved(tokens: int) -> tuple[tuple[str, dict[str, Any]], ...]:
    """What `movement` measures: ways, and both ways of exact sums."""
    *others, pushed = ways(tokens)
    exact = ("exact", {"order": "exact"}), ("exact, pushed", {**pushed[1], "order": "exact"})
    return *others, exact[0], pushed, exact[1]


def torch_movement(bench: Bench, layer: Layer, tokens: int, calls: int) -> None:
    """torch's collectives, for as many bytes as rows have."""
    section = section_of(layer, tokens)
    rows, _ = own(bench, tokens, *draw_tokens(layer, tokens, bench))
    even = rows[: tokens // bench.ranks * bench.ranks].contiguous()
    got, wide = torch.empty_like(even), rows.new_empty((bench.ranks * tokens, layer.hidden))
    bench.note(section, "torch: all_to_all_single of the rows", bench.time_us(
        lambda: dist.all_to_all_single(got, even), calls))  # fmt: skip
    bench.note(section, "torch: all_gather of the rows", bench.time_us(
        lambda: dist.all_gather_into_tensor(wide, rows), calls))  # fmt: skip


def section_of(layer: Layer, tokens: int) -> str:
    """The name of a section without experts."""
    return f"{tokens} tokens x {layer.hidden} {'e4m3' if layer.fp8 else 'bf16'}, top_k {layer.top_k}"


def movement(bench: Bench, layer: Layer, tokens: int, calls: int, pushed: bool) -> None:
    """Dispatch and combine without experts, of pushed rows or of the other ways."""
    section, plan = section_of(layer, tokens), parallel.contiguous_plan(layer.experts, bench.ranks)
    mine = draw_experts(layer._replace(size=128 if layer.fp8 else 8), plan.experts_of(bench.rank), bench.device)
    everything = draw_tokens(layer, tokens, bench)
    rows, routing = own(bench, tokens, *everything)
    for name, options in moved(tokens):
        if (options.get("way") == "pushed") != pushed or (layer.fp8 and "order" in options):
            continue
        with bench.said(section, name):
            connection = parallel.connect(mine, plan, top_k=layer.top_k, dtype=torch.bfloat16, **options)
            send = partial(dispatch, rows, routing, connection)
            sent = send()
            if pushed and not layer.fp8:
                check_arrived(sent, *everything)
            count = sum(sent.home.taken) if sent.home else len(sent.rows)
            count = count if sent.routes is None else sent.routes.capacity
            back = torch.randn(count, layer.hidden, device=bench.device).to(torch.bfloat16)
            fetch = partial(parallel.combine, back, sent)
            if "exact" not in name:
                bench.note(section, f"dispatch, {name}", bench.time_us(send, calls))
            bench.note(section, f"combine, {name}", bench.time_us(fetch, calls))
            if "max_tokens" in options and bench.device.type == "cuda":
                bench.note(section, f"dispatch, {name}, graph", bench.graph_us(send, calls))
                bench.note(section, f"combine, {name}, graph", bench.graph_us(fetch, calls))
                bench.note(section, f"dispatch and combine, {name}, graph", bench.graph_us(
                    lambda send=send, back=back: parallel.combine(back, send()), calls))  # fmt: skip


def check_arrived(sent: parallel.Dispatched, rows: Tensor, routing: Routing) -> None:
    """ValueError unless all rows that have an expert here are those that were sent."""
    wanted = sent.connection.expert_map[routing.topk_ids.long()] >= 0
    there = wanted.any(1)
    got = sent.connection.expert_map[sent.routing.topk_ids.long().clamp(min=0)] >= 0
    right = torch.equal(sent.rows[there], rows[there]) and torch.equal(got & (sent.routing.topk_ids >= 0), wanted)
    if not right:
        raise ValueError("wrong: rows that arrived are not those that were sent")


def whole_layer(bench: Bench, layer: Layer, tokens: int, calls: int) -> None:
    """A layer over all ranks and on one GPU, at the same global batch."""
    section = f"{layer.name}, {tokens} tokens per rank"
    plan = parallel.contiguous_plan(layer.experts, bench.ranks)
    rows, routing = draw_tokens(layer, tokens, bench)
    call_alone = partial(
        moeyard.fused_experts, rows, routing, draw_experts(layer, tuple(range(layer.experts)), bench.device)
    )
    plain, alone = call_alone(), bench.time_us(call_alone, calls)
    bench.note(section, "one GPU", alone)
    in_graph = alone
    if bench.device.type == "cuda":
        in_graph = bench.graph_us(call_alone, calls)
        bench.note(section, "one GPU, graph", in_graph)
    del call_alone  # and with it all weights
    mine = draw_experts(layer, plan.experts_of(bench.rank), bench.device)
    my_rows, my_routing = own(bench, tokens, rows, routing)
    wanted = plain[bench.rank * tokens : (bench.rank + 1) * tokens].float()
    asked = [*ways(tokens)]
    if layer.fp8:
        asked += [(f"{n}, rows as bf16", {**o, "send_codes": False}) for n, o in asked if n in ("gathered", "pushed")]
    for name, options in sorted(asked, key=lambda one: "pushed" in one[0]):  # those last
        if "pushed" in name and not bench.pushes:
            continue
        with bench.said(section, name):
            connection = parallel.connect(mine, plan, top_k=layer.top_k, dtype=torch.bfloat16, **options)
            call = partial(parallel.fused_experts, my_rows, my_routing, mine, connection)
            error = (call().float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            dist.all_reduce(error, dist.ReduceOp.MAX)
            if not float(error) < 0.02:
                raise ValueError(f"wrong: relative error {float(error):.3f}")
            sent = dispatch(my_rows, my_routing, connection)
            local = bench.time_us(partial(parallel.local_experts, sent, mine), calls)
            parallel.combine(parallel.local_experts(sent, mine), sent)
            spent = bench.time_us(call, calls)
            more = {"experts_us": round(local, 2), "relative_error": float(error)}
            bench.note(section, name, spent, over_one_gpu=round(alone / spent, 3), **more)
            if "max_tokens" in options and bench.device.type == "cuda":
                local = bench.graph_us(partial(parallel.local_experts, sent, mine), calls)
                spent = bench.graph_us(call, calls)
                more = {"experts_us": round(local, 2), "exposed_share": round(1 - local / spent, 3)}
                bench.note(section, f"{name}, graph", spent, over_one_gpu=round(in_graph / spent, 3), **more)
    told = predict(layer, bench.ranks, tokens)
    bench.note(section, "predicted, nothing overlaps", told.total_us, over_one_gpu=round(told.speedup, 3))


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is to be reached, what was measured, and whether that is enough; of what was measured alone."""
    found: list[dict[str, Any]] = []
    for row in rows:
        key, time_us, ratio = (row["section"], row["name"]), row["time_us"], row.get("over_one_gpu")
        if time_us is None:
            continue
        if key in GOALS:
            found.append({"what": ": ".join(key), "goal_us": GOALS[key], "time_us": time_us,
                          "met": time_us <= GOALS[key]})  # fmt: skip
        elif row["name"] == "pushed, graph" and ratio is not None:
            found.append({"what": ": ".join(key), "goal_over_one_gpu": LEAST_OVER_ONE_GPU, "over_one_gpu": ratio,
                          "met": ratio >= LEAST_OVER_ONE_GPU})  # fmt: skip
            if "4096 tokens" in row["section"]:
                found.append({"what": ": ".join(key), "goal_exposed_share": 0.1, "exposed_share": row["exposed_share"],
                              "met": row["exposed_share"] <= 0.1})  # fmt: skip
    return found


def write(bench: Bench, out: Path | None, left_out: list[str]) -> None:
    """The file of rank 0, with what was measured so far."""
    if bench.rank or out is None:
        return
    kind = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    content = {
        "schema": 1, "machine": f"{kind} x {bench.ranks}", "torch": torch.__version__,
        "commit": commit_of(Path(moeyard.__file__).parent / "bench"), "rounds": ROUNDS, "rows": bench.rows,
        "goals": goals(bench.rows), "left_out": left_out,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Joins the ranks that torchrun started, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where rank 0 writes the JSON, else as above")
    parser.add_argument("--seconds", type=float, default=240.0, help="no section begins after these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-pushes", dest="pushes", action="store_false", help="all but rows that kernels push")
    parser.add_argument("--small", action="store_true", help="small sizes, for a trial")
    given = parser.parse_args()
    os.environ["NCCL_NVLS_ENABLE"], os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "0", "1"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if given.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=WAIT)
    else:
        dist.init_process_group("gloo")
    out = given.out
    if out is None and device.type == "cuda":
        card = torch.cuda.get_device_name().removeprefix("NVIDIA ").lower().replace(" ", "-")
        out = RESULTS / f"{card}x{dist.get_world_size()}" / "parallel.json"
    bench = Bench(device, dist.get_rank(), dist.get_world_size(), time.monotonic() + given.seconds, [], given.pushes)
    layers, many, few = LAYERS, 4096, 64
    if given.small:
        layers = tuple(layer._replace(experts=8, top_k=2, hidden=256, size=128) for layer in LAYERS[:2])
        many, few = 48, 6
    todo: list[tuple[str, Callable[[], None]]] = []
    for tokens, calls in ((many, 20), (few, 60)):
        todo.append((f"torch, {tokens}", partial(torch_movement, bench, layers[0], tokens, calls)))
    for pushed in (False, True)[: 1 + bench.pushes]:  # pushes last: errors of theirs end a process
        for layer, tokens, calls in ((layers[0], many, 20), (layers[0], few, 60), (layers[1], many, 20)):
            name = f"{'pushes' if pushed else 'movement'}, {section_of(layer, tokens)}"
            todo.append((name, partial(movement, bench, layer, tokens, calls, pushed)))
    for tokens in (few, many):
        for layer in layers:
            todo.append((f"{layer.name}, {tokens} tokens", partial(whole_layer, bench, layer, tokens, 12)))
    left_out: list[str] = []
    for name, section in todo:
        if bench.over():
            left_out.append(name)
            continue
        section()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write(bench, out, left_out)
    write(bench, out, left_out)
    if bench.rank == 0:
        for goal in goals(bench.rows):
            print("met: " if goal["met"] else "missed: ", goal)
        print(f"left out: {left_out or 'nothing'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
