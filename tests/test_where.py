"""DESIGN.md says which files an operator and a quantisation scheme take.

Both are added here to a copy of the tree, in no other files, and then work like the ones that are there.
"""

import filecmp
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import moeyard
from moeyard import ExpertWeights, Routing, reference
from moeyard.dispatch import schemes, table
from moeyard.dispatch.schemes import Scheme
from moeyard.testing import CPU, draw_routing, impls_on

ROOT = Path(__file__).parents[1]
Change = str | tuple[tuple[str, str], ...]
"""A new file's text, or (old, new) parts of a file that is there."""


def listed(what: str) -> int:
    """How many files DESIGN.md gives something."""
    found = re.search(rf"^\| {what} \((\d+)", (ROOT / "DESIGN.md").read_text(), re.MULTILINE)
    assert found is not None, what
    return int(found[1])


def changed_copy(to: Path, changes: Mapping[str, Change]) -> Path:
    """A copy of the sources and of the tests that a change may touch, with these changes and no others."""
    for part in ("src/moeyard", "tests"):
        shutil.copytree(ROOT / part, to / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, change in changes.items():
        path = to / name
        if isinstance(change, str):
            assert not path.exists(), name
            path.write_text(change)
            continue
        text = path.read_text()
        for old, new in change:
            assert text.count(old) == 1, f"{name}: {old}"
            text = text.replace(old, new)
        path.write_text(text)
    files = {path.relative_to(to) for path in to.rglob("*") if path.is_file()}
    differ = {name for name in files if not (ROOT / name).exists() or not filecmp.cmp(ROOT / name, to / name, False)}
    assert {str(name) for name in differ} == set(changes)
    return to


def run(tree: Path, *arguments: str) -> str:
    """What a fresh interpreter prints that imports the moeyard of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "MOEYARD_IMPL": ""}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tree, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


NEGATE_ROOM = '''
"""rows -> rows of the other sign."""

from torch import Tensor

from moeyard.dispatch.checks import FLOATS, check_out, check_tensor
from moeyard.dispatch.op import Gradient, Op, ops


def _setup(ctx, inputs, output):
    ctx.impl = inputs[1]


def _backward(ctx, grad):
    return ops.negate(grad, ctx.impl), None


NEGATE = Op(
    "negate(Tensor rows, str impl) -> Tensor",
    allocate=lambda rows: rows.new_empty(rows.shape),
    launch=lambda launch, out, rows: launch(rows, out=out),
    gradient=Gradient(("rows",), _setup, _backward),
)


def negate(rows: Tensor, *, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Rows of the other sign."""
    check_tensor("rows", rows, dtypes=FLOATS, ndim=(2,))
    if out is not None:
        check_out("out", out, tuple(rows.shape), rows.dtype, rows.device)
    return NEGATE((rows,), impl, out)
'''
NEGATE_REFERENCE = '''
"""The specification of negation."""


def negate(rows):
    return -rows


def negate_launch(rows, *, out):
    out.copy_(negate(rows.detach().cpu()))
'''
NEGATE_VECTORISED = '''
"""Negation in whole tensors."""

import torch


def negate_launch(rows, *, out):
    torch.neg(rows, out=out)
'''
NEGATE_TEST = """
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import moeyard
from moeyard.reference.negate import negate as wanted
from moeyard.testing import CPU, impls_on, poisoned, same_bits


@pytest.mark.parametrize("impl", impls_on("negate", CPU))
def test_negate(impl):
    rows = torch.randn(5, 6)
    out = poisoned((5, 6), torch.float32)
    assert moeyard.negate(rows, out=out, impl=impl) is out and same_bits(out, wanted(rows))
    assert same_bits(moeyard.negate(rows, impl=impl), wanted(rows))
    assert same_bits(torch.ops.moeyard.negate(rows, impl), wanted(rows))
    compiled = torch.compile(lambda x: moeyard.negate(x, impl=impl) + 1, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(rows), wanted(rows) + 1)
    torch.library.opcheck(torch.ops.moeyard.negate.default, (rows.clone().requires_grad_(), impl))
    needs = torch.randn(5, 6, requires_grad=True)
    moeyard.negate(needs, impl=impl).sum().backward()
    assert same_bits(needs.grad, -torch.ones(5, 6))
    with pytest.raises(ValueError, match="out: expected memory apart from rows"):
        moeyard.negate(rows, out=rows, impl=impl)


def test_explain():
    assert impls_on("negate", CPU) == ["torch", "reference"]
    assert str(moeyard.explain("negate")).splitlines() == [
        "negate on cpu (bfloat16): torch", "  torch: chosen", "  reference: only chosen by name"
    ]
    with pytest.raises(ValueError, match="expected 'auto' or one of .*'torch', 'reference'.* for negate, got 'cpu'"):
        moeyard.negate(torch.ones(1, 1), impl="cpu")
"""
OPERATOR: dict[str, Change] = {
    "src/moeyard/negate.py": NEGATE_ROOM,
    "src/moeyard/reference/negate.py": NEGATE_REFERENCE,
    "src/moeyard/vectorised/negate.py": NEGATE_VECTORISED,
    "src/moeyard/dispatch/table.py": (
        ('    "moe_sum": _rows(', '    "negate": _everywhere("negate:negate_launch"),\n    "moe_sum": _rows('),
    ),
    "src/moeyard/__init__.py": (
        ("from moeyard.permute import", "from moeyard.negate import negate\nfrom moeyard.permute import"),
        ('    "permute",\n', '    "negate",\n    "permute",\n'),
    ),
    "tests/test_negate.py": NEGATE_TEST,
    "tests/test_laws.py": (
        ('OPS = ("router",', 'OPS = ("negate", "router",'),
        ('    "permute": ROOM,\n', '    "negate": ROOM,\n    "permute": ROOM,\n'),
        ("moe_sum permute ", "moe_sum negate permute "),
    ),
}


def test_an_operator_is_in_the_files_that_are_listed(tmp_path: Path) -> None:
    assert len(OPERATOR) == listed("an operator")
    tree = changed_copy(tmp_path, OPERATOR)
    laws = "one_way and (negate or reference or vectorised or table) or room or public_names or host_reads"
    quietly = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist")
    assert " passed" in run(tree, *quietly, "tests/test_negate.py")
    assert " passed" in run(tree, *quietly, "tests/test_laws.py", "-k", laws)


KNOWN = """    if weights.scheme != "none":
        raise ValueError"""
SCHEME: dict[str, Change] = {
    "src/moeyard/dispatch/schemes.py": (
        (
            "SCHEMES: dict[str, Scheme] = {}",
            'SCHEMES: dict[str, Scheme] = {"eighths": Scheme(torch.int8, ("torch", "reference"))}',
        ),
    ),
    "src/moeyard/reference/experts.py": (
        (KNOWN, '    if weights.scheme == "eighths":\n        return weights.w13 / 8, weights.w2 / 8\n' + KNOWN),
    ),
    "src/moeyard/vectorised/experts.py": (  # the one kernel that takes it
        (
            "    weights, activation = call.weights, call.activation\n",
            "    weights, activation = call.weights, call.activation\n"
            '    if weights.scheme == "eighths":\n'
            "        w13, w2 = ((w / 8).to(hidden_states.dtype) for w in (weights.w13, weights.w2))\n"
            "        weights = type(weights)(w13, w2, weights.w13_bias, weights.w2_bias, weights.gated)\n",
        ),
    ),
}
SCHEME_CALLS = """
import torch, moeyard

torch.manual_seed(0)
rows, ids = torch.randn(5, 16), torch.randint(0, 3, (5, 2), dtype=torch.int32)
routing = moeyard.Routing(torch.rand(5, 2), ids)
stored = [torch.randint(-8, 9, shape, dtype=torch.int8) for shape in ((3, 32, 16), (3, 16, 16))]
eighths = moeyard.ExpertWeights(*stored, scheme="eighths")
plain = moeyard.ExpertWeights(*(part / 8 for part in stored))
for taken in ("torch", "reference"):
    wanted = moeyard.fused_experts(rows, routing, plain, impl=taken)
    assert torch.equal(moeyard.fused_experts(rows, routing, eighths, impl=taken), wanted), taken
wanted = moeyard.fused_experts(rows, routing, plain, impl="torch")
assert torch.equal(moeyard.fused_experts(rows, routing, eighths), wanted)

seen = moeyard.explain("fused_experts", "cpu", torch.float32, weights=eighths)
others = {row: why for row, why in seen.reasons.items() if row not in ("torch", "reference")}
assert seen.chosen == "torch" and set(others.values()) == {"takes no weights of scheme 'eighths'"}, seen
assert set(others) == {"cpu", "cuda (few tokens)", "cuda (products)", "triton"}, seen

def message(call):
    try:
        call()
    except ValueError as problem:
        return str(problem)

for refused in ("cpu", "cuda", "triton"):
    said = message(lambda: moeyard.fused_experts(rows, routing, eighths, impl=refused))
    assert said is not None and "takes no weights of scheme 'eighths'" in said, said
needs = rows.clone().requires_grad_()
said = message(lambda: moeyard.fused_experts(needs, routing, eighths))
assert said is not None and said.startswith("weights.scheme: expected 'none' in a call that"), said
mistaken = moeyard.ExpertWeights(plain.w13, plain.w2, scheme="eighths")
try:
    moeyard.fused_experts(rows, routing, mistaken)
except TypeError as problem:
    assert str(problem) == "weights.w13: expected dtype int8, got float32", problem
print("done")
"""


def test_a_scheme_is_in_the_files_that_are_listed(tmp_path: Path) -> None:
    kernels = 1
    assert len(SCHEME) == listed("a quantisation scheme") + kernels
    assert run(changed_copy(tmp_path, SCHEME), "-c", SCHEME_CALLS) == "done\n"


def experts(scheme: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Routing, ExpertWeights]:
    torch.manual_seed(0)
    weights = ExpertWeights(torch.randn(4, 32, 16).to(dtype), torch.randn(4, 16, 16).to(dtype), scheme=scheme)
    return torch.randn(6, 16).to(dtype), draw_routing(6, 4, 2), weights


@pytest.mark.parametrize("impl", ["auto", *table.impl_names("fused_experts")])
def test_an_unknown_scheme_is_an_error(impl: str) -> None:
    rows, routing, weights = experts("fp3")
    with pytest.raises(ValueError, match=r"weights.scheme: expected one of \['none'\], got 'fp3'"):
        moeyard.fused_experts(rows, routing, weights, impl=impl)
    with pytest.raises(ValueError, match=r"weights.scheme: expected one of \['none'\], got 'fp3'"):
        moeyard.moe_layer(rows, torch.randn(4, 16), weights, top_k=2, impl=impl)


def test_the_reference_knows_no_other_scheme_either() -> None:
    with pytest.raises(ValueError, match=r"weights.scheme: expected 'none', got 'fp3'"):
        reference.fused_experts(*experts("fp3"))


def test_what_no_entry_names_refuses_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the table, on every device, before it looks at anything else; nothing takes weights as they lie."""
    monkeypatch.setitem(schemes.SCHEMES, "fp3", Scheme(None, ()))
    rows, routing, weights = experts("fp3")
    for device in ("cpu", "cuda", "meta"):
        seen = moeyard.explain("fused_experts", device, torch.float32, num_tokens=6, top_k=2, weights=weights)
        assert seen.chosen == "none" and set(seen.reasons.values()) == {"takes no weights of scheme 'fp3'"}
    for impl in ("auto", *impls_on("fused_experts", CPU, torch.float32)):
        with pytest.raises(ValueError, match=r"refuses fused_experts: .*takes no weights of scheme 'fp3'"):
            moeyard.fused_experts(rows, routing, weights, impl=impl)
    with pytest.raises(ValueError, match=r"weights.scheme: expected 'none' in a call that a compiler"):
        moeyard.fused_experts(rows.requires_grad_(), routing, weights)
    torch._dynamo.reset()
    compiled = torch.compile(moeyard.fused_experts, backend="aot_eager")
    with pytest.raises(Exception, match=r"weights.scheme: expected 'none' in a call that a compiler"):
        compiled(rows.detach(), routing, weights)


def test_a_scheme_is_taken_where_its_entry_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the label of a row: one way of an implementation may take what another does not."""
    monkeypatch.setitem(schemes.SCHEMES, "fp3", Scheme(None, ("cuda (products)",)))
    _, _, weights = experts("fp3")
    seen = moeyard.explain("fused_experts", "cuda", torch.bfloat16, weights=weights).reasons
    taken = [row for row, why in seen.items() if why != "takes no weights of scheme 'fp3'"]
    assert taken == ["cuda (products)"]
