"""A campaign: one TOML file that names tasks, agents, attempts and canaries. Read strictly; cells have content keys."""

import dataclasses
import hashlib
import json
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

import assay
from assay.agents import measure, running, template
from assay.arms.sandbox import PLACE
from assay.campaign import canaries
from assay.campaign.predictions import Prediction, read_predictions
from assay.contract import task as tasks
from assay.contract.errors import StoppedError, UsageError
from assay.contract.positions import line_of
from assay.prompts.render import Prompt, render

SCHEMA = 1
_STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, config=_STRICT)
class AgentEntry:
    """An agent of the campaign."""

    file: str
    """A TOML file relative to the campaign's, or the name of a ready template."""
    name: Name | Literal[""] = ""
    """Another name than the template's, as for a second model."""
    set: dict[str, str] = Field(default_factory=dict)
    """Variables of the template."""
    seconds: Positive | None = None
    """Less time than the template's own budget."""
    template: str = ""
    """Another prompt than the campaign's."""


@dataclass(frozen=True, config=_STRICT)
class PredictionEntry:
    """Patches that somebody made elsewhere, judged as attempts."""

    file: str
    """prediction.jsonl: instance_id is a task's name, model_name_or_path who made it, model_patch the patch."""


@dataclass(frozen=True, config=_STRICT)
class CanaryEntry:
    """A patch whose outcome is known, for a task whose canaries cannot be made."""

    task: Name
    name: Name
    patch: str
    """A file, relative to the campaign's."""
    expect: Literal["faster", "slower", "nothing", "rejected"]


@dataclass(frozen=True, config=_STRICT)
class Campaign:
    """All of it."""

    schema: Literal[1]
    name: Name
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Task files, relative to the campaign's."""
    agent: tuple[AgentEntry, ...] = ()
    prediction: tuple[PredictionEntry, ...] = ()
    canary: tuple[CanaryEntry, ...] = ()
    canaries: bool = True
    """Whether null, reference, sabotage and two cheats of each task are judged first."""
    attempts: Count = 1
    """Of each agent at each task."""
    pass_at: tuple[Count, ...] = (1,)
    template: str = "default"
    """The prompt."""
    jobs: Count = 1
    """Agents beside each other. Measuring is always alone."""
    retries: Annotated[int, Field(ge=0)] = 1
    """How often a run that infrastructure spoilt is run again."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Of the whole family of verdicts `faster`, by Holm's procedure."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One attempt of somebody at a task, or one canary."""

    kind: str
    """`agent`, `prediction` or `canary`."""
    task: tasks.Read
    who: str
    digest: str
    """Identity of whoever it is: the agent's template, or the patch."""
    number: int
    agent: template.Read | None = None
    prompt: Prompt | None = None
    patch: bytes = b""
    expect: str = ""

    @property
    def key(self) -> str:
        """Identity of all that decides what comes out."""
        prompt = self.prompt.digest if self.prompt else ""
        what = [SCHEMA, assay.__version__, self.kind, self.task.digest, self.who, self.digest, prompt, self.number]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.who} on {self.task.task.name}" + (f" #{self.number}" if self.kind == "agent" else "")


@dataclasses.dataclass(frozen=True)
class Read:
    """A campaign that was read, with its cells in the order in which they are begun."""

    campaign: Campaign
    file: Path
    cells: list[Cell]
    left_out: list[str]
    """Canaries that cannot be made, in words."""


@cache
def adapter() -> TypeAdapter[Campaign]:
    """Validation and the JSON schema."""
    return TypeAdapter(Campaign)


def json_schema() -> dict[str, Any]:
    """The schema that a campaign's content, as JSON, follows."""
    return {"$id": f"assay-campaign-{SCHEMA}", **adapter().json_schema()}


def read(file: Path) -> Read:
    """The campaign in a file. UsageError names file and line of what is wrong, in it or in what it names."""
    try:
        text = file.read_text()
        data = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{file}: expected a campaign, got {problem}") from None
    except tomllib.TOMLDecodeError as problem:
        line = re.search(r"line (\d+)", str(problem))
        raise UsageError(f"{file}:{line[1] if line else 1}: {problem}") from None
    try:
        campaign = adapter().validate_json(json.dumps(data, default=str))
    except ValidationError as problem:
        raise UsageError("\n".join(_explained(file, text, error) for error in problem.errors())) from None
    where = _Where(file, text)
    found = [where.named(("tasks", i), tasks.read, file.parent / name) for i, name in enumerate(campaign.tasks)]
    names = [one.task.name for one in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UsageError(where.words(("tasks", i), f"expected another task than {name}, which is named above"))
    cells, left_out = _canaries(campaign, found, where) if campaign.canaries or campaign.canary else ([], [])
    return Read(
        campaign, file, [*cells, *_predicted(campaign, found, where), *_agents(campaign, found, where)], left_out
    )


@dataclasses.dataclass(frozen=True)
class _Where:
    """Places in a campaign's file, for errors."""

    file: Path
    text: str

    def words(self, place: tuple[str | int, ...], words: str) -> str:
        """With file and line."""
        return f"{self.file}:{line_of(self.text, place)}: {'.'.join(map(str, place))}: {words}"

    def named(self, place: tuple[str | int, ...], step: Any, *given: Any, **more: Any) -> Any:
        """What a step gives; its error with the place that asked for it."""
        try:
            return step(*given, **more)
        except StoppedError as problem:
            raise UsageError(self.words(place, str(problem))) from None


def _canaries(campaign: Campaign, found: list[tasks.Read], where: _Where) -> tuple[list[Cell], list[str]]:
    cells, left_out = [], []
    for read_ in found if campaign.canaries else ():
        own = [one.name for one in campaign.canary if one.task == read_.task.name]
        made, words = canaries.made(read_, own)
        cells += [
            Cell("canary", read_, one.name, _digest(one.patch), 1, patch=one.patch, expect=one.expect) for one in made
        ]
        left_out += [f"{read_.task.name}: {one}" for one in words]
    by_name = {one.task.name: one for one in found}
    for i, entry in enumerate(campaign.canary):
        path = where.file.parent / entry.patch
        if entry.task not in by_name or not path.is_file():
            wrong = "task" if entry.task not in by_name else "patch"
            words_ = (
                f"expected {'a task of the campaign' if wrong == 'task' else 'a file'}, got {getattr(entry, wrong)}"
            )
            raise UsageError(where.words(("canary", i, wrong), words_))
        patch = path.read_bytes()
        cells.append(
            Cell("canary", by_name[entry.task], entry.name, _digest(patch), 1, patch=patch, expect=entry.expect)
        )
    return cells, left_out


def _predicted(campaign: Campaign, found: list[tasks.Read], where: _Where) -> list[Cell]:
    by_name, cells = {one.task.name: one for one in found}, []
    counts: dict[tuple[str, str], int] = {}
    for i, entry in enumerate(campaign.prediction):
        given: list[Prediction] = where.named(
            ("prediction", i, "file"), read_predictions, where.file.parent / entry.file
        )
        for one in given:
            if one.instance not in by_name:
                words = f"{one.place}: expected instance_id to be a task of the campaign, got {one.instance}"
                raise UsageError(where.words(("prediction", i, "file"), words))
            number = counts[one.instance, one.model] = counts.get((one.instance, one.model), 0) + 1
            task = by_name[one.instance]
            cells.append(Cell("prediction", task, one.model, _digest(one.patch), number, patch=one.patch))
    return cells


def _agents(campaign: Campaign, found: list[tasks.Read], where: _Where) -> list[Cell]:
    cells, seen = [], set()
    for i, entry in enumerate(campaign.agent):
        path = where.file.parent / entry.file
        name = str(path) if path.is_file() else entry.file
        agent = running.limited(where.named(("agent", i, "file"), template.read, name, entry.set), entry.seconds)
        who = entry.name or agent.agent.name
        if who in seen:
            raise UsageError(
                where.words(("agent", i, "name"), f"expected another name than {who}, which is given above")
            )
        seen.add(who)
        for task in found:
            prompt = where.named(
                ("template",) if not entry.template else ("agent", i, "template"),
                render,
                task,
                entry.template or campaign.template,
                tree=str(PLACE),
                seconds=agent.agent.budget.seconds,
                measure=measure.offered(task),
            )
            for number in range(1, campaign.attempts + 1):
                cells.append(Cell("agent", task, who, agent.digest, number, agent=agent, prompt=prompt))
    return sorted(cells, key=lambda one: one.number)  # every agent's first attempt before anybody's second


def _digest(patch: bytes) -> str:
    return hashlib.sha256(patch).hexdigest()[:16]


def _explained(file: Path, text: str, error: Any) -> str:
    place = tuple(error["loc"])
    words = {
        "unexpected_keyword_argument": "expected a name that campaigns have, got an unknown one",
        "missing": "expected it to be given",
    }.get(error["type"], error["msg"].removeprefix("Value error, "))
    return f"{file}:{line_of(text, place)}: {'.'.join(map(str, place)) or 'campaign'}: {words}"
