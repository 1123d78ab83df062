"""Many tokens with weights of 4 bits, without a GPU: plans, who takes what, what the compiler makes."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard import GPT_OSS_ACTIVATION, Activation, ExpertWeights, pack_experts
from moeyard.cuda.experts import four_bits_many
from moeyard.cuda.experts.four_bits_many import INTERLEAVING, interleave, many_defines, operand_boxes
from moeyard.cuda.experts.four_bits_many_plan import Operand, Tile, many_plan, many_stage_bytes
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.compile import compile_source
from moeyard.cuda.runtime.planning import planning
from moeyard.cuda.runtime.sources import SOURCES
from moeyard.dispatch.call import Call, WeightFacts
from moeyard.dispatch.schemes import refusal_of
from moeyard.quant import FP8_CHANNEL, MXFP4, NVFP4, QuantScheme, int4_scheme
from moeyard.testing.few_tokens import cuobjdump
from moeyard.testing.quantised import draw_quantised
from moeyard.values import ExpertCall

H200 = Card(132, 232448, True)
BF16, F16 = torch.bfloat16, torch.float16
SCHEMES = (MXFP4, NVFP4, int4_scheme(), int4_scheme(32, zero_points=True), int4_scheme(0), int4_scheme(64))
BYTES = {"e8m0": 1, "e4m3": 1, "float": 2}
MODELS = {"gpt-oss-120b": (4, 2880, 2880, 128), "Qwen3-30B": (8, 2048, 768, 128), "Mixtral": (2, 4096, 14336, 8)}


def operands(model: str, scheme: QuantScheme, dtype: torch.dtype = BF16) -> tuple[Operand, Operand]:
    """Of both products."""
    _, hidden, size, experts = MODELS[model]
    of = (replace(scheme, tiled=True), BYTES[scheme.scales], dtype)
    return Operand(experts, size, hidden, True, *of), Operand(experts, hidden, size, False, *of)


@pytest.mark.parametrize("model", MODELS)
def test_plans_fit_and_hold_the_rows_of_most_experts(model: str) -> None:
    for scheme in SCHEMES:
        for dtype in (BF16, F16):
            for tokens in (1, 65, 256, 1024, 4096, 16384):
                rows = tokens * MODELS[model][0]
                for operand in operands(model, scheme, dtype):
                    plan = many_plan(operand, rows, rows, dtype == F16, H200)
                    assert plan.blocks * (plan.shared_bytes + 1024) <= H200.shared_limit + 1024
                    assert plan.stages >= 4, "two on their way, one that is read, one that has been"
                    assert plan.rows % 16 == 0 and plan.weight_rows in (128, 256)
                    assert many_stage_bytes(operand, plan.rows, plan.groups, plan.tall) % 1024 == 0
                    mean = rows / operand.experts
                    assert plan.rows >= min(mean, 128) and (plan.rows <= 4 * mean + 16 or plan.rows == 16)
    wanted = {256: 16, 1024: 48, 4096: 160, 16384: 160}
    operand = operands("gpt-oss-120b", MXFP4)[0]
    for tokens, tile in wanted.items():
        assert many_plan(operand, 4 * tokens, 4 * tokens, False, H200).rows == tile
    with pytest.raises(ValueError, match="experts: expected so few that their table fits"):
        many_plan(replace(operand, experts=1 << 20), 1 << 20, 1 << 20, False, H200)


def test_boxes_bring_a_step_of_all_rows_of_a_tile() -> None:
    operand = operands("gpt-oss-120b", MXFP4)[0]
    plan = many_plan(operand, 65536, 65536, False, H200)
    (_, codes), (_, scales), _ = operand_boxes(operand, plan)
    assert codes == ((45 * 128, 360, 128, 1, 1), (45 * 512, 360 * 45 * 512, *(128 * 360 * 45 * 512,) * 2),
                     (128, 16, 1, 1, 1))  # fmt: skip
    assert scales[0][:3] == (90 * 16, 360, 128) and scales[2] == (32, 16, 1, 1, 1)
    assert codes[1][0] % 16 == scales[1][0] % 16 == 0, "the copy engine wants strides of 16 bytes"


def test_who_takes_what() -> None:
    label = "cuda (many tokens of 4 bits)"
    for scheme in SCHEMES:
        assert refusal_of(label, replace(scheme, tiled=True)) is None
        assert "in tiles alone (pack_experts)" in str(refusal_of(label, scheme))
    assert refusal_of(label, FP8_CHANNEL) == "takes no weights of scheme 'e4m3 1x*, e4m3 per row'"
    facts = WeightFacts(torch.uint8, replace(MXFP4, tiled=True), 8, 5760, 2880, True, "")
    call = Call(torch.device("cuda", 0), BF16, facts, 256, 4, 8)
    assert four_bits_many.unfit(call) is None
    assert four_bits_many.unfit(call._replace(weight_on_input=True)) == "takes no router weights on the input"
    assert four_bits_many.unfit(call._replace(weights=None)) == "takes weights of 4 bits: give weights"


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("gated", [True, False])
def test_a_layer_is_five_launches(dtype: torch.dtype, gated: bool) -> None:
    """By the launcher itself, on tensors of a CPU, which has what is allocated and listed but starts nothing."""
    weights = pack_experts(draw_quantised(4, 128, 64, MXFP4, dtype, gated=gated, bias=True))
    rows, ids = torch.zeros(300, 128, dtype=dtype), torch.zeros(300, 2, dtype=torch.int32)
    call = ExpertCall(weights, Activation() if gated else Activation("relu2"), 4, None)
    with planning(H200) as plan:
        four_bits_many.fused_experts_launch(rows, torch.zeros(300, 2), ids, call, out=torch.empty_like(rows))
    names = [recipe.name for recipe in plan.recipes]
    assert names[1:4] == ["interleave_kernel", "experts_kernel", "experts_kernel"] and len(names) == 5
    with planning(H200) as plan:
        interleave(rows, None, 1, torch.empty_like(rows))
    assert [recipe.source for recipe in plan.recipes] == ["interleave.cu"]


COMPILED: dict[str, dict[str, Any]] = {  # a product, a tile; most instructions per code in the loop, tensor cores apart
    "gpt-oss, 16": {"tile": 16, "most": 3.5},
    "gpt-oss, 32": {"tile": 32, "most": 3.6},
    "gpt-oss, 48": {"tile": 48, "most": 3.7},
    "gpt-oss, 48, second": {"tile": 48, "second": True},
    "gpt-oss, 64": {"tile": 64, "most": 4.3},
    "gpt-oss, 64, one block": {"tile": 64, "shape": (2, 1), "most": 3.5},
    "gpt-oss, 32, flat": {"tile": 32, "shape": (1, 2)},
    "gpt-oss, 128": {"tile": 128},
    "gpt-oss, 160": {"tile": 160},
    "gpt-oss, second": {"tile": 160, "second": True},
    "NVFP4, 16": {"scheme": NVFP4, "tile": 16, "most": 4.0},
    "NVFP4, 160": {"scheme": NVFP4, "tile": 160},
    "NVFP4, half": {"scheme": NVFP4, "dtype": F16, "tile": 64, "second": True},
    "MXFP4, half": {"dtype": F16, "tile": 128},
    "int4, 16": {"scheme": int4_scheme(), "tile": 16, "most": 2.6},
    "int4, 32": {"scheme": int4_scheme(32, zero_points=True), "tile": 32},
    "int4, 48": {"scheme": int4_scheme(64), "tile": 48},
    "int4, 64": {"scheme": int4_scheme(), "tile": 64, "second": True},
    "int4, 128": {"scheme": int4_scheme(), "tile": 128},
    "int4, half, second": {"scheme": int4_scheme(64, zero_points=True), "dtype": F16, "tile": 128, "second": True},
}


@pytest.mark.parametrize(
    "name", [name if name == "gpt-oss, 16" else pytest.param(name, marks=pytest.mark.full) for name in COMPILED]
)
def test_products_take_weights_from_registers_and_spill_nothing(name: str, tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    dump = cuobjdump() or pytest.skip("triton, whose wheel has cuobjdump, is not installed")
    case = {"scheme": MXFP4, "dtype": BF16, "second": False, "most": None, "shape": (), **COMPILED[name]}
    second, scheme, dtype = case["second"], case["scheme"], case["dtype"]
    operand = operands("gpt-oss-120b" if scheme == MXFP4 else "Qwen3-30B", scheme, dtype)[second]
    plan = many_plan(operand, 1 << 16, 1 << 16, second and dtype == F16, H200, Tile(case["tile"], *case["shape"]))
    kind = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn, "float": dtype}[scheme.scales]
    defines = many_defines(
        operand, plan, kind, None if second else GPT_OSS_ACTIVATION, biased=True, weighted=second and dtype == F16
    )
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compile_source(SOURCES["experts.cu"], defines, "sm_90a"))
    used, text = (
        subprocess.run([dump, option, str(path)], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    registers, stack, _, local = (int(value) for value in re.findall(r"(?:REG|STACK|SHARED|LOCAL):(\d+)", used))
    assert (registers, stack, local) == (80 if plan.blocks == 2 else 168, 0, 0)
    assert not re.search(r"\b(LDL|STL)\b", text)
    products = re.findall(r"HGMMA\.64x(\d+)x16\.F32(?:\.BF16)? R\d+, (\S+)", text)
    widths = [plan.rows] if plan.rows <= 64 else range(16, plan.rows + 1, 16)
    assert {int(width) for width, _ in products} == set(widths)
    assert all(re.fullmatch(r"R\d+,", first) for _, first in products), "the first factor comes from registers"
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", text)
    if operand.scales_weights:  # a batch is on its way while the next is made
        assert waits.count("1") in (2, 4) and waits.count("0") == 1
    else:
        assert waits.count("0") == len(widths) * plan.tall * operand.parts and waits.count("1") == 0
    if case["most"]:
        assert instructions_per_code(text, plan.tall) <= case["most"]


@pytest.mark.full
def test_rows_are_moved_16_bytes_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    dump = cuobjdump() or pytest.skip("triton, whose wheel has cuobjdump, is not installed")
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compile_source(SOURCES["interleave.cu"], INTERLEAVING, "sm_90"))
    text = subprocess.run([dump, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    assert text.count("LDG.E.128") == text.count("STG.E.128") >= 8, "four blocks of 16 columns are on their way"


def instructions_per_code(text: str, tall: int) -> float:
    """Of the loop over steps, without what is jumped over where no scale is large."""
    places = {int(at, 16): words for at, words in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)}
    product = next(at for at, words in places.items() if "HGMMA" in words)
    loops = [(int(back[1], 16), at) for at, words in places.items() if (back := re.search(r"BRA 0x([0-9a-f]+)", words))]
    first, last = min((loop for loop in loops if loop[0] <= product <= loop[1]), key=lambda loop: loop[1] - loop[0])
    inside = [(at, words) for at, words in sorted(places.items()) if first <= at <= last]
    count, until = 0, 0
    for at, words in inside:
        if at < until:
            continue
        count += 1
        jump = re.search(r"@!?P\d BRA 0x([0-9a-f]+)", words)
        if jump and at < int(jump[1], 16) <= last:
            skipped = [other for there, other in inside if at < there < int(jump[1], 16)]
            if not any("HGMMA" in other or "SYNCS" in other for other in skipped):
                until = int(jump[1], 16)
    return count / (32 * tall)


def test_operands_say_what_is_scaled() -> None:
    weights: ExpertWeights = draw_quantised(1, 64, 64, MXFP4, BF16)
    assert weights.scheme == MXFP4
    for scheme, dtype, wanted in (
        (MXFP4, BF16, True), (MXFP4, F16, False), (NVFP4, BF16, True), (NVFP4, F16, True), (int4_scheme(), BF16, False),
        (QuantScheme("e2m1", (1, 32)), BF16, False),
    ):  # fmt: skip
        assert operands("Mixtral", scheme, dtype)[0].scales_weights is wanted
