"""Experts over several ranks: placement, what rows become on their way, and checks in four processes joined by gloo."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeyard import Routing, parallel
from moeyard.dispatch import refusals
from moeyard.parallel import Plan
from moeyard.parallel.plan import map_of, ranks_of_tokens, slots_of_routes, tables_of
from moeyard.parallel.scaling import LAYERS, Machine, main, predict
from moeyard.parallel.wire import pack, restore, unpack
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR_STATIC, INT8_CHANNEL
from moeyard.reference.quant import quantise_rows
from moeyard.testing import SOURCE, draw_weights, python, same_bits

RANKS = Path(__file__).with_name("parallel_ranks.py")
QUICK = (
    "sums_are_those_of_one_process", "exact_sums_are_those_of_any_plan", "replicas_share_tokens",
    "ranks_split_experts", "quantised_rows_cross", "weights_on_the_input", "shared_experts_run_meanwhile",
    "batches_have_the_rows_of_each_expert",
    "differences_are_refused_on_every_rank", "gradients_are_those_of_one_process", "steps_of_random_counts",
)  # fmt: skip
MODELS = ("a_model_is_sharded", "a_model_whose_rows_take_turns_is_sharded")
MODEL = MODELS if refusals.installed("transformers") else ()


def in_processes(folder: Path, *names: str, impl: str = "torch", seconds: int = 200) -> list[dict[str, str]]:
    """What each of four ranks says of checks; a rank that says nothing has been killed."""
    command = ["timeout", "--kill-after=5", str(seconds), sys.executable, str(RANKS), str(folder), "4", *names]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SOURCE), "MOEYARD_IMPL": impl}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    paths = [folder / f"{rank}.json" for rank in range(4)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in paths]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """One session of four processes for all checks: starting them costs more than the checks."""
    return in_processes(tmp_path_factory.mktemp("ranks"), *QUICK, *MODEL)


@pytest.mark.parametrize("name", [*QUICK, *MODEL])
def test_four_ranks(said: list[dict[str, str]], name: str) -> None:
    problems = [f"rank {rank}: {words[name]}" for rank, words in enumerate(said) if words.get(name)]
    assert not problems, "\n".join(problems)
    assert all(name in words for words in said), f"ended before: {said}"


@pytest.mark.full
def test_four_ranks_by_the_cpu_implementation(tmp_path: Path) -> None:
    in_processes(tmp_path, *QUICK, impl="")  # compiles, while other ranks might wait for longer than they may
    for path in tmp_path.iterdir():
        path.unlink()
    said = in_processes(tmp_path, *QUICK, *MODEL, impl="")
    assert all(said) and not any(any(words.values()) for words in said), said


@pytest.mark.full
def test_ten_thousand_steps_leave_nothing(tmp_path: Path) -> None:
    said = in_processes(tmp_path, "many_steps_of_random_counts", seconds=900)
    assert said == [{"many_steps_of_random_counts": ""}] * 4


@pytest.mark.full
@pytest.mark.parametrize("name", ["a_rank_dies", "a_rank_stalls"])
def test_a_lost_rank_is_an_error_on_the_others(tmp_path: Path, name: str) -> None:
    said = in_processes(tmp_path, name, seconds=90)
    assert said[0] == said[2] == said[3] == {name: ""} and (said[1] == {}) == (name == "a_rank_dies")


@pytest.mark.full
def test_the_benchmark_measures_what_is_right(tmp_path: Path) -> None:
    script, out = Path(__file__).parents[1] / "benchmarks" / "parallel.py", tmp_path / "parallel.json"
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    environment = {"MOEYARD_IMPL": "torch", "GLOO_SOCKET_IFNAME": "lo"}
    done = python(*launch, "--device", "cpu", "--small", "--out", str(out), environment=environment)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    names = {row["name"] for row in content["rows"]}
    wanted = {
        "one GPU", "all_to_all", "gathered", "symmetric", "pushed", "pushed, rows as bf16", "dispatch, gathered",
        "dispatch, pushed", "combine, exact", "combine, exact, pushed", "torch: all_to_all_single of the rows",
    }  # fmt: skip
    assert content["left_out"] == [] == content["goals"] and content["machine"] == "cpu x 2" and wanted <= names
    assert all(row["time_us"] > 0 for row in content["rows"]) and not any("failed" in name for name in names)
    done = python(*launch, "--device", "cpu", "--small", "--seconds", "0", "--out", str(out), environment=environment)
    content = json.loads(out.read_text())
    assert done.returncode == 0 and content["rows"] == [] and len(content["left_out"]) == 12


def test_goals_say_what_was_reached() -> None:
    import parallel as benchmark  # benchmarks/parallel.py

    assert [benchmark.section_of(LAYERS[0], tokens) for tokens in (4096, 64)] == [benchmark.MANY, benchmark.FEW]
    layer = {"section": "Qwen3-235B bf16, 4096 tokens per rank", "name": "pushed, graph", "time_us": 1200.0}
    rows = [
        {"section": benchmark.MANY, "name": "dispatch, pushed, graph", "time_us": 90.0},
        {"section": benchmark.MANY, "name": "combine, pushed, graph", "time_us": 95.1},
        {"section": benchmark.MANY, "name": "dispatch, gathered, graph", "time_us": 1.0},
        {"section": benchmark.FEW, "name": "dispatch, pushed, graph", "time_us": None},
        {**layer, "over_one_gpu": 1.85, "exposed_share": 0.12},
    ]
    assert [goal["met"] for goal in benchmark.goals(rows)] == [True, False, True, False]


def naive(load: list[float], ranks: int) -> float:
    return max(parallel.contiguous_plan(len(load), ranks).loads(load))


def test_plans_from_load_hold_every_expert_and_are_no_worse() -> None:
    dice = random.Random(0)
    for _ in range(300):
        shares, tensor = dice.randrange(1, 9), dice.choice((1, 1, 2))
        experts = dice.randrange(shares, 40)
        load = [dice.choice((0.0, dice.random(), 50 * dice.random() ** 8)) for _ in range(experts)]
        least = -(-experts // shares)
        slots = dice.choice((None, least + dice.randrange(4), [least + dice.randrange(3) for _ in range(shares)]))
        plan = parallel.plan_experts(load, shares * tensor, slots=slots, tensor=tensor)
        room = [10**6] * shares if slots is None else [slots] * shares if isinstance(slots, int) else slots
        assert set().union(*plan.experts) == set(range(experts)) and plan.ranks == shares * tensor
        assert all(1 <= len(part) <= most for part, most in zip(plan.experts, room, strict=True))
        if slots is None:
            assert plan.num_slots == experts and max(map(len, plan.experts)) == least
        assert max(plan.loads(load)) <= naive(load, shares)
        assert plan == parallel.plan_experts(torch.tensor(load, dtype=torch.float64), shares * tensor, slots=slots,
                                             tensor=tensor)  # fmt: skip
        assert sum(plan.loads(load)) == pytest.approx(sum(load))


def test_replicas_halve_the_load_of_a_hot_expert() -> None:
    load = [100.0, 1, 1, 1, 1, 1, 1, 1]
    plain, more = parallel.plan_experts(load, 4), parallel.plan_experts(load, 4, slots=3)
    assert max(plain.loads(load)) >= 100 and max(more.loads(load)) < 30
    assert more.replicas[0] == 4 and all(0 in part for part in more.experts)
    one = parallel.plan_experts([5.0, 1.0], 4, slots=1)  # fewer experts than ranks
    assert sorted(one.experts) == [(0,), (0,), (0,), (1,)]


def test_a_spare_slot_per_rank_evens_out_zipf_loads() -> None:
    """256 experts on 64 ranks: the busiest rank over the mean, as docs/notes/parallel.md has it."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    load = (1 / torch.arange(1, 257, dtype=torch.float64) ** 0.8)[order]
    mean = float(load.sum()) / 64
    plans = [parallel.plan_experts(load, 64, slots=slots) for slots in (4, 5)]
    assert naive(load.tolist(), 64) / mean == pytest.approx(6.27, abs=0.01)
    assert max(plans[0].loads(load)) / mean == pytest.approx(6.18, abs=0.01)
    assert max(plans[1].loads(load)) / mean < 1.02


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parallel.plan_experts([1.0, 2.0], 3), "ranks: expected"),
        (lambda: parallel.plan_experts([1.0, 2.0], 2, slots=[1]), "slots: expected one number per share"),
        (lambda: parallel.plan_experts([1.0] * 8, 2, slots=3), "slots: expected at least 8"),
        (lambda: parallel.plan_experts([1.0, float("nan")], 2), "load: expected finite"),
        (lambda: parallel.plan_experts([1.0, -1.0], 2), "load: expected finite"),
        (lambda: parallel.plan_experts([], 1), "load: expected one number per expert"),
        (lambda: parallel.contiguous_plan(8, 3, tensor=2), "ranks: expected a multiple of tensor=2"),
        (lambda: Plan(3, ((0, 1), ())), "experts: expected at least one share"),
        (lambda: Plan(3, ((0, 1), (1,))), r"got none for \[2\]"),
        (lambda: Plan(2, ((0, 1), (2,))), "experts: expected an integer"),
        (lambda: Plan(2, [[0, 1]]), "experts: expected a tuple"),
        (lambda: parallel.slice_experts(draw_weights(3, 8, 6, torch.float32), Plan(2, ((0, 1),)), 0), "all 2 experts"),
        (lambda: parallel.slice_experts(draw_weights(2, 8, 6, torch.float32), parallel.contiguous_plan(2, 4, tensor=4),
                                        0), "divisor of intermediate_size=6"),
    ],
)  # fmt: skip
def test_placements_that_cannot_be_are_refused(call, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()


@pytest.mark.parametrize("top_k", [1, 3, 9])
@pytest.mark.parametrize("tensor", [1, 2])
def test_tokens_go_once_to_each_rank_that_has_an_expert(top_k: int, tensor: int) -> None:
    plan = Plan(5, ((0, 1), (2, 0), (3, 4, 1), (0,)), tensor)
    tables = tables_of(plan, torch.device("cpu"))
    ids = torch.randint(-2, 7, (200, top_k), dtype=torch.int32)
    slots = slots_of_routes(ids, tables, 3)
    holders = [expert for part in plan.experts for expert in part]
    for token, (row, chosen) in enumerate(zip(ids.tolist(), slots.tolist(), strict=True)):
        for expert, slot in zip(row, chosen, strict=True):
            if 0 <= expert < 5:
                replicas = [place for place, held in enumerate(holders) if held == expert]
                assert slot == replicas[(3 + token) % len(replicas)]
            else:
                assert slot == -1
    ranks = ranks_of_tokens(slots, tables, plan)
    share_of = [share for share, part in enumerate(plan.experts) for _ in part]
    for chosen, got in zip(slots.tolist(), ranks.tolist(), strict=True):
        shares = {share_of[slot] for slot in chosen if slot >= 0}
        assert [rank for rank in got if rank >= 0] == sorted(s * tensor + j for s in shares for j in range(tensor))
    held = torch.stack([map_of(plan, rank, torch.device("cpu")) for rank in range(plan.ranks)])
    assert torch.equal((held >= 0).sum(0), torch.full((plan.num_slots,), tensor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", [FP8_BLOCK, FP8_CHANNEL], ids=str)
def test_restored_rows_have_the_codes_that_crossed(scheme, dtype: torch.dtype) -> None:
    """Codes and scales of restored rows are those that were sent: at all magnitudes, the least ones, zeros and NaN."""
    torch.manual_seed(0)
    rows = torch.randn(1200, 256) * torch.exp2(torch.randint(-45, 14, (1200, 1)))
    rows[:50] *= 1e-10 / rows[:50].abs().amax(1, keepdim=True) * torch.linspace(0.9, 1.1, 50).unsqueeze(1)
    rows[50:60] = 0
    rows[60:90] = 448 * 2.0 ** torch.randint(-20, 5, (30, 1))
    rows[90, 3], rows[91, 200] = torch.nan, torch.inf
    rows = rows.to(dtype)
    sent = quantise_rows(rows, scheme)
    again = quantise_rows(restore(sent.codes, sent.scales, dtype), scheme)
    fine = rows.isfinite().all(1)
    assert int(fine.sum()) >= 1190
    assert same_bits(again.codes[fine], sent.codes[fine]) and same_bits(again.scales[fine], sent.scales[fine])
    assert torch.equal(again.values.isnan(), sent.values.isnan())
    plain = (sent.codes.float().view(1200, sent.scales.shape[1], -1) * sent.scales.unsqueeze(2)).view(1200, 256)
    mutant = quantise_rows(plain.to(dtype), scheme)
    assert dtype == torch.float16 or not same_bits(mutant.scales, sent.scales)  # what restore mends is there


def test_router_weights_cross_bit_by_bit() -> None:
    slots, factors = torch.randint(-1, 9, (5, 3), dtype=torch.int32), torch.randn(5, 3)
    factors[0, 0] = torch.nan
    got = unpack(pack(slots, factors))
    assert same_bits(got[0], slots) and same_bits(got[1], factors)


def test_explanations_say_which_way_and_why() -> None:
    plan = parallel.contiguous_plan(128, 8)
    told = parallel.explain(plan, top_k=8, hidden_size=4096)
    assert told.chosen == "all_to_all" and "max_tokens" in told.reasons["gathered"]
    few = parallel.explain(plan, top_k=8, hidden_size=4096, max_tokens=64, scheme=FP8_BLOCK)
    assert (
        few.chosen == "gathered"
        and "only chosen by name" in few.reasons["symmetric"]
        and "only chosen by name" in few.reasons["pushed"]
        and "e4m3 with a float32 scale per 128 columns" in str(few)
    )
    many = parallel.explain(plan, top_k=2, hidden_size=4096, max_tokens=4096)
    assert many.chosen == "all_to_all" and "MB per rank" in many.reasons["gathered"]
    trained = parallel.explain(plan, top_k=2, hidden_size=64, max_tokens=4, training=True)
    assert "no gradients" in trained.reasons["symmetric"] and trained.chosen == "gathered"
    with pytest.raises(ValueError, match="way: 'symmetric' has no gradients"):
        parallel.explain(plan, top_k=2, hidden_size=64, max_tokens=4, training=True, way="symmetric")
    assert (
        "one per route"
        in parallel.explain(plan, top_k=2, hidden_size=64, max_tokens=4, order="exact").reasons["gathered"]
    )
    for scheme, words in ((INT8_CHANNEL, "nothing here quantises"), (FP8_TENSOR_STATIC, "a scale of its own")):
        assert words in parallel.explain(plan, top_k=2, hidden_size=256, scheme=scheme).rows
    with pytest.raises(ValueError, match="way: 'gathered' needs the most tokens"):
        parallel.explain(plan, top_k=2, hidden_size=64, way="gathered")
    for sizes, words in (
        ({"hidden_size": 4100}, "way: 'pushed' moves whole words of 16 bytes, got rows of 8200"),
        ({"hidden_size": 64, "dtype": torch.float64}, "adds in float32, not float64"),
        ({"hidden_size": 64, "training": True, "order": "exact"}, "has gradients of grouped sums alone"),
        ({"hidden_size": 64, "top_k": 33}, "at most 32 routes of a token, got 33"),
        ({"hidden_size": 64, "max_tokens": None}, "needs the most tokens of a rank"),
    ):
        with pytest.raises(ValueError, match=words):
            parallel.explain(plan, way="pushed", **{"top_k": 2, "max_tokens": 4, **sizes})
    exact = parallel.explain(plan, top_k=8, hidden_size=4096, max_tokens=64, way="pushed", order="exact")
    assert exact.chosen == "pushed"
    asked = parallel.explain(plan, top_k=8, hidden_size=4096, max_tokens=64, way="symmetric")
    assert asked.chosen == "symmetric" and asked.reasons["gathered"] == "not asked for"
    with pytest.raises(ValueError, match="way: expected one of"):
        parallel.explain(plan, top_k=2, hidden_size=64, way="nvlink")
    with pytest.raises(ValueError, match="order: expected one of"):
        parallel.explain(plan, top_k=2, hidden_size=64, order="sorted")


def test_orders_are_told_apart() -> None:
    """Another order of ranks has other bits: a comparison of bits would see it."""
    torch.manual_seed(0)
    rows, whole = torch.randn(64, 16), draw_weights(6, 16, 8, torch.float32)
    routing = Routing(torch.rand(64, 4), torch.rand(64, 6).topk(4).indices.int())
    plan, turned = Plan(6, ((0, 1), (2, 3), (4, 5))), Plan(6, ((4, 5), (2, 3), (0, 1)))
    one, other = (parallel.experts_in_order(rows, routing, whole, p, impl="torch") for p in (plan, turned))
    assert not same_bits(one, other)
    torch.testing.assert_close(one, other)


def test_a_connection_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="group: expected a process group"):
        parallel.connect(draw_weights(2, 8, 8, torch.float32), parallel.contiguous_plan(2, 1), top_k=1)


def test_predictions_are_bytes_over_rates(capsys: pytest.CaptureFixture[str]) -> None:
    layer, machine = LAYERS[0], Machine()
    two = predict(layer, 2, 4096)
    row = 2 * 4096 + 8 * 8
    assert two.dispatch_us == pytest.approx(4096 * (1 - 0.5**8) * row / 390_000 + 3)
    assert two.experts_us == pytest.approx(6 * 4096 * 1536 * 8 * 4096 / 600e6 + 12)
    one = predict(layer, 1, 4096)
    assert one.dispatch_us == one.combine_us == 0 and one.speedup == pytest.approx(1)
    far, once = predict(layer, 64, 4096), predict(layer, 64, 4096, forward=True)
    assert once.dispatch_us < far.dispatch_us and far.dispatch_us > 10 * predict(layer, 8, 4096).dispatch_us
    slow = predict(layer, 64, 4096, machine._replace(rdma_bytes_per_us=25_000.0))
    assert slow.dispatch_us == pytest.approx(2 * far.dispatch_us, rel=0.01)
    main()
    notes = (Path(__file__).parents[1] / "docs" / "notes" / "parallel.md").read_text()
    assert capsys.readouterr().out.strip() in notes
