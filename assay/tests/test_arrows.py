"""assay measures from the tree where nothing can be installed: the standard library, numpy and itself.

Only judging needs more, and only the three modules that say so; measuring and deciding load none of them.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import assay

SOURCE = Path(assay.__file__).parent
ALLOWED = {*sys.stdlib_module_names, "numpy", "assay"}
JUDGES = {"task.py": {"pydantic"}, "api.py": {"griffe"}, "equivalence.py": {"hypothesis"}}
MORE = {"show.py": {"rich"}, "worker.py": {"wire", "torch", "pyperf"}, "wire.py": {"torch"}, **JUDGES}
"""Optional, or the workload's own: a bar in a terminal; what the worker loads when it is asked to."""
MEASURES = ("__main__", "measuring", "decide", "verdict_report", "frozen", "devices", "ledger")


def test_imports() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "assay"] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= ALLOWED | MORE.get(path.name, set()), path


def test_files_stay_short() -> None:
    for path in [*SOURCE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_measuring_and_deciding_load_nothing_that_has_to_be_installed() -> None:
    imports = "; ".join(f"import assay.{name}" for name in MEASURES)
    code = f"import sys; {imports}; print(sorted({{name.partition('.')[0] for name in sys.modules}}))"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    loaded = set(ast.literal_eval(done.stdout))
    assert "numpy" in loaded and not loaded & {"torch", "moeyard", "rich", "pytest", *set().union(*JUDGES.values())}
