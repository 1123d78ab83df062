"""Breaks of what callers rely on: Python, torch operator schemas, C prototypes; and what is none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from assay.judgement.api import broken
from small_project import environment, files

PYTHON = """from torch.library import Library

VALUE = 1


def kept(a, b=1, *, c=2): ...
def gone(): ...
def _private(a): ...


class Thing:
    def method(self, x): ...
    def _hidden(self, x): ...


_lib = Library("moe", "DEF")
_lib.define("align(Tensor ids, int n) -> Tensor")
_lib.define(
    "sum(Tensor rows, "
    "bool fast=True) -> Tensor"
)
"""
CUDA = """// void in_a_comment(int a);
#define MANY(x) \\
  other(x);
/* int also_not(void); */
TORCH_LIBRARY(_C, ops) {
  ops.def("moe_sum(Tensor input, Tensor! output) -> ()");
  ops.def(
      "moe_align(Tensor a, int[] b) -> (Tensor, Tensor)");
}
extern "C" int launch(const int* ids, int n) {
  if (n) return helper(ids);
  return 0;
}
void scale( float *x ,int n );
"""


def api(**more: Any) -> dict[str, Any]:
    return {"packages": ["pkg"], "paths": ["src", "."], "native": ["**/*.cu", "pkg/*.py"], "allow": [], **more}


def trees(folder: Path, python: str, cuda: str) -> tuple[Path, Path]:
    for name, texts in (("base", (PYTHON, CUDA)), ("candidate", (python, cuda))):
        files(folder / name, {"pkg/__init__.py": texts[0], "csrc/x.cu": texts[1]})
    return folder / "base", folder / "candidate"


def test_equal_trees_break_nothing(tmp_path: Path) -> None:
    assert broken(api(), *trees(tmp_path, PYTHON, CUDA)) == []


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("def kept(a, b=1", "def kept(a, b=2", "pkg.kept"),
        ("def kept(a, b=1", "def kept(a", "pkg.kept"),
        ("def kept(a, b=1", "def kept(b=1", "pkg.kept"),
        ("def kept(a, b=1", "def kept(a, z, b=1", "pkg.kept"),
        ("def gone(): ...", "", "pkg.gone"),
        ("def gone(): ...", "gone = 3", "pkg.gone"),
        ("method(self, x)", "method(self, y)", "pkg.Thing.method"),
        ("align(Tensor ids, int n)", "align(Tensor ids, int m)", "torch:moe::align"),
        ("bool fast=True", "bool fast=False", "torch:moe::sum"),
        ('    "bool fast=True) -> Tensor"', '    "bool fast=True) -> Tensor[]"', "torch:moe::sum"),
    ],
)
def test_breaks_in_python(old: str, new: str, name: str, tmp_path: Path) -> None:
    assert old in PYTHON
    found = broken(api(), *trees(tmp_path, PYTHON.replace(old, new), CUDA))
    assert [words.rpartition(": ")[0].split(": ")[0] for words in found] and found[0].startswith(f"{name}: "), found
    assert broken(api(allow=[name]), *trees(tmp_path / "1", PYTHON.replace(old, new), CUDA)) == []
    pattern = name[:-2] + "*"
    assert broken(api(allow=[pattern]), *trees(tmp_path / "2", PYTHON.replace(old, new), CUDA)) == []


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ('  ops.def("moe_sum(Tensor input, Tensor! output) -> ()");', "", "torch:_C::moe_sum"),
        ("Tensor! output", "Tensor output", "torch:_C::moe_sum"),
        ("(Tensor, Tensor)", "Tensor", "torch:_C::moe_align"),
        ("int[] b", "int[] b, int c", "torch:_C::moe_align"),
        ("int n) {", "long n) {", "c:launch"),
        ("void scale", "int scale", "c:scale"),
        ("launch(", "start(", "c:launch"),
    ],
)
def test_breaks_in_native_code(old: str, new: str, name: str, tmp_path: Path) -> None:
    assert old in CUDA
    found = broken(api(), *trees(tmp_path, PYTHON, CUDA.replace(old, new)))
    assert len(found) == 1 and found[0].startswith(f"{name}: "), found


def test_what_is_no_break(tmp_path: Path) -> None:
    python = PYTHON.replace("c=2)", "c=2, d=None)").replace("VALUE = 1", "VALUE = 2\ndef new(): ...")
    python = python.replace("def _private(a)", "def _other(a)").replace("_hidden(self, x)", "_hidden(self)")
    python = python.replace("int n) ->", "int n, *, bool sorted=False) ->")
    cuda = CUDA.replace("( float *x ,int n )", "(float* x, int n)").replace("int[] b)", "int[] b, int c=0)")
    cuda = cuda.replace("return helper(ids);", "return better(ids, n);").replace("in_a_comment", "changed")
    assert broken(api(), *trees(tmp_path, python, cuda)) == []


def test_a_package_that_is_not_there(tmp_path: Path) -> None:
    base, candidate = trees(tmp_path, PYTHON, CUDA)
    with pytest.raises(ValueError, match="expected a package of base, got nothing"):
        broken(api(packages=["nothing"]), base, candidate)
    (candidate / "pkg/__init__.py").unlink()
    (candidate / "pkg").rmdir()
    assert broken(api(native=[]), base, candidate) == ["pkg: the package is no longer found, or cannot be read"]


def test_nothing_is_imported(tmp_path: Path) -> None:
    """A module that would leave a file behind if it ran; and files that no parser can read end nothing else."""
    marker = tmp_path / "ran"
    base, candidate = trees(tmp_path, f"open({str(marker)!r}, 'w')\n" + PYTHON, CUDA)
    assert broken(api(), base, candidate) == [] and not marker.exists()
    files(candidate, {"pkg/__init__.py": "(" * 5000})
    command = [sys.executable, "-m", "assay.judgement.api", str(base), str(candidate)]
    given = json.dumps(api(native=[])).encode()
    done = subprocess.run(command, input=given, capture_output=True, check=True, env=environment())
    assert json.loads(done.stdout)["broken"]
