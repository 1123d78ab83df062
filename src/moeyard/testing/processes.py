"""Fresh interpreters."""

import os
import subprocess
import sys
from pathlib import Path

import moeyard

SOURCE = Path(moeyard.__file__).parents[1]
"""The folder that holds the imported moeyard."""


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a fresh interpreter that imports this moeyard from any folder; stdout and stderr are text."""
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "160", "NO_COLOR": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
