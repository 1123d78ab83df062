"""`assay simulate`: the procedure on experiments with a known truth."""

import argparse
import sys
import time

from assay import __version__
from assay.simulate import SCENARIOS, failures, simulate

_EFFECTS = (0.0, 0.02, 0.05)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 if a promise is broken, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="assay", description=__doc__)
    parser.add_argument("--version", action="version", version=f"assay {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("simulate", help="check level and coverage by simulation", description=__doc__)
    one.add_argument("--experiments", type=int, default=10_000, help="a scenario and effect (default %(default)s)")
    one.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    if arguments.experiments < 100:
        parser.error(f"--experiments: expected at least 100, got {arguments.experiments}")
    return _simulate(arguments.experiments, arguments.seed)


def _simulate(experiments: int, seed: int) -> int:
    broken = []
    start = time.monotonic()
    print(f"{'scenario':<12}{'effect':>8}{'called':>9}{'wrong':>8}{'void':>8}{'95 % covers':>13}")
    for scenario in SCENARIOS:
        for effect in _EFFECTS:
            seen = simulate(scenario, effect, experiments, seed)
            shares = [f"{count / experiments:.2%}" for count in (seen.claimed, seen.wrong, seen.void, seen.covered)]
            print(
                f"{scenario.name:<12}{effect:>8.2f}{shares[0]:>9}{shares[1]:>8}{shares[2]:>8}{shares[3]:>13}",
                flush=True,
            )
            broken += [f"{scenario.name}, effect {effect}: {words}" for words in failures(seen, scenario)]
    print(f"{experiments} experiments a line, {time.monotonic() - start:.0f} s")
    for scenario in SCENARIOS:
        print(f"  {scenario.name}: {scenario.description}")
    for words in broken:
        print(f"broken promise: {words}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
