"""The `moeyard` command, which needs the packages of the extra `cli`; `python -m moeyard` imports torch first."""

import sys

_PACKAGES = ("typer", "rich")


def main() -> None:
    """Runs the command; without its packages it says what to install and exits with status 2."""
    try:
        from moeyard_command.app import app
    except ModuleNotFoundError as problem:
        package = (problem.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        sys.stderr.write(f"error: the moeyard command needs {package}; install it with: pip install 'moeyard[cli]'\n")
        sys.exit(2)
    app(prog_name="moeyard")
