"""DESIGN.md says which files an operator and a quantisation scheme take.

Both are added here to a copy of the tree, in no other files, and then work like the ones that are there.
"""

import dataclasses
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
from moeyard import ExpertWeights, Routing
from moeyard.dispatch import schemes, table
from moeyard.quant import CODES, FP8_CHANNEL, ExpertScales, QuantScheme
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
    """A copy of the sources, tests and docs that a change may touch, with these changes and no others."""
    for part in ("src/moeyard", "src/moeyard_command", "tests", "docs"):
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
    "src/moeyard/helptexts.py": (
        (
            '    "permute": """',
            '    "negate": """\n        >>> moeyard.negate(torch.ones(1, 1))\n        tensor([[-1.]])\n    """,\n'
            '    "permute": """',
        ),
    ),
    "docs/api.md": (("::: moeyard.permute.permute\n", "::: moeyard.negate.negate\n::: moeyard.permute.permute\n"),),
    "docs/operators.md": (("## Rows\n", "## Rows\n\n### `negate`\n\n`rows` [T, H] to [T, H], each value negated.\n"),),
    "tests/test_negate.py": NEGATE_TEST,
    "tests/test_laws.py": (
        ('OPS = (\n    "router",', 'OPS = (\n    "negate", "router",'),
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
    assert " passed" in run(tree, *quietly, "tests/test_laws.py", "-k", f"{laws} or help and negate")
    assert " passed" in run(tree, *quietly, "tests/test_site.py", "-k", "list_every")


SCHEME: dict[str, Change] = {
    "src/moeyard/quant.py": (
        ('    "int8": Codes(torch.int8),\n', '    "int8": Codes(torch.int8),\n    "eighths": Codes(torch.int8),\n'),
    ),
    "src/moeyard/reference/quant.py": (
        (
            '    if scheme.weights == "int8":\n        return stored.double()\n',
            '    if scheme.weights == "int8":\n        return stored.double()\n'
            '    if scheme.weights == "eighths":\n        return stored.double() / 8\n',
        ),
    ),
    "src/moeyard/dispatch/schemes.py": (('"torch": _known,', '"torch": lambda scheme: True,'),),
    "src/moeyard/vectorised/quant.py": (  # the one kernel that takes it
        (
            "    if scheme.per_byte == 1:\n",
            '    if scheme.weights == "eighths":\n        return stored.to(dtype) / 8\n    if scheme.per_byte == 1:\n',
        ),
    ),
}
SCHEME_CALLS = """
import torch, moeyard
from moeyard.quant import ExpertScales, QuantScheme

torch.manual_seed(0)
rows, ids = torch.randn(5, 16), torch.randint(0, 3, (5, 2), dtype=torch.int32)
routing = moeyard.Routing(torch.rand(5, 2), ids)
stored = [torch.randint(-8, 9, shape, dtype=torch.int8) for shape in ((3, 32, 16), (3, 16, 16))]
scheme = QuantScheme("eighths", (1, 0), activations="int8")
scales = ExpertScales(torch.full((3, 32, 1), 2.0), torch.full((3, 16, 1), 4.0))
eighths = moeyard.ExpertWeights(*stored, scheme=scheme, scales=scales)
known = ExpertScales(scales.w13 / 8, scales.w2 / 8)
plain = moeyard.ExpertWeights(*stored, scheme=QuantScheme("int8", (1, 0), activations="int8"), scales=known)
for taken in ("torch", "reference"):
    wanted = moeyard.fused_experts(rows, routing, plain, impl=taken)
    assert torch.equal(moeyard.fused_experts(rows, routing, eighths, impl=taken), wanted), taken
wanted = moeyard.fused_experts(rows, routing, plain, impl="torch")
assert torch.equal(moeyard.fused_experts(rows, routing, eighths), wanted)
compiled = torch.compile(lambda x: moeyard.fused_experts(x, routing, eighths), fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(rows), wanted)

refusal = "takes no weights of scheme 'eighths 1x*, int8 per row'"
seen = moeyard.explain("fused_experts", "cpu", torch.float32, weights=eighths)
others = {row: why for row, why in seen.reasons.items() if row not in ("torch", "reference")}
assert seen.chosen == "torch" and set(others.values()) == {refusal}, seen
ways = {f"cuda ({way})" for way in ("few tokens", "few tokens of 4 bits", "many tokens of 4 bits", "products")}
assert set(others) == {"cpu", *ways, "triton"}, seen
for refused in ("cpu", "cuda", "triton"):
    try:
        moeyard.fused_experts(rows, routing, eighths, impl=refused)
    except ValueError as problem:
        assert refusal in str(problem), problem
    else:
        raise AssertionError(refused)
mistaken = moeyard.ExpertWeights(stored[0].float(), stored[1].float(), scheme=scheme, scales=scales)
try:
    moeyard.fused_experts(rows, routing, mistaken)
except TypeError as problem:
    assert str(problem) == "weights.w13: expected dtype int8, got float32", problem
print("done")
"""


def test_a_scheme_is_in_the_files_that_are_listed(tmp_path: Path) -> None:
    kernels = 1
    assert len(SCHEME) == listed("a code of quantised weights") + kernels
    assert run(changed_copy(tmp_path, SCHEME), "-c", SCHEME_CALLS) == "done\n"


def experts(scheme: QuantScheme = FP8_CHANNEL) -> tuple[torch.Tensor, Routing, ExpertWeights]:
    """Weights of a scheme with one scale per row."""
    torch.manual_seed(0)
    stored = (torch.randn(shape).to(CODES[scheme.weights].dtype) for shape in ((4, 32, 16), (4, 16, 16)))
    scales = ExpertScales(torch.ones(4, 32, 1), torch.ones(4, 16, 1))
    return torch.randn(6, 16), draw_routing(6, 4, 2), ExpertWeights(*stored, scheme=scheme, scales=scales)


@pytest.mark.parametrize("impl", ["auto", *table.impl_names("fused_experts")])
def test_what_is_no_scheme_is_an_error(impl: str) -> None:
    rows, routing, weights = experts()
    weights = dataclasses.replace(weights, scheme="fp3")  # type: ignore[arg-type]
    said = r"weights.scheme: expected a QuantScheme or None, got str \('fp3'\)"
    with pytest.raises(TypeError, match=said):
        moeyard.fused_experts(rows, routing, weights, impl=impl)
    with pytest.raises(TypeError, match=said):
        moeyard.moe_layer(rows, torch.randn(4, 16), weights, top_k=2, impl=impl)


def test_a_code_that_nothing_knows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification is the last to take one, by name, and says so."""
    with pytest.raises(ValueError, match=r"weights: expected one of \('e4m3', .*\), got 'fp3'"):
        QuantScheme("fp3")
    monkeypatch.setitem(CODES, "fp3", CODES["int8"])
    rows, routing, weights = experts(QuantScheme("fp3", (1, 0)))
    with pytest.raises(ValueError, match="scheme: expected codes that this specification knows, got 'fp3'"):
        moeyard.fused_experts(rows, routing, weights, impl="reference")
    with pytest.raises(ValueError, match=r"refuses fused_experts: .*torch: takes no weights of scheme 'fp3 1x"):
        moeyard.fused_experts(rows, routing, weights)


def test_what_no_entry_names_refuses_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the table, on every device, before it looks at anything else; nothing takes weights as they lie."""
    monkeypatch.setattr(schemes, "TAKES", {})
    rows, routing, weights = experts()
    refusal = "takes no weights of scheme 'e4m3 1x*, e4m3 per row'"
    for device in ("cpu", "cuda", "meta"):
        seen = moeyard.explain("fused_experts", device, torch.float32, num_tokens=6, top_k=2, weights=weights)
        assert seen.chosen == "none" and set(seen.reasons.values()) == {refusal}
    for impl in ("auto", *impls_on("fused_experts", CPU, torch.float32)):
        with pytest.raises(ValueError, match=f"refuses fused_experts: .*{re.escape(refusal)}"):
            moeyard.fused_experts(rows, routing, weights, impl=impl)
    torch._dynamo.reset()
    compiled = torch.compile(moeyard.fused_experts, backend="aot_eager")
    with pytest.raises(Exception, match=re.escape(refusal)):
        compiled(rows.detach(), routing, weights)


def test_a_scheme_is_taken_where_its_entry_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the label of a row: one way of an implementation may take what another does not."""
    monkeypatch.setattr(schemes, "TAKES", {"cuda (products)": lambda scheme: scheme.weights == "e4m3"})
    _, _, weights = experts()
    seen = moeyard.explain("fused_experts", "cuda", torch.bfloat16, weights=weights).reasons
    taken = [row for row, why in seen.items() if not why.startswith("takes no weights of scheme")]
    assert taken == ["cuda (products)"]
