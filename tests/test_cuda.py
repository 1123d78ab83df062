"""What the cuda implementation can show without a GPU: sources compile, plans hold."""

import pytest
import torch

from moeyard.cuda.align import launchers
from moeyard.cuda.align.plan import MAX_ROUNDS, align_plan
from moeyard.cuda.route.plan import route_align_plan, router_plan
from moeyard.cuda.rows.plan import row_plan, whole_row_plan
from moeyard.cuda.runtime import compile as building
from moeyard.cuda.runtime.cards import WARP, Card
from moeyard.cuda.runtime.parameters import division
from moeyard.cuda.runtime.sources import SOURCES
from moeyard.dispatch.call import Call
from moeyard.dispatch.sizes import layout_capacity

H200 = Card(132, 232448, True)
ARCHITECTURES = (
    "sm_80",
    "sm_90",
    *(pytest.param(arch, marks=pytest.mark.full) for arch in ("sm_89", "sm_100", "sm_120")),
)
NAMES = "EXCHANGE BLOCK BLOCKS_A_CLUSTER PLACING_WARPS ROUTES_A_LANE EXPERTS_A_THREAD ID MAP ALIGN WHOLE_LAYOUT".split()
VARIANTS = [
    tuple(zip(NAMES, values.split(), strict=True))
    for values in (
        "TINY 512 1 1 1 1 int false true true",
        "TINY 512 1 1 1 16 i64 true false false",
        "ALONE 256 1 1 1 1 int false true true",
        "ALONE 1024 1 2 2 8 i64 true false false",
        "CLUSTER 256 8 4 1 1 int false true true",
        "CLUSTER 512 8 8 4 2 i64 true false false",
        "GRID 512 8 16 4 1 int false true true",
        "GRID 512 1 16 8 2 i64 true false false",
        "LONG 512 1 16 8 1 int false true true",
        "LONG 1024 1 1 8 8 i64 true false false",
    )
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sources_compile_everywhere(arch: str) -> None:
    pytest.importorskip("cuda.core")
    text = SOURCES["align.cu"]
    for defines in VARIANTS:
        code = building.compile_source(text, defines, arch)
        assert code[:4] == b"\x7fELF" and b"align_kernel" in code
    text = SOURCES["batched.cu"]
    for per in ("1", "8"):
        assert b"batched_align_kernel" in building.compile_source(
            text, (("BLOCK", "256"), ("EXPERTS_A_THREAD", per)), arch
        )


ROUTERS = [
    "8 1 BFLOAT16 0 false 32 1 false 2 4",
    "256 1 BFLOAT16 0 false 32 8 true 16 16",
    "256 8 FLOAT32 1 true 4 8 true 16 16",
    "60 3 FLOAT16 0 true 8 3 false 2 4",
    "256 1 FLOAT32 2 true 32 8 true 16 16",
]
ROUTER_NAMES = (
    "NUM_EXPERTS GROUPS LOGIT_KIND SCORING SELECTION_BIAS LANES_A_GROUP EXPERTS_A_LANE ALL_LANES_FULL WORD BIAS_WORD"
).split()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sources_of_rows_and_routers_compile_everywhere(arch: str) -> None:
    pytest.importorskip("cuda.core")

    def code(source: str, **defines: object) -> bytes:
        text = SOURCES[source]
        return building.compile_source(text, tuple((name, str(value)) for name, value in defines.items()), arch)

    for word, scale_word in ((16, 0), (8, 4), (1, 1)):
        made = code("send.cu", BLOCK=256, LOADS=2, STORE="__stcs", MAP_TYPE="i64", WORD=word, SCALE_WORD=scale_word)
        assert b"permute_kernel" in made and b"shuffle_kernel" in made
    for kind, word, top_k, routes in (
        ("FLOAT32", 16, 2, "MAPPED"),
        ("BFLOAT16", 2, 0, "BY_MAP"),
        ("FLOAT16", 8, 8, "BY_ID"),
    ):
        options = {"ROW_KIND": kind, "WORD": word, "STATIC_TOP_K": top_k, "ROUTES": routes, "ID": "int"}
        assert b"sum_kernel" in code("sum.cu", BLOCK=128, LOADS=1, STORE="__stcs", WEIGHTS="true", **options)
        for grouped in ("false",) if word == 2 else ("false", "true"):
            options = {"ROW_KIND": kind, "WORD": word, "GROUPS": grouped, "WHOLE_ROW": "true", "THREADS_A_ROW": 64}
            for int8, stays in (("false", "false"), ("true", "true")):
                ways = {"CODE_IS_INT8": int8, "IN_PLACE": stays, "COUNTED": stays}
                assert b"quantize_kernel" in code("quantize.cu", BLOCK=128, LOADS=2, STORE="__stcs", **options, **ways)
    for values in ROUTERS:
        defines = dict(zip(ROUTER_NAMES, values.split(), strict=True))
        assert b"route_kernel" in code("route.cu", **defines)
        for way in VARIANTS[0], VARIANTS[2]:
            made = code("route_align.cu", **defines, **dict(way), SHARED_IDS=1, BLOCKS_THAT_SHARE=8)
            assert b"route_align_kernel" in made
    some = {"NUM_EXPERTS": 2048, "GROUPS": 64, "LOGIT_KIND": "FLOAT16", "SCORING": 1}
    assert b"route_block_kernel" in code("route_block.cu", **some, SELECTION_BIAS="true")


@pytest.mark.parametrize("experts", [1, 4, 60, 64, 256, 512, 1024, 1025, 8192])
@pytest.mark.parametrize("groups", [1, 2, 3, 8, 32, 33])
def test_lanes_hold_every_expert_of_their_group(experts: int, groups: int) -> None:
    if experts % groups:
        pytest.skip("groups are equal")
    chosen = router_plan(experts, groups)
    if groups > WARP or experts // groups > WARP // min(groups, WARP) * 32:
        assert chosen is None or experts // groups <= chosen.lanes_a_group * chosen.experts_a_lane
    if chosen is not None:
        assert chosen.lanes_a_group * groups <= WARP
        held = chosen.lanes_a_group * chosen.experts_a_lane
        assert held >= experts // groups
        assert chosen.full == (held == experts // groups and chosen.lanes_a_group * groups == WARP)


@pytest.mark.parametrize("card", [H200, Card(108, 166912, False)], ids=str)
@pytest.mark.parametrize("experts", [8, 64, 256, 512])
def test_one_launch_for_small_batches(card: Card, experts: int) -> None:
    for tokens, top_k in ((0, 8), (1, 8), (4, 8), (5, 2), (8, 8), (9, 8), (16, 10), (64, 8), (65, 10), (3, 33)):
        chosen = route_align_plan(tokens, top_k, experts, layout_capacity(tokens * top_k, experts, 16), card)
        if not tokens or tokens > 64 or top_k > WARP or (tokens > 16 and not card.clusters):
            assert chosen is None
        else:
            assert chosen is not None and chosen.align.places >= tokens * top_k
            assert chosen.align.exchange in ("TINY", "ALONE") and chosen.align.cluster == 1
            assert chosen.peers in (1, chosen.align.grid)
            assert chosen.peers * chosen.align.threads // WARP >= tokens, "a warp a token"
            assert chosen.align.shared_bytes(experts) + 4 * tokens * top_k + 16 <= card.shared_limit


@pytest.mark.parametrize("words", [1, 31, 128, 360, 896, 5000])
@pytest.mark.parametrize("rows", [1, 64, 8192, 10**6])
def test_rows_are_cut_so_that_enough_warps_work(rows: int, words: int) -> None:
    for at_once in (1, 2, 8):
        chosen = row_plan(rows, words, at_once)
        assert chosen.loads in (1, 2, 4, 8) and chosen.threads % WARP == 0 and chosen.threads <= 1024
        assert chosen.loads == 1 or (chosen.loads * at_once <= 8 and chosen.loads * WARP < 2 * words)
    whole = whole_row_plan(rows, words)
    assert whole.threads % whole.team == 0 and whole.team % WARP == 0 and whole.threads <= 1024
    assert whole.team * whole.loads >= min(words, 2048)


@pytest.mark.parametrize("card", [H200, Card(108, 166912, False), Card(128, 101376, False)], ids=str)
@pytest.mark.parametrize("experts", [1, 8, 64, 256, 257, 1024])
def test_plans_hold(card: Card, experts: int) -> None:
    sizes = [
        0,
        1,
        8,
        31,
        32,
        33,
        511,
        513,
        1024,
        1025,
        4096,
        4097,
        8191,
        16385,
        65536,
        131072,
        131073,
        2**20,
        2**24,
        2**30,
    ]
    for routes in sizes:
        chosen = align_plan(routes, experts, layout_capacity(routes, experts, 16), card)
        assert chosen.places >= routes
        assert chosen.shared_bytes(experts) <= card.shared_limit
        assert chosen.threads % WARP == 0 and chosen.warps * WARP <= chosen.threads <= 1024
        assert 1 <= chosen.rounds <= MAX_ROUNDS and chosen.tile < 2**16, "tables hold 16 bits"
        assert (chosen.grid % chosen.cluster == 0 and chosen.cluster == 1) or card.clusters
        assert chosen.tiles == 1 or chosen.exchange == "LONG"
        if chosen.cooperative:
            blocks = min(
                65536 // (64 * chosen.threads), (card.shared_limit + 1024) // (chosen.shared_bytes(experts) + 1024)
            )
            lost = 8 * 7 if chosen.cluster > 1 else 0
            assert chosen.grid <= blocks * card.processors - lost, "all blocks run at once, whatever 8 GPCs look like"


@pytest.mark.parametrize("processors", [8, 188])
def test_cards_with_little_shared_memory_say_what_they_do_not_take(
    processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2048 experts fit every card; of more, plans say so before anything is launched, and "auto" goes on."""
    card = Card(processors, 101376, False)
    monkeypatch.setattr(launchers, "card_of", lambda device: card)

    def refused(routes: int, experts: int) -> str | None:
        call = Call(torch.device("cuda", 0), torch.int32, num_tokens=routes, num_experts=experts)
        reason = launchers.unfit_for_align(call)
        try:
            align_plan(routes, experts, layout_capacity(routes, experts, 16), card)
        except ValueError as problem:
            assert reason == str(problem), "what is let through can be launched"
        else:
            assert reason is None
        return reason

    for routes in (0, 1, 62, 1000, 8192, 100_000, 2**20):
        assert refused(routes, 1) is refused(routes, 1024) is refused(routes, launchers._ALWAYS_FIT) is None
    assert refused(8, 8192) is None, "routes of one warp need no table"
    assert refused(100, 8192) == (
        "num_local_experts: expected so few that tables fit 101376 bytes of shared memory, got 8192"
    )


def test_eight_thousand_experts_fit_an_h200_and_too_many_are_an_error() -> None:
    for routes in (1, 62, 1000, 8192, 100_000, 2**24):
        assert align_plan(routes, 8192, 4096, H200).shared_bytes(8192) <= H200.shared_limit
    with pytest.raises(ValueError, match="num_local_experts: expected so few that tables fit 49152 bytes"):
        align_plan(100, 8192, 4096, Card(20, 49152, False))


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 16, 48, 100, 127, 128, 129, 4096, 65_537, 2**30, 2**31 - 1])
def test_division_by_multiplication_is_exact(divisor: int) -> None:
    magic, shift = division(divisor)
    assert magic < 2**32
    edges = [divisor * k + d for k in (0, 1, 2, 1000, (2**31 - 1) // divisor) for d in (-1, 0, 1)]
    for value in [*edges, *range(0, 2**31, 2**31 // 997), 2**31 - 1]:
        if 0 <= value < 2**31:
            assert value * magic >> shift == value // divisor
