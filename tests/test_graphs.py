"""A whole block under torch's compilers: no graph break, exported, packaged ahead of time; opcheck of every operator.

Elsewhere: single operators compiled, exported and traced in test_library.py, test_experts.py and test_router.py; the
backward in the graph in test_training.py; quantised experts in test_quant_layers.py; changed routing in tests/gpu.
"""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeyard
from moeyard.dispatch.op import REGISTERED
from moeyard.quant import FP8_BLOCK, INT8_CHANNEL
from moeyard.testing import draw_routing, draw_weights, python

TESTS = Path(__file__).parent


class Block(nn.Module):
    """Norm, router, experts, shared expert, residual."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        routed, shared = draw_weights(8, 64, 32, dtype, bias=True), draw_weights(1, 64, 48, dtype)
        self.norm = nn.RMSNorm(64, dtype=dtype)
        self.router = nn.Parameter(torch.randn(8, 64, dtype=dtype) * 0.1)
        self.w13, self.w2 = nn.Parameter(routed.w13), nn.Parameter(routed.w2)
        self.w13_bias = nn.Parameter(routed.w13_bias)
        self.shared_w13, self.shared_w2 = nn.Parameter(shared.w13), nn.Parameter(shared.w2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights = moeyard.ExpertWeights(self.w13, self.w2, self.w13_bias)
        shared = moeyard.ExpertWeights(self.shared_w13, self.shared_w2)
        rows = self.norm(hidden_states)
        return hidden_states + moeyard.moe_layer(rows, self.router, weights, shared=shared, top_k=2, renormalize=True)


def test_a_block_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    block = Block().requires_grad_(False)
    seen = torch._dynamo.explain(block)(torch.randn(5, 64))
    assert (seen.graph_break_count, seen.graph_count) == (0, 1)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 5, 64, 3):
        rows = torch.randn(tokens, 64)
        assert torch.equal(compiled(rows), block(rows))


def exported(block: Block) -> torch.export.ExportedProgram:
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    return torch.export.export(block, (torch.randn(5, 64),), dynamic_shapes=({0: tokens},))


def test_a_block_is_exported_for_any_number_of_tokens(tmp_path: Path) -> None:
    block = Block().requires_grad_(False)
    program = exported(block)
    names = [str(node.target) for node in program.graph.nodes if "moeyard" in str(node.target)]
    assert names == ["moeyard.route.default", *["moeyard.fused_experts.default"] * 2]
    torch.export.save(program, tmp_path / "block.pt2")
    again = torch.export.load(tmp_path / "block.pt2").module()
    for tokens in (2, 33):
        rows = torch.randn(tokens, 64)
        assert torch.equal(again(rows), block(rows))


LOADED = """
import sys, torch, moeyard
block = torch._inductor.aoti_load_package(sys.argv[1])
for rows, wanted in torch.load(sys.argv[2]):
    assert torch.allclose(block(rows), wanted, rtol=1e-5, atol=1e-5), (block(rows) - wanted).abs().max()
print("done")
"""


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_block_is_packaged_ahead_of_time_and_runs_in_another_process(tmp_path: Path) -> None:
    """AOTInductor on a CPU: one package for all numbers of tokens, loaded where moeyard is imported."""
    block = Block().requires_grad_(False)
    package = tmp_path / "block.pt2"
    made = torch._inductor.aoti_compile_and_package(exported(block), package_path=str(package))
    answers = [(rows, block(rows)) for rows in (torch.randn(tokens, 64) for tokens in (2, 7, 300))]
    torch.save(answers, tmp_path / "answers.pt")
    done = python("-c", LOADED, str(made), str(tmp_path / "answers.pt"))
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_a_block_compiles_to_code_with_its_backward() -> None:
    torch._dynamo.reset()
    block = Block()
    rows = torch.randn(12, 64, requires_grad=True)
    given = (rows, *block.parameters())
    plain = torch.autograd.grad(block(rows).square().sum(), given)
    compiled = torch.compile(lambda rows: block(rows).square().sum(), fullgraph=True)
    found = torch.autograd.grad(compiled(rows), given)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(plain, found, strict=True))


UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("scheme", [FP8_BLOCK, INT8_CHANNEL], ids=str)
def test_opcheck_of_quantised_experts(scheme: moeyard.QuantScheme) -> None:
    weights = moeyard.quantize_experts(draw_weights(4, 128, 128, torch.float32), scheme)
    routing, scales = draw_routing(6, 4, 2), weights.scales
    assert scales is not None
    told = (None, None, *scales.tensors, 0, str(scheme), True, "silu", 1.0, 0.0, None, 4, False, "auto")
    rows = (torch.randn(6, 128), routing.topk_weights, routing.topk_ids, None)
    utils = (
        UTILS if scheme.weights == "int8" else UTILS[1:]
    )  # the first compares inputs, and torch multiplies no float8
    call = (*rows, weights.w13, weights.w2, *told)
    torch.library.opcheck(torch.ops.moeyard.fused_experts.default, call, test_utils=utils)


@pytest.mark.parametrize("group_size", [None, 128])
def test_opcheck_of_rows_in_fp8(group_size: int | None) -> None:
    layout = moeyard.moe_align_block_size(draw_routing(6, 4, 2, "uniform").topk_ids, num_experts=4, block_size=1)
    where = (layout.sorted_token_ids.clone(), layout.route_rows.clone(), 2, group_size)
    torch.library.opcheck(torch.ops.moeyard.permute_to_fp8.default, (torch.randn(6, 128), *where, "auto"))


def test_every_operator_has_an_opcheck() -> None:
    """Somewhere in the tests: as `ops.<name>.default` in a file that calls opcheck, or by name in a list for it."""
    told: set[str] = set()
    for path in TESTS.glob("test_*.py"):
        text = path.read_text()
        if "opcheck(" in text:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute) and node.attr == "default" and isinstance(node.value, ast.Attribute):
                    told.add(node.value.attr)
                elif isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "OP_CALLS" for t in node.targets):
                    told |= {part.elts[0].value for part in node.value.elts}  # type: ignore[attr-defined]
    apart = {"exchange_rows", "spread_rows", "bring_rows"}  # they need a process group: tests/test_parallel.py
    assert set(REGISTERED) - apart <= told, set(REGISTERED) - told
