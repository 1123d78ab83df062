"""The agent's measuring tool: `assay ab` on the task's own workloads, with seeds that are public.

A script per workload. It copies base and the agent's files, builds both as the task says, and compares them. What
makes inputs is shown to the agent with it, if the task shows its workload; the judge draws other seeds.
"""

import hashlib
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import assay
from assay.arms.process import PREFIX, PYTHON
from assay.arms.sandbox import PLACE

if TYPE_CHECKING:
    from assay.contract.task import Read, Timed

TOOL, BASE = "/assay/measure", "/assay/base"
"""Where the scripts and base's files are, in the sandbox."""
SOURCE = Path(assay.__file__).parents[1]


def offered(read: "Read") -> dict[str, str]:
    """Workload -> command, for those that the task shows and this tool can measure; nothing that needs a GPU."""
    if "workload" not in read.task.prompt.shows or read.task.sandbox.device != "cpu":
        return {}
    return {timed.name: f"{TOOL}/{timed.name}" for timed in read.task.workload}


def readable() -> tuple[Path, ...]:
    """What the tool needs to see beside the interpreter: assay itself, unless it is installed there."""
    return () if SOURCE.is_relative_to(PREFIX) else (SOURCE / "assay",)


def public_seed(read: "Read") -> int:
    """Of the tool's inputs and orders: everybody may know it."""
    return int(hashlib.sha256(f"public {read.digest}".encode()).hexdigest()[:12], 16)


def write(read: "Read", folder: Path) -> None:
    """The scripts, and the task's own files that they need, in a missing folder."""
    folder.mkdir()
    for timed in read.task.workload if offered(read) else ():
        script = folder / timed.name
        script.write_text(_script(read, timed, folder))
        script.chmod(0o755)


def _script(read: "Read", timed: "Timed", folder: Path) -> str:
    commands = [*read.task.commands.setup, *read.task.commands.build]
    built = "".join(f" && {shlex.join(command)}" for command in commands)
    ab = shlex.join([PYTHON, "-m", "assay", "ab"])
    options, after = _options(read, timed, folder)
    lines = [
        "#!/bin/sh",
        f"# Is {PLACE} faster than {BASE} in the workload {timed.name}? The judge's protocol, with public seeds.",
        "set -e",
        "new=$(mktemp -d)",
        "trap 'rm -rf \"$new\"' EXIT",
        f'cp -R {BASE} "$new/base"',
        f'cp -R {PLACE} "$new/candidate"',
        'chmod -R u+w "$new"',
        'rm -rf "$new/candidate/.git"',
        *([f'for one in base candidate; do (cd "$new/$one"{built}); done'] if built else []),
        f"export PYTHONPATH={shlex.quote(str(SOURCE))}",
        "status=0",
        f'{ab} "$new/base" "$new/candidate" --out "$new/raw.jsonl" {shlex.join(options)} {after} || status=$?',
        "exit $status",
    ]
    return "\n".join(lines) + "\n"


def _options(read: "Read", timed: "Timed", folder: Path) -> tuple[Sequence[str], str]:
    """Of `assay ab`, and what stands behind them."""
    run, budget = timed.run, read.task.budget
    found = ["--delta", str(read.task.delta), "--seed", str(public_seed(read)), "--timeout", str(budget.timeout_s)]
    found += ["--most-foreign", str(budget.most_foreign), *(["--primary", timed.primary] if timed.primary else [])]
    if run.kind == "command":
        return found, f"-- {shlex.join(run.command)}"

    def place(name: str) -> str:
        """A function's name as the sandbox sees it: a file of the task is copied beside the script."""
        file = read.own(name)
        if file is None:
            return name
        to = folder / "files" / hashlib.sha256(str(file.parent).encode()).hexdigest()[:8]
        to.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to / file.name)
        return f"{TOOL}/{(to / file.name).relative_to(folder)}:{name.partition(':')[2]}"

    found += [f"--{run.kind}", place(run.target), "--case", str(run.case), "--rounds", str(run.rounds)]
    found += ["--calls", str(run.calls), "--warmups", str(run.warmups), "--links", str(run.links)]
    found += ["--rtol", str(run.rtol), "--atol", str(run.atol)]
    found += ["--inputs", place(run.inputs)] if run.inputs else []
    found += ["--chain", place(run.chain)] if run.chain else []
    found += ["--canonical", place(run.canonical)] if run.canonical else []
    found += ["--constant"] if run.constant else []
    found += [] if run.compare else ["--no-compare"]
    for path in run.paths:
        found += ["--path", path]
    return found, ""
