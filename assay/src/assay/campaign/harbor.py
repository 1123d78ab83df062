"""A task as a directory that Harbor runs: an instruction, an image with base in it, and assay as its verifier.

The image holds what an agent may see. Base for the judge, the task and its private files go into `tests`, which Harbor
shows after the agent has ended. Harbor's containers have no sandbox of ours, so the verdict says `unsandboxed`.
"""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import assay
from assay.contract import task as tasks
from assay.contract.errors import UsageError
from assay.contract.positions import line_of
from assay.contract.task import functions_of
from assay.judgement.guards import CACHES
from assay.prompts.render import render
from assay.repository.store import Store

if TYPE_CHECKING:
    from assay.contract.task import Read

SCHEMA = "1.4"
"""Of Harbor's task.toml."""
TREE = "/workspace"
_IMAGE = "python:3.12-slim"
_NEEDED = ("numpy>=1.26", "pydantic>=2.9", "griffe>=1.5", "hypothesis>=6.120", "pytest>=8.3")
_DOCKERFILE = """FROM {image}
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
RUN python3 -m pip install --no-cache-dir {needed}
COPY repository {tree}
WORKDIR {tree}
RUN git init --quiet && git add --all --force && \\
    git -c user.name=assay -c user.email=assay@localhost commit --quiet --message base
"""
_VERIFY = """#!/bin/sh
# Judges what the agent left. Reward 1 if what the task requires was shown, else 0; verdict.json says why.
tests=${ASSAY_TESTS:-/tests}
logs=${ASSAY_LOGS:-/logs/verifier}
tree=${ASSAY_TREE:-/workspace}
mkdir -p "$logs"
export PYTHONPATH="$tests/assay"
python3 -m assay judge "$tests/task/task.toml" --tree "$tree" --no-sandbox --store "$logs/assay" --json \\
    > "$logs/verdict.json" 2> "$logs/assay.log"
status=$?
cat "$logs/verdict.json" "$logs/assay.log"
case $status in
0) echo 1 > "$logs/reward.txt" ;;
1 | 5) echo 0 > "$logs/reward.txt" ;;
*) exit $status ;;  # infrastructure, or a task that makes no sense, is no failure of the agent
esac
"""
_SOLVE = """#!/bin/sh
cd "${ASSAY_TREE:-/workspace}" && git apply /solution/reference.diff
"""


def export(read: "Read", folder: Path, *, seconds: float, image: str = _IMAGE) -> list[str]:
    """Writes a task directory into a missing or empty folder; what could not be carried over, in words.

    UsageError for a folder that holds something, and for a task whose files lie outside its own folder.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"--out: expected a missing or empty folder, got {folder}")
    own = _own_files(read)
    (folder / "environment").mkdir(parents=True)
    (folder / "tests" / "task").mkdir(parents=True)
    store = Store(folder / "git", read.repository if read.base else None)
    base = store.tree_of(read.base) if read.base else store.take(read.repository, CACHES).tree
    store.write(base, folder / "environment" / "repository")
    store.write(base, folder / "tests" / "task" / "base")
    left = _left(read)
    if read.reference:
        (folder / "solution").mkdir()
        (folder / "solution" / "reference.diff").write_bytes(store.patch(base, store.tree_of(read.reference)))
        _script(folder / "solution" / "solve.sh", _SOLVE)
    shutil.rmtree(folder / "git")
    for name, source in own.items():
        (folder / "tests" / "task" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / "tests" / "task" / name)
    (folder / "tests" / "task" / "task.toml").write_text(_of_directory(read))
    source = Path(assay.__file__).parent
    shutil.copytree(source, folder / "tests" / "assay" / "assay", ignore=shutil.ignore_patterns("__pycache__"))
    _script(folder / "tests" / "test.sh", _VERIFY)
    prompt = render(read, tree=TREE, seconds=seconds)
    (folder / "instruction.md").write_text(prompt.text)
    needed = " ".join(f"'{one}'" for one in _NEEDED)
    dockerfile = _DOCKERFILE.format(image=image, needed=needed, tree=TREE)
    (folder / "environment" / "Dockerfile").write_text(dockerfile)
    (folder / "task.toml").write_text(_config(read, prompt.level, seconds))
    tasks.read(folder / "tests" / "task" / "task.toml")
    return left


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _own_files(read: "Read") -> dict[str, Path]:
    """The task's own files by the names that the task gives them."""
    found = {}
    for place, name, _ in functions_of(read.task):
        file = read.own(name)
        if file is None:
            continue
        named = name.partition(":")[0]
        if Path(named).is_absolute() or ".." in Path(named).parts:
            words = f"expected a file below the task's folder, got {named}"
            raise UsageError(f"{read.file}:{line_of(read.text, place)}: {words}")
        found[named] = file
    return found


def _left(read: "Read") -> list[str]:
    sandbox, found = read.task.sandbox, []
    if sandbox.readable:
        found.append(f"sandbox.readable: the image must hold {', '.join(sandbox.readable)}")
    if sandbox.devices or sandbox.device == "gpu":
        found.append("sandbox.devices: the container must be given the task's devices")
    if read.reference:
        found.append("repository.reference: it is the solution, and no arm of the measurement")
    return found


def _of_directory(read: "Read") -> str:
    """The task's text with base as a directory beside it."""
    lines, found, inside = [], False, False
    for number, line in enumerate(read.text.splitlines(), 1):
        header = re.match(r"^\s*\[", line)
        if re.match(r"^\s*\[\s*repository\s*\]\s*(#.*)?$", line):
            found = inside = True
            lines += [line, 'path = "base"']
            continue
        inside = inside and not header
        if re.match(r"^\s*repository\s*[.=]", line):
            raise UsageError(f"{read.file}:{number}: expected the repository as a table, [repository], to export it")
        lines += [] if inside and line.strip() and not line.lstrip().startswith("#") else [line]
    assert found, "a task has a repository"
    readable = [name for name in read.task.sandbox.readable if not Path(name).is_absolute()]
    if readable:
        at = line_of(read.text, ("sandbox", "readable"))
        raise UsageError(f"{read.file}:{at}: expected absolute paths, which an image can hold, got {readable[0]}")
    return "\n".join(lines) + "\n"


def _config(read: "Read", level: str, seconds: float) -> str:
    """Harbor's task.toml."""
    budget, name = read.task.budget, re.sub(r"[^A-Za-z0-9._-]", "-", read.task.name)
    verify = 2 * budget.seconds + 600
    lines = [
        f'schema_version = "{SCHEMA}"',
        "",
        "[task]",
        f'name = "assay/{name}"',
        f"description = {json.dumps(f'Make it faster, and keep it right: {read.task.name}')}",
        "",
        "[metadata]",
        f'assay = "{assay.__version__}"',
        f'digest = "{read.digest}"',
        f'leak_level = "{level}"',
        f"delta = {read.task.delta}",
        f'require = "{read.task.require}"',
        "",
        "[agent]",
        f"timeout_sec = {float(seconds)}",
        "",
        "[verifier]",
        f"timeout_sec = {float(verify)}",
        "",
        "[environment]",
        "build_timeout_sec = 1800.0",
        f'workdir = "{TREE}"',
    ]
    if budget.memory_bytes is not None:
        lines.append(f"memory_mb = {budget.memory_bytes >> 20}")
    return "\n".join(lines) + "\n"
