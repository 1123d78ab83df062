"""The experts of a few tokens, without a GPU: plans, who copies what and in which order, what the compiler makes."""

import importlib.util
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moeyard import GPT_OSS_ACTIVATION, Activation
from moeyard.cuda.experts.few_tokens import few_tokens_defines
from moeyard.cuda.experts.few_tokens_plan import (
    ExpertSizes,
    FewTokensPlan,
    down_room,
    few_tokens_are_quicker,
    few_tokens_plan,
    segment_of,
)
from moeyard.cuda.runtime import compile as building
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.sources import SOURCES

H200, SMALL = Card(132, 232448, True), Card(84, 101376, True)
MODELS = {  # top_k, hidden size, intermediate size, gated, experts
    "Mixtral": (2, 4096, 14336, True, 8),
    "Qwen3-30B": (8, 2048, 768, True, 128),
    "DeepSeek-V3": (8, 7168, 2048, True, 256),
    "gpt-oss-120b": (4, 2880, 2880, True, 128),
    "Qwen3-Next": (10, 2048, 512, True, 512),
    "Qwen3-Next / 4": (10, 2048, 128, True, 512),
    "Qwen3-235B / 8": (8, 4096, 192, True, 128),
    "Gemma4": (8, 2816, 704, True, 128),
    "not gated": (6, 2688, 1856, False, 128),
    "odd": (3, 8 * 37, 8 * 131, True, 5),
    "one word": (1, 8, 8, True, 1),
}


def sizes_of(model: str, tokens: int = 1) -> ExpertSizes:
    top_k, hidden, size, gated, _ = MODELS[model]
    return ExpertSizes(tokens, top_k, hidden, size, gated)


def plans(sizes: ExpertSizes, card: Card = H200) -> list[FewTokensPlan]:
    """The default plan and others that a benchmark may ask for."""
    variants: list[dict[str, int]] = [
        {},
        {"warps": 16, "segment": 64},
        {"warps": 4, "segment": 256},
        {"ring_bytes": 48 << 10},
    ]
    made = [few_tokens_plan(sizes, card, **variant) for variant in variants]
    return [plan for plan in made if plan is not None]


@pytest.mark.parametrize("model", MODELS)
def test_plans_hold(model: str) -> None:
    for tokens in range(1, 33):
        sizes = sizes_of(model, tokens)
        if tokens == 1:
            assert few_tokens_plan(sizes, H200) is not None
        if sizes.num_routes > 32:
            assert few_tokens_plan(sizes, H200) is None
        for card in (H200, SMALL):
            for plan in plans(sizes, card):
                whole, room = card.shared_limit + 1024, down_room(plan, sizes, card)
                assert plan.up_bytes(sizes, card) + room + 2 * 1024 <= whole, "a block of both launches at once"
                assert room >= plan.down_bytes(sizes, card) and room <= card.shared_limit
                assert 2 <= plan.up_stages <= 16 and 2 <= plan.down_stages <= 16
                assert plan.down_rows == 1 or 8 * plan.down_segment == sizes.intermediate_size
                assert sizes.hidden_size % plan.down_rows == 0
        assert few_tokens_plan(sizes, Card(108, 166912, False)) is None, "bulk copies came with compute capability 9.0"
    default = few_tokens_plan(sizes_of(model), H200)
    assert default is not None and down_room(default, sizes_of(model), H200) * 2 > H200.shared_limit + 1024 - 2 * 1024


@pytest.mark.parametrize("words", [1, 2, 96, 128, 129, 131, 256, 336, 352, 360, 896, 1792, 8192])
@pytest.mark.parametrize("most", [64, 128, 256])
def test_segments_cover_rows(words: int, most: int) -> None:
    segment = segment_of(words, most)
    pieces = -(-words // segment)
    assert 1 <= segment <= most and pieces == -(-words // most), "no more segments than needed"
    assert segment == words or segment % 8 == 0, "segments begin at whole lines of 128 bytes"


def first_unit(total: int, block: int, blocks: int) -> int:
    return total * block // blocks


def up_copies(sizes: ExpertSizes, plan: FewTokensPlan, held: int, blocks: int) -> Iterator[list[tuple[int, int, int]]]:
    """(place, row, word) of what each warp copies, in its order, as `fill` of few_tokens_up_kernel finds them."""
    total = held * sizes.intermediate_size
    pieces = -(-(sizes.hidden_size // 8) // plan.up_segment)
    for block in range(blocks):
        last = first_unit(total, block + 1, blocks)
        for warp in range(plan.warps):
            begin = first_unit(total, block, blocks) + warp
            units = -(-(last - begin) // plan.warps) if begin < last else 0
            ahead, piece, copies = begin, 0, []
            for _ in range(units * pieces):
                copies.append((*divmod(ahead, sizes.intermediate_size), piece * plan.up_segment))
                piece += 1
                if piece == pieces:
                    ahead, piece = ahead + plan.warps, 0
            yield copies


def down_copies(
    sizes: ExpertSizes, plan: FewTokensPlan, starts: list[int], blocks: int
) -> Iterator[tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]]:
    """(place, first row, word) in the order of a warp's copies (Walk) and in the order in which it multiplies."""
    units_a_token = sizes.hidden_size // plan.down_rows
    total, pieces = sizes.num_tokens * units_a_token, -(-(sizes.intermediate_size // 8) // plan.down_segment)
    for block in range(blocks):
        first, last = first_unit(total, block, blocks), first_unit(total, block + 1, blocks)
        for warp in range(plan.warps):
            walked, unit, place, stop, piece = [], first + warp, 0, 0, 0

            def enter(unit: int, last: int = last) -> tuple[int, int, int]:
                while unit < last:
                    token = unit // units_a_token
                    if starts[token] < starts[token + 1]:
                        return unit, starts[token], starts[token + 1]
                    unit += plan.warps
                return unit, 0, 0

            unit, place, stop = enter(unit)
            while unit < last:
                walked.append((place, unit % units_a_token * plan.down_rows, piece * plan.down_segment))
                piece += 1
                if piece == pieces:
                    piece, place = 0, place + 1
                    if place == stop:
                        unit, place, stop = enter(unit + plan.warps)
            multiplied = [
                (place, unit % units_a_token * plan.down_rows, piece * plan.down_segment)
                for unit in range(first + warp, last, plan.warps)
                for place in range(starts[unit // units_a_token], starts[unit // units_a_token + 1])
                for piece in range(pieces)
            ]
            yield walked, multiplied


@pytest.mark.parametrize("model", [name for name in MODELS if name not in ("Mixtral", "DeepSeek-V3")])
def test_every_row_is_copied_once_and_blocks_have_as_much(model: str) -> None:
    for tokens in (1, 2):
        sizes = sizes_of(model, tokens)
        kept = [random.random() < 0.8 for _ in range(sizes.num_routes)]
        starts = [sum(kept[: t * sizes.top_k]) for t in range(tokens + 1)]
        for plan in plans(sizes):
            seen, shares = [], []
            for copies in up_copies(sizes, plan, starts[-1], 132):
                seen += copies
                shares.append(len(copies))
            words = range(0, sizes.hidden_size // 8, plan.up_segment)
            assert len(seen) == len(set(seen)) == starts[-1] * sizes.intermediate_size * len(words)
            assert all(p < starts[-1] and r < sizes.intermediate_size and w in words for p, r, w in seen)
            blocks = [sum(shares[i : i + plan.warps]) for i in range(0, len(shares), plan.warps)]
            assert max(blocks) - min(blocks) <= len(words), "blocks differ by one unit at most"
            written = []
            for walked, multiplied in down_copies(sizes, plan, starts, 132):
                assert walked == multiplied, "copies come in the order in which they are waited for"
                written += walked
            words = range(0, sizes.intermediate_size // 8, plan.down_segment)
            assert len(written) == len(set(written))
            assert len(written) * plan.down_rows == starts[-1] * sizes.hidden_size * len(words)


def test_where_this_is_the_quicker_way() -> None:
    def chosen(model: str, tokens: int, card: Card = H200) -> bool:
        return few_tokens_are_quicker(sizes_of(model, tokens), MODELS[model][4], card)

    assert all(chosen(model, 1) for model in MODELS)
    assert not any(chosen(model, 0) or chosen(model, 8) or chosen(model, 33) for model in MODELS if model != "one word")
    assert not chosen("Mixtral", 2), "two tokens share an expert almost every other time"
    assert chosen("Qwen3-30B", 2) and chosen("Qwen3-Next", 3) and chosen("gpt-oss-120b", 2)
    assert not chosen("DeepSeek-V3", 2), "an expert of 88 MB is too much to read twice in every fourth call"
    assert not chosen("Qwen3-30B", 1, Card(108, 166912, False))
    for model, tokens in (("Qwen3-30B", 1), ("Qwen3-30B", 4), ("DeepSeek-V3", 1), ("Mixtral", 1)):
        experts, sizes = MODELS[model][4], sizes_of(model, tokens)
        less = few_tokens_are_quicker(sizes, experts, H200, 0.125)
        assert less or not chosen(model, tokens), "a rank has less to read"
    assert not chosen("DeepSeek-V3", 2) and few_tokens_are_quicker(sizes_of("DeepSeek-V3", 2), 256, H200, 0.125)
    assert few_tokens_plan(sizes_of("Qwen3-30B"), H200, 0.125) == few_tokens_plan(
        sizes_of("Qwen3-30B"), H200, warps=4, ring_bytes=32 << 10
    ), "an eighth of the routes is little to read"
    one = ExpertSizes(1, 2, 2048, 768, True)
    assert not few_tokens_are_quicker(one, 1, H200), "more routes than experts repeat some"
    assert not few_tokens_are_quicker(ExpertSizes(1, 8, 2044, 768, True), 128, H200), "rows of whole words"


COMPILED = [  # model, tokens, options of the plan, ids, map, biases, activation, dtype, weight on input
    ("Qwen3-30B", 1, {}, "int", False, (False, False), Activation(), torch.bfloat16, False),
    ("Mixtral", 1, {"trigger": 4}, "i64", True, (False, True), Activation("gelu"), torch.float16, False),
    ("gpt-oss-120b", 2, {}, "int", False, (True, True), GPT_OSS_ACTIVATION, torch.bfloat16, False),
    ("DeepSeek-V3", 1, {"warps": 16, "segment": 64}, "int", True, (False, False), Activation(), torch.bfloat16, False),
    ("Qwen3-Next / 4", 3, {}, "int", False, (False, False), Activation("gelu_tanh"), torch.float16, True),
    ("Qwen3-235B / 8", 1, {"evict_first": False}, "int", False, (True, False), Activation(), torch.bfloat16, True),
    ("not gated", 1, {"warps": 4, "segment": 256}, "i64", False, (True, True), Activation("relu2", limit=3.0),
     torch.bfloat16, False),
    ("odd", 2, {}, "int", True, (True, True), Activation(), torch.float16, False),
    ("one word", 5, {}, "int", False, (False, False), Activation(), torch.bfloat16, True),
]  # fmt: skip


def compiled(case: tuple, arch: str, card: Card = H200) -> bytes | None:  # type: ignore[type-arg]
    model, tokens, options, id_type, mapped, biased, activation, dtype, on_input = case
    sizes = sizes_of(model, tokens)
    plan = few_tokens_plan(sizes, card, **options)
    if plan is None:
        return None
    text = SOURCES["few_tokens.cu"]
    defines = few_tokens_defines(sizes, plan, card, dtype, id_type, mapped, biased, activation, on_input)
    return building.compile_source(text, defines, arch)


def cuobjdump() -> str:
    spec = importlib.util.find_spec("triton")
    path = Path(spec.origin or "").parent / "backends/nvidia/bin/cuobjdump" if spec else Path()
    if not path.is_file():
        pytest.skip("triton, whose wheel has cuobjdump, is not installed")
    return str(path)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case[0])
def test_kernels_compile_to_bulk_copies_and_spill_nothing(case: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    pytest.importorskip("cuda.core")
    code = compiled(case, "sm_90")
    assert code is not None
    dump, path = cuobjdump(), tmp_path / "kernels.cubin"
    path.write_bytes(code)
    usage = subprocess.run([dump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert {name for name, *_ in found} == {"few_tokens_up_kernel", "few_tokens_down_kernel"}, usage
    threads = 32 * case[2].get("warps", 8)
    assert all(stack == local == "0" for _, _, stack, _, local in found), "nothing is spilled"
    assert sum(int(registers) for _, registers, *_ in found) * threads <= 65536, "both at once"
    text = subprocess.run([dump, "-sass", path], capture_output=True, text=True, check=True).stdout
    for part in text.split("Function :")[1:]:
        assert "UBLKCP" in part and "LDS.128" in part and "ACQBULK" in part and "PREEXIT" in part
        assert "LDL" not in part and "STL" not in part


@pytest.mark.parametrize("arch", ["sm_100", "sm_120"])
def test_kernels_compile_for_later_cards(arch: str) -> None:
    pytest.importorskip("cuda.core")
    card = SMALL if arch == "sm_120" else H200
    made = [compiled(case, arch, card) for case in (COMPILED[0], COMPILED[4], COMPILED[7])]
    assert sum(code is not None and b"few_tokens_up_kernel" in code for code in made) >= 2
