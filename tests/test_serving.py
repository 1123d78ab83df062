"""What a serving engine counts on, without a GPU: how many kernels a model needs, and that warming up makes them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
from moeyard import Activation, ExpertWeights
from moeyard.bench.served import models, options_of, served
from moeyard.dispatch import processes
from moeyard.dispatch.call import LayerFacts
from moeyard.dispatch.sizes import changes
from moeyard.quant import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR_STATIC,
    FP8_WEIGHTS,
    INT8_CHANNEL,
    MXFP4,
    NVFP4,
    QuantScheme,
    int4_scheme,
)
from moeyard.testing import draw_quantised, python
from moeyard.values import Router
from moeyard.warmup import facts_of

MOST = 16384
HOPPER = (9, 0)
ALL = {  # kernels of a model on Hopper where plans take the best that was measured
    "deepseek-v3": 43, "gpt-oss-120b": 37, "gpt-oss-20b": 36, "mixtral-8x7b": 35, "olmoe-1b-7b": 37,
    "qwen3-235b-a22b": 37, "qwen3-30b-a3b": 38, "qwen3-next-80b-a3b": 49,
}  # fmt: skip
FEW = dict.fromkeys(ALL, 20)
"""With MOEYARD_KERNELS=few."""
FEW_EXPERTS = {
    "deepseek-v3": 36, "gpt-oss-120b": 30, "gpt-oss-20b": 30, "mixtral-8x7b": 29, "olmoe-1b-7b": 31,
    "qwen3-235b-a22b": 31, "qwen3-30b-a3b": 31, "qwen3-next-80b-a3b": 39,
}  # fmt: skip
"""With MOEYARD_KERNELS=experts=few."""
TRITON = {name: 27 if name in ("deepseek-v3", "qwen3-next-80b-a3b") else 16 for name in ALL}
"""Experts alone; a shared expert has its own table of experts and top_k."""
COUNT = """
import json, sys
from moeyard.bench.served import options_of, served
from moeyard.cuda.ahead import units_of
from moeyard.warmup import facts_of
layers = {name: served(name) for name in json.loads(sys.argv[1])}
print(json.dumps({n: len(units_of(facts_of(x.weights, **options_of(x)), (9, 0), 16384)) for n, x in layers.items()}))
"""


@cache
def facts(model: str) -> LayerFacts:
    layer = served(model)
    return facts_of(layer.weights, **options_of(layer))


def small(experts: int = 8) -> ExpertWeights:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    return ExpertWeights(empty(experts, 128, 64), empty(experts, 64, 64))


def test_all_models_are_counted() -> None:
    assert set(models()) == set(ALL)


@pytest.mark.parametrize("model", ALL)
def test_a_model_needs_so_many_kernels(model: str) -> None:
    pytest.importorskip("cuda.bindings")
    from moeyard.cuda.ahead import units_of

    assert len(units_of(facts(model), HOPPER, MOST)) <= ALL[model]


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (["qwen3-next-80b-a3b", "deepseek-v3"], "few"),
        pytest.param(list(FEW), "few", marks=pytest.mark.full),
        pytest.param(list(FEW), "experts=few", marks=pytest.mark.full),
    ],
    ids=["two", "all", "experts alone"],
)
def test_a_model_can_make_do_with_few_kernels(names: list[str], asked: str) -> None:
    pytest.importorskip("cuda.bindings")
    done = python("-c", COUNT, json.dumps(names), environment={"MOEYARD_KERNELS": asked})
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    most = FEW if asked == "few" else FEW_EXPERTS
    assert all(count <= most[name] < ALL[name] for name, count in counts.items()), counts


def test_a_choice_of_kernels_is_for_all_kinds_or_for_some() -> None:
    from moeyard.cuda.runtime import few

    every = frozenset(few.KINDS)
    assert all((Path(few.__file__).parents[1] / kind / "plan.py").exists() for kind in every)
    assert few._asked("") == few.BY_DEFAULT and few._asked("few") == every and few._asked("all") == frozenset()
    assert few._asked("all,experts=few") == {"experts"} and few._asked("few, align=all") == every - {"align"}
    assert few._asked("experts=few") == few.BY_DEFAULT | {"experts"}
    for text, words in (
        ("some", r"expected one of \('all', 'few'\), got 'some'"),
        ("experts=some", r"expected one of \('all', 'few'\), got 'some'"),
        ("permute=few", r"expected one of \('align', .*\) before '=', got 'permute'"),
    ):
        with pytest.raises(ValueError, match=f"MOEYARD_KERNELS: {words}"):
            few._asked(text)


def test_another_choice_of_kernels_is_an_error() -> None:
    done = python("-c", "import moeyard.cuda.align.plan", environment={"MOEYARD_KERNELS": "some"})
    assert "MOEYARD_KERNELS: expected one of ('all', 'few'), got 'some'" in done.stderr


@pytest.mark.parametrize("kind", ["align", "route", "rows", "experts"])
def test_few_kernels_of_a_kind_change_no_plan_of_another(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources of kernels tell the kind; a layer aligns by its experts' launches, with plans of alignments."""
    pytest.importorskip("cuda.bindings")
    from moeyard.cuda.ahead import CARDS
    from moeyard.cuda.align import plan as aligning
    from moeyard.cuda.experts import few_tokens
    from moeyard.cuda.experts import plan as products
    from moeyard.cuda.route import plan as routing
    from moeyard.cuda.rows import plan as rows
    from moeyard.cuda.walk import recipes_of

    sources = {
        "align": {"align.cu"}, "route": {"route_align.cu"}, "rows": {"send.cu", "sum.cu"},
        "experts": {"experts.cu", "few_tokens.cu"},
    }  # fmt: skip
    modules = {"align": [aligning], "route": [routing], "rows": [rows], "experts": [few_tokens, products]}
    given, counts = facts("qwen3-30b-a3b"), (2, 15, 40, 300)

    def asked() -> set[Any]:
        aligning.align_plan.cache_clear()
        products.product_plan.cache_clear()
        return {recipe for count in counts for recipe in recipes_of(given, CARDS[HOPPER], count)}

    before = asked()
    for module in modules[kind]:
        monkeypatch.setattr(module, "FEW_KERNELS", frozenset({kind}))
    changed = {recipe.source for recipe in before ^ asked()}
    monkeypatch.undo()
    assert changed and changed <= sources[kind] and asked() == before


@pytest.mark.parametrize("model", ALL)
def test_triton_needs_so_many_kernels(model: str) -> None:
    pytest.importorskip("triton")
    from moeyard.triton.ahead import CARDS, all_asked

    assert len(all_asked(facts(model), CARDS[HOPPER], MOST)) <= TRITON[model]


def counts_of(number: int) -> list[int]:
    rng = random.Random(number)
    return [1, 2, 3, 4, MOST, *(rng.randint(1, MOST) for _ in range(number))]


@pytest.mark.parametrize(
    ("model", "number"),
    [*((name, 25) for name in ALL), pytest.param("qwen3-30b-a3b", 10_000, marks=pytest.mark.full)],
)
def test_no_number_of_tokens_asks_for_a_kernel_that_the_walk_missed(model: str, number: int) -> None:
    """Launchers as they are, on meta tensors: all operators of a layer."""
    pytest.importorskip("cuda.bindings")
    from moeyard.cuda.ahead import CARDS
    from moeyard.cuda.walk import all_recipes, recipes_of

    walked = {recipe.compiled for recipe in all_recipes(facts(model), CARDS[HOPPER], MOST)}
    for count in counts_of(number):
        asked = {recipe.compiled for recipe in recipes_of(facts(model), CARDS[HOPPER], count)}
        assert asked <= walked, (count, asked - walked)


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "deepseek-v3"])
def test_no_number_of_tokens_asks_triton_for_more(model: str) -> None:
    pytest.importorskip("triton")
    from moeyard.triton import ahead
    from moeyard.triton.launch import planning

    given = facts(model)
    walked = ahead.all_asked(given, ahead.CARDS[HOPPER], MOST)
    for count in counts_of(200):
        with planning(ahead.CARDS[HOPPER]) as plan:
            ahead._experts(given, given.weights, given.router.top_k, given.num_experts, count)
        assert plan.asked.keys() <= walked.keys(), count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
def test_addresses_ask_for_nothing_else(dtype: torch.dtype, full: bool) -> None:
    """Meta tensors have no addresses: tensors that have some ask for the same kernels, biases, maps and all."""
    pytest.importorskip("cuda.bindings")
    from moeyard.cuda.ahead import CARDS
    from moeyard.cuda.walk import recipes_of

    def layer(device: str) -> LayerFacts:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        biases = (zeros(8, 128), zeros(8, 64)) if full else (None, None)
        weights = ExpertWeights(zeros(8, 128, 64), zeros(8, 64, 64), *biases)
        shared = ExpertWeights(zeros(1, 64, 64), zeros(1, 64, 32)) if full else None
        experts = 16 if full else 8
        return LayerFacts(weights, Router(2), experts, Activation(), dtype, full, full, shared, (1, 16))

    for count in (1, 2, 15, 16, 40, 300, 3000):
        for card in (CARDS[HOPPER], CARDS[8, 0]):
            planned = recipes_of(layer("meta"), card, count)
            assert planned == recipes_of(layer("cpu"), card, count, device="cpu"), count
            named = {recipe.source for recipe in planned}
            assert card is not CARDS[HOPPER] or {"few_tokens.cu", "experts.cu"} & named


def test_changes_find_every_step() -> None:
    """Of functions with steps at random places; a step is missed only where it ends before the next number tried."""
    rng = random.Random(3)
    for _ in range(50):
        steps = sorted(rng.sample(range(2, 5000), 8))
        wide = [step for step, after in zip(steps, [*steps[1:], 9999], strict=True) if after - step > step // 64]
        found = changes(lambda n, steps=steps: sum(step <= n for step in steps), 5000)  # type: ignore[misc]
        assert found[0] == 1 and set(wide) <= set(found) and max(found) <= 5000
    assert changes(lambda n: n, 5) == [1, 2, 3, 4, 5] and changes(lambda n: 0, 1) == [1]


def test_launches_are_noted_and_nothing_is_kept() -> None:
    pytest.importorskip("cuda.bindings")
    from moeyard.cuda.ahead import CARDS
    from moeyard.cuda.align import launchers
    from moeyard.cuda.runtime.planning import planned
    from moeyard.cuda.walk import recipes_of

    before = len(launchers._READY)
    one, again = (list(recipes_of(facts("qwen3-30b-a3b"), CARDS[HOPPER], 40)) for _ in range(2))
    assert one == again and {recipe.source for recipe in one} >= {"route.cu", "align.cu", "experts.cu", "sum.cu"}
    assert len(launchers._READY) == before
    other = recipes_of(facts("qwen3-30b-a3b"), CARDS[8, 0], 40)
    assert any(recipe not in one for recipe in other), "the card counts"
    with pytest.raises(ValueError, match="device: expected tensors of an NVIDIA GPU"):
        planned()


# Codes

CODED = {  # scheme -> kernels of a layer on Hopper, and of its experts in Triton
    FP8_BLOCK: (42, 18), FP8_CHANNEL: (42, 18), INT8_CHANNEL: (42, 18), FP8_TENSOR_STATIC: (26, 18),
    FP8_WEIGHTS: (26, 16), replace(MXFP4, tiled=True): (30, 16), replace(NVFP4, tiled=True): (30, 16),
    replace(int4_scheme(32, zero_points=True), tiled=True): (30, 16),
}  # fmt: skip
"""Static scales and weights alone are Triton's beyond a few tokens; 4 bits, too."""


def coded(scheme: QuantScheme, experts: int = 128, hidden: int = 2048, size: int = 768) -> LayerFacts:
    return facts_of(drawn(scheme, experts, hidden, size, "meta"), top_k=min(8, experts), dtype=torch.bfloat16)


def drawn(scheme: QuantScheme, experts: int, hidden: int, size: int, device: str) -> ExpertWeights:
    """Codes as a scheme has them. Tiles have shapes and dtypes of rows."""
    with torch.device(device):
        weights = draw_quantised(experts, hidden, size, replace(scheme, tiled=False), bias=experts < 128)
    return replace(weights, scheme=scheme)


@pytest.mark.parametrize("scheme", CODED, ids=str)
def test_codes_need_so_many_kernels_and_no_number_of_tokens_more(scheme: QuantScheme) -> None:
    pytest.importorskip("cuda.bindings")
    from moeyard.cuda.ahead import CARDS
    from moeyard.cuda.walk import all_recipes, products_refuse, recipes_of

    given, hopper = coded(scheme), CARDS[HOPPER]
    walked = {recipe.compiled for recipe in all_recipes(given, hopper, MOST)}
    assert len(walked) <= CODED[scheme][0]
    sources = {source for source, _, _ in walked}
    assert ("four_bits.cu" if scheme.tiled else "few_tokens.cu") in sources
    assert ({"experts.cu", "quantize.cu"} <= sources) == (products_refuse(given) is None)
    for count in counts_of(15):
        asked = {recipe.compiled for recipe in recipes_of(given, hopper, count)}
        assert asked <= walked, (count, asked - walked)


@pytest.mark.parametrize("scheme", CODED, ids=str)
def test_codes_ask_triton_for_so_many_and_no_number_of_tokens_more(scheme: QuantScheme) -> None:
    pytest.importorskip("triton")
    from moeyard.triton import ahead
    from moeyard.triton.launch import planning

    given = coded(scheme)
    walked = ahead.all_asked(given, ahead.CARDS[HOPPER], MOST)
    assert len(walked) <= CODED[scheme][1]
    for count in counts_of(50):
        with planning(ahead.CARDS[HOPPER]) as plan:
            ahead._experts(given, given.weights, given.router.top_k, given.num_experts, count)
        assert plan.asked.keys() <= walked.keys(), count


@pytest.mark.parametrize("scheme", CODED, ids=str)
def test_addresses_of_codes_ask_for_nothing_else(scheme: QuantScheme) -> None:
    pytest.importorskip("cuda.bindings")
    from moeyard.cuda.ahead import CARDS
    from moeyard.cuda.walk import recipes_of

    given = coded(scheme, 8, 256, 128)
    there = given._replace(weights=drawn(scheme, 8, 256, 128, "cpu"))
    for count in (1, 15, 300, 3000):
        planned = recipes_of(given, CARDS[HOPPER], count)
        assert planned == recipes_of(there, CARDS[HOPPER], count, device="cpu"), count


@pytest.mark.full
@pytest.mark.parametrize("impl", ["cuda", "triton", "auto"])
def test_warming_up_codes_without_a_gpu_fills_both_caches(
    impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings")
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("MOEYARD_CACHE", str(tmp_path / "moeyard"))
    with torch.device("meta"):
        weights = draw_quantised(8, 256, 128, FP8_CHANNEL if impl == "cuda" else FP8_WEIGHTS)
    given = {"top_k": 2, "max_tokens": 40, "arch": "sm_90a", "jobs": 2, "block_sizes": (16,), "impl": impl}
    made = moeyard.warmup(weights, **given)  # type: ignore[arg-type]
    assert len(made) == (1 if impl == "cuda" else 2) and len(list((tmp_path / "moeyard").iterdir())) > 3
    kernels = {path.stem for path in (tmp_path / "triton").rglob("*.cubin")}
    assert kernels == (set() if impl == "cuda" else {"align_kernel", "coded_product_kernel", "combine_kernel"})
    assert "cuda: 0 kernels compiled" in moeyard.warmup(weights, **given)  # type: ignore[arg-type]


def test_codes_that_no_kernel_takes_are_refused() -> None:
    given = {"top_k": 2, "arch": "sm_90a"}
    with torch.device("meta"):
        narrow, fp8 = draw_quantised(8, 64, 64, MXFP4), draw_quantised(8, 128, 128, FP8_CHANNEL)
    with pytest.raises(ValueError, match=r"weights: expected a scheme that one of \('cuda \(products\)'"):
        moeyard.warmup(narrow, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weights: expected a scheme that one of \('triton',\) takes"):
        moeyard.warmup(narrow, impl="triton", **given)  # type: ignore[arg-type]
    for weights, dtype, words in ((fp8, torch.float32, "bfloat16 or float16"), (small(), torch.float16, "bfloat16")):
        with pytest.raises(ValueError, match=f"dtype: expected .*{words}, got {dtype}"):
            moeyard.warmup(weights, dtype=dtype, **given)  # type: ignore[arg-type]


# Warming up


def test_warming_up_without_a_gpu_fills_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings")
    from moeyard.cuda.ahead import units_of
    from moeyard.cuda.runtime.compile import is_kept

    monkeypatch.setenv("MOEYARD_CACHE", str(tmp_path))
    told: list[tuple[str, int]] = []
    steps: list[int] = []

    def progress(what: str, count: int) -> object:
        told.append((what, count))
        return lambda: steps.append(1)

    given = {"top_k": 2, "max_tokens": 4, "arch": "sm_90a", "jobs": 2, "block_sizes": (16,)}
    made = moeyard.warmup(small(), progress=progress, **given)  # type: ignore[arg-type]
    units = units_of(facts_of(small(), top_k=2, block_sizes=(16,)), HOPPER, 4)
    assert told == [("cuda kernels", len(units))] and len(steps) == len(units) == len(list(tmp_path.iterdir()))
    assert list(made) == [f"cuda: {len(units)} kernels compiled"]
    assert all(is_kept(*unit) for unit in units)
    assert list(moeyard.warmup(small(), **given)) == ["cuda: 0 kernels compiled"]  # type: ignore[arg-type]


@pytest.mark.full
def test_warming_up_triton_without_a_gpu_fills_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("MOEYARD_CACHE", str(tmp_path / "moeyard"))
    made = moeyard.warmup(small(), top_k=2, max_tokens=64, arch="sm_90a", jobs=2, impl="triton")
    kernels = {path.stem for path in (tmp_path / "triton").rglob("*.cubin")}
    assert kernels == {"align_kernel", "product_kernel", "combine_kernel"} and len(made) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": None}, "arch: expected an architecture such as 'sm_90a' for weights on meta, got None"),
        ({"arch": "sm_42"}, "arch: expected one of .*'sm_90'.*, got sm_42"),
        ({"top_k": 9}, "top_k: expected"),
        ({"jobs": 0}, "jobs: expected a positive integer, got 0"),
        ({"max_tokens": 1.5}, "max_tokens: expected a positive integer, got 1.5"),
        ({"impl": "torch"}, "impl: expected 'auto', 'cuda' or 'triton', got 'torch'"),
    ],
)
def test_what_cannot_be_warmed_up_is_an_error(change: dict[str, object], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        moeyard.warmup(small(), **({"top_k": 2, "arch": "sm_90a"} | change))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="top_k: expected"):
        moeyard.warmup(small(), arch="sm_90a")


def test_work_in_processes_ends_with_its_first_failure(tmp_path: Path) -> None:
    done: list[int] = []
    processes.in_processes("os:mkdir", [(str(tmp_path / name),) for name in "abc"], 2, lambda: done.append(1))
    assert len(done) == 3 and {path.name for path in tmp_path.iterdir()} == set("abc")
    with pytest.raises(RuntimeError, match="FileExistsError"):
        processes.in_processes("os:mkdir", [(str(tmp_path / "a"),)], 1)
    with pytest.raises(RuntimeError, match="has ended with status 3"):
        processes.in_processes("os:_exit", [(3,)], 1)


def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    code = (
        "from moeyard.dispatch.processes import in_processes\n"
        f"in_processes('moeyard.testing.processes:wait_beside', [({str(tmp_path)!r},)] * 2, 2)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(path.name) for path in tmp_path.iterdir()]
    assert len(children) == 2
    parent.send_signal(signal.SIGINT)
    _, said = parent.communicate(timeout=30)
    assert "KeyboardInterrupt" in said
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_configuration_is_a_layer(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    content = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid", "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "n_shared_experts": 1, "hidden_act": "silu",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    assert str(facts_of(served(str(path)).weights, **options_of(served(str(path))))) == str(facts("deepseek-v3"))
    path.write_text(json.dumps({**content, "hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="hidden_act: expected silu, got 'gelu'"):
        served(str(path))
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a number of experts"):
        served(str(path))
    with pytest.raises(ValueError, match="model: expected one of"):
        served("rows")


# Cubins that come with the package


def test_what_came_with_the_package_comes_first_and_is_never_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings")
    from moeyard.cuda.runtime import compile as building
    from moeyard.cuda.runtime.sources import SOURCES

    defines, compiled = (("BLOCK", "256"),), []
    monkeypatch.setenv("MOEYARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "PACKAGED", tmp_path / "cubins")
    monkeypatch.setattr(building, "compile_source", lambda *_: compiled.append(1) or b"compiled")
    assert building.cubin("batched.cu", defines, "sm_90") == b"compiled" and len(compiled) == 1
    building.write_cubin(building.packaged_path("batched.cu", defines, "sm_90"), b"packaged")
    assert building.cubin("batched.cu", defines, "sm_90") == b"packaged", "before the cache"

    def missing() -> tuple[int, int]:
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(building, "compiler_version", missing)
    assert building.cubin("batched.cu", defines, "sm_90") == b"packaged", "needs no NVRTC"
    with pytest.raises(RuntimeError, match=r"batched.cu for sm_80: the cubins of this package lack it, and NVRTC"):
        building.cubin("batched.cu", defines, "sm_80")
    monkeypatch.setattr(building, "compiler_version", lambda: (13, 5))
    monkeypatch.setitem(SOURCES, "batched.cu", SOURCES["batched.cu"] + "// edited")
    assert building.cubin("batched.cu", defines, "sm_90") == b"compiled" and len(compiled) == 2


@pytest.mark.full
def test_a_wheel_with_cubins_needs_no_compiler(tmp_path: Path) -> None:
    """Built of a copy of the tree, installed beside it: the kernels of a named model come without NVRTC."""
    pytest.importorskip("cuda.bindings")
    root, tree, target = Path(__file__).parents[1], tmp_path / "tree", tmp_path / "target"
    shutil.copytree(root / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "cubins"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(root / name, tree)
    environment = {"MOEYARD_CACHE": str(tmp_path / "cache")}
    cubins = tree / "src/moeyard/cuda/cubins"
    made = python("-m", "moeyard.bench.cubins", str(cubins), "90a", environment=environment)
    assert made.returncode == 0, made.stderr
    assert sum(path.stat().st_size for path in cubins.iterdir()) <= 20 << 20
    wheel = python("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(tree))
    assert wheel.returncode == 0, wheel.stderr
    (path,) = tmp_path.glob("*.whl")
    assert path.stat().st_size <= 20 << 20
    installed = python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(path))
    assert installed.returncode == 0, installed.stderr
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); sys.modules['cuda.bindings.nvrtc'] = None\n"
        "import moeyard; from moeyard.cuda.runtime.compile import cubin\n"
        f"assert moeyard.__file__.startswith({str(target)!r})\n"
        "from moeyard.bench.served import options_of, served; from moeyard.cuda.ahead import units_of\n"
        "from moeyard.warmup import facts_of; layer = served('qwen3-30b-a3b')\n"
        "units = units_of(facts_of(layer.weights, **options_of(layer)), (9, 0), 16384)\n"
        "print(len(units), {cubin(*unit)[:4] for unit in units})"
    )
    done = python("-c", code, environment={"MOEYARD_CACHE": str(tmp_path / "none")})
    assert done.stdout.strip() == f"{ALL['qwen3-30b-a3b']} {{b'\\x7fELF'}}", done.stderr
    assert not (tmp_path / "none").exists()
