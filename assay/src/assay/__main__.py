"""Is it really faster? Paired experiments on two trees, decided by exact intervals."""

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from assay import __version__, commands, doctor, report, selftest, show
from assay.arms import ArmError
from assay.experiment import replay, rows_of, run
from assay.plan import Kind, Plan, Workload
from assay.simulate import SCENARIOS, failures, simulate

_EFFECTS = (0.0, 0.02, 0.05)
STATUS = {"faster": 0, "slower": 1, "equivalent": 1, "incorrect": 1, "tampered": 1, "undecided": 5, "void": 3}


def main(argv: list[str] | None = None) -> int:
    """The command line. Exit status: 0, 1 if something does not hold, 2 for wrong usage, 3 void, 5 undecided."""
    given = sys.argv[1:] if argv is None else argv
    split = given.index("--") if "--" in given else len(given)
    parser, both = _parser()
    arguments, command = parser.parse_args(given[:split]), given[split + 1 :]
    if command and arguments.command != "ab":
        parser.error(f"--: expected no command for {arguments.command}, got {command}")
    if arguments.command == "ab":
        if not command and arguments.kind is None:
            both.error("COMMAND: expected a command after --, or --call, --asv or --pyperf, got none")
        if command and arguments.kind is not None:
            both.error(f"COMMAND: expected none with --{arguments.kind[0]}, got {command}")
        return _ab(arguments, command)
    if arguments.command == "simulate":
        if arguments.experiments < 100:
            parser.error(f"--experiments: expected at least 100, got {arguments.experiments}")
        return _simulate(arguments.experiments, arguments.seed)
    if arguments.command == "selftest":
        return selftest.main(arguments)
    if arguments.command == "doctor":
        return doctor.main(arguments.seconds)
    if arguments.command in commands.NAMES:
        return commands.main(arguments)
    if arguments.command == "schema":
        print(commands.schema(arguments.of), end="")
        return 0
    return _again(arguments)


def _parser() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(prog="assay", description=__doc__)
    parser.add_argument("--version", action="version", version=f"assay {__version__}")
    each = parser.add_subparsers(dest="command", required=True)
    commands.arguments(each)
    both = each.add_parser("ab", help="measure two trees against each other", description=_AB, usage=_AB_USAGE)
    both.add_argument("a", type=Path, metavar="A", help="directory of the base tree")
    both.add_argument("b", type=Path, metavar="B", help="directory of the candidate tree")
    what = both.add_argument_group("what is measured (or -- COMMAND)").add_mutually_exclusive_group()
    targets: tuple[tuple[Kind, str], ...] = (
        ("call", "module:function or file.py:function, inside a worker"),
        ("asv", "file.py:Class.time_method, an asv benchmark"),
        ("pyperf", "script.py:NAME, a benchmark that a pyperf script registers"),
    )
    for kind, words in targets:
        what.add_argument(f"--{kind}", dest="kind", type=partial(_target, kind), metavar="TARGET", help=words)
    calls = both.add_argument_group("callables")
    calls.add_argument(
        "--inputs", default="", metavar="M:F", help="called with a seed in base: a tuple of arguments, a dict"
    )
    calls.add_argument(
        "--constant", action="store_true", help="one input for all calls; else every call gets a new one"
    )
    calls.add_argument(
        "--chain", default="", metavar="M:F", help="(input, output) -> next input, for calls of microseconds"
    )
    calls.add_argument(
        "--links", type=int, default=1, help="calls a request: with --chain, or --clock cuda (%(default)s)"
    )
    calls.add_argument(
        "--clock", choices=("judge", "cuda"), default="judge", help="cuda: events in the arm, cooperative"
    )
    calls.add_argument("--graph", action="store_true", help="with --clock cuda: replay a CUDA graph of the links")
    calls.add_argument("--no-compare", action="store_true", help="outputs are not sent back and compared")
    calls.add_argument("--rtol", type=float, default=0.0, help="of outputs; equal bits unless given")
    calls.add_argument("--atol", type=float, default=0.0)
    calls.add_argument("--case", type=int, default=0, help="asv: which combination of parameters (%(default)s)")
    calls.add_argument("--python", default="", help="the workers' interpreter (this one)")
    calls.add_argument("--path", action="append", help="folder of the tree put on sys.path; repeatable (. and src)")
    calls.add_argument("--rounds", type=int, default=8, help="turns that a block's workers take (%(default)s)")
    calls.add_argument("--calls", type=int, default=0, help="timed calls a block and arm (calibrated to about 20 ms)")
    calls.add_argument("--warmups", type=int, default=1, help="calls before them (%(default)s)")
    both.add_argument("--prime", type=Path, help="a second build of base (A'); a copy of A unless given")
    both.add_argument("--primary", default="", help="wall or memory; for callables steady, first, import or memory")
    both.add_argument("--delta", type=float, default=0.02, help="margin of equivalent and material (%(default)s)")
    both.add_argument("--seed", type=int, default=0, help="of orders and inputs (%(default)s)")
    both.add_argument(
        "--timeout", type=float, default=600.0, help="seconds that a run or a call may take (%(default)s)"
    )
    both.add_argument("--most-foreign", type=float, default=0.1, help=_FOREIGN)
    both.add_argument("--isolation", choices=("auto", "namespaces", "links"), default="auto", help=_ISOLATION)
    both.add_argument("--out", type=Path, help="RAW file; a temporary one unless given")
    both.add_argument("--html", type=Path, help="write a report, too")
    again = each.add_parser("replay", help="decide again from a RAW file")
    page = each.add_parser("report", help="an HTML page of a RAW file")
    for one in (again, page):
        one.add_argument("raw", type=Path, metavar="RAW", help="a file of RAW, or the folder of an attempt")
    page.add_argument("--out", type=Path, help="RAW with .html unless given")
    kinds = each.add_parser("schema", help="print one of the public JSON schemas")
    kinds.add_argument("of", nargs="?", choices=commands.SCHEMAS, default="raw", help="(%(default)s: a line of RAW)")
    well = each.add_parser("doctor", help="what this machine allows, and how small an effect it could show")
    well.add_argument("--seconds", type=float, default=15.0, help="for the noise floor (%(default)s)")
    sim = each.add_parser("simulate", help="check level and coverage by simulation")
    sim.add_argument("--experiments", type=int, default=10_000, help="a scenario and effect (default %(default)s)")
    sim.add_argument("--seed", type=int, default=1)
    selftest.arguments(each.add_parser("selftest", help="does assay keep its promises here? 3 minutes"))
    return parser, both


_AB = "Runs A, B and A' in blocks, at most 40 of them, in fresh processes, until a look decides."
_AB_USAGE = "assay ab A B [options] (-- COMMAND ... | --call M:F | --asv F:C.M | --pyperf F:NAME)"
_FOREIGN = "processor seconds of others, a second of a block, above which it is left out (%(default)s)"
_ISOLATION = "namespaces: all trees at one path; links: at links of equal length (the first that works)"


def _target(kind: Kind, text: str) -> tuple[Kind, str]:
    return kind, text


def _workload(arguments: argparse.Namespace, command: list[str]) -> Workload:
    if arguments.kind is None:
        return Workload("command", tuple(command))
    kind, target = arguments.kind
    return Workload(
        kind,
        target=_here(target),
        inputs=_here(arguments.inputs),
        chain=_here(arguments.chain),
        constant=arguments.constant or not arguments.inputs,
        links=arguments.links,
        clock=arguments.clock,
        graph=arguments.graph,
        compare=not arguments.no_compare and kind == "call",
        rtol=arguments.rtol,
        atol=arguments.atol,
        case=arguments.case,
        python=arguments.python,
        paths=tuple(arguments.path or Workload("call").paths),
        rounds=arguments.rounds,
        calls=arguments.calls,
        warmups=arguments.warmups,
    )


def _here(target: str) -> str:
    """A file that is there, seen from here, stands for itself in every arm; other names are looked up in the arm."""
    place, colon, name = target.partition(":")
    return f"{Path(place).resolve()}{colon}{name}" if place.endswith(".py") and Path(place).is_file() else target


def _ab(arguments: argparse.Namespace, command: list[str]) -> int:
    """Exit status 0 faster; 1 slower, equivalent, incorrect, tampered; 2 usage; 3 void or a failed run; 5 undecided."""
    raw = arguments.out
    if raw is None:
        raw = Path(tempfile.mkdtemp(prefix="assay-")) / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    progress = show.Progress()
    try:
        plan = Plan(
            _workload(arguments, command),
            arguments.delta,
            arguments.seed,
            arguments.timeout,
            arguments.most_foreign,
            arguments.primary,
            arguments.isolation,
        ).checked()
        with raw.open("x") as out:
            seen = run(arguments.a, arguments.b, plan, out, control=arguments.prime, told=progress.told)
    except FileExistsError:
        return _sorry("ab", f"--out: expected a file that is not there yet, got {raw}", 2, progress)
    except ValueError as problem:
        _remove_if_empty(raw)
        return _sorry("ab", str(problem), 2, progress)
    except ArmError as problem:
        _remove_if_empty(raw)
        return _sorry("ab", f"a run failed: {problem}", 3, progress)
    progress.end()
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    print("\n".join([*show.outcome(seen), *show.figures(rows), *show.conditions(rows), f"RAW: {raw}"]))
    if arguments.html:
        arguments.html.write_text(report.page(rows))
        print(f"report: {arguments.html}")
    return STATUS[seen.verdict]


def _remove_if_empty(raw: Path) -> None:
    if raw.exists() and not raw.stat().st_size:
        raw.unlink()


def _sorry(command: str, words: str, status: int, progress: show.Progress | None = None) -> int:
    if progress is not None:
        progress.end()
    print(f"assay {command}: {words}", file=sys.stderr)
    return status


def _again(arguments: argparse.Namespace) -> int:
    """replay and report."""
    if arguments.raw.is_dir():
        return commands.again(arguments)
    try:
        lines = arguments.raw.read_text().splitlines()
        rows: list[dict[str, Any]] = rows_of(lines)
        if arguments.command == "report":
            out = arguments.out or arguments.raw.with_suffix(".html")
            out.write_text(report.page(rows))
            print(f"report: {out}")
            return 0
        seen, header = replay(lines)
    except (OSError, ValueError, KeyError) as problem:
        return _sorry(arguments.command, str(problem), 2)
    print(f"started {header['started']}")
    print("\n".join([*show.outcome(seen), *show.figures(rows), *show.conditions(rows)]))
    return STATUS[seen.verdict]


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
