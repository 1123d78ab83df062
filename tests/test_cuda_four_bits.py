"""The experts of a few tokens with weights of 4 bits, without a GPU: plans, who takes what, what the compiler makes."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard import GPT_OSS_ACTIVATION, Activation
from moeyard.cuda.experts import four_bits
from moeyard.cuda.experts.four_bits import four_bit_defines
from moeyard.cuda.experts.four_bits_plan import FourBitSizes, four_bit_plan, four_bits_are_few, most_routes_of
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.compile import compile_source
from moeyard.cuda.runtime.sources import SOURCES
from moeyard.dispatch.call import Call, WeightFacts
from moeyard.dispatch.schemes import refusal_of
from moeyard.quant import FP8_CHANNEL, MXFP4, NVFP4, QuantScheme, int4_scheme
from moeyard.testing.few_tokens import cuobjdump

H200 = Card(132, 232448, True)
MODELS = {  # top_k, hidden size, intermediate size, gated, experts
    "Mixtral": (2, 4096, 14336, True, 8),
    "Qwen3-30B": (8, 2048, 768, True, 128),
    "DeepSeek-V3": (8, 7168, 2048, True, 256),
    "gpt-oss-120b": (4, 2880, 2880, True, 128),
    "Qwen3-Next": (10, 2048, 512, True, 512),
    "not gated": (6, 2688, 1856, False, 128),
}
SCHEMES = (MXFP4, NVFP4, int4_scheme(), int4_scheme(32, zero_points=True), int4_scheme(0), int4_scheme(64))
KINDS = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn, "float": torch.bfloat16}


def sizes_of(model: str, tokens: int, scheme: QuantScheme) -> FourBitSizes:
    top_k, hidden, size, gated, experts = MODELS[model]
    return FourBitSizes(
        most_routes_of(tokens * top_k), top_k, experts, hidden, size, gated, replace(scheme, tiled=True),
        KINDS[scheme.scales].itemsize,
    )  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_plans_hold(model: str) -> None:
    for scheme in SCHEMES:
        for tokens in (1, 2, 3, 4, 8, 16, 33, 64):
            sizes = sizes_of(model, tokens, scheme)
            plan = four_bit_plan(sizes, H200)
            assert plan is not None or model in ("DeepSeek-V3", "Mixtral")
            if plan is None:
                continue
            up, down = plan.up_bytes(sizes), plan.down_bytes(sizes)
            assert max(up, down) <= H200.shared_limit
            assert min(plan.up_stages, plan.down_stages) >= 3, "two slots on their way while one is read"
            assert plan.held_rows == min(sizes.most_routes, plan.held_rows) and plan.held_rows in (4, 8, 16)
            if model in ("gpt-oss-120b", "Qwen3-30B") and sizes.most_routes <= 16:
                assert up + down + 2 * 1024 <= H200.shared_limit + 1024, "a block of both launches at once"


def test_who_takes_what(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in SCHEMES:
        assert refusal_of("cuda (few tokens of 4 bits)", replace(scheme, tiled=True)) is None
    assert (
        refusal_of("cuda (few tokens of 4 bits)", FP8_CHANNEL) == "takes no weights of scheme 'e4m3 1x*, e4m3 per row'"
    )
    for label in ("cuda (few tokens of 4 bits)", "triton"):
        wanted = "takes weights of scheme 'e2m1 1x32 e8m0 scales' in tiles alone (pack_experts)"
        assert refusal_of(label, MXFP4) == wanted
    monkeypatch.setattr(four_bits, "card_of", lambda _: H200)

    def said(tokens: int, model: str = "gpt-oss-120b") -> str | None:
        top_k, hidden, size, gated, experts = MODELS[model]
        scheme = replace(MXFP4, tiled=True)
        facts = WeightFacts(torch.uint8, scheme, experts, (1 + gated) * size, hidden, gated, "")
        return four_bits.unfit(Call(torch.device("cuda", 0), torch.bfloat16, facts, tokens, top_k, experts))

    assert said(1) is None and said(64) is None and said(64, "Qwen3-Next") is None
    assert said(65) == "takes up to 64 tokens, got 65"
    sizes = replace(sizes_of("Mixtral", 64, MXFP4), num_local=2)
    assert four_bits_are_few(sizes, 64, 2, H200) == "takes up to 16 routes per expert on average, got 64"
    wide = replace(sizes_of("Mixtral", 1, MXFP4), hidden_size=1 << 16)
    assert four_bits_are_few(wide, 1, 8, H200) == (
        "takes what fits shared memory, got 65536 and 14336 columns of weights"
    )


COMPILED: list[
    tuple[Any, ...]
] = [  # model, tokens, scheme, dtype; instructions per code in the loop of the first launch
    ("gpt-oss-120b", 1, MXFP4, torch.bfloat16, 2.1),
    ("Qwen3-30B", 8, int4_scheme(), torch.bfloat16, 1.9),
    ("Qwen3-30B", 64, int4_scheme(32, zero_points=True), torch.float16, 2.9),
    ("Qwen3-30B", 1, NVFP4, torch.bfloat16, 2.5),
    ("not gated", 4, int4_scheme(0), torch.bfloat16, 1.9),
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=() if one is COMPILED[0] else pytest.mark.full) for one in COMPILED],
    ids=lambda case: f"{case[0]}; {case[2]}",
)
def test_kernels_spill_nothing_and_take_few_instructions(case: tuple[Any, ...], tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    dump = cuobjdump() or pytest.skip("triton, whose wheel has cuobjdump, is not installed")
    model, tokens, scheme, dtype, most = case
    sizes = sizes_of(model, tokens, scheme)
    plan = four_bit_plan(sizes, H200)
    assert plan is not None
    activation = GPT_OSS_ACTIVATION if model == "gpt-oss-120b" else Activation()
    defines = four_bit_defines(
        sizes, plan, dtype, "int", False, (model == "gpt-oss-120b",) * 2, activation, False, KINDS[scheme.scales]
    )
    path = tmp_path / "kernels.cubin"
    path.write_bytes(compile_source(SOURCES["four_bits.cu"], defines, "sm_90"))
    usage = subprocess.run([dump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert {name for name, *_ in found} == {f"four_bits_{name}_kernel" for name in ("up", "down", "sum")}
    assert all(stack == local == "0" for _, _, stack, _, local in found), "nothing is spilled"
    text = subprocess.run([dump, "-sass", path], capture_output=True, text=True, check=True).stdout
    up = next(part for part in text.split("Function :") if "four_bits_up_kernel" in part[:60])
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", up)
    places = {int(at, 16): words for at, words in lines}
    products = [at for at, words in places.items() if "HMMA.16816.F32 " in words]
    loops = [(int(back[1], 16), at) for at, words in places.items() if (back := re.search(r"BRA 0x([0-9a-f]+)", words))]
    first, last = min((loop for loop in loops if loop[0] <= products[0] <= loop[1]), key=lambda loop: loop[1] - loop[0])
    inside = [words for at, words in places.items() if first <= at <= last]
    per_code = len(inside) / (8 * sum("HMMA" in words for words in inside))
    assert per_code <= most, f"{per_code:.2f} instructions per code"
