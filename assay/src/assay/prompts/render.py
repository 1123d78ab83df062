"""A task and a template become a prompt. What a template tells is read from its variables, never from its word."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from assay.contract.errors import UsageError
from assay.prompts.facts import LEVELS, of_reference, own

if TYPE_CHECKING:
    from assay.contract.task import Read

FOLDER = Path(__file__).parent / "templates"
NAMES = ("default", "early", "middle", "late")
"""Templates that come with assay; the last three have the structure of a published benchmark's three generations."""
Audit = Callable[[str], int]
"""A prompt's text -> the leak level, 0 to 4, that somebody measured against the reference."""


@dataclass(frozen=True)
class Prompt:
    """What an agent is given, and how much of the reference is in it."""

    text: str
    template: str
    tells: tuple[str, ...]
    """The template's variables, in the order of the alphabet."""
    level: str
    """L0 to L4: what the template's variables leak, or more if an audit found more in the text."""

    @property
    def digest(self) -> str:
        """Identity of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def file_of(template: str) -> Path:
    """The file of a template: one of NAMES, or a path. UsageError if there is none."""
    if template in NAMES:
        return FOLDER / f"{template}.md.j2"
    if Path(template).is_file():
        return Path(template)
    raise UsageError(f"--template: expected one of {', '.join(NAMES)} or a file, got {template}")


def tells(template: str) -> tuple[str, ...]:
    """Variables that a template uses. UsageError names file and line of what is no template."""
    file = file_of(template)
    try:
        found = meta.find_undeclared_variables(_environment().parse(file.read_text()))
    except TemplateSyntaxError as problem:
        raise UsageError(f"{file}:{problem.lineno}: {problem.message}") from None
    return tuple(sorted(found))


def declared_level(names: tuple[str, ...]) -> int:
    """The leak level of a template with these variables."""
    return max((LEVELS.get(name, 0) for name in names), default=0)


def render(
    read: "Read",
    template: str = "default",
    *,
    tree: str,
    seconds: float,
    measure: Mapping[str, str] | None = None,
    audit: Audit | None = None,
) -> Prompt:
    """The prompt of a task.

    Args:
        read: the task.
        template: one of NAMES, or the path of a template.
        tree: where the agent finds the repository.
        seconds: the agent's time.
        measure: workload -> command that measures it.
        audit: finds how much of the reference is in the text; it can raise the level, never lower it.

    UsageError for a template that asks for what is not there, and for one that tells of a reference without one.
    """
    file, names = file_of(template), tells(template)
    known = own(read, tree, measure or {}, seconds)
    leaks = [name for name in names if name in LEVELS]
    if leaks and not read.reference:
        words = f"expected a task with a reference, of which it tells ({', '.join(leaks)}), got {read.file}"
        raise UsageError(f"--template {template}: {words}")
    if unknown := [name for name in names if name not in known and name not in LEVELS]:
        have = ", ".join(sorted({*known, *LEVELS}))
        raise UsageError(f"{file}: expected variables among {have}, got {', '.join(unknown)}")
    if leaks:
        later = of_reference(read)
        known |= {name: later[name]() for name in leaks}
    try:
        text = _environment().from_string(file.read_text()).render(known)
    except (TemplateError, TypeError) as problem:
        raise UsageError(f"{file}: {problem}") from None
    level = max(declared_level(names), audit(text) if audit else 0)
    return Prompt(text, template if template in NAMES else file.stem, names, f"L{level}")


def _environment() -> SandboxedEnvironment:
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return SandboxedEnvironment(undefined=StrictUndefined, autoescape=False, **options)
