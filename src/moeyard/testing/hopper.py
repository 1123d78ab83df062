"""Cases of the Hopper kernels in a process: `python -m moeyard.testing.hopper GROUP` prints one line of JSON per case.

A kernel that waits for what never comes would hold its process for good: so each case has a limit, and the test that
started the process goes on with the next.
"""

import faulthandler
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import moeyard
from moeyard.cuda.experts import few_tokens
from moeyard.cuda.experts import launchers as experts
from moeyard.cuda.experts.plan import Way
from moeyard.testing import (
    draw_routing,
    draw_weights,
    guard_broken,
    largest_and_rms,
    plain_experts,
    poisoned,
    same_bits,
)
from moeyard.values import GPT_OSS_ACTIVATION, Activation, ExpertWeights, Routing

CUDA = torch.device("cuda")
NAMES = ("largest", "rms")
LIMIT_S = 20
FIRST_LIMIT_S = 60
"""Of the first case, which waits for the device and for compilers beside it."""
WAYS = {
    **{f"tiles of {rows}": Way(rows=rows) for rows in (8, 16, 32, 64, 128, 192)},
    **{f"tiles of {rows}, copied": Way(copied=True, rows=rows) for rows in (64, 128, 192)},
}


def poison_workspace(routes: int, hidden: int, size: int) -> None:
    """The next allocations of these sizes are full of NaN: of the rows of either product, and of both with a table."""
    sizes = [2 * routes * size, 2 * routes * hidden, 2 * routes * (size + hidden) + 8 * routes + 8192]
    held = [torch.empty(count, dtype=torch.uint8, device=CUDA).fill_(255) for count in sizes]
    del held


def layer(
    tokens: int, count: int, top_k: int, hidden: int, size: int, *, dtype: torch.dtype = torch.bfloat16,
    routing: str = "uniform", activation: Activation | None = None, gated: bool = True, bias: bool = False,
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    """A case of fused_experts: errors against float64 and the errors of plain torch at the dtype."""

    def run() -> dict[str, Any]:
        weights = draw_weights(count, hidden, size, dtype, gated=gated, bias=bias, device=CUDA)
        rows = torch.randn(tokens, hidden, device=CUDA).to(dtype)
        routes = draw_routing(tokens, count, top_k, routing, device=CUDA)
        out = poisoned((tokens, hidden), dtype, CUDA)
        poison_workspace(tokens * top_k, hidden, size)
        got = moeyard.fused_experts(rows, routes, weights, activation=activation, out=out, impl="cuda")
        torch.cuda.synchronize()
        wide = plain_experts(rows, routes, weights, activation, dtype=torch.float64)
        plain = plain_experts(rows, routes, weights, activation)
        again = moeyard.fused_experts(rows, routes, weights, activation=activation, impl="cuda")
        return {
            "errors": largest_and_rms(got, wide),
            "budget": largest_and_rms(plain, wide),
            "scale": float(wide.abs().max()),
            "count": wide.numel(),
            "guard": guard_broken(out),
            "same": same_bits(got, again),
        }

    return run


def with_way(way: Way) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Layers in one way, whatever would be chosen, from one product to many tiles a block."""
    setattr(experts, "way_of", lambda *_, **__: way)  # noqa: B010 - a name that experts imports
    yield "one step", layer(3, 4, 2, 64, 64)
    yield "short rows", layer(5, 3, 1, 80, 16)
    yield "few", layer(40, 8, 2, 512, 256)
    yield "biased gpt-oss", layer(130, 5, 3, 720, 176, routing="dropped", activation=GPT_OSS_ACTIVATION, bias=True)
    yield "one hot expert", layer(700, 6, 2, 1024, 704, routing="one_hot")
    yield "all rounds", layer(1500, 8, 2, 1024, 1408, routing="zipf")
    yield "not gated", layer(200, 7, 2, 352, 528, activation=Activation("relu2"), gated=False, dtype=torch.float16)
    yield "gelu", layer(90, 4, 2, 256, 80, activation=Activation("gelu"), dtype=torch.float16)
    yield "gelu_tanh", layer(90, 4, 2, 256, 80, activation=Activation("gelu_tanh", limit=1.0))


def products() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Grouped products with rows by token, by route, by offsets and in batches."""

    def by_layout(
        tokens: int, count: int, top_k: int, block: int, per_route: bool, columns: int = 272
    ) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            routes = draw_routing(tokens, count, top_k, device=CUDA)
            layout = moeyard.moe_align_block_size(routes.topk_ids, num_experts=count, block_size=block)
            rows = torch.randn(tokens * top_k if per_route else tokens, 336, device=CUDA).bfloat16()
            weight = torch.randn(count, columns, 336, device=CUDA).bfloat16()
            bias = torch.randn(count, columns, device=CUDA)
            out = poisoned((tokens * top_k, columns), torch.bfloat16, CUDA)
            options: dict[str, Any] = {"layout": layout, "topk_weights": routes.topk_weights}
            got = moeyard.grouped_gemm(rows, weight, bias=bias.bfloat16(), out=out, impl="cuda", **options)
            wide = moeyard.grouped_gemm(
                rows.double(), weight.double(), bias=bias.bfloat16().double(), impl="torch", **options
            )
            valid = layout.route_rows >= 0
            untouched = out[~valid].view(torch.uint8)
            return judged(got[valid], wide[valid], guard_broken(out) or bool((untouched != 0x7F).any()))

        return run

    def by_offsets(rows_of: list[int]) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            counts, count = torch.tensor(rows_of, device=CUDA), len(rows_of)
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            total = sum(rows_of)
            rows = torch.randn(total + 9, 528, device=CUDA).half()
            rows[total:] = float("nan")
            weight = torch.randn(count, 400, 528, device=CUDA).half() / 23
            out = poisoned((total + 9, 400), torch.float16, CUDA)
            got = moeyard.grouped_gemm(rows, weight, expert_offsets=offsets, out=out, impl="cuda")
            wide = moeyard.grouped_gemm(rows.double(), weight.double(), expert_offsets=offsets, impl="torch")
            return judged(got[:total], wide[:total], bool((out[total:].view(torch.uint8) != 0x7F).any()))

        return run

    def batched(counts: list[int]) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            valid = torch.tensor(counts, dtype=torch.int32, device=CUDA)
            rows = torch.randn(len(counts), max(counts), 256, device=CUDA).bfloat16()
            weight = torch.randn(len(counts), 192, 256, device=CUDA).bfloat16() / 16
            got = moeyard.grouped_gemm(rows, weight, expert_num_tokens=valid, impl="cuda")
            wide = moeyard.grouped_gemm(rows.double(), weight.double(), expert_num_tokens=valid, impl="torch")
            held = torch.arange(max(counts), device=CUDA) < valid[:, None]
            return judged(got[held], wide[held], False)

        return run

    yield "by token", by_layout(300, 7, 3, 1, False)
    yield "by route, padded", by_layout(77, 5, 2, 16, True)
    yield "by token, copied", by_layout(700, 4, 2, 1, False, columns=2064)
    yield "by offsets", by_offsets([3, 0, 700, 64, 1, 129])
    yield "in batches", batched([5, 0, 200, 77])


def judged(got: torch.Tensor, wide: torch.Tensor, guard: bool) -> dict[str, Any]:
    """A product rounded once, against float64."""
    honest = largest_and_rms(wide.float().to(got.dtype), wide)
    scale = float(wide.abs().max())
    return {
        "errors": largest_and_rms(got, wide), "budget": [value + 4e-6 * scale for value in honest], "scale": scale,
        "count": wide.numel(), "guard": guard, "same": True,
    }  # fmt: skip


def repeated() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The same bits over 100 runs, and from a graph whose ids and rows change; nobody's rows give zeros."""

    def draw() -> tuple[torch.Tensor, Routing, ExpertWeights]:
        return (
            torch.randn(600, 1024, device=CUDA).bfloat16(),
            draw_routing(600, 32, 4, "zipf", device=CUDA),
            draw_weights(32, 1024, 352, torch.bfloat16, device=CUDA),
        )

    def runs() -> dict[str, Any]:
        rows, routes, weights = draw()
        first = moeyard.fused_experts(rows, routes, weights, impl="cuda")
        same = all(same_bits(moeyard.fused_experts(rows, routes, weights, impl="cuda"), first) for _ in range(100))
        return {"same": same}

    def graph() -> dict[str, Any]:
        rows, routes, weights = draw()
        moeyard.fused_experts(rows, routes, weights, impl="cuda")
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(3):
                out = moeyard.fused_experts(rows, routes, weights, impl="cuda")
        same = True
        for name in ("uniform", "dropped", "one_hot"):
            routes.copy_(draw_routing(600, 32, 4, name, device=CUDA))
            rows.copy_(torch.randn_like(rows))
            captured.replay()
            same = same and same_bits(out, moeyard.fused_experts(rows, routes, weights, impl="cuda"))
        return {"same": same}

    def streams() -> dict[str, Any]:
        """Five streams at once, one of which replays a graph: each has turns of its own."""
        layers = [draw() for _ in range(5)]
        wanted = [moeyard.fused_experts(*layer, impl="cuda") for layer in layers]
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            replayed = moeyard.fused_experts(*layers[0], impl="cuda")
        beside = [torch.cuda.Stream() for _ in layers]
        torch.cuda.synchronize()
        got = [replayed] * len(layers)
        for _ in range(30):
            for i, stream in enumerate(beside):
                with torch.cuda.stream(stream):
                    if i == 0:
                        captured.replay()
                    else:
                        got[i] = moeyard.fused_experts(*layers[i], impl="cuda")
        torch.cuda.synchronize()
        return {"same": all(map(same_bits, got, wanted))}

    def nobody() -> dict[str, Any]:
        rows, routes, weights = draw()
        routes.topk_ids.fill_(-1)
        got = moeyard.fused_experts(rows, routes, weights, impl="cuda")
        return {"same": not bool(got.any())}

    yield "100 runs", runs
    yield "graph", graph
    yield "streams", streams
    yield "nobody", nobody


GROUPS: dict[str, Callable[[], Iterator[tuple[str, Callable[[], dict[str, Any]]]]]] = {
    **{name: (lambda way=way: with_way(way)) for name, way in WAYS.items()},  # type: ignore[misc]
    "products": products,
    "repeated": repeated,
}


def problems(case: dict[str, Any]) -> list[str]:
    """What is wrong with a case's result, in words."""
    found = []
    if not case["same"]:
        found.append(f"{case['case']}: not the same bits")
    if case.get("guard"):
        found.append(f"{case['case']}: wrote where it must not")
    factor = 1.1 if case.get("count", 0) > 30000 else 3  # of few values the largest errors are not comparable
    measured = zip(NAMES, case["errors"], case["budget"], strict=True) if "errors" in case else ()
    for name, error, allowed in measured:
        if not error <= factor * allowed + 1e-6 * case["scale"]:  # NaN is wrong too
            found.append(f"{case['case']}: {name} error {error:.3g}, plain torch {allowed:.3g}")
    return found


def unlucky(case: dict[str, Any]) -> bool:
    """Whether the largest error alone is too large, as it is once in a while on inputs that are always new."""
    found = problems(case)
    return bool(found) and all(": largest error" in words for words in found)


def main() -> None:
    setattr(few_tokens, "_are_quicker", lambda *_: False)  # noqa: B010 - a few tokens take this way too
    limit = FIRST_LIMIT_S
    for name, run in GROUPS[sys.argv[1]]():
        faulthandler.dump_traceback_later(limit, exit=True)
        result = {"case": name, **run()}
        if unlucky(result):  # a fault is there with other inputs, too
            result = {"case": name, **run()}
        torch.cuda.synchronize()
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
        limit = LIMIT_S
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
