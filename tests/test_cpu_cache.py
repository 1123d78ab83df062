"""numba's cache on disk: machine code counts for the sources it was made of, helpers in other modules included."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import moeyard

CODE = """
import torch, moeyard
from moeyard.cpu import layout
out = moeyard.moe_align_block_size(torch.zeros(4, 1, dtype=torch.int32), num_experts=2, block_size=2, impl="cpu")
kernel = layout._align_kernel
print(out.expert_counts.tolist(), sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


def run(source: Path, cache: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(source), "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_changed_helper_is_compiled_again(tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(Path(moeyard.__file__).parent, source / "moeyard", ignore=shutil.ignore_patterns("__pycache__"))
    cache = tmp_path / "cache"
    assert run(source, cache) == "[4, 0] 0 1"
    assert run(source, cache) == "[4, 0] 1 0"
    helper = source / "moeyard/cpu/pointers.py"
    text = helper.read_text()
    assert text.count("return carray(_pointer(address), (length,), np.uint32)") == 1
    helper.write_text(text.replace("(length,), np.uint32)", "(length,), np.int32)"))
    assert run(source, cache).endswith("0 1")
