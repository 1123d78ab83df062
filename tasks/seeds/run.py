"""Prepares, measures and decides the plans of the tasks beside this file, and writes README's table.

    python tasks/seeds/run.py prepare [NAME ...]              # where compilers are: plans, with trees that are built
    python tasks/seeds/run.py measure [NAME | PLAN ...]       # where GPUs are: a plan per GPU, beside each other
    python tasks/seeds/run.py decide [NAME ...]               # verdicts, which go to tasks/seeds/results
    python tasks/seeds/run.py table                           # the table of README.md, from tasks/seeds/results

`prepare` fills the folder that --store names (build/seeds). It goes to the machine that measures, and its folder `raw`
comes back. `measure` needs numpy, and goes on where it was cut short, as it is after --seconds.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from assay.experiment.raw import whole_rows
from assay.machine import gpu

HERE = Path(__file__).resolve().parent
RESULTS, PLANS = HERE / "results", "plans.json"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
NOT_MEASURED = "not measured yet"
_GRACE_S, _LOOK_S = 10.0, 0.2


class Seed(NamedTuple):
    """A plan: a task, what is prepared of it, and what others say of the same change."""

    task: str
    options: tuple[str, ...]
    what: str
    claim: str = ""
    """Of the change's author."""
    reported: str = ""
    """By the harness that the tasks come from."""


_REPORTED = "time to first token +67.2 %, throughput -10.0 %; +66.0 % and -20.0 % for a patch that optimises nothing"
SEEDS = {
    "align_21079": Seed(
        "align_21079.toml",
        ("--commit", "reference"),
        "#21079 against its base",
        "+0.43 % and +0.5 % requests a second",
        "no figure for the commit; one agent's patch counts as a success unmeasured",
    ),
    "cutlass_20762": Seed(
        "cutlass_20762.toml",
        ("--commit", "reference"),
        "#20762 against its base",
        "1 to 4 % of the layer",
        "nothing: it is no task there",
    ),
    "cutlass_21334": Seed(
        "cutlass_21334.toml",
        ("--commit", "reference"),
        "#21334, which takes #20762 back",
        "none: it is a revert",
        _REPORTED,
    ),
    "align_moeyard": Seed(
        "align_21079.toml",
        ("--base", "reference", "--commit", "moeyard", "--skip", "provenance"),
        "moeyard's alignment against #21079",
    ),
    "cutlass_moeyard": Seed(
        "cutlass_moeyard.toml",
        ("--commit", "moeyard", "--skip", "provenance"),
        "moeyard's layer against #20762",
    ),
}


def assay(*arguments: str | Path) -> list[str]:
    """The command."""
    return [sys.executable, "-m", "assay", *map(str, arguments)]


def tell(words: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def prepare(names: Sequence[str], store: Path, options: Sequence[str] = ()) -> int:
    """Prepares plans without a sandbox and notes where they are; the largest exit status."""
    worst = 0
    for name in names:
        command = assay("prepare", HERE / SEEDS[name].task, *SEEDS[name].options, "--store", store, "--no-sandbox")
        command += options
        begun = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        tell(f"{name}: {done.stdout.strip()} ({time.monotonic() - begun:.0f} s)")
        worst = max(worst, done.returncode)
        if done.returncode == 0:
            plan = Path(done.stdout.strip().removeprefix("prepared: ")).resolve()
            noted(store, {**noted(store), name: str(plan.relative_to(store))})
    return worst


def noted(store: Path, plans: dict[str, str] | None = None) -> dict[str, str]:
    """Plans by name, seen from the store; written first if they are given."""
    file = store / PLANS
    if plans is not None:
        file.write_text(json.dumps(plans, indent=1) + "\n")
    found: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    return found


def failures(plan: Path, raw: Path) -> list[str]:
    """Workloads whose measurement this machine could not do, with the file that has to go before it is tried again."""
    files = [raw / f"{workload}.jsonl" for workload in json.loads(plan.read_text())["workloads"]]
    last = [(file, (whole_rows(file) or [{"kind": "none"}])[-1]) for file in files]
    failed = [(file, row) for file, row in last if row["kind"] == "failed" and row["outcome"].startswith("infra.")]
    return [f"{row['outcome']}: {row['words']}; measured again without {file}" for file, row in failed]


def complete(plan: Path, raw: Path) -> bool:
    """Whether all workloads of a plan are decided, or a gate has rejected its patch."""
    try:
        gates = json.loads((raw / "gates.json").read_text())["gates"]
    except (OSError, ValueError):
        return False
    if any(outcome not in ("", "skipped", "not_asked") for outcome, _ in gates.values()):
        return True
    rows = [whole_rows(raw / f"{workload}.jsonl") for workload in json.loads(plan.read_text())["workloads"]]
    decided = all(some and some[-1]["kind"] in ("verdict", "failed") for some in rows)
    return decided and not failures(plan, raw)


def measure(plans: dict[str, Path], store: Path, seconds: float, gpus: Sequence[int]) -> int:
    """Measures plans beside each other, one per GPU, for so many seconds; 0 if all are decided, 5 if some are not.

    The processors are divided among the GPUs, so that no measurement sees another one's as foreign.
    """
    stop = time.monotonic() + seconds
    left = [name for name, plan in plans.items() if not complete(plan, store / "raw" / name)]
    shares = dict(zip(gpus, divided(sorted(os.sched_getaffinity(0)), len(gpus)), strict=True))
    running: dict[int, tuple[str, subprocess.Popen[bytes], float]] = {}
    failed, stopped = dict[str, int](), set[str]()
    try:
        while left or running:
            for number in [one for one in gpus if one not in running and left]:
                if (remains := stop - time.monotonic()) <= 0:
                    left.clear()
                    break
                name = left.pop(0)
                command = assay("measure", plans[name], "--out", store / "raw" / name, "--no-sandbox")
                command += ["--seconds", f"{remains:.0f}"]
                more = {"CUDA_VISIBLE_DEVICES": str(number), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
                keep = partial(os.sched_setaffinity, 0, shares[number])
                tell(f"{name}: GPU {number}, processors {min(shares[number])} to {max(shares[number])}")
                environment = {**os.environ, **more}
                child = subprocess.Popen(command, env=environment, preexec_fn=keep)  # noqa: PLW1509 - no threads here
                running[number] = (name, child, time.monotonic())
            time.sleep(_LOOK_S)
            late = time.monotonic() - stop
            for number, (name, child, begun) in list(running.items()):
                if child.poll() is None and late > 0 and (name not in stopped or late > _GRACE_S):
                    child.send_signal(signal.SIGINT if name not in stopped else signal.SIGKILL)
                    stopped.add(name)
                if child.poll() is not None:
                    tell(f"{name}: status {child.returncode} after {time.monotonic() - begun:.0f} s")
                    del running[number]
                    if child.returncode not in (0, 5) and name not in stopped:
                        failed[name] = child.returncode
    finally:
        for _, child, _ in running.values():
            child.kill()
            child.wait()
    open_ = [name for name, plan in plans.items() if not complete(plan, store / "raw" / name)]
    for name in open_:
        for words in failures(plans[name], store / "raw" / name):
            tell(f"{name}: {words}")
    tell(f"decided: {len(plans) - len(open_)} of {len(plans)}{'; open: ' if open_ else ''}{', '.join(open_)}")
    return max(failed.values(), default=5 if open_ else 0)


def divided(processors: Sequence[int], parts: int) -> list[set[int]]:
    """Processors in so many shares without a common one, neighbours together. ValueError if there are too few."""
    if parts > len(processors):
        raise ValueError(f"--gpus: expected at most {len(processors)}, one per processor, got {parts}")
    edges = [len(processors) * part // parts for part in range(parts + 1)]
    return [set(processors[low:high]) for low, high in pairwise(edges)]


def decide(names: Sequence[str], store: Path) -> None:
    """Decides what is measured, and keeps plan, gates, samples and verdict; no line of the judged trees."""
    for name in names:
        raw = store / "raw" / name
        if name not in noted(store) or not complete(store / noted(store)[name], raw):
            tell(f"{name}: {NOT_MEASURED}")
            continue
        command = assay("decide", raw, "--store", store, "--json")
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)
        kept(raw, found, RESULTS / name)
        tell(f"{name}: {found['outcome']}: {'; '.join(found['words'])[:150]}")


def kept(raw: Path, found: dict, to: Path) -> None:
    """Copies what a verdict follows from, without places of the machines."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for file in [raw / "plan.json", raw / "gates.json", *sorted(raw.glob("*.jsonl"))]:
        text = file.read_text()
        for place in set(re.findall(r'"(/[^"]*)/trees/base"', text)):
            text = text.replace(place, "ATTEMPT")
        (to / file.name).write_text(text)
    (to / "verdict.json").write_text(json.dumps(found, indent=1) + "\n")


def cell(workload: dict) -> str:
    """One workload's verdict, with base over candidate and its interval."""
    if workload["estimate"] is None:
        return f"{workload['name']}: {workload['verdict']}"
    middle, low, high = (f"{math.expm1(end) * 100:+.1f}" for end in (workload["estimate"], *workload["interval"]))
    return f"{workload['name']}: {workload['verdict']}, {middle} % [{low}, {high}], {workload['blocks']} blocks"


def rows(results: Path = RESULTS) -> list[str]:
    """The table, from verdicts alone."""
    found = [
        "| what | its author says | that benchmark reports | outcome here | by workload |",
        "|---|---|---|---|---|",
    ]
    for name, seed in SEEDS.items():
        file = results / name / "verdict.json"
        verdict = json.loads(file.read_text()) if file.exists() else None
        outcome = f"**{verdict['outcome']}**" if verdict else NOT_MEASURED
        cells = "; ".join(map(cell, verdict["workloads"])) if verdict else ""
        found.append(f"| {seed.what} | {seed.claim} | {seed.reported} | {outcome} | {cells} |")
    return found


def table(readme: Path = HERE / "README.md") -> None:
    """Writes it between its marks."""
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text("\n".join([before + BEGIN, *rows(), END]) + rest.split(END)[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Does one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "measure", "decide", "table"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SEEDS)}; all unless given")
    parser.add_argument("--store", type=Path, default=Path("build/seeds"), help="plans and RAW (%(default)s)")
    parser.add_argument("--seconds", type=float, default=540.0, help="of `measure`, at most (%(default)s)")
    parser.add_argument("--gpus", metavar="N,N", help="their numbers; all unless given")
    parser.add_argument("--build-jobs", default="", metavar="N", help="of `prepare`: as of `assay prepare`")
    given = parser.parse_args(arguments)
    store, names = given.store.resolve(), given.names or list(SEEDS)
    plans = {Path(name).resolve().parent.name: Path(name) for name in names if name.endswith(".json")}
    if unknown := [name for name in names if name not in SEEDS and not name.endswith(".json")]:
        parser.error(f"NAME: expected one of {', '.join(SEEDS)}, got {', '.join(unknown)}")
    if given.what == "prepare":
        return prepare(names, store, ["--build-jobs", given.build_jobs] if given.build_jobs else [])
    if given.what == "measure":
        where = noted(store)
        if missing := [name for name in given.names if name in SEEDS and name not in where]:
            parser.error(f"NAME: expected one that is prepared in {store}, got {', '.join(missing)}")
        plans = {name: store / where[name] for name in names if name in where} | plans
        if "VLLM_C" not in os.environ and any(name.startswith("cutlass") for name in plans):
            parser.error("VLLM_C: expected it to name the compiled library of vLLM's wheel, got nothing")
        seen = [state.index for state in gpu.states()]
        gpus = [int(number) for number in given.gpus.split(",")] if given.gpus else seen
        if not gpus:
            parser.error("--gpus: expected a machine with one, found none")
        return measure(plans, store, given.seconds, gpus)
    if given.what == "decide":
        decide([name for name in names if name in SEEDS], store)
    else:
        table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
