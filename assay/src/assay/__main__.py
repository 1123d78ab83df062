"""Is it really faster? Paired experiments on two trees, decided by exact intervals."""

import argparse
import signal
import sqlite3
import sys
import tempfile
import traceback

from assay import __version__
from assay.cli.table import COMMANDS
from assay.contract.errors import PATHS, Status, StoppedError
from assay.report import terminal

_INTERRUPTED = 128 + signal.SIGINT
"""As shells have it."""


def main(argv: list[str] | None = None) -> int:
    """The command line. Exit statuses are those of contract/errors.py."""
    given = sys.argv[1:] if argv is None else argv
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(prog="assay", description=__doc__)
    parser.add_argument("--version", action="version", version=f"assay {__version__}")
    each = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS.values():
        one = each.add_parser(
            command.name, help=command.help, description=command.description, epilog=command.epilog, usage=command.usage
        )
        command.arguments(one)
        one.set_defaults(parser=one)
    arguments = parser.parse_args(given[:split])
    arguments.after = given[split + 1 :]
    command = COMMANDS[arguments.command]
    if arguments.after and not command.after:
        parser.error(f"--: expected no command for {command.name}, got {arguments.after}")
    progress = terminal.Progress()
    try:
        command.check()
        return command.run(arguments, progress)
    except StoppedError as problem:
        return _sorry(command.name, problem, problem.status, progress)
    except (OSError, sqlite3.Error) as problem:
        named = isinstance(problem, PATHS)
        return _sorry(command.name, problem, Status.USAGE if named else Status.INFRASTRUCTURE, progress)
    except ValueError as problem:
        return _sorry(command.name, problem, Status.USAGE, progress)
    except KeyboardInterrupt:
        return _sorry(command.name, "interrupted", _INTERRUPTED, progress)
    except Exception as problem:  # nobody but us has to read a traceback
        return _sorry(command.name, _kept(problem), Status.INFRASTRUCTURE, progress)
    finally:
        progress.end()


def _kept(problem: Exception) -> str:
    """Words for a mistake of assay's own, whose traceback is kept in a file."""
    with tempfile.NamedTemporaryFile("w", prefix="assay-bug-", suffix=".txt", delete=False) as file:
        traceback.print_exception(problem, file=file)
    return f"a mistake of assay's own: {type(problem).__name__}: {problem}; {file.name} holds what to report"


def _sorry(name: str, problem: Exception | str, status: int, progress: terminal.Progress) -> int:
    progress.end()
    terminal.line(f"assay {name}: {problem}", sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
