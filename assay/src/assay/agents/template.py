"""An agent: one TOML file that says how a command-line agent is started and what it may use. Read strictly."""

import dataclasses
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from assay.agents.proxy import split
from assay.contract.errors import UsageError
from assay.contract.patterns import checked
from assay.contract.positions import line_of

SCHEMA = 1
READY = Path(__file__).parent / "ready"
INSTALL = "ASSAY_AGENTS"
"""Environment variable: the folder that ready templates look for installed agents in."""
_STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
_PLACE = re.compile(r"\{([a-z_]+)\}")
OURS = ("prompt", "prompt_file", "tree", "home", "seconds", "measure")
"""Placeholders that assay fills in; others are variables of the template."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


def _expression(text: str) -> str:
    try:
        found = re.compile(text)
    except re.error as problem:
        raise ValueError(f"expected a regular expression, got {text!r}: {problem}") from None
    return found.pattern


def _inside(path: str) -> str:
    """A relative path below HOME."""
    if path.startswith("/") or not path or ".." in path.split("/"):
        raise ValueError(f"expected a path below HOME, without .., got {path!r}")
    return path


Expression = Annotated[str, AfterValidator(_expression)]
Below = Annotated[str, AfterValidator(_inside)]


@dataclass(frozen=True, config=_STRICT)
class Command:
    """How the agent is started, in the repository's folder."""

    argv: Annotated[tuple[str, ...], Field(min_length=1)]
    """Program and arguments. Variables are filled in, and what assay knows.

    {tree} and {home} are folders, {seconds} is the budget, {measure} runs the measuring tool on every workload.
    """
    prompt: Literal["stdin", "file", "argument"] = "stdin"
    """How it gets the prompt: on stdin, as the file {prompt_file}, or as the argument that holds {prompt}."""


@dataclass(frozen=True, config=_STRICT)
class Environment:
    """What stands in its environment beside what the sandbox sets. Nothing of the judge's own passes unnamed."""

    allow: tuple[Variable, ...] = ()
    """Names that are taken from the judge's environment if they are set there."""
    keys: tuple[Variable, ...] = ()
    """Secrets: they must be set; they go into the agent's process alone, and are redacted from all that is kept."""
    set: dict[Variable, str] = Field(default_factory=dict)
    """Fixed values; variables are filled in."""


@dataclass(frozen=True, config=_STRICT)
class Network:
    """The only places that it can reach."""

    hosts: tuple[str, ...] = ()
    """host:port each, exactly; variables are filled in."""


@dataclass(frozen=True, config=_STRICT)
class Budget:
    """What a run may use; a run that is over it is ended, and what it has changed is judged all the same."""

    seconds: Positive = 3600.0
    tokens: Count | None = None
    """Needs `usage.tokens`."""
    money: Positive | None = None
    """In the unit in which the agent reports it; needs `usage.money`."""


@dataclass(frozen=True, config=_STRICT)
class Reported:
    """Where a figure stands in what the agent says of itself. Without a match it is unknown, not 0."""

    pattern: Expression
    """Its groups are numbers, which are added; `k` and `M` behind one are thousands and millions."""
    file: Below | Literal[""] = ""
    """A file below HOME; without it what the agent prints is searched."""
    combine: Literal["sum", "last"] = "sum"


@dataclass(frozen=True, config=_STRICT)
class Usage:
    """What the agent reports of its own consumption."""

    tokens: Reported | None = None
    money: Reported | None = None


@dataclass(frozen=True, config=_STRICT)
class Sandbox:
    """What it sees and may use beside the repository."""

    readable: tuple[str, ...] = ()
    """Files and folders, shown read-only at their own paths: where it is installed. Variables and ~ are filled in."""
    path: tuple[str, ...] = ()
    """Folders put before PATH."""
    home: dict[Below, str] = Field(default_factory=dict)
    """Files below HOME and what they hold, as its configuration. Variables are filled in."""
    memory_bytes: Count | None = None
    disk_bytes: Count | None = None
    processes: Count | None = None


@dataclass(frozen=True, config=_STRICT)
class Provider:
    """How failures of the model's provider look in the end of what the agent prints. They never count against it."""

    errors: tuple[Expression, ...] = ()


@dataclass(frozen=True, config=_STRICT)
class Agent:
    """All of it."""

    schema: Literal[1]
    name: Name
    command: Command
    about: str = ""
    """What it is, how it is installed, and what was tried."""
    variables: dict[Annotated[str, Field(pattern=r"^[a-z_]+$")], str] = Field(default_factory=dict)
    """Names for {name} elsewhere; `--set name=value` gives others."""
    environment: Environment = Environment()
    network: Network = Network()
    budget: Budget = Budget()
    usage: Usage = Usage()
    sandbox: Sandbox = Sandbox()
    provider: Provider = Provider()
    left: tuple[Annotated[str, AfterValidator(checked)], ...] = ()
    """New files of the agent's own in the repository, which are left behind unseen: its history, say."""
    keeps: tuple[Below, ...] = ()
    """Files below HOME that are kept with the run, redacted: its trajectory."""


@dataclasses.dataclass(frozen=True)
class Read:
    """An agent that was read, its variables filled in."""

    agent: Agent
    file: Path
    digest: str
    """Identity of all that it says, variables included."""
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Variables that were set, beside the file's own."""


@cache
def adapter() -> TypeAdapter[Agent]:
    """Validation and the JSON schema."""
    return TypeAdapter(Agent)


def json_schema() -> dict[str, Any]:
    """The schema that an agent's content, as JSON, follows."""
    return {"$id": f"assay-agent-{SCHEMA}", **adapter().json_schema()}


def ready() -> list[str]:
    """Names of the templates that come with assay."""
    return sorted(path.stem for path in READY.glob("*.toml"))


def file_of(name: str) -> Path:
    """A template's file: a path, or the name of a ready one. UsageError if there is none."""
    if Path(name).is_file():
        return Path(name).resolve()
    if name in ready():
        return READY / f"{name}.toml"
    raise UsageError(f"--agent: expected a file or one of {', '.join(ready())}, got {name}")


def read(name: str, variables: Mapping[str, str] | None = None) -> Read:
    """The agent in a file, or a ready one, with some variables set. UsageError names file and line."""
    file = file_of(name)
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{file}: expected an agent, got {problem}") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        line = re.search(r"line (\d+)", str(problem))
        raise UsageError(f"{file}:{line[1] if line else 1}: {problem}") from None
    given = dict(variables or {})
    own = data.get("variables", {})
    if isinstance(own, dict):
        if unknown := sorted(given.keys() - own.keys()):
            raise UsageError(f"--set: expected one of {', '.join(sorted(own)) or 'no variable'}, got {unknown[0]}")
        data["variables"] = {**own, **given}
    try:
        agent = adapter().validate_json(json.dumps(data, default=str))
    except ValidationError as problem:
        raise UsageError("\n".join(_explained(file, text, error) for error in problem.errors())) from None
    found = _filled(agent)
    if wrong := list(_wrong(agent, found)):
        lines = [f"{file}:{line_of(text, place)}: {'.'.join(map(str, place))}: {words}" for place, words in wrong]
        raise UsageError("\n".join(lines))
    content = json.dumps(dataclasses.asdict(found), sort_keys=True)
    return Read(found, file, hashlib.sha256(content.encode()).hexdigest()[:16], given)


def fill(text: str, values: Mapping[str, str]) -> str:
    """The text with known placeholders filled in; others stay, since braces mean something to other programs, too."""
    return _PLACE.sub(lambda match: values.get(match[1], match[0]), text)


def _filled(agent: Agent) -> Agent:
    values = {"install": str(Path(os.environ.get(INSTALL, "~/.cache/assay/agents")).expanduser()), **agent.variables}
    for _ in range(2):  # a variable may name another one
        values = {name: fill(value, values) for name, value in values.items()}

    def each(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(fill(text, values) for text in texts)

    def paths(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(Path(text).expanduser()) for text in each(texts))

    home = {name: fill(text, values) for name, text in agent.sandbox.home.items()}
    fixed = {name: fill(text, values) for name, text in agent.environment.set.items()}
    return dataclasses.replace(
        agent,
        variables=values,
        command=dataclasses.replace(agent.command, argv=each(agent.command.argv)),
        environment=dataclasses.replace(agent.environment, set=fixed),
        network=dataclasses.replace(agent.network, hosts=each(agent.network.hosts)),
        sandbox=dataclasses.replace(
            agent.sandbox, readable=paths(agent.sandbox.readable), path=paths(agent.sandbox.path), home=home
        ),
    )


def _wrong(raw: Agent, filled: Agent) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What no schema says: hosts that are none, placeholders and figures that nobody gives."""
    for i, host in enumerate(filled.network.hosts):
        try:
            split(host)
        except ValueError as problem:
            yield ("network", "hosts", i), str(problem)
    command = raw.command
    for name in ("prompt", "prompt_file"):
        wanted = {"prompt": "argument", "prompt_file": "file"}[name]
        if (command.prompt == wanted) != any(f"{{{name}}}" in one for one in command.argv):
            yield ("command", "prompt"), f"expected {{{name}}} in argv if and only if it is {wanted!r}"
    for name in ("tokens", "money"):
        if getattr(raw.budget, name) is not None and getattr(raw.usage, name) is None:
            yield ("budget", name), f"expected usage.{name} with it, which says how the agent reports it"
        reported = getattr(raw.usage, name)
        if reported is not None and re.compile(reported.pattern).groups < 1:
            yield ("usage", name, "pattern"), f"expected a group that is the number, got {reported.pattern!r}"
    if both := sorted({*raw.environment.keys} & {*raw.environment.set, *raw.environment.allow}):
        yield ("environment", "keys"), f"expected a key to stand there alone, got {both[0]} twice"
    if ours := sorted({*raw.variables} & {*OURS}):
        yield ("variables", ours[0]), "expected another name: assay fills this one in itself"


def _explained(file: Path, text: str, error: Any) -> str:
    place = tuple(error["loc"])
    words = {
        "unexpected_keyword_argument": "expected a name that agents have, got an unknown one",
        "missing": "expected it to be given",
    }.get(error["type"], error["msg"].removeprefix("Value error, "))
    return f"{file}:{line_of(text, place)}: {'.'.join(map(str, place)) or 'agent'}: {words}"
