"""What the README promises: a repository judged by its words alone, and a 50 ms workload within a minute."""

import ast
import os
import re
import resource
import shlex
import subprocess
import sys
import time
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

from assay.arms import sandbox
from small_project import candidate, edited, environment, files, git, project, verdict

README = Path(__file__).parents[1] / "README.md"


def blocks_of(title: str) -> list[tuple[str, str, str]]:
    """Kind, name and text of a section's blocks."""
    section = README.read_text().split(f"## {title}")[1].split("\n## ")[0]
    return re.findall(r"```(\w+) *([\w./-]*)\n(.*?)```", section, flags=re.DOTALL)


def written(folder: Path, blocks: list[tuple[str, str, str]]) -> str:
    """Writes a section's files; its commands. Other tests run beside this one, so that foreign load is allowed."""
    for kind, name, text in blocks:
        if kind != "sh":
            beside = "\n[budget]\nmost_foreign = 1e9\n" if "[repository]" in text or "[commands]" in text else ""
            files(folder, {name: text + beside})
    (commands,) = (text for kind, _, text in blocks if kind == "sh")
    return commands


def shell(folder: Path, commands: str) -> subprocess.CompletedProcess[str]:
    """Runs commands with `assay` on PATH."""
    bin_ = folder / "bin"
    bin_.mkdir(exist_ok=True)
    (bin_ / "assay").write_text(f'#!/bin/sh\nexec {sys.executable} -m assay "$@"\n')
    (bin_ / "assay").chmod(0o755)
    named = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    given = environment(PATH=os.pathsep.join([str(bin_), os.environ["PATH"]]), **named)
    return subprocess.run(["sh", "-ec", commands], cwd=folder, env=given, capture_output=True, text=True, check=False)


def test_judge_your_own_repository_in_five_minutes(tmp_path: Path) -> None:
    """The README's files and commands, in a fresh directory, as they stand there."""
    blocks = blocks_of("Judge your own repository in five minutes")
    assert {kind for kind, _, _ in blocks} == {"python", "toml", "sh"}
    git(tmp_path, "init", "--quiet", "words")
    commands = written(tmp_path, blocks)
    more = "" if sandbox.refusal() is None else " --no-sandbox"
    start = time.monotonic()
    done = shell(tmp_path, commands.replace("assay judge task.toml", f"assay judge task.toml{more}"))
    print(f"{time.monotonic() - start:.0f} s")
    assert done.stdout.splitlines()[1].startswith("faster: the interval lies above 0"), done.stdout + done.stderr
    assert done.returncode == 0 and list(tmp_path.glob(".assay/attempts/*/report.html"))


def installed_by(section: str) -> set[str]:
    """Distributions that a section's `pip install` lines bring, by pyproject.toml and what each of them requires."""
    own = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]
    waiting = [word for line in re.findall(r"pip install ([^`]+)`", section) for word in shlex.split(line)]
    found: set[str] = set()
    while waiting:
        name, _, extras = re.split(r"[<>=;~! ]", waiting.pop())[0].rstrip("]").partition("[")
        if name == "assay":
            waiting += [
                *own["dependencies"],
                *(one for extra in extras.split(",") if extra for one in own["optional-dependencies"][extra]),
            ]
        elif name.lower() not in found:
            found.add(name.lower())
            needs = [one for one in requires(name) or [] if "extra ==" not in one]
            waiting += [one.partition(";")[0].strip() for one in needs if _holds(one)]
    return found


def _holds(requirement: str) -> bool:
    """Whether a requirement may count here; markers of other systems and older interpreters are left out."""
    return not re.search(r"win32|python_version *<|python_full_version *<|implementation", requirement)


@pytest.mark.parametrize(
    "title", ["Judge your own repository in five minutes", "Run your first campaign in ten minutes"]
)
def test_a_section_says_what_it_needs(title: str) -> None:
    """Whatever its files import or run by name is in the standard library, its own, or what its words install."""
    section = README.read_text().split(f"## {title}")[1].split("\n## ")[0]
    blocks = blocks_of(title)
    wanted = set(re.findall(r'"-m", "(\w+)"', section))
    for _, _, text in (block for block in blocks if block[0] == "python"):
        for node in ast.walk(ast.parse(text)):
            wanted |= {one.name for one in node.names} if isinstance(node, ast.Import) else set()
            wanted |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    own = {Path(name).stem for kind, name, _ in blocks if kind == "python"} | {"venv", "pip"}
    of = packages_distributions()
    missing = {name for name in wanted - set(sys.stdlib_module_names) - own
               if not {one.lower() for one in of[name]} & installed_by(section)}  # fmt: skip
    assert not missing and (wanted or "campaign" in title)
    assert "pytest" not in installed_by(section.replace("pip install pytest", ""))


@pytest.mark.full
@pytest.mark.sandbox
def test_run_your_first_campaign_in_ten_minutes(tmp_path: Path) -> None:
    """As above, with a margin that a busy machine can meet, since a void canary is what the README says of one."""
    git(tmp_path, "init", "--quiet", "words")
    before = written(tmp_path, blocks_of("Judge your own repository in five minutes"))
    edited(tmp_path / "task.toml", 'name = "words"\n', 'name = "words"\ndelta = 1.0\n')
    commands = written(tmp_path, blocks_of("Run your first campaign in ten minutes"))
    start = time.monotonic()
    done = shell(tmp_path, before.splitlines()[0] + "\n" + commands)
    assert done.returncode == 0 and time.monotonic() - start < 600, done.stdout + done.stderr
    assert (
        "by-hand on words #2: faster" in done.stdout
        and "by-hand: succeeded 2 of 2 [34%, 100%]; pass@1 100%" in done.stdout
    )
    assert "sabotage on words #1: slower" in done.stdout and "/assay/measure/a-page" in done.stdout
    assert (tmp_path / "first/report.html").exists() and (tmp_path / "first/predictions.jsonl").exists()


SLEEPLESS = """def work(n):
    total = 0
    for i in range(n):
        total += i * i % 7
    return total
"""


@pytest.mark.full
@pytest.mark.parametrize("change", ["faster", "equal"])
def test_a_workload_of_50_ms_within_a_minute(change: str, tmp_path: Path) -> None:
    """All gates, 40 examples, 12 to 40 blocks. A loaded machine takes longer, so processor time is what is asserted."""
    task = edited(project(tmp_path), "rounds = 2, calls = 2", "rounds = 2, calls = 2, warmups = 1")
    edited(task, "examples = 10", "examples = 40")
    once = time.process_time()
    scope: dict[str, object] = {}
    exec(SLEEPLESS, scope)
    scope["work"](1000000)  # type: ignore[operator]
    size = int(1000000 * 0.05 / (time.process_time() - once))
    files(tmp_path / "repo", {"pkg/__init__.py": SLEEPLESS, "tests/test_work.py": "from pkg import work\n\n\n" + _TEST})
    files(tmp_path, {"inputs.py": f"def squares(seed):\n    return ({size} + seed % 100,)\n"})
    files(tmp_path, {"strategies.py": _STRATEGY})
    git(tmp_path / "repo", "commit", "--all", "-m", "50 ms")
    text = SLEEPLESS.replace("range(n)", "range(0, n)")
    if change == "faster":
        text = "def work(n):\n    k, r = divmod(n, 7)\n    return 14 * k + sum(i * i % 7 for i in range(r))\n"
        text += "def _unused(n):\n    return sum(range(n // 3))\n_work = work\n"
        text += "def work(n):\n    _unused(n)\n    return _work(n)\n"
    tree = candidate(task, change, {"pkg/__init__.py": text})
    more = [] if sandbox.refusal() is None else ["--no-sandbox"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    found = verdict(task, "--tree", tree, "--store", tmp_path / "store", *more)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
    used = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    blocks = found["workloads"][0]["blocks"]
    print(f"{found['outcome']}: {blocks} blocks, {seconds:.1f} s, {used:.1f} s of a processor")
    assert used <= 60
    if change == "faster":
        assert found["outcome"] == "faster" and blocks == 12
    else:
        assert found["outcome"] in ("equivalent", "undecided", "void") or not found["workloads"][0]["material"]


_TEST = "def test_work():\n    assert work(10) == sum(i * i % 7 for i in range(10))\n"
_STRATEGY = """from hypothesis import strategies


def arguments():
    return strategies.tuples(strategies.integers(0, 2000))
"""
