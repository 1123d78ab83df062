"""Fresh interpreters."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import moeyard

SOURCE = Path(moeyard.__file__).parents[1]
"""The folder that holds the imported moeyard."""


def python(
    *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a fresh interpreter that imports this moeyard from any folder; stdout and stderr are text. `environment` is
    added to that of this process.
    """
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH", ""))))
    given = {**os.environ, "PYTHONPATH": path, "COLUMNS": "160", "NO_COLOR": "1", **(environment or {})}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=given)


def wait_beside(folder: str) -> None:
    """Leaves a file in a folder, named after this process, and then waits for a minute."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)
