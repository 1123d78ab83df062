"""These tests need an NVIDIA GPU; elsewhere each one is skipped with that reason."""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

if WORKERS > 1:  # oracles in float64 run on the processor, where threads of all workers would wait for each other
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // WORKERS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = "needs an NVIDIA GPU: torch sees none"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
