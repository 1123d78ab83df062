"""What `help` shows beside a docstring: the fields of a dataclass, and an example of every public name.

The words of a field stand below it in the source, where tools read them and `help` does not. A test runs the examples;
`weights` there are those of `WEIGHTS`.
"""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, is_dataclass
from functools import cache
from inspect import cleandoc, getdoc
from pathlib import Path
from textwrap import fill, indent
from typing import Any

WEIGHTS = ">>> weights = moeyard.ExpertWeights(w13=torch.randn(8, 2 * 16, 32), w2=torch.randn(8, 32, 16))"
"""8 experts, 16 wide inside, of tokens 32 wide."""
EXAMPLES: Mapping[str, str] = {
    "moe_layer": """
        >>> moeyard.moe_layer(torch.randn(5, 32), torch.randn(8, 32), weights, top_k=2).shape
        torch.Size([5, 32])
    """,
    "fused_experts": """
        >>> routing = moeyard.route(torch.randn(5, 8), top_k=2)
        >>> moeyard.fused_experts(torch.randn(5, 32), routing, weights).shape
        torch.Size([5, 32])
    """,
    "route": """
        >>> moeyard.route(torch.tensor([[0.0, 3.0, 1.0]]), top_k=2).topk_ids
        tensor([[1, 2]], dtype=torch.int32)
    """,
    "route_and_align": """
        >>> routing, layout = moeyard.route_and_align(torch.tensor([[0.0, 3.0, 1.0]]), top_k=2, block_size=1)
        >>> layout.expert_counts
        tensor([0, 1, 1], dtype=torch.int32)
    """,
    "moe_align_block_size": """
        >>> ids = torch.tensor([[2, 0], [2, 1], [0, 2]], dtype=torch.int32)
        >>> moeyard.moe_align_block_size(ids, num_experts=3, block_size=2).route_rows
        tensor([4, 0, 5, 2, 1, 6], dtype=torch.int32)
    """,
    "batched_moe_align_block_size": """
        >>> counts = torch.tensor([2, 0], dtype=torch.int32)
        >>> moeyard.batched_moe_align_block_size(counts, max_num_tokens=3, block_size=2).expert_ids
        tensor([ 0, -1, -1, -1], dtype=torch.int32)
    """,
    "moe_lora_align_block_size": """
        >>> ids, adapters = torch.tensor([[0], [1]]), torch.tensor([1, 0])
        >>> layouts = moeyard.moe_lora_align_block_size(ids, adapters, num_experts=2, block_size=1, max_loras=2)
        >>> [layout.expert_counts.tolist() for layout in layouts]
        [[0, 1], [1, 0]]
    """,
    "empty_layout": """
        >>> moeyard.empty_layout(6, num_experts=3, block_size=2).capacity
        10
    """,
    "permute": """
        >>> layout = moeyard.moe_align_block_size(torch.tensor([[1], [0]]), num_experts=2, block_size=1)
        >>> moeyard.permute(torch.tensor([[1.0], [2.0]]), layout).rows
        tensor([[2.],
                [1.]])
    """,
    "permute_to_fp8": """
        >>> layout = moeyard.moe_align_block_size(torch.tensor([[1], [0]]), num_experts=2, block_size=1)
        >>> moeyard.permute_to_fp8(torch.tensor([[448.0], [896.0]]), layout).scales
        tensor([2., 1.])
    """,
    "shuffle_rows": """
        >>> moeyard.shuffle_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([1, -1]))
        tensor([[2.],
                [0.]])
    """,
    "combine": """
        >>> layout = moeyard.moe_align_block_size(torch.tensor([[0, 1]]), num_experts=2, block_size=1)
        >>> moeyard.combine(torch.tensor([[1.0], [2.0]]), layout, torch.tensor([[0.5, 0.25]]))
        tensor([[1.]])
    """,
    "moe_sum": """
        >>> moeyard.moe_sum(torch.tensor([[[1.0], [2.0]]]), topk_ids=torch.tensor([[0, -1]]))
        tensor([[1.]])
    """,
    "grouped_gemm": """
        >>> rows, weight, offsets = torch.ones(3, 2), torch.ones(2, 4, 2), torch.tensor([0, 1, 3])
        >>> moeyard.grouped_gemm(rows, weight, expert_offsets=offsets).shape
        torch.Size([3, 4])
    """,
    "activate": """
        >>> moeyard.activate(torch.tensor([[-1.0, 3.0]]), moeyard.Activation('relu2'), gated=False)
        tensor([[0., 9.]])
    """,
    "quantize_experts": """
        >>> moeyard.quantize_experts(weights, moeyard.QuantScheme('e4m3', (1, 0), activations='e4m3')).w13.dtype
        torch.float8_e4m3fn
    """,
    "straight_through_experts": """
        >>> masters = moeyard.ExpertWeights(torch.randn(8, 64, 32, requires_grad=True), torch.randn(8, 32, 32))
        >>> scheme = moeyard.QuantScheme('e4m3', (128, 128), activations='e4m3', activation_group=128)
        >>> routing = moeyard.route(torch.randn(5, 8), top_k=2)
        >>> moeyard.straight_through_experts(torch.randn(5, 32), routing, masters, scheme).sum().backward()
        >>> masters.w13.grad.shape
        torch.Size([8, 64, 32])
    """,
    "dequantize_experts": """
        >>> codes = moeyard.quantize_experts(weights, moeyard.QuantScheme('int8', (1, 0)))
        >>> moeyard.dequantize_experts(codes, torch.float32).w13.dtype
        torch.float32
    """,
    "pack_experts": """
        >>> codes = moeyard.QuantScheme('e2m1', (1, 32), 'e8m0')  # MXFP4
        >>> wide = moeyard.ExpertWeights(torch.randn(8, 2 * 64, 128), torch.randn(8, 128, 64))
        >>> moeyard.pack_experts(moeyard.quantize_experts(wide, codes)).scheme.tiled
        True
    """,
    "unpack_experts": """
        >>> codes = moeyard.QuantScheme('e2m1', (1, 32), 'e8m0')
        >>> wide = moeyard.ExpertWeights(torch.randn(8, 2 * 64, 128), torch.randn(8, 128, 64))
        >>> packed = moeyard.pack_experts(moeyard.quantize_experts(wide, codes))
        >>> moeyard.unpack_experts(packed).scheme.tiled
        False
    """,
    "load_experts": """
        >>> path = moeyard.save_experts(weights, 'checkpoint', 'mlp.experts')
        >>> moeyard.load_experts('checkpoint', 'mlp.experts', device='cpu').w13.shape
        torch.Size([8, 32, 32])
    """,
    "save_experts": """
        >>> moeyard.save_experts(weights, 'checkpoint', 'mlp.experts').name
        'mlp.experts.safetensors'
    """,
    "experts_from_interleaved": """
        >>> moeyard.experts_from_interleaved(torch.randn(8, 32, 2 * 16), torch.randn(8, 16, 32)).w13.shape
        torch.Size([8, 32, 32])
    """,
    "load_balancing_loss": """
        >>> moeyard.load_balancing_loss(torch.zeros(2, 2), torch.tensor([[0], [1]]))
        tensor(1.)
    """,
    "router_z_loss": """
        >>> moeyard.router_z_loss(torch.zeros(4, 1))
        tensor(0.)
    """,
    "update_selection_bias": """
        >>> moeyard.update_selection_bias(torch.zeros(2), torch.tensor([[0], [0]]), rate=0.5)
        tensor([-0.5000,  0.5000])
    """,
    "explain": """
        >>> moeyard.explain('fused_experts', 'cuda', capability=(7, 5)).chosen
        'torch'
    """,
    "warmup": """
        >>> seconds = moeyard.warmup('cpu')
        >>> 'permute cpu cpu' in seconds or 'permute torch cpu' in seconds
        True
    """,
    "ExpertWeights": """
        >>> weights.num_local_experts, weights.intermediate_size
        (8, 16)
    """,
    "Activation": """
        >>> moeyard.Activation('silu', alpha=1.702, beta=1.0, limit=7.0) == moeyard.GPT_OSS_ACTIVATION
        True
    """,
    "Routing": """
        >>> moeyard.Routing(torch.tensor([[1.0]]), torch.tensor([[3]], dtype=torch.int32)).topk_ids
        tensor([[3]], dtype=torch.int32)
    """,
    "Layout": """
        >>> moeyard.moe_align_block_size(torch.tensor([[1], [0]]), num_experts=2, block_size=4).capacity
        8
    """,
    "Permuted": """
        >>> layout = moeyard.moe_align_block_size(torch.tensor([[1], [0]]), num_experts=2, block_size=1)
        >>> moeyard.permute(torch.randn(2, 32), layout, scales=torch.rand(2)).scales.shape
        torch.Size([2])
    """,
    "QuantScheme": """
        >>> str(moeyard.QuantScheme('e4m3', (128, 128), activations='e4m3', activation_group=128))
        'e4m3 128x128, e4m3 per 128'
    """,
    "ExpertScales": """
        >>> moeyard.ExpertScales(w13=torch.ones(8, 32, 1), w2=torch.ones(8, 32, 1)).block_start  # one per row
        0
    """,
}


def add_to(names: Mapping[str, Any], listed: Iterable[str]) -> None:
    """Completes the docstrings of public names. Without docstrings (python -OO) it does nothing."""
    for name in listed:
        found = names[name]
        told = getdoc(found)
        if name not in EXAMPLES or told is None:
            continue
        if is_dataclass(found):
            lines = [fill(f"{field}: {words}", 110, subsequent_indent="    ") for field, words in _fields(found)]
            told += "\n\nFields:\n" + indent("\n".join(lines), "    ")
        example = cleandoc(EXAMPLES[name])
        if "weights" in example and not example.startswith(WEIGHTS):
            example = f"{WEIGHTS}\n{example}"
        found.__doc__ = f"{told}\n\nExample:\n{indent(example, '    ')}\n"


def _fields(found: Any) -> list[tuple[str, str]]:
    """Name and words of the fields that a caller gives; the annotation where nothing else is said."""
    words = _words_in(found.__module__.replace(".", "/")).get(found.__qualname__, {})
    fields = [field for field in found.__dataclass_fields__.values() if field.init]
    return [(field.name, words.get(field.name) or _kind(field)) for field in fields]


def _kind(field: Field[Any]) -> str:
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    return kind if field.default is MISSING else f"{kind}, {field.default!r} unless given"


@cache
def _words_in(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the string that stands below it in a source; nothing where there are no sources."""
    path = Path(__file__).parents[1] / f"{module}.py"
    if not path.is_file():
        return {}
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                field.target.id: " ".join(below.value.value.split())
                for field, below in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            }
    return found
