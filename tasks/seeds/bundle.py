"""Makes the small repositories that the tasks beside this file judge, from a clone of vLLM.

    python tasks/seeds/bundle.py CLONE [NAME ...]      # into tasks/seeds/clones: NAME and NAME.bundle

A repository holds two commits of vLLM, `base` and `reference`, cut down to the files that its workload needs, and what
stands for the rest of vLLM (overlay/common and overlay/NAME). A third commit, `moeyard`, is the reference whose
function calls moeyard; it carries moeyard's sources. A bundle is made of them that can be sent to a machine with a
GPU. Commits have no author but `bundle` and no message but their names: nothing of vLLM's history goes along, and
nothing of it is committed here.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
CLONES = HERE / "clones"
SOURCE = HERE.parents[1] / "src" / "moeyard"
MOST_BYTES = 5_000_000
"""Of a bundle: what is sent beside the rest must stay small."""
_CUTLASS, _INCLUDE = "nvidia-cutlass==4.2.0.0", "cutlass_library/source/include"
_THIRD_PARTY = "csrc/third_party"
_WHO = ("-c", "user.name=bundle", "-c", "user.email=bundle@invalid")
_WHEN = {"GIT_AUTHOR_DATE": "2025-07-01T00:00:00Z", "GIT_COMMITTER_DATE": "2025-07-01T00:00:00Z"}


class Seed(NamedTuple):
    """Two commits of vLLM, and what of them a workload needs."""

    base: str
    reference: str
    paths: tuple[str, ...]
    overlay: str
    """The folder of overlay/ that stands for the rest of vLLM; beside it a file, *.moeyard.py, that calls moeyard."""
    ours: str = ""
    """Where that file goes; nothing: there is no commit that calls moeyard."""
    headers: tuple[str, ...] = ()
    """Headers of CUTLASS that the sources include, from the wheel nvidia-cutlass."""


_LAYERS = "vllm/model_executor/layers/fused_moe"
_OF_EXPERTS = (
    "csrc/moe/moe_align_sum_kernels.cu",
    "csrc/moe/moe_permute_unpermute_op.cu",
    "csrc/moe/permute_unpermute_kernels",
    "csrc/core/registration.h",
    "csrc/cuda_compat.h",
    "csrc/dispatch_utils.h",
    *(
        f"{_LAYERS}/{name}.py"
        for name in ("cutlass_moe", "modular_kernel", "prepare_finalize", "topk_weight_and_reduce", "utils")
    ),
)
_HEADERS = ("cutlass/array.h", "cutlass/numeric_size.h")
SEEDS = {
    "align_21079": Seed(
        base="005ae9be6c22dfa2c2c5580b50b41e67faee4a87",
        reference="0ec82edda59aaf5cf3b07aadf4ecce1aa1131add",
        paths=(
            "csrc/moe/moe_align_sum_kernels.cu",
            "csrc/cuda_compat.h",
            "csrc/dispatch_utils.h",
            f"{_LAYERS}/moe_align_block_size.py",
        ),
        overlay="align",
        ours=f"{_LAYERS}/moe_align_block_size.py",
    ),
    "cutlass_20762": Seed(
        base="2d6a38209b68e7556672654a136e6b11c694821b",
        reference="9fb2d22032cee577a189f8c4cddd88a3c190cb0c",
        paths=_OF_EXPERTS,
        overlay="cutlass",
        ours=f"{_LAYERS}/cutlass_moe.py",
        headers=_HEADERS,
    ),
    "cutlass_21334": Seed(
        base="90f1e55421f1b61394ba25abe34bf5abd82a71af",
        reference="e7b204268132cb775c139574c1ff4ad7e15c8f66",
        paths=_OF_EXPERTS,
        overlay="cutlass",
        headers=_HEADERS,
    ),
}


def git(folder: Path, *arguments: str, **options: bytes) -> bytes:
    """What git prints; its own words go to stderr, and CalledProcessError ends the command."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **_WHEN}
    command = ["git", "-C", str(folder), *_WHO, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, **options).stdout


def bundle(clone: Path, name: str, folder: Path) -> Path:
    """Makes folder/NAME, a repository, and folder/NAME.bundle, and returns the bundle.

    Raises:
        ValueError: a commit or a file is not in the clone, or the bundle is larger than MOST_BYTES.
    """
    seed = SEEDS[name]
    made = folder / name
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    git(made, "init", "--quiet", "--initial-branch", "base")
    _commit(made, clone, seed.base, name, "base")
    git(made, "checkout", "--quiet", "-b", "reference")
    _commit(made, clone, seed.reference, name, "reference")
    branches = ["base", "reference"]
    if seed.ours:
        git(made, "checkout", "--quiet", "-b", "moeyard")
        shutil.copyfile(HERE / "overlay" / f"{seed.overlay}.moeyard.py", made / seed.ours)
        shutil.copytree(SOURCE, made / "moeyard", ignore=shutil.ignore_patterns("__pycache__"))
        _record(made, "moeyard")
        branches.append("moeyard")
    git(made, "checkout", "--quiet", "base")
    file = folder / f"{name}.bundle"
    git(made, "bundle", "create", "--quiet", str(file), *branches)
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{file}: expected at most {MOST_BYTES} bytes, got {size}")
    return file


def _commit(made: Path, clone: Path, commit: str, name: str, called: str) -> None:
    """The tree of one commit, as far as the seed needs it, in place of what is there."""
    seed = SEEDS[name]
    for path in (made / kept for kept in git(made, "ls-files").decode().split()):
        path.unlink()
    try:
        archive = git(clone, "archive", commit, *seed.paths)
    except subprocess.CalledProcessError as problem:
        raise ValueError(f"CLONE: expected a clone of vLLM with commit {commit}, got {clone}") from problem
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["tar", "-x", "-C", unpacked], input=archive, check=True)
        shutil.copytree(unpacked, made, dirs_exist_ok=True)
    for overlay in ("common", seed.overlay):
        folder = HERE / "overlay" / overlay
        shutil.copytree(folder, made, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in _cutlass(seed.headers).items():
        (made / _THIRD_PARTY / path).parent.mkdir(parents=True, exist_ok=True)
        (made / _THIRD_PARTY / path).write_bytes(text)
    _record(made, called)


@cache
def _cutlass(wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Headers of CUTLASS and all that they include of it."""
    if not wanted:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _CUTLASS], check=True
        )
        (file,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(file) as wheel:
            there = set(wheel.namelist())
            found: dict[str, bytes] = {}
            left = list(wanted)
            while left:
                path = left.pop()
                if path not in found and f"{_INCLUDE}/{path}" in there:
                    found[path] = wheel.read(f"{_INCLUDE}/{path}")
                    left += re.findall(r'#\s*include\s+[<"]([^>"]+)[>"]', found[path].decode())
    return found


def _record(made: Path, called: str) -> None:
    git(made, "add", "--all", "--force")
    git(made, "commit", "--quiet", "--message", called)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes all seeds that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, metavar="CLONE", help="a clone of vLLM with its history")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SEEDS)}; all without names")
    given = parser.parse_args(arguments)
    for name in given.names or SEEDS:
        if name not in SEEDS:
            parser.error(f"NAME: expected one of {', '.join(SEEDS)}, got {name}")
        try:
            file = bundle(given.clone.resolve(), name, CLONES)
        except ValueError as problem:
            sys.stderr.write(f"bundle: {problem}\n")
            return 2
        sys.stdout.write(f"{file}: {file.stat().st_size} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
