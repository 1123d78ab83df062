"""tasks/seeds: small repositories cut from a clone, what of a layout counts, and tasks that `task check` takes."""

import importlib.util
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from assay.__main__ import main
from assay.judgement.decision import replayed
from moeyard.integrations.vllm import moe_align_block_size
from small_project import BASE, FASTER, assay, candidate, edited, project

SEEDS = Path(__file__).parents[2] / "tasks" / "seeds"
CLONE = "ASSAY_SEEDS_REPOSITORY"
"""A clone of vLLM that holds the commits."""


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"seeds_{Path(name).name}", SEEDS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def bundle() -> ModuleType:
    return module("bundle")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path: Path, bundle: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits with the paths of one seed and others, under the hashes that the seed then has."""
    made = tmp_path / "clone"
    made.mkdir()
    git(made, "init", "--quiet")
    seed, hashes = bundle.SEEDS["align_21079"], []
    for text in ("before\n", "after\n"):
        for path in (*seed.paths, "vllm/engine.py"):
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            (made / path).write_text(text)
        git(made, "add", "--all")
        git(made, "commit", "--quiet", "--message", "secret words")
        hashes.append(git(made, "rev-parse", "HEAD"))
    known = {"align_21079": seed._replace(base=hashes[0], reference=hashes[1])}
    monkeypatch.setattr(bundle, "SEEDS", known)
    return made


def test_a_bundle_holds_what_a_workload_needs_and_nothing_else(clone: Path, bundle: ModuleType, tmp_path: Path) -> None:
    file = bundle.bundle(clone, "align_21079", tmp_path / "out")
    again = bundle.bundle(clone, "align_21079", tmp_path / "again")
    there = tmp_path / "there"
    git(tmp_path, "clone", "--quiet", str(file), str(there))
    hashes = {name: git(there, "rev-parse", f"origin/{name}") for name in ("base", "reference", "moeyard")}
    assert hashes["base"] == git(again.with_suffix(""), "rev-parse", "base"), "commits depend on their trees alone"
    wrapper, source = (
        "vllm/model_executor/layers/fused_moe/moe_align_block_size.py",
        "csrc/moe/moe_align_sum_kernels.cu",
    )
    for name, text in (("base", "before"), ("reference", "after")):
        assert git(there, "show", f"{hashes[name]}:{source}") == text
        files = git(there, "ls-tree", "-r", "--name-only", hashes[name]).split("\n")
        assert {"build_ops.py", "csrc/binding.cpp", "vllm/_custom_ops.py", wrapper, source} <= set(files)
        assert "vllm/engine.py" not in files
    assert "moeyard" in git(there, "show", f"{hashes['moeyard']}:{wrapper}")
    assert git(there, "show", f"{hashes['moeyard']}:moeyard/__init__.py")
    assert "secret" not in git(there, "log", "--all", "--format=%an %ae %s %b")


def test_a_wrong_clone_and_a_large_bundle_are_refused(
    clone: Path, bundle: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    with pytest.raises(ValueError, match="CLONE: expected a clone of vLLM with commit"):
        bundle.bundle(other, "align_21079", tmp_path / "out")
    monkeypatch.setattr(bundle, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="expected at most 1000 bytes"):
        bundle.bundle(clone, "align_21079", tmp_path / "out")


def test_the_order_of_an_experts_ids_is_free_and_nothing_else() -> None:
    form = module("align_forms").form
    ids = torch.stack([torch.randperm(16)[:4] for _ in range(300)]).to(torch.int32)
    rows, experts, total = (part.numpy() for part in moe_align_block_size(ids, 256, 16))
    wanted = form([(rows, experts, total)])
    length = int(total[0])

    def answer(rows: np.ndarray, experts: np.ndarray = experts, total: np.ndarray = total) -> bool:
        (one,), (other,) = wanted, form([(rows, experts, total)])
        return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    mixed = rows.copy()
    first = np.flatnonzero(experts[: length // 256] == experts[0])[-1] * 256 + 256
    mixed[:first] = np.random.default_rng().permutation(mixed[:first])
    tail, changed, skipped = rows.copy(), rows.copy(), experts.copy()
    tail[length:] = -5
    changed[[0, first]] = changed[[first, 0]]
    skipped[0] = 15
    assert answer(rows) and answer(mixed) and answer(tail)
    assert not answer(changed) and not answer(rows, skipped)
    for wrong in (total + 1, total * 0 - 256, total + len(rows)):
        with pytest.raises(ValueError, match="total: expected a multiple of 256"):
            form([(rows, experts, wrong)])


PUBLIC = SEEDS.parent / "public" / "results"


def test_the_table_is_that_of_the_verdicts() -> None:
    run = module("run")
    text = (SEEDS / "README.md").read_text()
    assert text.split(run.BEGIN)[1].split(run.END)[0].strip().split("\n") == run.rows()


def test_a_row_says_what_a_verdict_says_and_others_that_there_is_none(tmp_path: Path) -> None:
    """Tried on verdicts that were measured of other tasks."""
    run = module("run")
    for name, task in (("align_21079", "markupsafe_434"), ("cutlass_20762", "markupsafe_413")):
        (tmp_path / name).mkdir()
        shutil.copy(PUBLIC / task / "reference" / "verdict.json", tmp_path / name)
    found = run.rows(tmp_path)
    assert len(found) == 2 + len(run.SEEDS) and all(line.count("|") == found[0].count("|") for line in found)
    workload = json.loads((tmp_path / "align_21079/verdict.json").read_text())["workloads"][0]
    assert (
        "| **faster** | " in found[2]
        and f"{workload['name']}: faster, +110.7 % [+107.6, +113.2], 12 blocks |" in found[2]
    )
    assert "| **incorrect** | " in found[3]
    assert all(f"| {run.NOT_MEASURED} |  |" in line for line in found[4:])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n")
    run.table(readme)
    assert readme.read_text().split("\n") == ["before", run.BEGIN, *run.rows(), run.END, "after", ""]


def test_processors_are_divided_among_gpus() -> None:
    run = module("run")
    assert run.divided(range(5), 2) == [{0, 1}, {2, 3, 4}] and run.divided([3], 1) == [{3}]
    with pytest.raises(ValueError, match="--gpus: expected at most 2"):
        run.divided([0, 1], 3)


def test_a_build_stops_at_the_first_source_that_is_refused() -> None:
    compiled = module("overlay/common/compiled")
    begun = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        compiled._all([["sleep", "60"], ["sh", "-c", "exit 3"], ["sleep", "60"]], 2)
    assert ended.value.code == 3 and time.monotonic() - begun < 30


@pytest.mark.full
def test_plans_are_measured_beside_each_other_until_all_are_decided(tmp_path: Path) -> None:
    """Two plans of a small project, each on a processor of its own, cut short and taken up again."""
    run = module("run")
    task = edited(project(tmp_path), '[tests]\ncommand = ["python", "-m", "pytest", "-q", "tests"]\n', "")
    plans = {}
    for name, text in (("same", f"{BASE}# nothing else\n"), ("fast", FASTER)):
        tree = candidate(task, name, {"pkg/__init__.py": text})
        given = ("--tree", tree, "--store", tmp_path / "store", "--no-sandbox", "--skip", "equivalence,provenance")
        done = assay("prepare", task, *given)
        plans[name] = Path(done.stdout.strip().removeprefix("prepared: "))
    gpus = range(min(2, len(os.sched_getaffinity(0))))
    assert run.measure(plans, tmp_path / "store", 3.0, gpus) == 5
    for _ in range(20):
        if run.measure(plans, tmp_path / "store", 60.0, gpus) == 0:
            break
    assert all(run.complete(plan, tmp_path / "store/raw" / name) for name, plan in plans.items())
    run.noted(tmp_path / "store", {name: f"attempts/{plan.parent.name}/plan.json" for name, plan in plans.items()})
    for name in plans:
        found = json.loads(assay("decide", tmp_path / "store/raw" / name, "--json").stdout)
        run.kept(tmp_path / "store/raw" / name, found, tmp_path / "kept" / name)
        texts = "".join(path.read_text() for path in (tmp_path / "kept" / name).iterdir())
        assert str(tmp_path) not in texts and replayed(tmp_path / "kept" / name)[0]["outcome"] == found["outcome"]


@pytest.mark.skipif(CLONE not in os.environ, reason=f"{CLONE} names no clone of vLLM")
def test_the_real_bundles_and_their_tasks(bundle: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for name in bundle.SEEDS:
        assert bundle.bundle(Path(os.environ[CLONE]), name, bundle.CLONES).stat().st_size <= 5_000_000
    for file in SEEDS.glob("*.toml"):
        assert main(["task", "check", str(file)]) == 0, capsys.readouterr().err
