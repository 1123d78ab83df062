"""tasks/seeds: small repositories cut from a clone, what of a layout counts, and tasks that `task check` takes."""

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from assay.__main__ import main
from moeyard.integrations.vllm import moe_align_block_size

SEEDS = Path(__file__).parents[2] / "tasks" / "seeds"
CLONE = "ASSAY_SEEDS_REPOSITORY"
"""A clone of vLLM that holds the commits."""


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"seeds_{name}", SEEDS / f"{name}.py")
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


@pytest.mark.skipif(CLONE not in os.environ, reason=f"{CLONE} names no clone of vLLM")
def test_the_real_bundles_and_their_tasks(bundle: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for name in bundle.SEEDS:
        assert bundle.bundle(Path(os.environ[CLONE]), name, bundle.CLONES).stat().st_size <= 5_000_000
    for file in SEEDS.glob("*.toml"):
        assert main(["task", "check", str(file)]) == 0, capsys.readouterr().err
