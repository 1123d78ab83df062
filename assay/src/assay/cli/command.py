"""What a command is, and how it ends."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from assay.contract.errors import NotInstalledError
from assay.contract.workload import fraction
from assay.machine.conditions import PATIENCE_S, VERY_PATIENT_S, Conditions
from assay.report.terminal import Progress

STORE = Path(".assay")
SANDBOX = "run the patch's code beside the judge, unprotected; ledger, report and verdict say so"
EPILOG = (
    "Exit status: 0 what the task requires was shown; 1 rejected, slower or refuted; 2 wrong usage; 3 infrastructure "
    "or void; 4 the task makes no sense; 5 undecided or not evaluated."
)


def margin(text: str) -> float:
    """A margin as it is typed, as a fraction; one that is asked about ends the command."""
    try:
        return fraction(text, "margin")
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem).partition(": ")[2]) from None


@dataclass(frozen=True)
class Command:
    """A row of the table."""

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Progress], int]
    """What was given, and who follows -> the exit status. StoppedError, ValueError and OSError end it in words.

    `given.parser` is this command's, `given.after` what stands behind `--`.
    """
    description: str = ""
    usage: str | None = None
    epilog: str = ""
    after: bool = False
    """Whether `--` and a command may follow."""
    installs: tuple[str, ...] = ()
    """Packages that it needs beside numpy."""
    extra: str = "judge"
    """The extra of assay that brings them."""

    def check(self) -> None:
        """NotInstalledError if a package is missing."""
        if missing := [name for name in self.installs if find_spec(name) is None]:
            words = f"{self.name} needs more packages than measuring: pip install 'assay[{self.extra}]'"
            raise NotInstalledError(f"{', '.join(missing)}: {words}")


def beside_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of commands that measure beside other work on the machine."""
    beside = parser.add_argument_group("on a busy machine")
    beside.add_argument(
        "--patient",
        nargs="?",
        type=_seconds,
        const=VERY_PATIENT_S,
        default=PATIENCE_S,
        metavar="SECONDS",
        help=f"each block waits until others rest, so long at most ({VERY_PATIENT_S:g})",
    )
    beside.add_argument(
        "--pin", action="store_true", help="judge and arms stay on the quietest processor: for code with one thread"
    )
    beside.add_argument(
        "--isolate", action="store_true", help="--pin, and a control group keeps others off it, where that is allowed"
    )


def build_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of commands that build trees."""
    most = "trees that are built beside each other (all, at most one per two processors)"
    parser.add_argument("--build-jobs", type=_jobs, default=0, metavar="N", help=most)


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return int(text)


def beside(given: argparse.Namespace) -> Conditions:
    """What these options ask for."""
    return Conditions(given.patient, given.pin, given.isolate)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text}")
    return seconds
