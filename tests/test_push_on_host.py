"""The kernels of cuda/push, lane by lane on a host: several ranks at their own pace, memory that is written late."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard.cuda.push import plan as push_plan
from moeyard.cuda.push.launchers import (
    PushTables,
    back_recipe,
    lost_rank,
    push_back_launch,
    push_launch,
    push_recipe,
)
from moeyard.cuda.push.plan import PushSizes, back_grid, places_of
from moeyard.cuda.runtime import compile as building
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.planning import Noted, planning
from moeyard.cuda.runtime.sources import SOURCES
from moeyard.parallel import Plan, contiguous_plan
from moeyard.testing.few_tokens import COMPILER, cuobjdump
from moeyard.testing.pushes import Ranks, build, outcome, run

HERE = Path(__file__).parent
HEADERS = HERE / "host_push" / "peers.cuh", HERE / "host_push" / "run.cpp", HERE / "host_few_tokens" / "rows.cuh"
H200 = Card(132, 232448, True)
on_host = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
CASES: dict[str, dict[str, Any]] = {
    "two ranks": {"plan": contiguous_plan(6, 2), "counts": ([5, 7], [5, 7], [5, 7]), "tiles": (3, 4)},
    "exact": {"plan": contiguous_plan(6, 2), "counts": ([5, 7], [0, 6], [7, 1]), "exact": True, "tiles": (2, 3)},
    "three ranks, replicas": {
        "plan": Plan(5, ((0, 1), (2, 0), (3, 4, 0))), "counts": ([4, 0, 3], [1, 5, 0], [5, 5, 5]), "top_k": 2,
        "dtype": torch.float16, "wide": True, "tiles": (5, 5),
    },
    "exact, weighted before": {
        "plan": contiguous_plan(7, 3), "counts": ([2, 2, 2], [2, 0, 1], [1, 2, 2]), "exact": True, "weighted": False,
        "top_k": 9, "tiles": (1, 2),
    },
    "slices of experts, codes": {
        "plan": contiguous_plan(4, 4, tensor=2), "counts": ([3, 1, 2, 3], [3, 3, 3, 3], [0, 0, 0, 1]), "scales": 3,
        "tiles": (2, 2),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case's kernels, which are built once."""
    base = tmp_path_factory.mktemp("kernels")

    def of(name: str) -> Path:
        made = base / re.sub(r"\W", "-", name)
        made.mkdir(exist_ok=True)
        return made

    return of


@on_host
@pytest.mark.parametrize("name", [n if i < 1 else pytest.param(n, marks=pytest.mark.full) for i, n in enumerate(CASES)])
def test_rows_go_and_come_back(name: str, folder: Callable[[str], Path]) -> None:
    ranks = Ranks(CASES[name])
    library = build(HEADERS, folder(name), ranks)
    for slow in (0, 1):
        assert outcome(library, ranks, slow) == ""
    assert outcome(library, ranks, 0, (1, 1), 1) == "", "a dispatch needs one block at a time"


@on_host
def test_a_rank_that_does_not_answer_is_named(folder: Callable[[str], Path]) -> None:
    ranks = Ranks(CASES["two ranks"])
    library = build(HEADERS, folder("two ranks"), ranks)
    for kept, words in ((0, "rank 1 of the group did not answer a dispatch of rank 0"), (2, "a combine of rank 0")):
        for rank in range(2):
            ranks.draw(rank)
            ranks.memory[rank].zero_()
            ranks.tables[rank].trouble.zero_()
            ranks.tables[rank] = ranks.tables[rank]._replace(timeout_ns=10**6)
        programs = [ranks.program(0, (3, 2), 2), ranks.program(1, (3, 2), 2)[:kept]]
        failure = run(library, programs, ranks.test, -1)
        assert failure.startswith("gave up") and lost_rank(ranks.tables[1]) is None
        assert words in str(lost_rank(ranks.tables[0]))


MUTANTS: dict[str, tuple[str, str, str, str]] = {
    "a flag before what it stands for": ("two ranks", "push.cu", "release_there(", "store_there("),
    "a flag before the block has met": (
        "two ranks", "push.cu", "__syncthreads();\n    if (threadIdx.x < ranks)", "if (threadIdx.x < ranks)",
    ),
    "a flag of rows before what it stands for": ("two ranks", "push_back.cu", "release_there(", "store_there("),
    "sums before rows": ("two ranks", "push_back.cu", "threadIdx.x < ranks && threadIdx.x != me", "false"),
    "nobody waits for a dispatch": ("two ranks", "push.cu", "i < ranks * tiles", "i < tiles * me"),
    "an epoch that stays": ("two ranks", "push.cu", "*epochs = epoch", "*epochs = epoch - 1"),
    "an epoch of combines that stays": ("two ranks", "push_back.cu", "epochs[0] = epoch", "epochs[0] = epoch - 1"),
    "blocks that have not ended": ("two ranks", "push_back.cu", "== gridDim.x - 1", ">= 0"),
    "flags of any epoch": ("two ranks", "push.cuh", "(acquire_here(flag) - epoch) >= 0", "(acquire_here(flag)) > 0"),
    "rows of the first expert stay": (
        "two ranks", "push_back.cu", "if (first_slot <= slot &&", "if (first_slot < slot &&",
    ),
    "a row to the first rank alone": ("two ranks", "push.cu", "mask >> rank & 1", "mask & 1"),
    "slots of absent tokens": ("exact", "push.cu", "if (i >= full * top_k) return;", ""),
    "another's routes": ("exact", "push_back.cu", "if (slot >= 0) from[b]", "if (slot > 0) from[b]"),
    "weights of another token": (
        "exact", "push_back.cu", "factors[home * top_k + start + b]", "factors[token * top_k + start + b]",
    ),
    "always the first replica": ("three ranks, replicas", "push.cu", "most_replicas > 1 ?", "most_replicas > 9 ?"),
    "one slice of an expert": ("slices of experts, codes", "push.cu", "ALL >> (32 - tensor)", "1u"),
    "scales of another place": (
        "slices of experts, codes", "push.cu", "place) * scale_words + i", "first) * scale_words + i",
    ),
}  # fmt: skip


@on_host
@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_kernels_are_found(mutant: str, tmp_path: Path) -> None:
    name, *change = MUTANTS[mutant]
    ranks = Ranks(CASES[name])
    library = build(HEADERS, tmp_path, ranks, (change[0], change[1], change[2]))
    assert any(outcome(library, ranks, slow) for slow in (0, 1, -1, 0, 1))


@pytest.mark.full
@pytest.mark.parametrize("exact", [False, True])
def test_it_stores_16_bytes_releases_and_acquires(exact: bool, tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    if cuobjdump() is None:
        pytest.skip("needs cuobjdump, which Triton's wheel has")
    sizes = PushSizes(2, 4096, 8, 8192, 0, 8192, exact)
    for recipe in (push_recipe(torch.int32), back_recipe(sizes, True, torch.bfloat16)):
        path = tmp_path / "kernel.cubin"
        path.write_bytes(building.compile_source(SOURCES[recipe.source], recipe.defines, "sm_90a"))
        used, text = (
            subprocess.run([str(cuobjdump()), option, str(path)], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
        registers, stack, _, local = (int(value) for value in re.findall(r"(?:REG|STACK|SHARED|LOCAL):(\d+)", used))
        assert registers <= 128 and (stack, local) == (0, 0) and not re.search(r"\b(LDL|STL)\b", text)
        assert text.count("STG.E.NA.128") == 4 and len(re.findall(r"LDG\.E\.128", text)) >= 8
        assert re.search(r"MEMBAR\.ALL\.SYS(?:(?!MEMBAR|STG).)*STG\.E\.STRONG\.SYS", text, re.DOTALL)
        assert text.count("LDG.E.STRONG.SYS") >= 2 and text.count("BPT.TRAP") == 1


@pytest.mark.parametrize("exact", [False, True])
def test_launchers_hand_over_as_much_as_kernels_take(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a plan, with tensors that need no GPU."""
    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        Noted, "__call__", lambda self, shape, *pointers: seen.append(
            (self._recipe.name, self._recipe.words, len(pointers) + len(shape.sizes)))
    )  # fmt: skip

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sizes = PushSizes(2, 64, 4, 512, 0, 512, exact)
    tables = PushTables(empty(2), 0, empty(7, 2), empty(7), torch.zeros(1, dtype=torch.int64), 1, 1, 3, 4, 10**9)
    rows, factors = empty(9, 256, dtype=torch.bfloat16), empty(9, 4, dtype=torch.float32)
    with planning(H200):
        for ids in (empty(9, 4), empty(9, 4, dtype=torch.int64)):
            push_launch(rows, None, ids, factors, sizes, tables, beside=exact)
        made, routes = empty(512, 256, dtype=torch.bfloat16), empty(512)
        push_back_launch(made, routes if exact else None, sizes, tables, weighted=True, out=rows)
    assert [name for name, *_ in seen] == ["push_kernel", "push_kernel", "push_back_kernel"]
    assert all(wanted == given for _, wanted, given in seen), seen


def test_memory_and_grids_follow_from_sizes() -> None:
    for ranks, tokens, exact in ((2, 4096, False), (2, 4096, True), (8, 64, False), (1, 1, True), (32, 4097, False)):
        sizes = PushSizes(ranks, tokens, 8, 8192, 0, 8192, exact)
        places = places_of(sizes)
        offsets = places[:10]
        assert list(offsets) == sorted(offsets) and all(offset % 256 == 0 for offset in offsets)
        assert (places.tiles - 1) * places.tile < tokens <= places.tiles * places.tile
        assert (places.tiles_back - 1) * places.tile_back < tokens <= places.tiles_back * places.tile_back
        pushers, adders = back_grid(sizes, places, H200)
        assert 1 <= pushers <= 132 and 1 <= adders <= 132
        assert push_plan.push_grid(places, True) <= 48 and push_plan.push_grid(places, False) <= 128
    assert "32 ranks" in str(push_plan.refusal_of_sizes(PushSizes(33, 4, 8, 64, 0, 64, False)))
    assert "32 routes" in str(push_plan.refusal_of_sizes(PushSizes(2, 4, 33, 64, 0, 64, False)))
    assert "16 bytes" in str(push_plan.refusal_of_sizes(PushSizes(2, 4, 8, 72, 0, 72, False)))
