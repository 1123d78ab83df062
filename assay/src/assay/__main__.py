"""Is it really faster? Paired experiments on two trees, decided by exact intervals."""

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path

from assay import __version__
from assay.experiment import ArmError, Plan, replay, run
from assay.simulate import SCENARIOS, failures, simulate
from assay.stats import Judgement

_EFFECTS = (0.0, 0.02, 0.05)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 if a promise is broken, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="assay", description=__doc__)
    parser.add_argument("--version", action="version", version=f"assay {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    both = commands.add_parser("ab", help="measure a command in two trees", description=_AB, usage=_AB_USAGE)
    both.add_argument("a", type=Path, metavar="A", help="directory of the base tree")
    both.add_argument("b", type=Path, metavar="B", help="directory of the candidate tree")
    both.add_argument("--prime", type=Path, help="a second build of base (A'); a copy of A unless given")
    both.add_argument("--delta", type=float, default=0.02, help="margin of equivalent and material (%(default)s)")
    both.add_argument("--seed", type=int, default=0, help="of the orders in blocks (%(default)s)")
    both.add_argument("--timeout", type=float, default=600.0, help="seconds that one run may take (%(default)s)")
    both.add_argument("--most-foreign", type=float, default=0.1, help=_FOREIGN)
    both.add_argument("--out", type=Path, help="RAW file; a temporary one unless given")
    again = commands.add_parser("replay", help="decide again from a RAW file")
    again.add_argument("raw", type=Path, metavar="RAW")
    one = commands.add_parser("simulate", help="check level and coverage by simulation")
    one.add_argument("--experiments", type=int, default=10_000, help="a scenario and effect (default %(default)s)")
    one.add_argument("--seed", type=int, default=1)
    given = sys.argv[1:] if argv is None else argv
    split = given.index("--") if "--" in given else len(given)
    arguments, command = parser.parse_args(given[:split]), given[split + 1 :]
    if command and arguments.command != "ab":
        parser.error(f"--: expected no command for {arguments.command}, got {command}")
    if arguments.command == "ab":
        if not command:
            both.error("COMMAND: expected a command after --, got none")
        return _ab(arguments, command)
    if arguments.command == "replay":
        return _replay(arguments.raw)
    if arguments.experiments < 100:
        parser.error(f"--experiments: expected at least 100, got {arguments.experiments}")
    return _simulate(arguments.experiments, arguments.seed)


_AB = "Runs COMMAND in A, B and A' in blocks, at most 40 of them, each run a fresh process, until a look decides."
_AB_USAGE = "assay ab A B [options] -- COMMAND ..."
_FOREIGN = "processor seconds of others, a second of a block, above which it is left out (%(default)s)"
_STATUS = {"faster": 0, "slower": 1, "equivalent": 1, "undecided": 5, "void": 3}


def _ab(arguments: argparse.Namespace, command: list[str]) -> int:
    """Exit status 0 for faster, 1 for slower or equivalent, 2 usage, 3 void or a failing run, 5 undecided."""
    for name in ("delta", "timeout"):
        if getattr(arguments, name) <= 0:
            print(f"assay ab: --{name}: expected a positive number, got {getattr(arguments, name)}", file=sys.stderr)
            return 2
    plan = Plan(tuple(command), arguments.delta, arguments.seed, arguments.timeout, arguments.most_foreign)
    raw = arguments.out or Path(tempfile.gettempdir()) / f"assay-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"

    def told(words: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{words:<60}", end="", file=sys.stderr, flush=True)

    try:
        with raw.open("x") as out:
            seen = run(arguments.a, arguments.b, plan, out, control=arguments.prime, told=told)
    except FileExistsError:
        print(f"assay ab: --out: expected a file that is not there yet, got {raw}", file=sys.stderr)
        return 2
    except ValueError as problem:
        raw.unlink()
        print(f"assay ab: {problem}", file=sys.stderr)
        return 2
    except ArmError as problem:
        print(f"assay ab: a run failed: {problem}", file=sys.stderr)
        return 3
    told("")
    _show(seen)
    print(f"RAW: {raw}")
    return _STATUS[seen.verdict]


def _replay(raw: Path) -> int:
    try:
        seen, header = replay(raw.read_text().splitlines())
    except (OSError, ValueError) as problem:
        print(f"assay replay: {problem}", file=sys.stderr)
        return 2
    print(f"{' '.join(header['plan']['command'])}, started {header['started']}, protocol {header['protocol']}")
    _show(seen)
    return _STATUS[seen.verdict]


def _show(seen: Judgement) -> None:
    print(f"{seen.verdict}: {seen.reason}{', beyond the margin' if seen.material else ''}")
    if math.isfinite(seen.estimate):
        ends = [math.expm1(value) for value in (seen.interval.low, seen.interval.high)]
        print(
            f"base / candidate: {math.exp(seen.estimate):.4f}, that is {math.expm1(seen.estimate):+.2%}; "
            f"{1 - seen.alpha:.1%} interval {ends[0]:+.2%} to {ends[1]:+.2%}; {seen.blocks} blocks; "
            f"an effect of {math.expm1(seen.detectable):.2%} would have been seen"
        )


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
