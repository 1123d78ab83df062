"""assay runs from the tree where nothing can be installed: it imports the standard library, numpy and itself."""

import ast
import sys
from pathlib import Path

import assay

SOURCE = Path(assay.__file__).parent
ALLOWED = {*sys.stdlib_module_names, "numpy", "assay"}
MORE = {"show.py": {"rich"}, "worker.py": {"wire", "torch", "pyperf"}, "wire.py": {"torch"}}
"""Optional, or the workload's own: a bar in a terminal; what the worker loads when it is asked to."""


def test_imports() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "assay"] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= ALLOWED | MORE.get(path.name, set()), path


def test_files_stay_short() -> None:
    for path in [*SOURCE.rglob("*.py"), *Path(__file__).parent.glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
