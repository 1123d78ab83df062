"""Commands that ask whether assay keeps its promises: simulate, selftest, doctor."""

import argparse
import sys
import time

from assay.cli.command import Command
from assay.contract.errors import Status
from assay.proof import doctor, selftest
from assay.proof.simulation import SCENARIOS, failures, simulate
from assay.report import terminal
from assay.report.terminal import Progress

_EFFECTS = (0.0, 0.02, 0.05)


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiments", type=int, default=10_000, help="a scenario and effect (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)


def _simulate(given: argparse.Namespace, _: Progress) -> int:
    experiments = given.experiments
    if experiments < 100:
        given.parser.error(f"--experiments: expected at least 100, got {experiments}")
    broken = []
    start = time.monotonic()
    terminal.line(f"{'scenario':<12}{'effect':>8}{'called':>9}{'wrong':>8}{'void':>8}{'95 % covers':>13}")
    for scenario in SCENARIOS:
        for effect in _EFFECTS:
            seen = simulate(scenario, effect, experiments, given.seed)
            shares = [f"{count / experiments:.2%}" for count in (seen.claimed, seen.wrong, seen.void, seen.covered)]
            counts = f"{shares[0]:>9}{shares[1]:>8}{shares[2]:>8}{shares[3]:>13}"
            terminal.line(f"{scenario.name:<12}{effect:>8.2f}{counts}")
            broken += [f"{scenario.name}, effect {effect}: {words}" for words in failures(seen, scenario)]
    terminal.line(f"{experiments} experiments a line, {time.monotonic() - start:.0f} s")
    for scenario in SCENARIOS:
        terminal.line(f"  {scenario.name}: {scenario.description}")
    for words in broken:
        terminal.line(f"broken promise: {words}", sys.stderr)
    return Status.REFUTED if broken else Status.SHOWN


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=15.0, help="for the noise floor (%(default)s)")


SIMULATE = Command("simulate", "check level and coverage by simulation", _simulate_arguments, _simulate)
DOCTOR = Command(
    "doctor",
    "what this machine allows, and how small an effect it could show",
    _doctor_arguments,
    lambda given, _: doctor.main(given.seconds),
)
SELFTEST = Command(
    "selftest",
    "does assay keep its promises here? 3 minutes",
    selftest.arguments,
    lambda given, _: selftest.main(given),
)
