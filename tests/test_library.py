"""Every op under torch's machinery: registered ops, compile, export, tracing, fake tensors, modes, subclasses."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import moeyard
from moeyard import Layout
from moeyard.dispatch.op import goes_straight
from moeyard.testing import layout_difference, same_bits

IDS = torch.tensor([[0, 2, 5], [1, -1, 2], [7, 0, 1], [2, 2, 9]], dtype=torch.int32)
MAP = torch.tensor([0, -1, 1, 2, 3, 4, -1, 5], dtype=torch.int32)
ALIGN: dict[str, Any] = {"num_experts": 8, "block_size": 4}


def whole_path(
    ids: torch.Tensor, hidden: torch.Tensor, weights: torch.Tensor, expert_map: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Every op once, as a layer would call them."""
    layout = moeyard.moe_align_block_size(ids, expert_map=expert_map, **ALIGN)
    moved = moeyard.permute(hidden, layout, scales=hidden[:, :2].detach())
    total = moeyard.combine(moved.rows, layout, weights)
    summed = moeyard.moe_sum(hidden.view(*ids.shape[:1], 2, -1), topk_ids=ids[:, :2], expert_map=expert_map)
    shuffled = moeyard.shuffle_rows(total, ids[:, 0])
    counts = layout.expert_counts
    batched = moeyard.batched_moe_align_block_size(counts, max_num_tokens=4, block_size=4)
    loras = moeyard.moe_lora_align_block_size(ids, ids[:, 0], max_loras=2, **ALIGN)
    return (*layout.tensors, total, summed, shuffled, *batched.tensors, *(t for one in loras for t in one.tensors))


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return IDS.clone(), torch.randn(4, 6), torch.rand(4, 3)


OP_CALLS = [
    ("moe_align_block_size", lambda: (IDS, None, 8, 8, 4, 3)),
    ("moe_align_block_size", lambda: (IDS.long(), MAP, 8, 6, 4, 3)),
    ("batched_moe_align_block_size", lambda: (torch.tensor([2, 0, 3], dtype=torch.int32), 4, 8)),
    ("moe_lora_align_block_size", lambda: (IDS, torch.tensor([0, 1, -1, 0]), None, 2, 8, 8, 4, 3)),
    ("permute", lambda: (torch.randn(4, 6, requires_grad=True), torch.rand(4, 1), *_rows(), 3)),
    ("permute", lambda: (torch.randn(4, 6).bfloat16(), None, *_rows(), 3)),
    ("shuffle_rows", lambda: (torch.randn(4, 6, requires_grad=True), torch.tensor([3, -1, 0]))),
    ("combine", lambda: (torch.randn(24, 6, requires_grad=True), _rows()[1], torch.rand(4, 3, requires_grad=True), 3)),
    ("combine", lambda: (torch.randn(24, 6).bfloat16(), _rows()[1], None, 3)),
    ("moe_sum", lambda: (torch.randn(4, 3, 5, requires_grad=True), IDS, MAP)),
    ("moe_sum", lambda: (torch.randn(4, 3, 5).half(), None, None)),
]


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    layout = moeyard.moe_align_block_size(IDS, **ALIGN)
    return layout.sorted_token_ids[:24], torch.where(layout.route_rows < 24, layout.route_rows, -1)


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize(("name", "arguments"), OP_CALLS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(OP_CALLS)])
def test_opcheck(name: str, arguments: Any, impl: str) -> None:
    op = getattr(torch.ops.moeyard, name).default
    values = arguments()
    if name == "permute":  # its padding rows are unwritten, which comparisons of whole outputs must not see
        layout = moeyard.moe_align_block_size(IDS.clamp(0, 7), num_experts=8, block_size=1)
        values = (*values[:2], layout.sorted_token_ids, layout.route_rows, 3)
    torch.library.opcheck(op, (*values, impl))


@pytest.mark.parametrize("expert_map", [None, MAP], ids=["plain", "mapped"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(expert_map: torch.Tensor | None, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(whole_path, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tokens in (4, 4, 7, 9):
        ids = torch.randint(-1, 9, (tokens, 3), dtype=torch.int32)
        values = (ids, torch.randn(tokens, 6), torch.rand(tokens, 3), expert_map)
        assert all(same_bits(a, b) for a, b in zip(compiled(*values), whole_path(*values), strict=True))


def test_compiled_with_inductor_returns_layouts() -> None:
    torch._dynamo.reset()

    def align(ids: torch.Tensor) -> Layout:
        return moeyard.moe_align_block_size(ids + 1, **ALIGN)

    got = torch.compile(align, fullgraph=True)(IDS)
    assert layout_difference(got, align(IDS)) is None


def test_compiled_gradients() -> None:
    torch._dynamo.reset()

    def loss(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        layout = moeyard.moe_align_block_size(IDS, **ALIGN)
        return moeyard.combine(moeyard.permute(hidden, layout).rows, layout, weights).square().sum()

    hidden, weights = torch.randn(4, 6, requires_grad=True), torch.rand(4, 3, requires_grad=True)
    eager = torch.autograd.grad(loss(hidden, weights), (hidden, weights))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    again = torch.autograd.grad(compiled(hidden, weights), (hidden, weights))
    assert all(torch.allclose(a, b) for a, b in zip(eager, again, strict=True))


def test_fake_tensors_have_the_real_shapes() -> None:
    values = inputs()
    real = whole_path(*values)
    with FakeTensorMode() as mode:
        fake = whole_path(*(mode.from_tensor(value) for value in values))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_make_fx_keeps_the_ops(tracing: str) -> None:
    values = inputs()
    graph = make_fx(lambda ids, hidden, weights: whole_path(ids, hidden, weights), tracing_mode=tracing)(*values)
    called = {str(node.target).split(".")[1] for node in graph.graph.nodes if "moeyard" in str(node.target)}
    assert called == {name for name, _ in OP_CALLS}
    fresh = inputs()
    assert all(same_bits(a, b) for a, b in zip(graph(*fresh), whole_path(*fresh), strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    class Layer(torch.nn.Module):
        def forward(self, ids: torch.Tensor, hidden: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return whole_path(ids, hidden, weights)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Layer(), inputs(), dynamic_shapes=({0: tokens},) * 3, strict=strict)
    values = torch.randint(0, 8, (11, 3), dtype=torch.int32), torch.randn(11, 6), torch.rand(11, 3)
    assert all(same_bits(a, b) for a, b in zip(program.module()(*values), whole_path(*values), strict=True))


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class _Tagged(torch.Tensor):
    pass


def test_modes_and_subclasses_see_the_registered_ops() -> None:
    with _Seen() as seen:
        moeyard.moe_align_block_size(IDS, **ALIGN)
    assert seen.ops == ["moeyard.moe_align_block_size.default"]
    plain = torch.randn(4, 6)
    assert goes_straight(plain, torch.nn.Parameter(plain, requires_grad=False), None)
    assert not goes_straight(plain, plain.as_subclass(_Tagged))
    assert not goes_straight(plain.clone().requires_grad_())
    with torch.no_grad():
        assert goes_straight(plain.clone().requires_grad_())
    with torch.device("cpu"):
        assert not goes_straight(plain)
    inside = []
    torch.func.vmap(lambda x: (inside.append(goes_straight(x)), x)[1])(plain)
    assert inside == [False]


def test_out_is_filled_on_the_registered_way_too() -> None:
    wanted = moeyard.moe_align_block_size(IDS, **ALIGN)
    out = moeyard.empty_layout(12, top_k=3, **ALIGN)
    with _Seen():
        assert moeyard.moe_align_block_size(IDS, out=out, **ALIGN) is out
    assert layout_difference(out, wanted) is None
    with _Seen(), pytest.raises(ValueError, match="out: expected a layout with"):
        moeyard.moe_align_block_size(IDS, out=moeyard.empty_layout(12, top_k=1, **ALIGN), **ALIGN)
    hidden = torch.randn(4, 6)
    rows = moeyard.Permuted(torch.zeros(wanted.capacity, 6), None)
    with _Seen():
        assert moeyard.permute(hidden, wanted, out=rows) is rows
        total = torch.empty(4, 6)
        assert moeyard.combine(rows.rows, wanted, out=total) is total
    assert torch.allclose(total, moeyard.combine(moeyard.permute(hidden, wanted).rows, wanted))
