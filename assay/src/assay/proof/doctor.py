"""What this machine allows a judge to do, and how small an effect could be shown on it."""

import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from assay.arms import quotas, sandbox
from assay.arms.counters import best
from assay.arms.inside.wire import encode
from assay.arms.process import namespaces_work
from assay.contract.box import MOST_PIPES, PIPE_PAGES
from assay.experiment.samples import worker_samples
from assay.machine import gpu
from assay.machine.load import Load
from assay.proof import campaign
from assay.statistics.looks import LOOKS
from assay.statistics.signed_rank import exact_interval

_ARMS = {"base": 100, "control": 100}
_LEAST_BLOCKS = 8


def main(seconds: float) -> int:
    """Prints a line a finding: `ok`, `--` for what is missing and not needed, `!!` for what costs trust."""
    print("assay doctor")
    for mark, name, words in [*_isolation(), *_processor(), *_gpus()]:
        print(f"{mark} {name:<12} {words}", flush=True)
    for mark, name, words in noise(seconds):
        print(f"{mark} {name:<12} {words}", flush=True)
    return 0


Finding = tuple[str, str, str]


def _isolation() -> list[Finding]:
    found = []
    if namespaces_work():
        found.append(("ok", "namespaces", "mount and pid: all trees at one path, nothing outlives its arm"))
    else:
        words = "not allowed here: trees stand at links of equal length, a subreaper collects processes"
        found.append(("!!", "namespaces", words))
    refused = sandbox.refusal()
    found.append(("!!" if refused else "ok", "sandbox", refused or "bwrap: patches are judged in one"))
    found += [_quotas(sandboxed=not refused)] if refused else [_quotas(sandboxed=one) for one in (True, False)]
    found.append(_pipes())
    root = Path("/sys/fs/cgroup")
    version = "v2" if (root / "cgroup.controllers").exists() else "v1" if root.exists() else "none"
    writable = version != "none" and os.access(root if version == "v2" else root / "memory", os.W_OK)
    found.append(("ok" if writable else "--", "cgroups", f"{version}, {'writable' if writable else 'not writable'}"))
    counter, why = best("best", worker=True)
    words = "; ".join([counter.words if counter else "cannot be counted", *why])
    found.append(("ok" if counter and not why else "--", "instructions", words))
    return found


def _quotas(*, sandboxed: bool) -> Finding:
    """What of an arm's quotas the kernel keeps, tried here; what only the judge looks at."""
    kept = quotas.kept(sandboxed=sandboxed)
    others = [name for name in quotas.WHAT if name not in kept]
    free = [name for name in others if name in quotas.SANDBOX_ALONE]
    watched = [name for name in others if name not in free] + ["number of pipes"]
    place = "in a sandbox" if sandboxed else "without a sandbox"
    words = f"{place} the kernel keeps {', '.join(kept) or 'nothing'}; watched: {', '.join(watched)}"
    words += f"; not limited: {', '.join(free)}" if free else ""
    return "ok" if sandboxed else "--", "quotas", words


def _pipes() -> Finding:
    """Whether the pipes that an arm may have leave pages of this user to others."""
    try:
        pages = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text())
    except OSError:
        return "--", "pipes", "how many pages a user may have for pipes is not shown"
    most = MOST_PIPES * PIPE_PAGES
    words = f"a user may have {pages or 'any number of'} pages for pipes, an arm's {MOST_PIPES} pipes take {most}"
    return ("ok" if most < pages or not pages else "!!"), "pipes", words


def _processor() -> list[Finding]:
    cpus = Path("/sys/devices/system/cpu")
    governors = {path.read_text().strip() for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    found: list[Finding] = [
        ("ok", "processors", f"{os.cpu_count()}, of which this process may use {len(os.sched_getaffinity(0))}")
    ]
    if not governors:
        found.append(("--", "governor", "not shown: a virtual machine, or no frequency scaling"))
    else:
        found.append(("ok" if governors == {"performance"} else "!!", "governor", ", ".join(sorted(governors))))
    smt = cpus / "smt" / "active"
    on = smt.exists() and smt.read_text().strip() == "1"
    found.append(
        ("!!" if on else "ok", "SMT", "on: a neighbour on the other thread slows an arm" if on else "off or not shown")
    )
    load = Load.now()
    time.sleep(1)
    foreign = load.foreign_since()
    if foreign is None:
        found.append(("!!", "foreign load", "cannot be seen: /proc/stat is missing"))
    else:
        found.append(
            ("ok" if foreign < 0.1 else "!!", "foreign load", f"{foreign:.0%} of a processor over the last second")
        )
    return found


def _gpus() -> list[Finding]:
    states = gpu.states()
    if not states:
        return [("--", "GPU", "none, or no NVIDIA driver")]
    found: list[Finding] = []
    for state in states:
        worries = [*state.slowed(), *([f"{state.processes} processes on it"] if state.processes else [])]
        words = f"{state.name}, {state.sm_mhz} MHz, {state.celsius} °C" + "".join(f"; {one}" for one in worries)
        found.append(("!!" if worries else "ok", f"GPU {state.index}", words))
    return found


def noise(seconds: float) -> list[Finding]:
    """Blocks of fresh workers with the same 3 ms of pure Python, as many as fit; at least eight."""
    order, plan = random.Random(0), campaign.plan(0)
    given = [b"".join(bytes(part) for part in encode(()))] * (plan.workload.calls + plan.workload.warmups)
    ratios: list[float] = []
    stop = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="assay-") as folder, campaign.trees(Path(folder), _ARMS) as trees:
        while time.monotonic() < stop or len(ratios) < _LEAST_BLOCKS:
            samples = worker_samples(plan, trees, order, given, 0)
            base, control = (samples[arm].figures["steady"] for arm in _ARMS)
            ratios.append(math.log(base / control))
            if sys.stderr.isatty():
                print(f"\r{len(ratios)} blocks", end="\r", file=sys.stderr, flush=True)
    n, last = len(ratios), LOOKS[-1]
    spread = float(np.std(ratios))
    core = 1.4826 * float(np.median(np.abs(np.array(ratios) - np.median(ratios))))
    scale = math.sqrt(n / last.blocks)
    half = exact_interval(ratios, 0.05).width / 2 * scale
    call = exact_interval(ratios, 0.2).width / 2 / _Z80 * _Z_LAST * scale
    enough = half <= math.log1p(0.02) / 2
    return [
        ("ok", "noise floor", f"log-ratios of identical code: sd {spread:.1%}, core {core:.1%}, in {n} blocks"),
        (
            "ok" if enough else "!!",
            "detectable",
            f"at {last.blocks} blocks: 95 % interval of ± {math.expm1(half):.2%}; an effect of {math.expm1(call):.1%} "
            f"is called in half of the campaigns"
            + ("" if enough else "; too wide for a margin of 2 %, which takes ± 1 %"),
        ),
    ]


_Z80, _Z_LAST = 1.2816, 2.9677
"""Normal quantiles: of an 80 % interval, and of the level of the last look."""
