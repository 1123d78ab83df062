"""Several ranks that push rows to each other on a host: how tests/test_push_on_host.py runs the kernels."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeyard.cuda.push.launchers import (
    PushTables,
    back_recipe,
    numbers_of_push,
    numbers_of_push_back,
    push_recipe,
)
from moeyard.cuda.push.plan import CUT, PushSizes, back_grid, places_of
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.sources import HEADERS, SOURCES
from moeyard.parallel.plan import slots_of_routes, tables_of
from moeyard.parallel.pushed import packed_places
from moeyard.testing import guard_broken, poisoned, same_bits
from moeyard.testing.few_tokens import COMPILER

EPOCHS = 3
Program = list[tuple[int, int, int, list[int], tuple[int, ...]]]
"""Steps of a rank: kind, blocks, blocks at work at the same time, pointers, numbers."""


class Ranks:
    """The memory, inputs and results of all ranks of a case, and what their experts would make of rows."""

    def __init__(self, case: dict[str, Any]) -> None:
        """Memory of zeros, and inputs that `draw` fills."""
        sent, back = case["tiles"]
        self.cut = CUT._replace(threads=64, loads=2, tiles=sent, tiles_back=back, tiles_of_routes=back)
        self.case, self.plan, self.exact = case, case["plan"], case.get("exact", False)
        self.dtype, self.hidden, self.scales = case.get("dtype", torch.bfloat16), 136, case.get("scales", 0)
        self.ranks, self.top_k = self.plan.ranks, case.get("top_k", 3)
        most = max(max(counts) for counts in case["counts"])
        sent = 144 if self.scales else 2 * self.hidden  # codes of a wider row: the kernel only moves them
        self.sizes = PushSizes(self.ranks, most, self.top_k, sent, self.scales, 2 * self.hidden, self.exact)
        self.places = places_of(self.sizes, self.cut)
        self.memory = [poisoned((self.places.total,), torch.uint8) for _ in range(self.ranks)]
        for part in self.memory:
            part.zero_()
        self.tables = [self._tables(rank) for rank in range(self.ranks)]
        self.inputs = [self._inputs(most) for _ in range(self.ranks)]
        self.outs = [poisoned((most, self.hidden), self.dtype) for _ in range(self.ranks)]
        all_rows = self.ranks * most * (self.top_k if self.exact else 1)
        self.made = [torch.empty(all_rows, self.hidden, dtype=self.dtype) for _ in range(self.ranks)]
        self.routes = [torch.empty(self.ranks * most * self.top_k, dtype=torch.int32) for _ in range(self.ranks)]
        self.weighted = case.get("weighted", True)

    def _tables(self, rank: int) -> PushTables:
        rows, counts = packed_places(self.plan)
        share = rank // self.plan.tensor
        return PushTables(
            torch.tensor([part.data_ptr() for part in self.memory]), self.memory[rank].data_ptr(),
            torch.tensor(rows, dtype=torch.int32),
            torch.tensor(counts, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), rank, self.plan.tensor,
            sum(map(len, self.plan.experts[:share])), len(self.plan.experts[share]), 10**9,
        )  # fmt: skip

    def _inputs(self, most: int) -> dict[str, Tensor]:
        wide = self.sizes.sent_bytes + 32  # rows that do not follow each other
        ids = torch.int64 if self.case.get("wide") else torch.int32
        return {
            "rows": torch.zeros(most, wide, dtype=torch.uint8), "scales": torch.zeros(most, max(1, self.scales)),
            "ids": torch.zeros(most, self.top_k, dtype=ids), "factors": torch.zeros(most, self.top_k),
        }  # fmt: skip

    def draw(self, rank: int) -> None:
        """New inputs of a rank, in place, as a graph that is replayed finds them."""
        given = self.inputs[rank]
        values = torch.randn(given["rows"].shape[0], given["rows"].shape[1] // 2).to(self.dtype)
        given["rows"].copy_(values.view(torch.uint8))
        given["scales"].uniform_()
        given["factors"].uniform_()
        given["ids"].copy_(torch.randint(-1, self.plan.num_experts + 1, given["ids"].shape))
        self.outs[rank].fill_(torch.nan)

    def part(self, rank: int, offset: int, dtype: torch.dtype, row_bytes: int) -> Tensor:
        """[ranks, max_tokens, ...] of a rank's memory."""
        ranks, most = self.sizes.ranks, self.sizes.max_tokens
        return self.memory[rank][offset : offset + ranks * most * row_bytes].view(dtype).view(ranks, most, -1)

    def slots(self, source: int, count: int) -> Tensor:
        """[max_tokens, top_k] int32: those of a rank's tokens."""
        found = torch.full((self.sizes.max_tokens, self.top_k), -1, dtype=torch.int32)
        found[:count] = slots_of_routes(self.inputs[source]["ids"][:count], tables_of(self.plan, found.device), source)
        return found

    def held(self, rank: int, slots: Tensor) -> Tensor:
        """Which slots are of a rank."""
        first, count = self.tables[rank].first_slot, self.tables[rank].num_slots
        return (slots >= first) & (slots < first + count)

    def route_rows(self, rank: int, source: int) -> Tensor:
        """[max_tokens, top_k, hidden]: what experts of a rank make of routes: any function of row, slot and weight."""
        rows = self.inputs[source]["rows"][:, : 2 * self.hidden].contiguous().view(self.dtype).float()
        if self.scales:
            rows = torch.sin(torch.arange(self.hidden) + self.inputs[source]["scales"][:, :1])
        factors, slots = self.inputs[source]["factors"], self.slots(source, rows.shape[0]).float()
        made = rows.unsqueeze(1) * (slots.unsqueeze(2) + 0.5 + rank)
        return (made if self.exact else made * factors.unsqueeze(2)).to(self.dtype)

    def experts(self, rank: int, counts: list[int]) -> str:
        """What came is compared, and rows are made of it; what is wrong, or nothing."""
        slots = self.part(rank, self.places.slots, torch.int32, 4 * self.top_k)
        rows = self.part(rank, self.places.rows, torch.uint8, self.sizes.sent_bytes)
        factors = self.part(rank, self.places.factors, torch.float32, 4 * self.top_k)
        scales = self.part(rank, self.places.scales, torch.float32, 4 * self.scales)
        self.made[rank].fill_(torch.nan)
        self.routes[rank].fill_(-1)
        number = 0
        for source, count in enumerate(counts):
            given, wanted = self.inputs[source], self.slots(source, count)
            if not torch.equal(slots[source], wanted):
                return f"slots of rank {source} on {rank}"
            there, most = self.held(rank, wanted), self.sizes.max_tokens
            some = there.any(1)
            if not torch.equal(rows[source][some], given["rows"][some, : self.sizes.sent_bytes]):
                return f"rows of rank {source} on {rank}"
            if not torch.equal(factors[source, :count], given["factors"][:count]):
                return f"router weights of rank {source} on {rank}"
            if self.scales and not torch.equal(scales[source, :count], given["scales"][:count]):
                return f"scales of rank {source} on {rank}"
            made = self.route_rows(rank, source)
            if self.exact:
                taken = int(there.sum())
                self.made[rank][number : number + taken] = made[there]
                places = self.routes[rank].view(self.ranks, most, self.top_k)[source]
                places[there] = torch.arange(number, number + taken, dtype=torch.int32)
                number += taken
            else:
                total = torch.where(there.unsqueeze(2), made.float(), 0).sum(1).to(self.dtype)
                self.made[rank].view(self.ranks, most, -1)[source][some] = total[some]
        return ""

    def sums(self, rank: int, counts: list[int]) -> str:
        """The rank's results against sums in the order that is promised."""
        count, slots = counts[rank], self.slots(rank, counts[rank])
        wanted = torch.zeros(self.sizes.max_tokens, self.hidden)
        made = [self.route_rows(other, rank) for other in range(self.ranks)]
        if self.exact:
            for k in range(self.top_k):
                row = sum(
                    torch.where(self.held(r, slots)[:, k : k + 1], made[r][:, k].float(), 0) for r in range(self.ranks)
                )
                wanted += row * self.inputs[rank]["factors"][:, k : k + 1] if self.weighted else row
        else:
            for other in range(self.ranks):
                there = self.held(other, slots)
                partial = torch.where(there.unsqueeze(2), made[other].float(), 0).sum(1).to(self.dtype)
                wanted += torch.where(there.any(1, keepdim=True), partial.float(), 0)
        if not same_bits(self.outs[rank][:count], wanted[:count].to(self.dtype)):
            return f"sums of rank {rank}"
        return "" if bool(self.outs[rank][count:].isnan().all()) else f"rank {rank} wrote past its tokens"

    def program(self, rank: int, blocks: tuple[int, int], resident: int) -> Program:
        """Three times: a dispatch, experts, a combine, a look at the sums and new inputs."""
        given, tables, steps = self.inputs[rank], self.tables[rank], []
        memory = self.memory[rank]
        pointers = [tables.bases, memory, given["rows"], given["scales"], given["ids"], given["factors"],
                    tables.places, tables.replicas, tables.trouble]  # fmt: skip
        back = [tables.bases, memory, self.made[rank], self.routes[rank], self.outs[rank], tables.trouble]
        pushers, adders = back_grid(self.sizes, self.places, Card(blocks[1], 0, True))
        for epoch in range(EPOCHS):
            count = self.case["counts"][epoch][rank]
            sent = numbers_of_push(self.sizes, self.places, tables, count, given["rows"].stride(0))
            back_sizes = numbers_of_push_back(self.sizes, self.places, tables, count, pushers)
            steps += [
                (0, min(blocks[0], self.places.tiles), resident, [t.data_ptr() for t in pointers], sent),
                (2, 0, 0, [], ()), (1, pushers + adders, pushers + adders, [t.data_ptr() for t in back], back_sizes),
                (2, 0, 0, [], ()),
            ]  # fmt: skip
        return steps

    def test(self, rank: int, step: int) -> str:
        """What the test finds wrong at a step of a rank's program, or nothing."""
        counts = self.case["counts"][step // 4]
        if step % 4 == 1:
            return self.experts(rank, counts)
        found = self.sums(rank, counts)
        self.draw(rank)
        return found


def build(headers: tuple[Path, ...], folder: Path, ranks: Ranks, change: tuple[str, str, str] | None = None) -> Any:
    """Both kernels as a library of the host with `headers`, in a folder, `change` of a file made first."""
    if (folder / "kernels.so").exists():
        return loaded(folder)
    for name in ("push.cu", "push_back.cu", "push.cuh"):
        text = (SOURCES | HEADERS)[name]
        if change is not None and change[0] == name:
            assert change[1] in text, change
            text = text.replace(*change[1:])
        (folder / name).write_text(text)
    for path in headers:
        shutil.copy(path, folder)
    recipes = (
        push_recipe(ranks.inputs[0]["ids"].dtype, ranks.cut),
        back_recipe(ranks.sizes, ranks.weighted, ranks.dtype, ranks.cut),
    )
    defines = {**dict(recipes[0].defines), **dict(recipes[1].defines)}
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", *(f"-D{name}={value}" for name, value in defines.items())]
    done = subprocess.run(
        [str(COMPILER), *options, "-o", "kernels.so", "run.cpp"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:3000]
    return loaded(folder)


def loaded(folder: Path) -> Any:
    """The library that `build` left in a folder."""
    library = ctypes.CDLL(str(folder / "kernels.so"))
    library.run.restype = ctypes.c_char_p
    return library


def run(library: Any, programs: list[Program], test: Callable[[int, int], str], slow: int) -> str:
    """What goes wrong while all ranks run their programs, or nothing; rank `slow` is 40 times slower."""
    kept: list[Any] = []
    arrays = []
    for program in programs:
        words: list[int] = []  # the fields of `Step` in run.cpp
        for kind, blocks, resident, pointers, numbers in program:
            made = (ctypes.c_void_p * 16)(*pointers), (ctypes.c_int64 * 32)(*numbers)
            kept += made
            words += [kind, blocks, resident, ctypes.addressof(made[0]), ctypes.addressof(made[1])]
        arrays.append((ctypes.c_int64 * (len(words) + 1))(*words))
    said: list[str] = []

    def told(rank: int, step: int) -> int:
        said.append(test(rank, step))
        return int(bool(said[-1]))

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int)(told)
    given = (ctypes.c_void_p * len(arrays))(*(ctypes.addressof(steps) for steps in arrays))
    counts = (ctypes.c_int64 * len(arrays))(*map(len, programs))
    seed = int(torch.randint(2**31, ()))
    failure = library.run(len(programs), seed, slow, 40, given, counts, callback)
    return "" if failure is None else f"{failure.decode()}: {''.join(said)}"


def outcome(library: Any, ranks: Ranks, slow: int, blocks: tuple[int, int] = (3, 2), resident: int = 2) -> str:
    """What goes wrong in three epochs of all ranks, or nothing; of a dispatch `resident` blocks are at work at once."""
    for rank in range(ranks.ranks):
        ranks.draw(rank)
    for part in ranks.memory:
        part.zero_()
    programs = [ranks.program(rank, blocks, resident) for rank in range(ranks.ranks)]
    failure = run(library, programs, ranks.test, slow)
    broken = any(map(guard_broken, (*ranks.memory, *ranks.outs)))
    return failure or ("something was written behind a memory" if broken else "")
