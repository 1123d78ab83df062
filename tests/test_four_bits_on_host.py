"""The kernels of four_bits.cu, lane by lane on a host, against float64 of the dequantised layer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeyard import GPT_OSS_ACTIVATION, Activation, Routing, pack_experts
from moeyard.cuda.experts.four_bits import four_bit_defines
from moeyard.cuda.experts.four_bits_plan import FourBitPlan, FourBitSizes, four_bit_plan, most_routes_of
from moeyard.cuda.runtime.parameters import float_bits
from moeyard.dispatch.schemes import refusal_of
from moeyard.quant import MXFP4, NVFP4, QuantScheme, int4_scheme
from moeyard.testing import guard_broken, poisoned
from moeyard.testing.budgets import judged_experts
from moeyard.testing.few_tokens import CARD, COMPILER, FOUR_BITS, build, launch
from moeyard.testing.quantised import draw_quantised

HERE = Path(__file__).parent / "host_few_tokens"
pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
SCHEMES = (
    MXFP4, int4_scheme(), NVFP4, int4_scheme(32, zero_points=True), int4_scheme(64), int4_scheme(0),
    int4_scheme(0, zero_points=True), int4_scheme(128, zero_points=True),
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {  # sizes: tokens, top_k, hidden, intermediate
    "1 token": {"sizes": (1, 4, 192, 128), "experts": 5, "bias": True, "activation": GPT_OSS_ACTIVATION},
    "7 tokens, shared experts": {
        "sizes": (7, 4, 128, 192), "experts": 3, "mapped": True, "wide": True, "on_input": True,
        "scales": torch.float16, "cut": {"held_rows": 8, "up_steps": 2, "up_stages": 2, "down_steps": 1},
    },
    "20 tokens, one expert": {
        "sizes": (20, 1, 192, 64), "experts": 1, "dtype": torch.float16, "scales": torch.float32, "bias": True,
        "cut": {"held_rows": 8, "down_stages": 1},
    },
    "not gated": {
        "sizes": (3, 3, 256, 128), "experts": 40, "activation": Activation("relu2"), "gated": False,
        "cut": {"warps": 3, "up_steps": 3, "down_steps": 2}, "scales": torch.float16,
    },
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "activation": Activation(), "dtype": torch.bfloat16, "gated": True, "scales": torch.bfloat16
}  # fmt: skip


def prepared(name: str, scheme: QuantScheme) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    case = DEFAULTS | CASES[name]
    if scheme.scales != "float":
        case["scales"] = None
    tokens, top_k, hidden, size = case["sizes"]
    scale_dtype = case["scales"] or (torch.float8_e8m0fnu if scheme == MXFP4 else torch.float8_e4m3fn)
    sizes = FourBitSizes(
        most_routes_of(tokens * top_k), top_k, case["experts"], hidden, size, case["gated"],
        replace(scheme, tiled=True), scale_dtype.itemsize,
    )  # fmt: skip
    plan = four_bit_plan(sizes, CARD)
    assert isinstance(plan, FourBitPlan)
    plan = replace(plan, **case.get("cut", {}))
    assert max(plan.up_bytes(sizes), plan.down_bytes(sizes)) <= CARD.shared_limit
    defines = four_bit_defines(
        sizes, plan, case["dtype"], "i64" if case.get("wide") else "int", case.get("mapped", False),
        (case.get("bias", False),) * 2, case["activation"], case.get("on_input", False), scale_dtype,
    )  # fmt: skip
    return case, defines


def drawn(case: dict[str, Any], scheme: QuantScheme) -> tuple[Any, ...]:
    """Rows, routing, weights, num_experts and expert_map."""
    tokens, top_k, hidden, size = case["sizes"]
    experts, dtype = case["experts"], case["dtype"]
    weights = draw_quantised(experts, hidden, size, scheme, dtype, gated=case["gated"], bias=case.get("bias", False))
    scales = weights.scales
    assert scales is not None
    if case["scales"] is not None:
        kind = case["scales"]
        weights = replace(weights, scales=replace(scales, w13=scales.w13.to(kind), w2=scales.w2.to(kind)))
    num_experts, mapping = experts, None
    if case.get("mapped"):
        num_experts = 2 * experts
        mapping = torch.where(torch.arange(num_experts) % 2 == 0, torch.arange(num_experts) // 2, -1).int()
    ids = torch.randint(-1, num_experts + 1, (tokens, top_k), dtype=torch.int64 if case.get("wide") else torch.int32)
    ids[0, 0] = 0  # somebody is held
    rows = torch.randn(tokens, hidden).to(dtype) * torch.exp2(torch.randint(-3, 4, (tokens, 1))).to(dtype)
    return rows, Routing(torch.rand(tokens, top_k), ids), weights, num_experts, mapping


def computed(library: Any, case: dict[str, Any], at_once: bool, given: tuple[Any, ...]) -> torch.Tensor | str:
    """What the launches leave, or what went wrong."""
    rows, routing, weights, num_experts, mapping = given
    tokens, top_k, hidden, size = case["sizes"]
    packed = pack_experts(weights)
    ids, factors, scales = routing.topk_ids, routing.topk_weights, packed.scales
    assert scales is not None
    act, out = poisoned((tokens * top_k, size), case["dtype"]), poisoned((tokens, hidden), case["dtype"])
    results = poisoned((tokens * top_k, hidden), torch.float32)
    a = case["activation"]
    constants = [float_bits(value) for value in (a.alpha, a.beta, a.limit or 0.0)]
    blocks = CARD.processors
    failure = launch(
        library, 0, blocks, at_once,
        [ids, mapping, factors, rows, packed.w13, packed.w13_bias, scales.w13, scales.w13_zero_points,
         scales.w13_global, act],
        tokens, num_experts, 2 * hidden, *constants,
    ) or launch(
        library, 1, blocks, at_once,
        [ids, mapping, act, packed.w2, packed.w2_bias, scales.w2, scales.w2_zero_points, scales.w2_global, results],
        tokens, num_experts,
    ) or launch(library, 2, blocks, at_once, [ids, mapping, factors, results, out], tokens, num_experts)  # fmt: skip
    if failure is None and (guard_broken(act) or guard_broken(out) or guard_broken(results)):
        failure = "something was written behind an output"
    return out if failure is None else failure


def wrong(library: Any, case: dict[str, Any], at_once: bool, given: tuple[Any, ...]) -> str | None:
    """What is wrong with an answer, or None."""
    rows, routing, weights, num_experts, mapping = given
    got = computed(library, case, at_once, given)
    judged = judged_experts(
        rows, routing, weights, activation=case["activation"], num_experts=num_experts, expert_map=mapping,
        apply_router_weight_on_input=case.get("on_input", False),
    )  # fmt: skip
    return got if isinstance(got, str) else judged.error(got)


ALL = [(name, scheme) for name in CASES for scheme in SCHEMES]
FEW = [("1 token", MXFP4)]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [pytest.param(*one, marks=() if one in FEW else pytest.mark.full, id=f"{one[0]}; {one[1]}") for one in ALL],
)
def test_codes_of_4_bits_are_multiplied_by_the_rule(name: str, scheme: QuantScheme, tmp_path: Path) -> None:
    assert refusal_of("cuda (few tokens of 4 bits)", replace(scheme, tiled=True)) is None
    case, defines = prepared(name, scheme)
    library = build(HERE, tmp_path, defines, names=FOUR_BITS)
    for at_once in (True, False):
        assert wrong(library, case, at_once, drawn(case, scheme)) is None
    rows, *rest = given = drawn(case, scheme)
    rows[-1] = 0
    assert wrong(library, case, True, given) is None
    for bad in (torch.nan, -torch.inf):
        strange = rows.clone()
        strange[0, -1] = bad
        assert wrong(library, case, True, (strange, *rest)) is None, "a bad value stays in its row"
    codes = rest[1].w13, rest[1].w2  # one code that is not zero, in each place of a word
    for place in range(32):
        for matrix in codes:
            zero = 0x88 if scheme.weights == "int4" else 0
            matrix.fill_(zero)
            matrix[:, :, place % 32] = 0x17 if place % 2 else 0xE9
        assert place % 8 or wrong(library, case, True, (strange.nan_to_num(1, 1, 1), *rest)) is None


@pytest.mark.full
@pytest.mark.parametrize(
    ("scheme", "bytes_"), [(MXFP4, (0, 20, 200, 255)), (NVFP4, (0xB8, 0x00, 0x01, 0x7F, 0x80))], ids=["e8m0", "e4m3"]
)
def test_scales_at_their_ends(scheme: QuantScheme, bytes_: tuple[int, ...], tmp_path: Path) -> None:
    """e8m0 of 0, a subnormal, and of 255, NaN; e4m3 scales that are negative, zero, subnormal or NaN."""
    case, defines = prepared("1 token", scheme)
    library = build(HERE, tmp_path, defines, names=FOUR_BITS)
    for byte in bytes_:
        for name in ("w13", "w2"):
            given = drawn(case, scheme)
            getattr(given[2].scales, name).view(torch.uint8)[:, 9, 1] = byte
            assert wrong(library, case, True, given) is None, f"{name}: {byte}"


MUTANTS: dict[str, tuple[QuantScheme, str, tuple[str, str]]] = {
    "lower rows with the upper rows' scale": (MXFP4, "1 token", ("own[2], scale.y", "own[2], scale.x")),
    "the first group's scale for all": (MXFP4, "1 token", ("scales[part * 8];", "scales[0];")),
    "signs of e2m1 dropped": (MXFP4, "1 token", ("(word << 9 & SIZES) | (word << 2 & SIGNS)", "(word << 9 & SIZES)")),
    "zero points of the upper rows": (
        SCHEMES[3], "7 tokens, shared experts", ("lower_zero = both >> 8", "lower_zero = both & 0xff"),
    ),
    "sixteens as ones": (SCHEMES[3], "1 token", ("0x2c002c00, 0xd400d400", "0x3c003c00, 0xe400e400")),
    "a share of the sums is lost": (MXFP4, "7 tokens, shared experts", ("all[1] += more.y;", "")),
    "slots filled before they are read": (
        MXFP4, "7 tokens, shared experts", ("__syncwarp();  // all lanes have read the slot", "//"),
    ),
    "rows of a round that others still read": (
        MXFP4, "20 tokens, one expert", ("__syncthreads();  // all sums are there", "//"),
    ),
    "powers of two forgotten": (
        MXFP4, "1 token", ("sums[i] * scale * power + first_bias, up", "sums[i] * scale + first_bias, up"),
    ),
    "router weights forgotten": (MXFP4, "1 token", ("INPUT_IS_WEIGHTED ? 1.0f : __ldcg(topk_weights + route)", "1.0f")),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_kernels_are_found(mutant: str, tmp_path: Path) -> None:
    scheme, name, change = MUTANTS[mutant]
    case, defines = prepared(name, scheme)
    library = build(HERE, tmp_path, defines, change, FOUR_BITS)
    given = drawn(case, scheme)
    found = [wrong(library, case, at_once, given) for at_once in (True, False) for _ in range(3)]
    assert any(found)
