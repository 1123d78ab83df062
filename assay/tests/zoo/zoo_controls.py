"""What tricks need, and controls: what takes a defence away from the real judge."""

import dataclasses
import json
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo_project import BASE, CALL, COMMAND, OWN, PROPERTY, TESTS, WORK, Setting, outcome

from assay.arms import groups, handle, process, sandbox
from assay.arms.caches import Caches
from assay.arms.inside.supervisor import cpu_seconds
from assay.arms.trees import Trees
from assay.contract import foreign, seeds
from assay.contract.frozen import Frozen
from assay.experiment import calibration, samples, series
from assay.experiment.blocks import Blocks
from assay.experiment.exchange import Exchange
from assay.gates import equivalence, tests
from assay.gates.gate import Given
from assay.judgement import decision, guards
from assay.report import verdict


def unseen(setting: Setting) -> None:
    setting.remove(series, "differing", lambda *_: [])


def alike(setting: Setting) -> None:
    """What makes inputs does not look at its seed."""
    setting.own["inputs.py"] = "def make(seed): return ([float(i) for i in range(150)],)\n"


def any_start(setting: Setting) -> None:
    setting.remove(decision, "_start", lambda *_: "")


def kept_caches(setting: Setting) -> None:
    setting.remove(Caches, "restore", lambda _: None)


def any_subclass(setting: Setting) -> None:
    """Workers send whatever a subclass gives when it is iterated over."""
    folder = setting.folder / "inside"
    shutil.copytree(sandbox.INSIDE, folder)
    text = (folder / "wire.py").read_text()
    assert "_READS.items()" in text
    (folder / "wire.py").write_text(text.replace("_READS.items()", "()"))
    setting.remove(sandbox, "INSIDE", folder)
    setting.remove(handle, "INSIDE", folder)


def ill_conditioned(setting: Setting) -> None:
    """The first example that is drawn is one on which base itself is wrong in every digit."""
    setting.more = PROPERTY.replace('target = "work:work"', 'target = "work:work"\nwide = "wide.py:total"')
    setting.own["wide.py"] = "from fractions import Fraction\ndef total(x): return [float(sum(map(Fraction, x)))]\n"
    setting.own["private.py"] = """
from hypothesis import strategies as st
drawn = []
def first(x):
    drawn.append(x)
    return [1e17, 1.0, -1e17] if len(drawn) == 1 else x
def lists(): return st.tuples(st.lists(st.floats(-100, 100), min_size=2, max_size=20).map(first))
"""


def constant(setting: Setting) -> None:
    setting.workload += ", constant = true"


def last_only(setting: Setting) -> None:
    setting.remove(series, "differing", lambda _, one, two: [] if one.outputs[-1] == two.outputs[-1] else [0])


def any_reply(setting: Setting) -> None:
    setting.remove(handle, "_mark", lambda: bytes(8))


def unmarked(setting: Setting) -> None:
    any_reply(setting)
    unseen(setting)


def inner_clock(setting: Setting) -> None:
    call = samples.called

    def believed(*given: Any) -> Any:
        reply = call(*given)
        return dataclasses.replace(reply, seconds=reply.inner)

    setting.remove(samples, "called", believed)


def needing(
    more: str = "",
    scope: list[str] | None = None,
    workload: str = CALL,
    build: str = "",
    outputs: str = "compared",
) -> Any:
    def needs(setting: Setting) -> None:
        setting.more, setting.workload = more + (f"[commands]\nbuild = [{build}]\n" if build else ""), workload
        setting.scope, setting.outputs = scope or setting.scope, outputs

    return needs


def upstream(setting: Setting) -> None:
    (setting.folder / "upstream").mkdir(exist_ok=True)
    (setting.folder / "upstream" / "heavy.py").write_text(WORK.replace("def work", "def heavy"))
    path = setting.folder / "upstream"
    setting.more = f'[sandbox]\nreadable = ["upstream"]\nenvironment = {{PYTHONPATH = "{path}"}}\n'


def installed(setting: Setting) -> None:
    """A package that is installed beside the tree, with the tree's code in a folder that nobody looks into."""
    folder = setting.folder / "installed"
    folder.mkdir(exist_ok=True)
    (folder / "work.py").write_text(WORK)
    (setting.folder / "base/work.py").unlink()
    (setting.folder / "candidate/work.py").unlink()
    setting.scope = ["src/*.py"]
    setting.more = TESTS + f'[sandbox]\nreadable = ["installed"]\nenvironment = {{PYTHONPATH = "{folder}"}}\n'


def installed_and_timed(setting: Setting) -> None:
    """Nothing leads workers into the folder of the tree's code, and the task has no tests."""
    installed(setting)
    setting.more = setting.more.removeprefix(TESTS)
    setting.workload += ', paths = ["."]'


def installed_beside(setting: Setting) -> None:
    """A second workload runs the package that is installed beside the tree."""
    folder = setting.folder / "installed"
    folder.mkdir(exist_ok=True)
    (folder / "work.py").write_text(WORK)
    setting.more = f'[sandbox]\nreadable = ["installed"]\nenvironment = {{PYTHONPATH = "{folder}"}}\n'
    setting.more += '[[workload]]\nname = "beside"\noutputs = "unchecked"\n'
    setting.more += 'run = {kind = "command", command = ["python3", "-S", "beside.py"]}\n'


def repository(setting: Setting) -> None:
    base = setting.folder / "base"
    git(base, "init", "-q")
    commit(base)
    (base / "work.py").write_text(WORK.replace("PASSES = 2", "PASSES = 1"))
    commit(base)
    git(base, "branch", "fast")
    git(base, "reset", "-q", "--hard", "HEAD~1")
    setting.repository, setting.more = 'path = "base", base = "HEAD", reference = "fast"', PROPERTY


def readable_repository(setting: Setting) -> None:
    setting.more += '[sandbox]\nreadable = ["base"]\n'


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=zoo", "-c", "user.email=zoo@example.org"]
    subprocess.run(["git", *who, "-C", str(folder), *arguments], check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "-A", "-f")
    git(folder, "commit", "-q", "-m", "state")


def planted(change: Any) -> Any:
    """A candidate whose .git holds base, and something else besides."""

    def plant(tree: Path, folder: Path) -> None:
        texts = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
        for path, text in BASE.items():
            (tree / path).write_text(text)
        (tree / "sitecustomize.py").unlink(missing_ok=True)
        git(tree, "init", "-q")
        commit(tree)
        script = folder / "script.sh"
        script.write_text(f"#!/bin/sh\ntouch {folder}/ran\nexec git --git-dir={tree}/.git show HEAD:$1\n")
        script.chmod(0o755)
        change(tree, str(script))
        for path, data in texts.items():
            path.write_bytes(data)

    return plant


def cleans(tree: Path, script: str) -> None:
    git(tree, "config", "filter.zoo.clean", f"{script} %f")
    (tree / ".git" / "info" / "attributes").write_text("*.py filter=zoo\n")


def excludes(tree: Path, script: str) -> None:
    (tree / ".git" / "info").mkdir(exist_ok=True)
    (tree / ".git" / "info" / "exclude").write_text("sitecustomize.py\n")


def ran(folder: Path) -> str:
    return "a program that the candidate's .git names was run" if (folder / "ran").exists() else ""


def naming(*checks: str) -> Any:
    """A scope that holds everything and names files that check."""

    def control(setting: Setting) -> None:
        setting.scope, setting.checks = ["**"], list(checks)

    return control


def shown_inputs(setting: Setting) -> None:
    """Every arm's worker is told what makes inputs, and may read it."""
    started, box = handle.started, Frozen.box

    def told(*given: Any, **options: Any) -> Any:
        return started(*given, **{**options, "makes_inputs": True})

    def wide(frozen: Frozen, arm: str, **options: Any) -> Any:
        found = box(frozen, arm, **options)
        return dataclasses.replace(found, readable=(*found.readable, frozen.folder / "private"))

    setting.remove(samples, "started", told)
    setting.remove(Frozen, "box", wide)


def exit_status(setting: Setting) -> None:
    setting.remove(tests, "compared", lambda *_: tests.Found("", "pytest ended with status 0"))


def unchecked(setting: Setting) -> None:
    setting.outputs = "unchecked"


def weighed(setting: Setting) -> None:
    """A command, of which memory is what counts."""
    setting.scope, setting.workload, setting.outputs, setting.primary = ["run.py"], COMMAND, "unchecked", "memory"


def sending_counts(setting: Setting) -> None:
    """Times with all that sending takes, however much that is."""
    setting.remove(calibration, "TOO_SHORT", 10.0)
    setting.remove(Exchange, "echo", lambda *_: 0.0)


def own_echo(setting: Setting) -> None:
    """What sending takes is what an arm's own worker echoes."""

    def own(found: Any, arm: str) -> float:
        return float(statistics.median(found[arm].echoes))

    setting.remove(samples, "transport", own)
    unbounded(setting)


def long_lists(setting: Setting) -> None:
    """Sending takes about a tenth of a call."""
    setting.own["inputs.py"] = OWN["inputs.py"].replace("range(150)", "range(600)")
    setting.workload = CALL.replace("rounds = 2, calls = 4", "rounds = 8, calls = 24, loops = 1")


def in_a_loop(setting: Setting) -> None:
    """A call takes microseconds, so that many of them share a request."""
    setting.own["inputs.py"] = "def make(seed): return (seed % 2**32,)\n"
    setting.workload = CALL.replace("rounds = 2, calls = 4", "rounds = 4, calls = 8")


def unsealed(setting: Setting) -> None:
    """Each input of a loop can be read before the call before it has been made."""
    folder = setting.folder / "inside"
    shutil.copytree(sandbox.INSIDE, folder)
    text = (folder / "sealed.py").read_text()
    hides = 'return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")'
    assert hides in text
    (folder / "sealed.py").write_text(text.replace(hides, "return one"))
    setting.remove(sandbox, "INSIDE", folder)
    setting.remove(handle, "INSIDE", folder)


def many_calls(setting: Setting) -> None:
    setting.workload = CALL.replace("rounds = 2, calls = 4", "rounds = 8, calls = 24")


def unbounded(setting: Setting) -> None:
    setting.remove(Blocks, "bounded", lambda blocks: blocks.seconds["candidate"])


def small_disk(setting: Setting) -> None:
    setting.budget = f"disk_bytes = {8 << 20}"


def any_disk(setting: Setting) -> None:
    setting.remove(groups, "_bytes_below", lambda _: 0)


def any_pipes(setting: Setting) -> None:
    setting.remove(groups, "_pipes", lambda _: set())


def eight_seconds(setting: Setting) -> None:
    setting.budget, setting.more = "seconds = 8.0", TESTS + "timeout_s = 20.0\n"


def without_budget(setting: Setting) -> str:
    """Every gate may take as long as its own commands may."""
    setting.remove(Given, "most", lambda _, seconds: seconds)
    begun = time.monotonic()
    outcome(setting, stop=False)
    return "stalled" if time.monotonic() - begun > 2 * 8 else "in time"


def shared_file(setting: Setting) -> None:
    (setting.folder / "shared").write_text("")
    setting.more = '[sandbox]\nreadable = ["shared"]\n'


def any_lock(setting: Setting) -> None:
    setting.remove(samples, "held", lambda _: [])


def foreseeable(setting: Setting) -> None:
    """Inputs are drawn from the seed of hashes, which a candidate can see."""

    def inputs(seed: int, *label: object) -> Iterator[int]:
        drawn = random.Random(seeds.hash_seed(seed, *label))
        while True:
            yield drawn.getrandbits(53)

    setting.remove(seeds, "inputs", inputs)


def one_process(setting: Setting) -> None:
    setting.remove(process, "own_kib", lambda _: 0)


def no_left(setting: Setting) -> None:
    wait = process.Running.wait
    setting.remove(process.Running, "wait", lambda *given: dataclasses.replace(wait(*given), left=0))


def shared_cache(setting: Setting) -> None:
    def cache(frozen: Frozen, arm: str) -> Path:
        found = frozen.folder / "cache" / "shared"
        found.mkdir(parents=True, exist_ok=True)
        return found

    setting.remove(Frozen, "cache", cache)


def never_frozen(setting: Setting) -> None:
    def looks(running: process.Running) -> float:
        running._frozen = {process: cpu_seconds(process) for process in running.members()}
        return sum(running._frozen.values())

    setting.remove(process.Running, "freeze", looks)
    setting.remove(series, "too_busy_while_frozen", lambda _: False)


def frozen_or_not(setting: Setting) -> None:
    setting.remove(series, "too_busy_while_frozen", lambda _: False)


def one_hash_seed(setting: Setting) -> None:
    """Outputs are checked under one hash seed, and not while they are timed under others."""
    setting.remove(equivalence.secrets, "randbits", lambda bits: 0 if bits == 32 else 1)
    unseen(setting)


def named_arms(setting: Setting) -> None:
    environment = Trees.environment
    setting.remove(Trees, "environment", lambda trees, arm, seed: environment(trees, arm, seed) | {"ASSAY_ARM": arm})
    unseen(setting)


def drawn(folder: Path) -> str:
    """Whether the terminal's lines, as they would be printed, hold one that reads like another verdict."""
    (file,) = folder.glob("store/attempts/*/verdict.json")
    printed = "\n".join(foreign.told(line) for line in verdict.lines(json.loads(file.read_text())))
    forged = any(line.startswith("faster") for line in printed.splitlines()) or "\x1b" in printed
    return "a verdict that nobody came to was shown" if forged else ""


def raw_words(setting: Setting) -> str:
    setting.remove(foreign, "told", str)
    found = outcome(setting, stop=False)
    return "drawn" if drawn(setting.folder) else found


def links(tree: Path, folder: Path) -> None:
    (tree / "table.txt").symlink_to("/etc/passwd")


def links_allowed(setting: Setting) -> None:
    setting.modes = True
    setting.remove(guards, "SYMLINK", "none")
