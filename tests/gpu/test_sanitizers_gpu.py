"""compute-sanitizer over the kernels of rows and routers: memory, races, what is read before it is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeyard.dispatch import table
from moeyard.testing import SOURCE

REFUSAL = table.explain("permute", "cuda").reasons["cuda"]
pytestmark = pytest.mark.skipif(REFUSAL != "chosen", reason=f"cuda: {REFUSAL}")
SANITIZED = """
import torch, moeyard
gen = torch.Generator().manual_seed(1)
for tokens, hidden, experts, top_k, block in ((3, 136, 8, 2, 4), (70, 2048, 16, 8, 1), (9, 260, 64, 12, 8)):
    for kind in (torch.float32, torch.bfloat16):
        logits = torch.randn(tokens, experts, generator=gen).to(kind).cuda()  # from the host: no kernel but ours runs
        for groups, scoring, bias in ((1, "softmax", None), (4, "sigmoid", torch.rand(experts, generator=gen).cuda())):
            options = dict(num_groups=groups, top_k_groups=groups, scoring=scoring, selection_bias=bias)
            routing = moeyard.route(logits, top_k=top_k, impl="cuda", renormalize=True, **options)
            together = moeyard.route_and_align(logits[:60], top_k=top_k, block_size=block, **options)
    layout = moeyard.moe_align_block_size(routing.topk_ids, num_experts=experts, block_size=block, impl="cuda")
    for kind in (torch.bfloat16, torch.float32, torch.uint8):
        rows = (100 * torch.rand(tokens, hidden, generator=gen)).to(kind).cuda()
        moved = moeyard.permute(rows, layout, scales=routing.topk_weights, impl="cuda")
        moeyard.shuffle_rows(rows, routing.topk_ids.view(-1), impl="cuda")
        if kind != torch.uint8:
            filled = torch.ones(moved.rows.shape, dtype=kind).cuda()
            moeyard.combine(filled, layout, routing.topk_weights, impl="cuda")
            moeyard.moe_sum(rows.unsqueeze(1).expand(-1, top_k, -1), topk_ids=routing.topk_ids, impl="cuda")
            for group_size in (None, 128) if hidden % 128 == 0 else (None,):
                moeyard.permute_to_fp8(rows, layout, group_size=group_size, impl="cuda")
wide = torch.randn(3, 2048, generator=gen).cuda()
moeyard.route(wide, top_k=5, num_groups=64, top_k_groups=8, impl="cuda")
moeyard.route_and_align(torch.randn(1, 256, generator=gen).cuda(), top_k=8, block_size=16)
torch.cuda.synchronize()
print("finished")
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_sanitizers_find_nothing_in_rows_and_routers(tool: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SANITIZED)
    options = ["--tool", tool, "--report-api-errors", "no"]
    done = subprocess.run(
        ["compute-sanitizer", *options, "--error-exitcode", "9", sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    assert done.returncode == 0 and "finished" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    assert "0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout[-500:]
