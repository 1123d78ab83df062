"""The cuda implementation of moe_align_block_size: every way of counting, streams, graphs, threads, sanitizers."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
from moeyard import Layout
from moeyard.cuda.runtime.launch import programmatic_launch
from moeyard.dispatch import table
from moeyard.integrations import vllm
from moeyard.testing import ROUTINGS, SOURCE, guard_broken, layout_difference, layout_error, poisoned_layout, python

REFUSAL = table.explain("moe_align_block_size", "cuda").reasons["cuda"]
pytestmark = pytest.mark.skipif(REFUSAL != "chosen", reason=f"cuda: {REFUSAL}")
WAYS = [(8, 256, 16), (1000, 64, 16), (8000, 256, 64), (60_000, 128, 128), (300_000, 64, 128), (300_000, 8, 32)]
WAYS += [(700_000, 40, 64)]


def align(ids: torch.Tensor, experts: int, block: int, **more: Any) -> Layout:
    return moeyard.moe_align_block_size(ids, num_experts=experts, block_size=block, impl="cuda", **more)


def named(layout: Layout) -> dict[str, torch.Tensor]:
    return dict(zip(Layout.TENSORS, layout.tensors, strict=True))


@pytest.mark.parametrize("routing", sorted(ROUTINGS))
@pytest.mark.parametrize("routes", [1, 32, 33, 1024, 4097, 16385, 131_072, 131_073, 1_000_003])
@pytest.mark.parametrize("experts", [1, 8, 200, 1024, 1025, 8192])
def test_every_size_is_exact(routing: str, routes: int, experts: int) -> None:
    if routing not in ("independent", "dropped", "zipf") and routes > 20_000:
        pytest.skip("large draws of the other routings take long on the host and add nothing")
    if routing in ("zipf", "dropped") and routes * experts > 2**27:
        pytest.skip("too many scores to draw")
    ids = ROUTINGS[routing](routes, experts, 1, torch.Generator().manual_seed(routes))
    layout = align(ids.cuda(), experts, 16)
    out = poisoned_layout(layout)
    again = align(ids.cuda(), experts, 16, out=out)
    assert layout_error(ids, experts, 16, named(again), stable=True) is None
    assert layout_difference(layout, again) is None and not any(guard_broken(t) for t in out.tensors)


@pytest.mark.parametrize("block", [1, 3, 48, 256])
@pytest.mark.parametrize(("routes", "experts", "_block"), WAYS)
def test_blocks_of_any_size_and_maps(routes: int, experts: int, _block: int, block: int) -> None:
    ids = torch.randint(-2, experts + 2, (routes,), dtype=torch.int64, device="cuda")
    mapping = torch.where(torch.arange(experts) % 2 == 0, torch.arange(experts) // 2, -1).int().cuda()
    for call in (
        {},
        {"expert_map": mapping, "num_local_experts": (experts + 1) // 2},
        {"num_local_experts": experts + 5},
    ):
        wanted = moeyard.moe_align_block_size(ids, num_experts=experts, block_size=block, impl="torch", **call)
        for given in (ids, ids.int()):
            assert layout_difference(align(given, experts, block, **call), wanted) is None


@pytest.mark.parametrize(("routes", "experts", "block"), WAYS)
def test_graphs_own_their_barriers(routes: int, experts: int, block: int) -> None:
    ids = torch.randint(0, experts, (routes,), dtype=torch.int32, device="cuda")
    align(ids, experts, block)
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layouts = [align(ids, experts, block) for _ in range(3)]
        graphs.append((graph, layouts))
    for step in range(3):
        ids.copy_(torch.randint(-1, experts + 1, (routes,), dtype=torch.int32))
        torch.cuda.synchronize()
        wanted = moeyard.moe_align_block_size(ids, num_experts=experts, block_size=block, impl="torch")
        streams = [torch.cuda.Stream() for _ in graphs]
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = align(ids, experts, block)
        torch.cuda.synchronize()
        for layout in [eager, *graphs[0][1], *graphs[1][1]]:
            assert layout_difference(layout, wanted) is None, step


def test_streams_and_threads_at_once_beside_a_running_product() -> None:
    stop = time.monotonic() + 60
    left, right = torch.randn(2, 4096, 4096, device="cuda", dtype=torch.bfloat16)
    inputs = [torch.randint(0, e, (n,), dtype=torch.int32, device="cuda") for n, e, _ in WAYS]
    wanted = [align(ids, e, b) for ids, (_, e, b) in zip(inputs, WAYS, strict=True)]
    torch.cuda.synchronize()

    def work(seed: int) -> int:
        wrong = 0
        with torch.cuda.stream(torch.cuda.Stream()):
            for call in range(1000):
                way = (call + seed) % len(WAYS)
                got = align(inputs[way], *WAYS[way][1:])
                if call % 50 == 0:
                    wrong += layout_difference(got, wanted[way]) is not None
                assert time.monotonic() < stop, "took longer than a minute"
            torch.cuda.current_stream().synchronize()
        return wrong

    with ThreadPoolExecutor(5) as pool:
        product = pool.submit(lambda: [left @ right for _ in range(200)])
        assert sum(pool.map(work, range(4))) == 0
        product.result()


FIRST_CALL_IN_A_CAPTURE = """
import torch, moeyard
from moeyard.testing import layout_error
for routes, experts in ((8, 64), (700, 64), (20000, 64), (140000, 33), (2000000, 33)):
    ids = torch.randint(-1, experts + 1, (routes,), dtype=torch.int32)
    given, graph = ids.cuda(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layout = moeyard.moe_align_block_size(given, num_experts=experts, block_size=16, impl="cuda")
    graph.replay()
    torch.cuda.synchronize()
    got = {name: getattr(layout, name) for name in layout.TENSORS}
    assert layout_error(ids, experts, 16, got, stable=True) is None, routes
print("finished")
"""


def test_the_first_call_may_be_inside_a_capture() -> None:
    done = python("-c", FIRST_CALL_IN_A_CAPTURE)
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize(("routes", "experts", "block"), [*WAYS, (0, 5, 16), (3, 5, 7), (2_000_000, 33, 48)])
def test_the_triple_alone_is_the_layouts_first_outputs(
    routes: int, experts: int, block: int, pad: bool, mapped: bool
) -> None:
    ids = torch.randint(-1, experts + 1, (routes, 1), dtype=torch.int32, device="cuda")
    mapping = (torch.arange(experts, dtype=torch.int32, device="cuda") - 2).clamp(min=-1) if mapped else None
    slots, owners, total = vllm.moe_align_block_size(ids, block, experts, mapping, pad, ignore_invalid_experts=mapped)
    wanted = align(ids, experts, block, expert_map=mapping)
    assert torch.equal(slots, wanted.sorted_token_ids[: len(slots)])
    assert torch.equal(owners, wanted.expert_ids[: len(owners)]) and torch.equal(total, wanted.num_tokens_post_padded)


@pytest.mark.parametrize(("routes", "experts", "block"), WAYS)
def test_programmatic_launch_changes_no_bits(routes: int, experts: int, block: int) -> None:
    ids = torch.randint(0, experts, (routes,), dtype=torch.int32, device="cuda")
    keys = [torch.randint(-1, experts + 1, (routes,), dtype=torch.int32, device="cuda") for _ in range(8)]
    wanted = [align(key, experts, block) for key in keys]
    before = programmatic_launch()
    programmatic_launch(True)
    try:
        got = []
        for key in keys * 3:
            ids.copy_(key)  # each launch must wait for the copy, and the copy for the launch before
            got.append(align(ids, experts, block))
    finally:
        programmatic_launch(before)
    for layout, expected in zip(got, wanted * 3, strict=True):
        assert layout_difference(layout, expected) is None


def test_outputs_given_again_and_again() -> None:
    """The short way of a repeated call takes nothing for granted: shape, strides, addresses, outputs."""
    ids = [torch.randint(-1, 70, (4096, 2), dtype=torch.int32, device="cuda") for _ in range(3)]
    out = poisoned_layout(align(ids[0], 64, 128))
    ids += [ids[0].t().contiguous().t(), torch.cat([ids[1].flatten(), ids[2].flatten()])[3:8195].view(4096, 2)]
    ids += [ids[0].long(), ids[1][:4096], ids[2] % 5]
    for value in [*ids, *ids]:
        wanted = align(value, 64, 128)
        assert layout_difference(align(value, 64, 128, out=out), wanted) is None
    with pytest.raises(ValueError, match="out: expected a layout with"):
        align(ids[0], 64, 64, out=out)
    with pytest.raises(ValueError, match=r"out.sorted_token_ids: expected shape"):
        align(ids[0][:100], 64, 128, out=out)
    assert layout_difference(pickle.loads(pickle.dumps(out)), out) is None
    out.route_rows.set_(torch.empty(8, dtype=torch.int32, device="cuda"))
    with pytest.raises(ValueError, match=r"out.route_rows: expected shape"):
        align(ids[0], 64, 128, out=out)


SANITIZED = """
import torch, moeyard
for routes, experts in ((8, 64), (0, 3), (700, 64), (5000, 257), (20000, 64), (140000, 33), (600000, 33)):
    ids = torch.randint(-1, experts + 1, (routes,))
    for dtype in (torch.int32, torch.int64):
        given = ids.to(dtype).cuda()  # copied, since initcheck sees what copies and our kernels write, and no others
        moeyard.moe_align_block_size(given, num_experts=experts, block_size=16, impl="cuda")
for experts, rows in ((5, 7), (300, 600)):
    counts = torch.randint(-1, rows + 3, (experts,), dtype=torch.int32).cuda()
    moeyard.batched_moe_align_block_size(counts, max_num_tokens=rows, block_size=16, impl="cuda")
torch.cuda.synchronize()
print("finished")
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_sanitizers_find_nothing_in_our_kernels(tool: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SANITIZED)
    options = ["--tool", tool, "--kernel-name", "kernel_substring=align_kernel", "--report-api-errors", "no"]
    done = subprocess.run(
        ["compute-sanitizer", *options, "--error-exitcode", "9", sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    assert done.returncode == 0 and "finished" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    assert "0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout[-500:]
