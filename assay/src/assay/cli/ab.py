"""The command ab: two trees against each other, without a task."""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

from assay.cli.command import Command
from assay.cli.shown import judged
from assay.contract import seeds
from assay.contract.errors import ArmError, UsageError
from assay.contract.workload import Kind, Plan, Workload
from assay.experiment.series import run
from assay.report import page, terminal
from assay.report.terminal import Progress


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="directory of the base tree")
    parser.add_argument("b", type=Path, metavar="B", help="directory of the candidate tree")
    what = parser.add_argument_group("what is measured (or -- COMMAND)").add_mutually_exclusive_group()
    targets: tuple[tuple[Kind, str], ...] = (
        ("call", "module:function or file.py:function, inside a worker"),
        ("asv", "file.py:Class.time_method, an asv benchmark"),
        ("pyperf", "script.py:NAME, a benchmark that a pyperf script registers"),
    )
    for kind, words in targets:
        what.add_argument(f"--{kind}", dest="kind", type=partial(_target, kind), metavar="TARGET", help=words)
    calls = parser.add_argument_group("callables")
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
    calls.add_argument(
        "--trusted", action="store_true", help="B does not patch its worker: its chain and copies bound nothing"
    )
    calls.add_argument(
        "--canonical", default="", metavar="F:F", help="output -> what of it is compared, as where an order is free"
    )
    calls.add_argument("--rtol", type=float, default=0.0, help="of outputs; equal bits unless given")
    calls.add_argument("--atol", type=float, default=0.0)
    calls.add_argument("--case", type=int, default=0, help="asv: which combination of parameters (%(default)s)")
    calls.add_argument("--python", default="", help="the workers' interpreter (this one)")
    calls.add_argument("--path", action="append", help="folder of the tree put on sys.path; repeatable (. and src)")
    calls.add_argument("--rounds", type=int, default=8, help="turns that a block's workers take (%(default)s)")
    calls.add_argument("--calls", type=int, default=0, help="timed calls a block and arm (calibrated to about 20 ms)")
    calls.add_argument("--warmups", type=int, default=1, help="calls before them (%(default)s)")
    parser.add_argument("--prime", type=Path, help="a second build of base (A'); a copy of A unless given")
    parser.add_argument("--primary", default="", help="wall or memory; for callables steady, first, import or memory")
    parser.add_argument("--delta", type=float, default=0.02, help="margin of equivalent and material (%(default)s)")
    parser.add_argument("--seed", type=int, help="of orders and inputs (256 bits, drawn anew)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds that a run or a call may take (%(default)s)"
    )
    parser.add_argument("--most-foreign", type=float, default=0.1, help=_FOREIGN)
    parser.add_argument("--isolation", choices=("auto", "namespaces", "links"), default="auto", help=_ISOLATION)
    parser.add_argument("--out", type=Path, help="RAW file; a temporary one unless given")
    parser.add_argument("--html", type=Path, help="write a report, too")


_DESCRIPTION = "Runs A, B and A' in blocks, at most 40 of them, in fresh processes, until a look decides."
_USAGE = "assay ab A B [options] (-- COMMAND ... | --call M:F | --asv F:C.M | --pyperf F:NAME)"
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
        canonical=_here(arguments.canonical),
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


def _ab(given: argparse.Namespace, progress: Progress) -> int:
    if not given.after and given.kind is None:
        given.parser.error("COMMAND: expected a command after --, or --call, --asv or --pyperf, got none")
    if given.after and given.kind is not None:
        given.parser.error(f"COMMAND: expected none with --{given.kind[0]}, got {given.after}")
    raw: Path = given.out
    if raw is None:
        raw = Path(tempfile.mkdtemp(prefix="assay-")) / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    plan = Plan(
        _workload(given, given.after),
        given.delta,
        seeds.secret() if given.seed is None else given.seed,
        given.timeout,
        given.most_foreign,
        given.primary,
        given.isolation,
        trusted=given.trusted,
    ).checked()
    if raw.exists():
        raise UsageError(f"--out: expected a file that is not there yet, got {raw}")
    progress.begin()
    try:
        with raw.open("x") as out:
            seen = run(given.a, given.b, plan, out, control=given.prime, told=progress.told)
    except ArmError as problem:
        raise ArmError("a run failed", str(problem)) from None
    finally:
        if not raw.stat().st_size:
            raw.unlink()
    progress.end()
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    status = judged(seen, rows, f"RAW: {raw}")
    if given.html:
        given.html.write_text(page.page(rows))
        terminal.line(f"report: {given.html}")
    return status


AB = Command(
    "ab", "measure two trees against each other", _arguments, _ab, description=_DESCRIPTION, usage=_USAGE, after=True
)
