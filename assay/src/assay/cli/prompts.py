"""The command prompt: what an agent would be told about a task, and how much of the reference that is."""

import argparse
import json
from pathlib import Path

from assay.cli.command import Command
from assay.contract.errors import UsageError
from assay.report import terminal
from assay.report.terminal import Progress

_SECONDS = 3600.0
_DESCRIPTION = (
    "Prints the prompt that an agent gets for a task. The template default says scope, API, tests and margin as the "
    "judge applies them, offers a measuring tool, and tells nothing of the reference. early, middle and late have the "
    "structure of a published benchmark's three generations, and tell what those told."
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", type=Path, nargs="?", metavar="TASK", help="a task's TOML file")
    parser.add_argument("--template", default="default", metavar="NAME", help="a name or a Jinja file (%(default)s)")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="the agent's time (%(default)s)")
    parser.add_argument("--facts", action="store_true", help="print leak level, what is told and digest as JSON")
    parser.add_argument("--list", action="store_true", help="list templates with their leak levels")


def _prompt(given: argparse.Namespace, _: Progress) -> int:
    from assay.agents import measure
    from assay.arms.sandbox import PLACE
    from assay.contract import task
    from assay.prompts import render
    from assay.prompts.facts import LEVEL_WORDS, LEVELS

    if given.list:
        for name in render.NAMES:
            told = render.tells(name)
            level = f"L{render.declared_level(told)}"
            leaks = ", ".join(one for one in told if one in LEVELS)
            terminal.line(f"{name}: {level}, {LEVEL_WORDS[level]}{f' ({leaks})' if leaks else ''}")
        return 0
    if given.task is None:
        raise UsageError("TASK: expected a task's file, or --list, got neither")
    read = task.read(given.task)
    found = render.render(read, given.template, tree=str(PLACE), seconds=given.seconds, measure=measure.offered(read))
    if given.facts:
        facts = {"template": found.template, "level": found.level, "tells": found.tells, "digest": found.digest}
        terminal.line(json.dumps(facts))
    else:
        terminal.lines(found.text.rstrip("\n").split("\n"))
    return 0


PROMPT = Command(
    "prompt",
    "what an agent is told about a task",
    _arguments,
    _prompt,
    description=_DESCRIPTION,
    installs=("pydantic", "jinja2"),
    extra="agents",
)
