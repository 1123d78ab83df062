"""The thresholds of the sources, collected from the code, and what each means as a size of an operator.

A threshold is a module's integer constant with an upper-case name, or an integer above 2 that a function compares with.
`REACHES` says how each becomes a size, so that sizes are drawn on both sides of it; `EXEMPT` says why one does not.
`unknown` gives those of the sources that are in neither.
"""

import ast
import importlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple

from moeyard.testing.callers import OPERATORS
from moeyard.testing.draws import Sizes

SOURCE = Path(__file__).parents[1]
FOLDERS = ("cpu", "vectorised", "triton", "dispatch", "cuda")
SMALLEST_LITERAL = 3
"""Smaller integers in comparisons are not thresholds: sizes of 0, 1 and 2 are drawn anyway."""

Reach = Callable[[int, int, Sizes], Sizes]
"""(threshold, offset of -1, 0 or 1, sizes) -> sizes that lie so far from it."""


class Threshold(NamedTuple):
    """A threshold of the sources."""

    name: str
    """"module:NAME" below moeyard, or "module:function:value" of one without a name."""
    value: int


@cache
def collect() -> tuple[Threshold, ...]:
    """The thresholds of all modules in `FOLDERS` of moeyard."""
    found: dict[str, int] = {}
    for path in sorted(path for folder in FOLDERS for path in (SOURCE / folder).rglob("*.py")):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        names = [name for name in _assigned(tree) if name.isupper()]
        if names:
            loaded = vars(importlib.import_module(f"moeyard.{module}"))
            found.update({f"{module}:{name}": loaded[name] for name in names if type(loaded[name]) is int})
        for function, value in _compared(tree):
            found[f"{module}:{function}:{value}"] = value
    return tuple(Threshold(*one) for one in found.items())


def _assigned(tree: ast.Module) -> list[str]:
    """Names that a module assigns at its top level."""
    targets: list[ast.expr] = []
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            targets += statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets.append(statement.target)
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _compared(tree: ast.Module) -> list[tuple[str, int]]:
    """Functions and the integers that they compare with."""
    found = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
                found += [(function.name, v) for v in map(_integer, sides) if v is not None and v >= SMALLEST_LITERAL]
    return found


def _integer(node: ast.expr) -> int | None:
    """The value of an integer, or of a shifted or multiplied one."""
    if isinstance(node, ast.Constant):
        return node.value if type(node.value) is int else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift | ast.Mult):
        left, right = _integer(node.left), _integer(node.right)
        if left is not None and right is not None:
            return left << right if isinstance(node.op, ast.LShift) else left * right
    return None


# What a threshold means


def _tokens(value: int, off: int, s: Sizes) -> Sizes:
    return s._replace(tokens=max(0, value + off))


def _routes(value: int, off: int, s: Sizes) -> Sizes:
    """As many routes, in tokens of one route."""
    return s._replace(tokens=max(0, value + off), top_k=1, hidden=min(s.hidden, 4), columns=min(s.columns, 4))


def _routes_of_two_parts(value: int, off: int, s: Sizes) -> Sizes:
    return _routes(2 * value, off, s)


def _hidden(value: int, off: int, s: Sizes) -> Sizes:
    return s._replace(hidden=max(1, value + off))


def _columns(value: int, off: int, s: Sizes) -> Sizes:
    return s._replace(columns=max(1, value + off))


def _sides(value: int, off: int, s: Sizes) -> Sizes:
    return s._replace(hidden=max(1, value + off), columns=max(1, value + off))


def _experts(value: int, off: int, s: Sizes) -> Sizes:
    return s._replace(experts=max(1, value + off), top_k=min(s.top_k, max(1, value + off)))


def _top_k(value: int, off: int, s: Sizes) -> Sizes:
    return s._replace(top_k=value + off, experts=max(s.experts, value + off))


def _rows_of_an_expert(value: int, off: int, s: Sizes) -> Sizes:
    """All rows go to one expert."""
    return s._replace(tokens=max(0, value + off), top_k=1, experts=1)


def _row_bytes(value: int, off: int, s: Sizes) -> Sizes:
    return s._replace(hidden=max(1, value // s.dtype.itemsize + off))


def _two_parts_of_row_bytes(value: int, off: int, s: Sizes) -> Sizes:
    """Rows of 1024 bytes in all routes that make two parts; what is summed counts a token's result too."""
    hidden, top_k = 1024 // s.dtype.itemsize, min(s.top_k, 4)
    rows = 2 * value // 1024
    return s._replace(tokens=max(0, rows // (top_k + s.block % 2) + off), top_k=top_k, hidden=hidden)


def _output_bytes(value: int, off: int, s: Sizes) -> Sizes:
    """Rows of 4096 bytes."""
    return s._replace(tokens=value // 4096 + off, top_k=1, hidden=4096 // s.dtype.itemsize)


def _two_parts_of_logits(value: int, off: int, s: Sizes) -> Sizes:
    return s._replace(tokens=2 * value // s.experts + off)


def _two_parts_of_weights(value: int, off: int, s: Sizes) -> Sizes:
    """One expert whose weights make two parts."""
    hidden = 2 * value // (64 * s.dtype.itemsize)
    return s._replace(tokens=min(s.tokens, 8), experts=1, top_k=1, columns=64, hidden=hidden + off)


def _weights_copied_at_once(value: int, off: int, s: Sizes) -> Sizes:
    """As many rows as matrices fit, of sizes that torch's grouped product does not take."""
    hidden, columns = 2047, 1025
    rows = value // (hidden * columns * s.dtype.itemsize)
    return s._replace(tokens=rows + off, top_k=1, experts=2, hidden=hidden, columns=columns)


_SUMS = ("permute", "shuffle_rows", "combine", "moe_sum")
_PRODUCTS = (
    "grouped_gemm by layout",
    "grouped_gemm by offsets",
    "grouped_gemm by counts",
    "fused_experts",
    "quantised experts",
    "moe_layer",
)
_EXPERTS = ("fused_experts", "quantised experts")
_GEMM = ("grouped_gemm by offsets", "fused_experts", "quantised experts")
_LAYOUTS = ("align", "lora")
_ROUTERS = ("route", "route_and_align")
_MOVERS = ("permute", "shuffle_rows", "permute_to_fp8")

REACHES: dict[str, tuple[tuple[str, ...], Reach]] = {
    # "module:NAME" or "module:function:value": the operators that meet it, and how
    "cpu.dots:LANES": (("activate", *_PRODUCTS), _sides),
    "cpu.dots:STEP": (_PRODUCTS, _sides),
    "cpu.layout:_LEAST_ROUTES": (("align",), _routes_of_two_parts),
    "cpu.layout:_BATCH": (_LAYOUTS, _routes),
    "cpu.pointers:IDS": (_LAYOUTS, _routes),
    "cpu.pointers:LINE": (_SUMS, _row_bytes),
    "cpu.pointers:LANES": (_SUMS, _hidden),
    "cpu.products:ROWS": (_PRODUCTS, _rows_of_an_expert),
    "cpu.products:COLUMNS": (_PRODUCTS, _sides),
    "cpu.products:UNIT": (_PRODUCTS, _sides),
    "cpu.products:LEAST_BYTES": (_GEMM, _two_parts_of_weights),
    "cpu.products:BLOCK": (_GEMM, _hidden),
    "cpu.products:product:3": (_PRODUCTS, _rows_of_an_expert),
    "cpu.gradients:_LONGEST": (("grouped_gemm by offsets", "fused_experts"), _rows_of_an_expert),
    "cpu.router:_LEAST_LOGITS": (_ROUTERS, _two_parts_of_logits),
    "cpu.rows:_LEAST_BYTES": (_SUMS, _two_parts_of_row_bytes),
    "cpu.rows:_STREAMED_BYTES": (_SUMS, _output_bytes),
    "vectorised.experts:_CHUNK_BYTES": (("grouped_gemm by offsets",), _weights_copied_at_once),
    "vectorised.experts:_COLUMNS": (_PRODUCTS, _sides),
    "vectorised.experts:_MOST_IN_A_BLOCK": (("quantised experts",), _rows_of_an_expert),
    "triton.steps:_MOST_ALONE": (_EXPERTS, _routes),
    "triton.steps:_CHUNK": (_EXPERTS, _routes),
    "triton.steps:SIDE_BY_SIDE": (_EXPERTS, _tokens),
    "triton.coded:GROUP": (("quantised experts",), _sides),
    "triton.plan:product_tile:64": (_GEMM, _rows_of_an_expert),
    "triton.plan:product_tile:128": (_GEMM, _rows_of_an_expert),
    "triton.plan:product_tile:1024": (_GEMM, _hidden),
    "triton.plan:coded_tile:64": (("quantised experts",), _rows_of_an_expert),
    "triton.plan:coded_tile:128": (("quantised experts",), _rows_of_an_expert),
    "cuda.experts.product:product_defines:128": (_GEMM, _rows_of_an_expert),
    "dispatch.call:_MANY_EXPERTS": (_LAYOUTS, _experts),
    "dispatch.sizes:MOST_FUSED_TOKENS": (_ROUTERS, _tokens),
    "cuda.align.launchers:_ALWAYS_FIT": (_LAYOUTS, _experts),
    "cuda.align.plan:MAX_THREADS": (_LAYOUTS, _experts),
    "cuda.align.plan:MAX_ROUNDS": (_LAYOUTS, lambda value, off, s: _routes(32 * 32 * value, off, s)),
    "cuda.align.plan:_candidates:4096": (_LAYOUTS, _routes),
    "cuda.align.plan:_candidates:32": (_LAYOUTS, _experts),
    "cuda.align.plan:_candidates:524288": (("align",), _routes),
    "cuda.align.plan:_candidates:2048": (_LAYOUTS, _routes),
    "cuda.align.plan:_candidates:131072": (("align",), _routes),
    "cuda.align.plan:_candidates:16384": (("align",), _routes),
    "cuda.align.plan:_in_few:4096": (_LAYOUTS, _routes),
    "cuda.align.plan:_in_few:16384": (("align",), _routes),
    "cuda.align.plan:_in_few:131072": (("align",), _routes),
    "cuda.align.plan:_MOST_IN_FEW": (("align",), _routes),
    "cuda.experts.product:ALIGNMENT": (_PRODUCTS, _row_bytes),
    "cuda.experts.launchers:_UNIT": (_PRODUCTS, _columns),
    "cuda.experts.launchers:_BLOCK": (_PRODUCTS, _columns),
    "cuda.experts.outer:_PIECE": (_PRODUCTS, _sides),
    "cuda.experts.plan:WARPGROUP": (_GEMM, _columns),
    "cuda.experts.plan:_WEIGHT_ROWS": (_GEMM, _columns),
    "cuda.experts.plan:_COPIED_ROWS": (_GEMM, _rows_of_an_expert),
    "cuda.experts.plan:_COPIED_RESULTS": (
        _GEMM,
        lambda value, off, s: _rows_of_an_expert(-(-value // 2048), off, s)._replace(columns=2048),
    ),
    "cuda.experts.few_tokens_plan:WORD": (_PRODUCTS, _sides),
    "cuda.experts.few_tokens_plan:_COPY_BYTES": (_PRODUCTS, _sides),
    "cuda.experts.few_tokens_plan:_SEGMENT_WORDS": (_GEMM, lambda value, off, s: _hidden(8 * value, 8 * off, s)),
    "cuda.experts.few_tokens_plan:_LEAST_COPY_BYTES": (_GEMM, lambda value, off, s: _columns(value // 2, 8 * off, s)),
    "cuda.experts.few_tokens_plan:_MOST_ROWS": (_GEMM, _rows_of_an_expert),
    "cuda.experts.plan:shared_bytes:128": (_GEMM, _rows_of_an_expert),
    "cuda.experts.plan:box:16": (_GEMM, _rows_of_an_expert),
    "cuda.experts.plan:box:64": (_GEMM, _rows_of_an_expert),
    "cuda.experts.plan:product_plan:3": (_GEMM, _tokens),
    "cuda.route.launchers:BLOCK_THREADS": (_ROUTERS, _tokens),
    "cuda.route.plan:_MOST_EXPERTS_A_LANE": (_ROUTERS, lambda value, off, s: _experts(32 * value, off, s)),
    "cuda.route.plan:route_align_plan:16": (_ROUTERS, _tokens),
    "cuda.route.plan:route_align_plan:8": (_ROUTERS, _tokens),
    "cuda.rows.launchers:_WIDEST": (_MOVERS, _row_bytes),
    "cuda.rows.launchers:_MOST_STATIC": (("combine", "moe_sum"), _top_k),
    "cuda.rows.launchers:permute_ready:4": (("permute",), _top_k),
    "cuda.rows.plan:_ENOUGH_WORDS": (_SUMS, lambda value, off, s: _output_bytes(16 * value, off, s)),
    "cuda.rows.plan:row_plan:8": (("combine", "moe_sum"), _top_k),
    "cuda.rows.plan:whole_row_plan:512": (("permute_to_fp8",), lambda value, off, s: _hidden(4 * value, off, s)),
    "cuda.runtime.cards:WARP": (("align", "fused_experts", "route_and_align"), _routes),
}
EXEMPT = {
    # a name: why nothing is drawn beside it
    "dispatch.again:_MOST": "calls that are known again",
    "cpu.activation:_SILU": "the code of an activation",
    "cpu.activation:_GELU": "the code of an activation",
    "cpu.activation:_GELU_TANH": "the code of an activation",
    "cpu.activation:_RELU2": "the code of an activation",
    "cpu.coded.": "codes of dtypes and schemes, fields of plans; sizes meet cpu.products and cpu.dots",
    "cpu.layout:_APART": "the distance of counters, which no size is compared with",
    "cpu.layout:_place:4": "the bytes of an id: both widths are drawn as dtypes",
    "cpu.layout:_rank_any:8": "the bytes of an id: both widths are drawn as dtypes",
    "cpu.layout:_place_any:8": "the bytes of an id: both widths are drawn as dtypes",
    "cpu.products:FLOAT32": "the code of a dtype",
    "cpu.products:BFLOAT16": "the code of a dtype",
    "cpu.products:FLOAT16": "the code of a dtype",
    "cpu.router:SOFTMAX": "a way of scoring",
    "cpu.router:SIGMOID": "a way of scoring",
    "cpu.rows:_FLOAT32": "the code of a dtype",
    "cpu.rows:_BFLOAT16": "the code of a dtype",
    "cpu.rows:_FLOAT16": "the code of a dtype",
    "vectorised.quant:code_values:4": "a code of e2m1",
    "vectorised.quant:code_values:7": "a code of e2m1",
    "vectorised.router:_LEAST": "a key below all others",
    "triton.steps:MOST_PLANS": "the length of a cache",
    "triton.plan:PINNED_ROWS": "a tile's rows, whatever the sizes",
    "triton.launch:_kind:2147483648": "the width of an integer",
    "triton.plan:product_tile:9": "a compute capability",
    "triton.plan:outer_tile:9": "a compute capability",
    "triton.plan:_BUFFERS": "stages of shared memory, which sizes of tiles decide",
    "triton.plan:_LARGE": "the size of a tile, which a card and sizes of matrices decide",
    "triton.plan:coded_tile:9": "a compute capability",
    "triton.coded_kernels:widened:127": "a code of e4m3",
    "cuda.align.plan:_REGISTERS": "what a card has",
    "cuda.align.plan:_REGISTERS_A_THREAD": "what a card has",
    "cuda.align.plan:_PARTITIONS": "what a card has",
    "cuda.align.plan:CLUSTER": "blocks of a cluster, whatever the sizes",
    "cuda.experts.plan:_TABLE_BITS": "the width of an entry",
    "cuda.experts.plan:_ENTRY_BYTES": "the width of an entry",
    "cuda.experts.plan:_MOST_STAGES": "stages of shared memory, which sizes of tiles decide",
    "cuda.experts.outer:_TALL": "columns of a tile; gradients have tests of their own",
    "cuda.experts.outer:_STAGES": "stages of shared memory",
    "cuda.experts.outer:_STAGE_ROWS": "rows of a stage; gradients have tests of their own",
    "cuda.experts.outer:_BARRIERS_BYTES": "bytes of a block's shared memory",
    "cuda.experts.layer:_LINE": "where parts of a layer's memory begin",
    "cuda.experts.product:TURNS": "where products keep their turns",
    "cuda.experts.plan:_ENTRIES_OF_FEW": "the length of a table, which shared memory has room for",
    "cuda.experts.few_tokens_plan:_ROUTES_BYTES": "bytes of a block's shared memory",
    "cuda.experts.few_tokens_plan:_BARRIER_BYTES": "bytes of a block's shared memory",
    "cuda.experts.few_tokens_plan:_RING_BYTES": "bytes of a block's shared memory",
    "cuda.experts.few_tokens_plan:_ENOUGH_RING_BYTES": "bytes of a block's shared memory",
    "cuda.experts.few_tokens_plan:_LEAST_RING_BYTES": "bytes of a block's shared memory",
    "cuda.experts.few_tokens_plan:_LITTLE_BYTES": "chooses between plans of several hundred MB of weights",
    "cuda.experts.few_tokens_plan:_MOST_SLOTS": "slots of shared memory, which sizes of tiles decide",
    "cuda.experts.few_tokens_plan:_MOST_VALUES": "rows of 65536 values: weights of several GB",
    "cuda.experts.few_tokens_plan:_MOST_REPEATED_BYTES": "chooses between plans of several hundred MB of weights",
    "triton.plan:four_bit_tile:64": "tiles of 4 bits; quantised layers have tests of their own",
    "triton.plan:four_bit_tile:9": "a compute capability",
    "triton.four_bits_kernels:scale_of:255": "a code of e8m0",
    "triton.four_bits_kernels:part_of_sum:4": "groups of a tile",
    "triton.four_bits_kernels:four_bits_product_kernel:64": "columns of a tile",
    "cuda.experts.coded:GROUP": "columns of a scale; quantised layers have tests of their own",
    "cuda.experts.four_bits_plan:TOGETHER": "tiles of 4 bits; quantised layers have tests of their own",
    "cuda.experts.four_bits_plan:MOST_TOKENS": "tiles of 4 bits; quantised layers have tests of their own",
    "cuda.experts.four_bits_plan:_MOST_MEAN": "tiles of 4 bits; quantised layers have tests of their own",
    "cuda.experts.four_bits_plan:_TILE_BYTES": "the bytes of a tile",
    "cuda.experts.four_bits_plan:_RING_BYTES": "bytes of a block's shared memory",
    "cuda.experts.four_bits_plan:_LEAST_RING_BYTES": "bytes of a block's shared memory",
    "cuda.experts.four_bits_plan:_LEAST_SLOTS": "slots of shared memory, which sizes of tiles decide",
    "cuda.experts.four_bits_plan:_MOST_SLOTS": "slots of shared memory, which sizes of tiles decide",
    "cuda.experts.four_bits_plan:_WARPS": "warps of a block, whatever the sizes",
    "cuda.experts.four_bits_plan:_BESIDE_ROUTES": "tiles of 4 bits; quantised layers have tests of their own",
    "cuda.experts.four_bits_plan:_LEAST_ROUTES": "tiles of 4 bits; quantised layers have tests of their own",
    "cuda.experts.four_bits_many:_BLOCK": "threads of a block, whatever the sizes",
    "cuda.experts.four_bits_many:_BLOCKS": "blocks of a multiprocessor, whatever the sizes",
    "cuda.experts.four_bits_many:_COLUMNS": "columns that tiles are a multiple of",
    "cuda.experts.four_bits_many:_STEP_BYTES": "the bytes of a tile",
    "cuda.experts.four_bits_many_plan:_WEIGHT_ROWS": "tiles of 4 bits; quantised layers have tests of their own",
    "cuda.experts.four_bits_many_plan:_STAGE_ALIGNMENT": "bytes of a block's shared memory",
    "cuda.experts.four_bits_many_plan:_BARRIER_BYTES": "bytes of a block's shared memory",
    "cuda.experts.four_bits_many_plan:_MOST_STAGES": "stages of shared memory, which sizes of tiles decide",
    "cuda.experts.four_bits_many_plan:_STREAMED_ROWS": "tiles of 4 bits; quantised layers have tests of their own",
    "cuda.experts.plan:_MOST_ROWS_IN_BLOCKS": "tiles of codes; quantised layers have tests of their own",
    "cuda.experts.plan:_COPIED_CODE_COLUMNS": "tiles of codes; quantised layers have tests of their own",
    "dispatch.schemes:_coded:128": "the block of a scheme",
    "dispatch.sizes:_SINGLY": "which numbers of tokens are tried ahead of time",
    "cuda.runtime.": "driver, caches and alignment of tables, which no size is compared with",
}
"""A name that ends in "." stands for a folder; `REACHES` comes first."""


def _exempt(name: str) -> bool:
    return any(name == key or (key[-1] == "." and name.startswith(key)) for key in EXEMPT)


def unknown() -> list[str]:
    """Thresholds of the sources that `REACHES` and `EXEMPT` do not know."""
    return [one.name for one in collect() if one.name not in REACHES and not _exempt(one.name)]


def gone() -> list[str]:
    """What `REACHES` and `EXEMPT` know and the sources no longer have."""
    names = [one.name for one in collect()]
    missing = [key for key in REACHES if key not in names]
    return missing + [key for key in EXEMPT if key[-1] != "." and key not in names]


def near(name: str, sizes: Sizes, rng: Random, known: Sequence[Threshold]) -> tuple[Sizes, str]:
    """Sizes just below, at or just above a threshold that the operator `name` meets; and which."""
    met = [one for one in known if one.name in REACHES and name in REACHES[one.name][0]]
    if not met:
        return sizes, ""
    one, off = rng.choice(met), rng.choice([-1, 0, 1])
    return REACHES[one.name][1](one.value, off, sizes), f"{one.name}{off:+d}"


def draw_sizes(name: str, rng: Random, known: Sequence[Threshold], most: int) -> tuple[Sizes, str]:
    """Small sizes, or sizes at a threshold of at most `most` elements of tensors; and what they are near."""
    operator = OPERATORS[name]
    while True:
        experts = rng.choice([1, 2, 3, 8, 8, 16, 24, 64])
        sizes = Sizes(
            tokens=rng.choice([0, 1, 2, 3, 5, rng.randrange(40)]),
            top_k=rng.randint(1, min(4, experts)),
            experts=experts,
            hidden=rng.choice([1, 8, 16, 24, 64, rng.randint(1, 150)]),
            columns=rng.choice([1, 8, 16, 24, 64, rng.randint(1, 100)]),
            block=rng.choice([1, 1, 4, 16, 5]),
            dtype=rng.choice(operator.dtypes),
        )
        where = "small"
        if rng.random() < 0.6:
            sizes, where = near(name, sizes, rng, known)
        if cost(name, sizes) <= most and sizes.top_k <= sizes.experts:
            return sizes, where or "small"


def cost(name: str, sizes: Sizes) -> int:
    """Elements of the largest tensors, and multiplications, of a question of these sizes."""
    routes = sizes.tokens * sizes.top_k
    slots = routes + min(routes, sizes.experts) * (sizes.block - 1)
    if OPERATORS[name].op in ("grouped_gemm", "fused_experts"):
        return max(1, routes // 16) * sizes.hidden * sizes.columns + 3 * sizes.experts * sizes.hidden * sizes.columns
    if OPERATORS[name].op == "route":
        return sizes.tokens * sizes.experts * 16
    if OPERATORS[name].op in ("moe_align_block_size", "batched_moe_align_block_size", "moe_lora_align_block_size"):
        return 8 * slots + sizes.experts
    return slots * (sizes.hidden + 64)
