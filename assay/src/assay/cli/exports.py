"""The command export: a task in the form of another harness."""

import argparse
from pathlib import Path

from assay.cli.command import Command
from assay.report import terminal
from assay.report.terminal import Progress

_SECONDS = 3600.0
_DESCRIPTION = (
    "Writes a directory that Harbor runs: instruction.md is the default prompt, the image holds base under one commit, "
    "and the verifier is assay, which writes reward 1 if what the task requires was shown, else 0, and verdict.json."
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True)
    harbor = what.add_parser("harbor", help="a Harbor task directory", description=_DESCRIPTION)
    harbor.add_argument("task", type=Path, metavar="TASK", help="a task's TOML file")
    harbor.add_argument("--out", type=Path, required=True, metavar="DIR", help="a missing or empty folder")
    harbor.add_argument("--seconds", type=float, default=_SECONDS, help="the agent's time (%(default)s)")
    harbor.add_argument("--image", default="python:3.12-slim", help="base image, with Python and apt (%(default)s)")


def _export(given: argparse.Namespace, _: Progress) -> int:
    from assay.campaign import harbor
    from assay.contract import task

    left = harbor.export(task.read(given.task), given.out, seconds=given.seconds, image=given.image)
    terminal.lines([*(f"not carried over: {words}" for words in left), f"exported: {given.out}"])
    return 0


EXPORT = Command(
    "export",
    "a task in the form of another harness: Harbor",
    _arguments,
    _export,
    installs=("pydantic", "griffe", "jinja2"),
    extra="agents",
)
