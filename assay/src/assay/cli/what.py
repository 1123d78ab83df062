"""What is measured without a task, and how: the options that ab and history share."""

import argparse
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from assay.arms.counters import COUNTERS
from assay.cli.command import beside_arguments, margin
from assay.contract import seeds
from assay.contract.workload import Kind, Plan, Workload

_DELTA = "margin of equivalent and material, 0.02 or 2%% (%(default)s)"
_FOREIGN = "processor seconds of others, a second of a block, above which it is left out (%(default)s)"
_ISOLATION = "namespaces: all trees at one path; links: at links of equal length (the first that works)"
_PREPARE = "shell command that is run before each timed run, in its tree, untimed"
ALL = -1
"""In place of a case's number: all of them."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them."""
    what = parser.add_argument_group("what is measured (or -- COMMAND)").add_mutually_exclusive_group()
    targets: tuple[tuple[Kind, str], ...] = (
        ("call", "module:function or file.py:function, inside a worker"),
        ("asv", "file.py:Class.time_method, an asv benchmark"),
        ("pyperf", "script.py:NAME, a benchmark that a pyperf script registers"),
        ("pytest", "file.py::test, a test that calls pytest-benchmark's fixture"),
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
    calls.add_argument("--loops", type=int, default=0, help="calls a request without --chain (as many as it takes)")
    calls.add_argument(
        "--clock", choices=("judge", "cuda"), default="judge", help="cuda: events in the arm, cooperative"
    )
    calls.add_argument("--graph", action="store_true", help="with --clock cuda: replay a CUDA graph of the links")
    calls.add_argument("--no-compare", action="store_true", help="outputs are not sent back and compared")
    calls.add_argument(
        "--trusted", action="store_true", help="B does not patch its worker: chains may be faster, copies bound nothing"
    )
    calls.add_argument(
        "--canonical", default="", metavar="F:F", help="output -> what of it is compared, as where an order is free"
    )
    calls.add_argument("--rtol", type=float, default=0.0, help="of outputs; equal bits unless given")
    calls.add_argument("--atol", type=float, default=0.0)
    calls.add_argument(
        "--case", type=_case, default=ALL, help="asv: number of a combination of parameters (ab: all, else 0)"
    )
    calls.add_argument("--python", default="", help="the workers' interpreter (this one)")
    calls.add_argument("--path", action="append", help="folder of the tree put on sys.path; repeatable (. and src)")
    calls.add_argument("--rounds", type=int, default=8, help="turns that a block's workers take (%(default)s)")
    calls.add_argument("--calls", type=int, default=0, help="timed calls a block and arm (calibrated to about 20 ms)")
    calls.add_argument("--warmups", type=int, default=1, help="calls before them (%(default)s)")
    parser.add_argument(
        "--setup", default="", metavar="CMD", help="shell command that is run once in each tree: a build"
    )
    parser.add_argument("--prepare", default="", metavar="CMD", help=_PREPARE)
    parser.add_argument("--primary", default="", help="wall or memory; for callables steady, first, import or memory")
    parser.add_argument("--delta", type=margin, default=0.02, help=_DELTA)
    parser.add_argument("--seed", type=int, help="of orders and inputs (256 bits, drawn anew)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds that a run or a call may take (%(default)s)"
    )
    parser.add_argument("--most-foreign", type=float, default=0.1, help=_FOREIGN)
    parser.add_argument("--isolation", choices=("auto", "namespaces", "links"), default="auto", help=_ISOLATION)
    parser.add_argument(
        "--instructions",
        nargs="?",
        const="best",
        default="",
        choices=("best", *COUNTERS),
        help="count each arm's, too, by the best means there is; they decide nothing",
    )
    beside_arguments(parser)


def _target(kind: Kind, text: str) -> tuple[Kind, str]:
    return kind, text


def _case(text: str) -> int:
    if text == "all":
        return ALL
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number or all, got {text!r}")
    return int(text)


def given(arguments: argparse.Namespace) -> Workload:
    """The workload. Ends the command in words if there is none, or two."""
    if not arguments.after and arguments.kind is None:
        arguments.parser.error("COMMAND: expected a command after --, or --call, --asv, --pyperf or --pytest, got none")
    if arguments.after and arguments.kind is not None:
        arguments.parser.error(f"COMMAND: expected none with --{arguments.kind[0]}, got {arguments.after}")
    prepare = shell(arguments.prepare)
    if arguments.kind is None:
        return Workload("command", tuple(arguments.after), prepare)
    kind, target = arguments.kind
    return Workload(
        kind,
        prepare=prepare,
        target=_here(target),
        inputs=_here(arguments.inputs),
        chain=_here(arguments.chain),
        canonical=_here(arguments.canonical),
        constant=arguments.constant or not arguments.inputs,
        links=arguments.links,
        loops=arguments.loops,
        clock=arguments.clock,
        graph=arguments.graph,
        compare=not arguments.no_compare and kind == "call",
        rtol=arguments.rtol,
        atol=arguments.atol,
        case=max(0, arguments.case),
        python=arguments.python,
        paths=tuple(arguments.path or Workload("call").paths),
        rounds=arguments.rounds,
        calls=arguments.calls,
        warmups=arguments.warmups,
    )


def shell(text: str) -> tuple[str, ...]:
    """What runs a line of shell; nothing for none."""
    return ("sh", "-ec", text) if text else ()


def _here(target: str) -> str:
    """A file that is there, seen from here, stands for itself in every arm; other names are looked up in the arm."""
    place, colon, name = target.partition(":")
    if name.startswith(":"):  # a test of pytest, whose configuration lies around it
        return target
    return f"{Path(place).resolve()}{colon}{name}" if place.endswith(".py") and Path(place).is_file() else target


def plan(arguments: argparse.Namespace, workload: Workload, comparisons: int) -> Plan:
    """How the workload is judged, as one of so many comparisons: the levels of the looks are divided by their number.

    ValueError for what makes no sense.
    """
    return Plan(
        workload,
        arguments.delta,
        seeds.secret() if arguments.seed is None else arguments.seed,
        arguments.timeout,
        arguments.most_foreign,
        arguments.primary,
        arguments.isolation,
        comparisons,
        trusted=arguments.trusted,
        instructions=arguments.instructions,
    ).checked()


def uncompared(workload: Workload) -> Workload:
    """Without a look at outputs, which may well change from commit to commit."""
    return replace(workload, compare=False)


def of_case(workload: Workload, case: int) -> Workload:
    """One of the cases of a benchmark."""
    return replace(workload, case=case)


def file_name(*parts: str) -> str:
    """A name for files of a comparison."""
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-.")[-40:] or "x" for part in parts if part)
