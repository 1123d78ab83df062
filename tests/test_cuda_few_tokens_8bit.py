"""The experts of a few tokens with weights of 8 bits, without a GPU: plans, who takes what, what the compiler makes."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from moeyard import Activation
from moeyard.cuda.experts import few_tokens
from moeyard.cuda.experts.few_tokens import few_tokens_defines
from moeyard.cuda.experts.few_tokens_plan import ExpertSizes, down_room, few_tokens_are_quicker, few_tokens_plan
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.compile import compile_source
from moeyard.cuda.runtime.sources import SOURCES
from moeyard.dispatch.call import Call, WeightFacts
from moeyard.dispatch.schemes import refusal_of
from moeyard.quant import (
    FP8_BLOCK,
    FP8_BLOCK_WEIGHTS,
    FP8_CHANNEL,
    FP8_TENSOR,
    FP8_TENSOR_STATIC,
    FP8_WEIGHTS,
    INT8_CHANNEL,
    INT8_WEIGHTS,
    MXFP4,
    NVFP4,
    QuantScheme,
    int4_scheme,
)
from moeyard.testing.few_tokens import cuobjdump

H200, SMALL = Card(132, 232448, True), Card(84, 101376, True)
MODELS = {  # top_k, hidden size, intermediate size, gated, experts
    "Mixtral": (2, 4096, 14336, True, 8),
    "Qwen3-30B": (8, 2048, 768, True, 128),
    "DeepSeek-V3": (8, 7168, 2048, True, 256),
    "gpt-oss-120b": (4, 2880, 2880, True, 128),
    "Qwen3-Next": (10, 2048, 512, True, 512),
    "Qwen3-Next / 4": (10, 2048, 128, True, 512),
    "Qwen3-235B / 8": (8, 4096, 192, True, 128),
    "not gated": (6, 2688, 1856, False, 128),
    "odd": (3, 16 * 37, 16 * 131, True, 5),
    "one word": (1, 16, 16, True, 1),
}
SCHEMES = (
    FP8_TENSOR, FP8_TENSOR_STATIC, FP8_CHANNEL, FP8_BLOCK, FP8_WEIGHTS, FP8_BLOCK_WEIGHTS, INT8_CHANNEL, INT8_WEIGHTS
)  # fmt: skip


def sizes_of(model: str, tokens: int, scheme: QuantScheme, start: int = 0) -> ExpertSizes:
    top_k, hidden, size, gated, _ = MODELS[model]
    return ExpertSizes(tokens, top_k, hidden, size, gated, scheme, start)


@pytest.mark.parametrize("model", MODELS)
def test_plans_hold(model: str) -> None:
    for scheme in SCHEMES:
        for tokens in range(1, 33):
            for start in (0, 64) if scheme.period == 128 else (0,):
                sizes = sizes_of(model, tokens, scheme, start)
                for card in (H200, SMALL):
                    plan = few_tokens_plan(sizes, card)
                    assert plan is not None or tokens > 1 or card is SMALL
                    if plan is None:
                        continue
                    whole, room = card.shared_limit + 1024, down_room(plan, sizes, card)
                    assert plan.up_bytes(sizes, card) + room + 2 * 1024 <= whole, "a block of both launches at once"
                    assert plan.down_bytes(sizes, card) <= room <= card.shared_limit
                    assert 2 <= plan.up_stages <= 16 and 2 <= plan.down_stages <= 16
                    assert plan.down_rows == 1 or 8 * plan.down_segment == sizes.intermediate_size
                    assert not plan.up_segment % 2 and not plan.down_segment % 2, "copies of whole 16 bytes"
                    assert 8 * plan.up_segment <= 2048 and 8 * plan.down_segment <= 2048, "as long as those of 16 bits"


def test_sizes_that_copies_do_not_take() -> None:
    assert few_tokens_plan(ExpertSizes(1, 2, 2048 + 8, 768, True), H200) is not None
    for hidden, size, start in ((2048 + 8, 768, 0), (2048, 768 + 8, 0), (2048, 768, 4)):
        assert few_tokens_plan(ExpertSizes(1, 2, hidden, size, True, FP8_BLOCK, start), H200) is None
    assert few_tokens_plan(ExpertSizes(1, 2, 2048, 768, True, FP8_BLOCK, 8), H200) is not None


def test_half_the_bytes_may_be_read_twice_as_often() -> None:
    chosen = {
        (model, tokens, scheme): few_tokens_are_quicker(
            ExpertSizes(tokens, *MODELS[model][:4], scheme), MODELS[model][4], H200
        )
        for model in MODELS
        for tokens in range(1, 9)
        for scheme in (None, FP8_CHANNEL)
    }
    assert all(chosen[model, tokens, FP8_CHANNEL] or not chosen[model, tokens, None] for model, tokens, _ in chosen)
    assert any(chosen[model, tokens, FP8_CHANNEL] > chosen[model, tokens, None] for model, tokens, _ in chosen)


def test_who_takes_what() -> None:
    for scheme in SCHEMES:
        assert refusal_of("cuda (few tokens)", scheme) is None
    others = (
        MXFP4, NVFP4, int4_scheme(), QuantScheme("e4m3", (64, 128)), QuantScheme("int8", activations="e4m3"),
        QuantScheme("e4m3", activations="int8"), QuantScheme("e4m3", (128, 128), "e8m0"),
        QuantScheme("e4m3", (1, 0), activations="e4m3", activation_group=64),
    )  # fmt: skip
    for scheme in others:
        assert refusal_of("cuda (few tokens)", scheme) == f"takes no weights of scheme {str(scheme)!r}"


@pytest.mark.parametrize(
    ("hidden", "size", "start", "said"),
    [
        (2048, 768, 4, "weights.scales.block_start: takes multiples of 8, got 4"),
        (2056, 768, 0, "takes rows of whole 16 bytes, got 2056 and 768 columns of weights"),
        (2048, 776, 0, "takes rows of whole 16 bytes, got 2048 and 776 columns of weights"),
        (2048, 768, 64, None),
    ],
)
def test_refusals_say_why(
    hidden: int, size: int, start: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_tokens, "card_of", lambda _: H200)
    facts = WeightFacts(torch.float8_e4m3fn, FP8_BLOCK, 128, 2 * size, hidden, True, "", start)
    call = Call(torch.device("cuda", 0), torch.bfloat16, facts, 1, 8, 128)
    assert few_tokens.unfit(call) == said


COMPILED = [  # model, tokens, scheme, where in a block, dtype, weight on input; what multiplies
    ("Qwen3-30B", 1, FP8_CHANNEL, 0, torch.bfloat16, False, "HMMA.16816.F32"),
    ("DeepSeek-V3", 1, FP8_BLOCK, 0, torch.bfloat16, False, "HMMA.16816.F32"),
    ("Mixtral", 4, FP8_TENSOR_STATIC, 0, torch.float16, False, "HMMA.16816.F32"),
    ("Qwen3-235B / 8", 1, FP8_BLOCK, 64, torch.bfloat16, True, "HMMA.16816.F32"),
    ("gpt-oss-120b", 8, FP8_BLOCK_WEIGHTS, 0, torch.bfloat16, False, "HMMA.16816.F32.BF16"),
    ("Qwen3-Next", 3, FP8_WEIGHTS, 0, torch.float16, True, "HMMA.16816.F32"),
    ("Qwen3-30B", 4, INT8_CHANNEL, 0, torch.bfloat16, False, "IDP.4A.S8.S8"),
    ("not gated", 1, INT8_WEIGHTS, 0, torch.bfloat16, False, "HMMA.16816.F32.BF16"),
]


def compiled(case: tuple, arch: str) -> bytes:  # type: ignore[type-arg]
    model, tokens, scheme, start, dtype, on_input, _ = case
    sizes = sizes_of(model, tokens, scheme, start)
    plan = few_tokens_plan(sizes, H200)
    assert plan is not None
    defines = few_tokens_defines(
        sizes, plan, H200, dtype, "int", False, (False, True), Activation(), on_input, torch.bfloat16
    )
    return compile_source(SOURCES["few_tokens.cu"], defines, arch)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: f"{case[0]}; {case[2]}")
def test_kernels_multiply_codes_and_spill_nothing(case: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    pytest.importorskip("cuda.core")
    dump, path = (
        cuobjdump() or pytest.skip("triton, whose wheel has cuobjdump, is not installed"),
        tmp_path / "kernels.cubin",
    )
    path.write_bytes(compiled(case, "sm_90"))
    usage = subprocess.run([dump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert {name for name, *_ in found} == {"few_tokens_up_kernel", "few_tokens_down_kernel"}, usage
    assert all(stack == local == "0" for _, _, stack, _, local in found), "nothing is spilled"
    assert sum(int(registers) for _, registers, *_ in found) * 256 <= 65536, "both at once"
    text = subprocess.run([dump, "-sass", path], capture_output=True, text=True, check=True).stdout
    for part in text.split("Function :")[1:]:
        assert "UBLKCP" in part and case[-1] in part
        assert "LDL" not in part and "STL" not in part


def test_kernels_compile_for_later_cards() -> None:
    pytest.importorskip("cuda.core")
    for case in (COMPILED[1], COMPILED[6]):
        assert b"few_tokens_up_kernel" in compiled(case, "sm_100")
