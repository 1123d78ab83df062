"""A task: one TOML file that says what is judged and how. Read strictly; an error names the file and the line."""

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from assay.contract import patterns
from assay.contract.errors import TaskError
from assay.contract.positions import line_of
from assay.contract.workload import NAMED, Plan, Workload
from assay.repository import store

SCHEMA = 1
_STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
Pattern = Annotated[str, AfterValidator(patterns.checked)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
Command = Annotated[tuple[str, ...], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, config=_STRICT)
class Repository:
    """Where the trees come from."""

    path: str
    """A repository, or any directory if `base` is not given; relative to the task's file."""
    base: str = ""
    """The commit that patches start from; without it the directory is taken as it is."""
    reference: str = ""
    """A commit that is known to be better: a fourth arm of every block, shown beside the candidate."""


@dataclass(frozen=True, config=_STRICT)
class Commands:
    """What turns files into something that runs; every argument a string, in the arm's own tree."""

    setup: tuple[Command, ...] = ()
    build: tuple[Command, ...] = ()
    timeout_s: Positive = 600.0
    """Of each command."""
    where: Literal["measured", "prepared"] = "measured"
    """Where trees are built that are prepared on one machine and measured on another.

    `prepared`: what is built there runs on the other machine, too. It is carried there with its digests.
    """


@dataclass(frozen=True, config=_STRICT)
class Timed:
    """A workload and its name."""

    name: Name
    run: Workload
    """A file named in it that is there, seen from the task's file, is the task's own; other names are the tree's."""
    primary: Literal["", "wall", "steady", "first", "import", "memory"] = ""
    """The figure that gets the verdict: wall unless given, steady for callables."""
    outputs: Literal["compared", "unchecked"] = "compared"
    """What was not compared speaks for no patch, unless this says `unchecked`.

    Not compared are outputs of a command, of a benchmark, of a call with `compare = false`, and of a function that
    returns nothing.
    """
    instructions: Literal["", "best", "perf", "valgrind", "bytecode"] = ""
    """By what instructions are counted beside times: `best` that the machine allows, or one. They decide nothing."""
    worker: Literal["untrusted", "trusted"] = "untrusted"
    """Whether a patch may have its worker in its hands; only what that cannot explain is then called faster.

    `trusted` is for patches of one's own: a chain's calls, copies of arguments and outputs, and what is left for the
    time after an answer are then no bound. Without it no chain is called faster.
    """


@dataclass(frozen=True, config=_STRICT)
class Property:
    """What must stay the same: the candidate's outputs on inputs that hypothesis draws, against base's."""

    name: Name
    target: str
    """`module:function` of the tree, or `file.py:function` of the task."""
    strategy: str
    """`file.py:function` of the task, never shown to a candidate: returns a hypothesis strategy of the arguments."""
    wide: str = ""
    """`module:function` or `file.py:function`: the same from wider types, in base, which calibrates the tolerance."""
    examples: Count = 200
    rtol: Annotated[float, Field(ge=0)] = 0.0
    atol: Annotated[float, Field(ge=0)] = 0.0
    writes: tuple[int | str, ...] = ()
    """Positions or names of the arguments that are written to: filled with NaN or 0x7f before a call, and compared."""
    updates: tuple[int | str, ...] = ()
    """Those that are read and written: compared. All others must come back unchanged."""


@dataclass(frozen=True, config=_STRICT)
class Tests:
    """A necessary gate: every test that is collected in base must be reported and pass in the candidate."""

    command: tuple[str, ...] = ()
    """What starts pytest, and which tests it runs, as in `python -m pytest tests`; none: no gate."""
    timeout_s: Positive = 600.0


@dataclass(frozen=True, config=_STRICT)
class Scope:
    """What a patch may touch."""

    files: tuple[Pattern, ...] = ("**",)
    """Tests, benchmarks, conftest and build files among them are put back as in base, unless `checks` names them."""
    checks: tuple[Pattern, ...] = ()
    """Tests, benchmarks and build files that a patch may change, and modules that Python loads by itself."""
    restored: tuple[Pattern, ...] = ()
    """More files that are put back as in base if they lie outside `files`."""
    left: tuple[Pattern, ...] = ("model_patch.diff", "**/.bench_scratch/**")
    """New files that are left behind unseen."""
    binary: tuple[Pattern, ...] = ()
    """Binary or ignored files that may change."""
    modes: bool = False
    """Whether a file may become executable, or no longer be."""
    most_files: Count = 100
    most_bytes: Count = 1 << 20
    """Of the whole patch."""


@dataclass(frozen=True, config=_STRICT)
class Api:
    """What callers rely on."""

    packages: tuple[str, ...] = ()
    """Python packages whose public names, parameters and defaults must stay."""
    paths: tuple[str, ...] = ("src", ".")
    """Folders of the tree in which they are found."""
    native: tuple[Pattern, ...] = ()
    """Files in which torch operators are registered or C functions declared."""
    allow: tuple[str, ...] = ()
    """Names that may break: `package.module.function`, `torch:namespace::op`, `c:function`; * stands for any text."""


@dataclass(frozen=True, config=_STRICT)
class Budget:
    """What a judgement may use."""

    seconds: Positive = 3600.0
    """Of all gates together, and again of measuring, all workloads together."""
    timeout_s: Positive = 600.0
    """Of one run or call."""
    memory_bytes: Count | None = None
    disk_bytes: Count | None = None
    """Of an arm's cache, of its tree while it is built, and of what it prints."""
    processes: Count | None = None
    most_start_s: Positive = 0.25
    """Seconds that a candidate's import and first call may take longer than base's, if that is more than twice as long.

    Neither is in the figure of a steady state: work that was moved there makes nothing faster.
    """
    most_foreign: Positive = 0.1
    """Processor seconds of others, a second of a block, above which it is left out."""


@dataclass(frozen=True, config=_STRICT)
class Sandbox:
    """What an arm may see beside the interpreter and its own tree."""

    readable: tuple[str, ...] = ()
    """Files and folders, absolute or relative to the task's file: a toolchain."""
    devices: tuple[str, ...] = ()
    """Device files, as /dev/nvidia0."""
    environment: dict[str, str] = Field(default_factory=dict)
    device: Literal["cpu", "gpu"] = "cpu"
    """What is measured on, and locked against other judges of this machine meanwhile."""


@dataclass(frozen=True, config=_STRICT)
class Prompt:
    """What an agent is told beside scope, budget and the names of the workloads."""

    goal: str = ""
    shows: tuple[Literal["workload", "tests", "history"], ...] = ("workload", "tests")


@dataclass(frozen=True, config=_STRICT)
class Task:
    """All of it."""

    schema: Literal[1]
    name: Name
    repository: Repository
    workload: Annotated[tuple[Timed, ...], Field(min_length=1)]
    commands: Commands = Commands()
    property: tuple[Property, ...] = ()
    tests: Tests = Tests()
    scope: Scope = Scope()
    api: Api = Api()
    budget: Budget = Budget()
    sandbox: Sandbox = Sandbox()
    prompt: Prompt = Prompt()
    delta: Positive = 0.02
    """The margin of `equivalent`, `material` and `not_slower`, as a fraction."""
    require: Literal["faster", "material", "not_slower", "any"] = "faster"
    """What exit status 0 stands for; `material` is faster by more than the margin."""


@dataclasses.dataclass(frozen=True)
class Read:
    """A task that was read: its place, its text, and commits by their full names."""

    task: Task
    file: Path
    text: str
    base: str
    """Full name of the base commit; "" for a directory."""
    reference: str
    digest: str

    @property
    def repository(self) -> Path:
        """The repository or directory."""
        return (self.file.parent / self.task.repository.path).resolve()

    def own(self, name: str) -> Path | None:
        """The task's own file that `file.py:function` names; None if it is the tree's."""
        return _own(self.file, name)

    def plan(self, timed: Timed, seed: int) -> Plan:
        """How one of the workloads is measured. ValueError for what makes no sense."""
        task = self.task
        return Plan(
            timed.run,
            task.delta,
            seed,
            task.budget.timeout_s,
            task.budget.most_foreign,
            timed.primary,
            workloads=len(task.workload),
            most_start_s=task.budget.most_start_s,
            unchecked=timed.outputs == "unchecked",
            trusted=timed.worker == "trusted",
            instructions=timed.instructions,
        ).checked()


def read(file: Path, base: str = "") -> Read:
    """The task in a file, perhaps with another base commit. TaskError names file and line."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as problem:
        raise TaskError(f"{file}: expected a task, got {problem}") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        line = re.search(r"line (\d+)", str(problem))
        raise TaskError(f"{file}:{line[1] if line else 1}: {problem}") from None
    try:
        task = adapter().validate_json(json.dumps(data, default=str))
    except ValidationError as problem:
        raise TaskError("\n".join(_explained(file, text, error) for error in problem.errors())) from None
    if task.delta > 1:
        meant = f"expected at most 1, which is 100 %: is {100 * task.delta:g} % meant? {task.delta:g} % is"
        raise TaskError(f"{file}:{line_of(text, ('delta',))}: delta: {meant} {task.delta / 100:g}")
    if base:
        task = dataclasses.replace(task, repository=dataclasses.replace(task.repository, base=base))
    found = Read(task, file.resolve(), text, "", "", "")
    base, reference = (_commit(found, name) for name in ("base", "reference"))
    _check(found)
    found = dataclasses.replace(found, base=base, reference=reference)
    return dataclasses.replace(found, digest=_digest(found))


@cache
def adapter() -> TypeAdapter[Task]:
    """Validation and the JSON schema."""
    return TypeAdapter(Task)


def json_schema() -> dict[str, Any]:
    """The schema that a task's content, as JSON, follows."""
    return {"$id": f"assay-task-{SCHEMA}", **adapter().json_schema()}


def _commit(found: Read, name: str) -> str:
    revision = getattr(found.task.repository, name)
    if not found.repository.is_dir():
        words = f"repository.path: expected a directory, got {found.repository}"
        raise TaskError(f"{found.file}:{line_of(found.text, ('repository', 'path'))}: {words}")
    if not revision:
        return ""
    try:
        if name == "reference" and not found.task.repository.base:
            raise store.GitError("expected `base` with it")
        return store.resolved(found.repository, revision)
    except store.GitError as problem:
        at = line_of(found.text, ("repository", name))
        raise TaskError(f"{found.file}:{at}: repository.{name}: {problem}") from None


def _check(found: Read) -> None:
    """What no schema says: files that are there, workloads that make sense, names that are given once."""
    task = found.task
    wrong: list[tuple[tuple[str | int, ...], str]] = []
    for kind in ("workload", "property"):
        names = [one.name for one in getattr(task, kind)]
        wrong += [
            ((kind, i, "name"), f"expected another name than {name!r}, which is given above")
            for i, name in enumerate(names)
            if name in names[:i]
        ]
    for i, timed in enumerate(task.workload):
        try:
            found.plan(timed, 0)
        except ValueError as problem:
            wrong.append((("workload", i, "run"), str(problem)))
    for place, name, must in functions_of(task):
        path = name.partition(":")[0]
        looked = (found.file.parent / path).resolve()
        tree = found.repository / path
        there = looked.is_file() if must or task.repository.base else looked.is_file() or tree.is_file()
        if path.endswith(".py") and not there and (must or not task.repository.base):
            wrong.append((place, f"expected a file, got {path}, which is not there"))
        elif must and not path.endswith(".py"):
            wrong.append((place, f"expected file.py:function, a file of the task, got {name!r}"))
    called = {_own(found.file, name) for place, name, _ in functions_of(task) if place[-1] in _IN_ARMS}
    for i, timed in enumerate(task.workload):
        if (own := _own(found.file, timed.run.inputs)) is not None and own in called:
            words = f"expected a file of its own, which no arm reads, got {own.name}, which holds what arms call"
            wrong.append((("workload", i, "run", "inputs"), words))
    for i, path in enumerate(task.sandbox.readable):
        if not (found.file.parent / path).exists():
            wrong.append((("sandbox", "readable", i), f"expected a file or folder, got {path}, which is not there"))
    if wrong:
        lines = [f"{found.file}:{line_of(found.text, place)}: {_dotted(place)}: {words}" for place, words in wrong]
        raise TaskError("\n".join(lines))


_IN_ARMS = ("target", "chain", "wide")
"""The functions of a task's own files that run beside the code that is judged."""


def functions_of(task: Task) -> Iterator[tuple[tuple[str | int, ...], str, bool]]:
    """Every `file.py:function` of a task: where it stands, itself, and whether it must be the task's own."""
    for i, timed in enumerate(task.workload):
        for field in NAMED:
            if getattr(timed.run, field):
                yield ("workload", i, "run", field), getattr(timed.run, field), field == "canonical"
    for i, one in enumerate(task.property):
        for field in ("target", "strategy", "wide"):
            if getattr(one, field):
                yield ("property", i, field), getattr(one, field), field == "strategy"


def _own(file: Path, name: str) -> Path | None:
    path = name.partition(":")[0]
    looked = (file.parent / path).resolve()
    return looked if path.endswith(".py") and looked.is_file() else None


def _digest(found: Read) -> str:
    """Identity: what the file says, the commits, and the bytes of the files that it brings along."""
    own = {str(path): path for _, name, _ in functions_of(found.task) if (path := _own(found.file, name))}
    files = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in own.values())
    content = {**dataclasses.asdict(found.task), "commits": [found.base, found.reference], "files": files}
    if found.base:
        content["repository"] = {}  # commits say it all, whatever they are called and wherever the repository lies
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _dotted(place: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def _explained(file: Path, text: str, error: Any) -> str:
    place = tuple(error["loc"])
    words = {
        "unexpected_keyword_argument": "expected a name that tasks have, got an unknown one",
        "missing": "expected it to be given",
    }.get(error["type"], error["msg"].removeprefix("Value error, "))
    silent = error["type"] in ("unexpected_keyword_argument", "missing", "value_error")
    got = "" if silent else f" (got {error['input']!r:.80})"
    return f"{file}:{line_of(text, place)}: {_dotted(place)}: {words}{got}"
