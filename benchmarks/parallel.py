"""Measures experts over several GPUs, beside torch's all_to_all_single and beside one GPU with all experts.

    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py --out parallel.json [--seconds N]
    torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py --device cpu --small      # a trial without GPUs

Sections run in order until the time is over; what is left out is named. Times are medians over rounds, in microseconds,
of the slowest rank. A whole layer is compared with one GPU's answer before it is timed. Calls are made in a row. What
the host takes to launch them is part of the time, but for rows that say "graph".
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class Bench(NamedTuple):
    """A rank, and what it found."""

    device: torch.device
    rank: int
    ranks: int
    deadline: float
    rows: list[dict[str, Any]]

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


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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
    if connection.window is not None:
        connection.window.waiting = False
    return parallel.dispatch(rows, routing, connection)


def ways(tokens: int) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Ways by name, with what `connect` is told."""
    fixed = {"max_tokens": tokens}
    return (
        ("all_to_all", {"way": "all_to_all"}),
        ("gathered", {"way": "gathered", **fixed}),
        ("symmetric", {"way": "symmetric", **fixed}),
    )


def movement(bench: Bench, layer: Layer, tokens: int, calls: int) -> None:
    """Dispatch and combine without experts, and torch's collectives that move as many bytes."""
    section = f"{tokens} tokens x {layer.hidden} bf16, top_k {layer.top_k}"
    plan = parallel.contiguous_plan(layer.experts, bench.ranks)
    few = layer._replace(hidden=layer.hidden, size=8)  # no product is timed here
    mine = draw_experts(few._replace(fp8=False), plan.experts_of(bench.rank), bench.device)
    rows, routing = own(bench, tokens, *draw_tokens(layer, tokens, bench))
    even = rows[: tokens // bench.ranks * bench.ranks].contiguous()
    got = torch.empty_like(even)
    bench.note(section, "torch: all_to_all_single of the rows", bench.time_us(
        lambda: dist.all_to_all_single(got, even), calls))  # fmt: skip
    wide = rows.new_empty((bench.ranks * tokens, layer.hidden))
    bench.note(section, "torch: all_gather of the rows", bench.time_us(
        lambda: dist.all_gather_into_tensor(wide, rows), calls))  # fmt: skip
    for name, options in (*ways(tokens), ("exact", {"order": "exact"})):
        with bench.said(section, name):
            connection = parallel.connect(mine, plan, top_k=layer.top_k, dtype=torch.bfloat16, **options)
            send = partial(dispatch, rows, routing, connection)
            sent = send()
            back = torch.randn(sum(sent.home.taken) if sent.home else len(sent.rows), layer.hidden, device=bench.device)
            fetch = partial(parallel.combine, back.to(torch.bfloat16), sent)
            if name != "exact":
                bench.note(section, f"dispatch, {name}", bench.time_us(send, calls))
            bench.note(section, f"combine, {name}", bench.time_us(fetch, calls))
            if "max_tokens" in options and bench.device.type == "cuda":
                bench.note(section, f"dispatch, {name}, graph", bench.time_us(captured(send), calls))
                bench.note(section, f"combine, {name}, graph", bench.time_us(captured(fetch), calls))


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
        in_graph = bench.time_us(captured(call_alone), calls)
        bench.note(section, "one GPU, graph", in_graph)
    del call_alone  # and with it all weights
    mine = draw_experts(layer, plan.experts_of(bench.rank), bench.device)
    my_rows, my_routing = own(bench, tokens, rows, routing)
    wanted = plain[bench.rank * tokens : (bench.rank + 1) * tokens].float()
    plainly = ("gathered, rows as bf16", {"way": "gathered", "max_tokens": tokens, "send_codes": False})
    for name, options in (*ways(tokens), *([plainly] if layer.fp8 else [])):
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
                spent = bench.time_us(captured(call), calls)
                bench.note(section, f"{name}, graph", spent, over_one_gpu=round(in_graph / spent, 3))
    told = predict(layer, bench.ranks, tokens)
    bench.note(section, "predicted, nothing overlaps", told.total_us, over_one_gpu=round(told.speedup, 3))


def write(bench: Bench, out: Path | None, left_out: list[str]) -> None:
    """The file of rank 0, with what was measured so far."""
    if bench.rank or out is None:
        return
    kind = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    content = {
        "schema": 1, "machine": f"{kind} x {bench.ranks}", "torch": torch.__version__,
        "commit": commit_of(Path(moeyard.__file__).parent / "bench"), "rounds": ROUNDS, "rows": bench.rows,
        "left_out": left_out,
    }  # fmt: skip
    out.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Joins the ranks that torchrun started, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where rank 0 writes the JSON")
    parser.add_argument("--seconds", type=float, default=240.0, help="no section begins after these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, for a trial")
    given = parser.parse_args()
    os.environ["NCCL_NVLS_ENABLE"], os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "0", "1"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if given.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    bench = Bench(device, dist.get_rank(), dist.get_world_size(), time.monotonic() + given.seconds, [])
    layers, many, few = LAYERS, 4096, 64
    if given.small:
        layers = tuple(layer._replace(experts=8, top_k=2, hidden=256, size=128) for layer in LAYERS[:2])
        many, few = 48, 6
    todo: list[tuple[str, Callable[[], None]]] = [
        (f"movement of {many}", lambda: movement(bench, layers[0], many, 20)),
        (f"movement of {few}", lambda: movement(bench, layers[0], few, 50)),
    ]
    for tokens in (few, many):
        for layer in layers:
            todo.append((f"{layer.name}, {tokens} tokens", lambda layer=layer, tokens=tokens: whole_layer(
                bench, layer, tokens, 10)))  # fmt: skip
    left_out: list[str] = []
    for name, section in todo:
        if bench.over():
            left_out.append(name)
            continue
        section()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write(bench, given.out, left_out)
    write(bench, given.out, left_out)
    if bench.rank == 0:
        print(f"left out: {left_out or 'nothing'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
