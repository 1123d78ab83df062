"""Experts over several GPUs of one host, joined by NCCL, one process per GPU; pushed rows of two processes on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeyard.testing import SOURCE

CARDS = torch.cuda.device_count()
PUSHED = (
    "pushed_rows_are_those_of_one_gpu", "pushed_codes_are_those_of_one_gpu", "graphs_replay_over_pushes",
    "a_rank_that_does_not_answer_is_an_error",
)  # fmt: skip
NAMES = (
    *PUSHED,
    "sums_are_those_of_one_gpu", "exact_sums_are_those_of_fused_experts", "quantised_rows_cross",
    "gradients_are_those_of_one_gpu", "graphs_replay_on_all_ranks", "graphs_replay_over_symmetric_memory",
    "differences_are_refused",
)  # fmt: skip
RANKS = Path(__file__).with_name("parallel_cards.py")


def session(folder: Path, name: str, ranks: int) -> list[str]:
    """What each rank says of a check. Each has processes of its own: one that fails takes no other with it."""
    command = ["timeout", "--kill-after=5", "150", sys.executable, str(RANKS), str(folder), str(ranks), name]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(SOURCE)}
    )
    paths = sorted(folder.glob("*.json"))
    assert done.returncode == 0 and len(paths) == ranks, done.stderr[-2000:]
    return [json.loads(path.read_text())[name] for path in paths]


@pytest.mark.skipif(CARDS < 2, reason=f"needs 2 NVIDIA GPUs: torch sees {CARDS}")
@pytest.mark.parametrize("name", NAMES)
def test_several_gpus(tmp_path: Path, name: str) -> None:
    problems = [f"rank {r}: {words}" for r, words in enumerate(session(tmp_path, name, min(CARDS, 4))) if words]
    assert not problems, "\n".join(problems)


@pytest.mark.skipif(CARDS != 1, reason=f"is for one NVIDIA GPU, which two processes share: torch sees {CARDS}")
@pytest.mark.parametrize("name", PUSHED)
def test_two_processes_on_one_gpu(tmp_path: Path, name: str) -> None:
    problems = [f"rank {rank}: {words}" for rank, words in enumerate(session(tmp_path, name, 2)) if words]
    assert not problems, "\n".join(problems)
