"""How the weights of experts may be quantised: the values that say it. dispatch/schemes.py says who takes which."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Codes(NamedTuple):
    """How the values of a code are stored."""

    dtype: torch.dtype
    per_byte: int = 1
    """Two values share a byte along the last axis: the one of the even column has the low four bits."""


CODES: dict[str, Codes] = {
    "e4m3": Codes(torch.float8_e4m3fn),
    "int8": Codes(torch.int8),
    "int4": Codes(torch.uint8, 2),
    "e2m1": Codes(torch.uint8, 2),
}
"""What the bits of a weight mean. e4m3: the float of 8 bits without infinities. int4: the code less 8, or less its zero
point. e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and their negatives where bit 3 is set."""
SCALES: dict[str, tuple[torch.dtype, ...]] = {
    "float": (torch.float32, torch.bfloat16, torch.float16),
    "e8m0": (torch.float8_e8m0fnu,),
    "e4m3": (torch.float8_e4m3fn,),
}
"""Dtypes of scales. e8m0: 2 to the power of the byte less 127; 255 is NaN."""
LARGEST = {"e4m3": 448.0, "int8": 127.0}
"""The largest magnitude that a code of activations has: what the largest value of a row or group becomes."""
TILE_ROWS, TILE_COLUMNS = 16, 64
"""Of a tile of weights of 4 bits (`pack_experts`): what a warp multiplies at a time."""
LEAST_MAGNITUDE = 1e-10
"""Rows and groups with smaller values are quantised as if their largest magnitude were this, so none divides by 0."""


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How the weights of a layer's experts are quantised, and what they are multiplied by.

    A weight is its code times the scale of its block, times the expert's global scale where there is one. Activations
    are the rows of both products: hidden states, and what the activation leaves, rounded to the dtype of the hidden
    states. With `activations` they are quantised once each: with a dynamic scale, max(largest magnitude, 1e-10) over
    the largest code (448, 127), or a static one; value / scale is rounded to the nearest code, ties to even, and
    saturated. Router weights on the input multiply before. All of this is in float32.
    """

    weights: str
    """A code of `CODES`."""
    block: tuple[int, int] = (0, 0)
    """Weight rows and columns that share a scale; 0: all of a matrix. (0, 0): one scale per matrix (gate and up have
    one each); (1, 0): one per row (channel); (128, 128): blocks; (1, 32): groups of 32 columns."""
    scales: str = "float"
    """What scales are, of `SCALES`."""
    zero_points: bool = False
    """Of int4: whether each block has one; 8 unless."""
    global_scales: bool = False
    """Whether each matrix has one more scale, as NVFP4's do (gate and up one each)."""
    activations: str = "none"
    """"none": rows stay in their dtype; "e4m3" or "int8": they are quantised."""
    activation_group: int = 0
    """Consecutive columns of a row that share a scale; 0: all of it (per token)."""
    static: bool = False
    """Whether the scale of activations is given, one per expert and product."""
    dynamic_second: bool = False
    """Whether the second product's rows have a dynamic scale each, though the first product's is given."""
    tiled: bool = False
    """Of 4 bits: whether codes, scales and zero points lie in tiles of 16 rows, as GPU kernels read them
    (`pack_experts`). Shapes are those of rows."""

    def __post_init__(self) -> None:
        """Refuses what means nothing."""
        for name, value, known in (
            ("weights", self.weights, tuple(CODES)), ("scales", self.scales, tuple(SCALES)),
            ("activations", self.activations, ("none", *LARGEST)),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        whole = isinstance(self.block, tuple) and len(self.block) == 2
        if not whole or not all(type(size) is int and size >= 0 for size in self.block):
            raise ValueError(f"block: expected (rows, columns) of 0 and above, got {self.block!r}")
        if self.block[1] % CODES[self.weights].per_byte:
            raise ValueError(f"block: expected an even number of columns for {self.weights}, got {self.block}")
        if self.zero_points and self.weights != "int4":
            raise ValueError(f"zero_points: expected False for {self.weights} (int4 alone has them), got True")
        if type(self.activation_group) is not int or self.activation_group < 0:
            raise ValueError(f"activation_group: expected 0 or more columns, got {self.activation_group!r}")
        if self.activations == "none" and (self.activation_group or self.static):
            raise ValueError("activations: expected a code beside activation_group or static, got 'none'")
        if self.static and self.activation_group:
            raise ValueError(f"activation_group: expected 0 for static scales, got {self.activation_group}")
        if self.dynamic_second and not self.static:
            raise ValueError("static: expected True beside dynamic_second, got False")
        if self.tiled and not fits_tiles(replace(self, tiled=False)):
            raise ValueError(
                "tiled: expected False but for weights of 4 bits with one scale per row and 16, 32, 64, a multiple of "
                "64, or all columns, beside rows as they are or of e4m3 with one dynamic scale each, "
                f"got True for {replace(self, tiled=False)}"
            )

    @property
    def per_byte(self) -> int:
        """Weights that share a byte."""
        return CODES[self.weights].per_byte

    @property
    def period(self) -> int:
        """Rows or columns after which blocks and groups begin together: `ExpertScales.block_start` is below it."""
        return math.lcm(*(size for size in (*self.block, self.activation_group) if size))

    def __str__(self) -> str:
        """The scheme in words, which `scheme_of` reads: "e4m3 128x128, e4m3 per 128"."""
        rows, columns = (str(size or "*") for size in self.block)
        first = f"{self.weights} {rows}x{columns}" + "" .join(
            f" {word}"
            for word, there in (
                (f"{self.scales} scales", self.scales != "float"), ("zero points", self.zero_points),
                ("global scales", self.global_scales), ("tiled", self.tiled),
            )
            if there
        )  # fmt: skip
        if self.activations == "none":
            return first
        given = "static first" if self.dynamic_second else "static"
        how = given if self.static else f"per {self.activation_group or 'row'}"
        return f"{first}, {self.activations} {how}"


def groups_fit_tiles(block: tuple[int, int]) -> bool:
    """Whether groups of columns of one row each divide the columns of a tile, or are a multiple of them."""
    rows, columns = block
    return rows == 1 and (columns % TILE_COLUMNS == 0 or columns in (TILE_COLUMNS // 4, TILE_COLUMNS // 2))


def meets_tiles(scheme: QuantScheme) -> bool:
    """Whether codes have 4 bits, and the rows that they meet are those that kernels of tiles know."""
    per_row = scheme.activations == "e4m3" and not scheme.activation_group and not scheme.static
    return scheme.per_byte == 2 and (scheme.activations == "none" or per_row)


def fits_tiles(scheme: QuantScheme) -> bool:
    """Whether `pack_experts` takes weights of a scheme, if their sizes fit."""
    return meets_tiles(scheme) and groups_fit_tiles(scheme.block)


_WORDS = re.compile(
    r"(?P<weights>\w+) (?P<rows>\d+|\*)x(?P<columns>\d+|\*)(?: (?P<scales>(?!global)\w+) scales)?"
    r"(?P<zero> zero points)?(?P<more> global scales)?(?P<tiled> tiled)?"
    r"(?:, (?P<activations>\w+) (?:(?P<static>static)(?P<first> first)?|per (?P<group>\w+)))?"
)


@lru_cache(maxsize=256)
def scheme_of(words: str) -> QuantScheme:
    """The scheme whose `str` this is; ValueError for other words."""
    found = _WORDS.fullmatch(words)
    if found is None:
        raise ValueError(f"scheme: expected words as '{FP8_BLOCK}', got {words!r}")
    rows, columns = (0 if found[name] == "*" else int(found[name]) for name in ("rows", "columns"))
    group = found["group"]
    if group not in (None, "row") and not group.isdecimal():
        raise ValueError(f"scheme: expected 'per row' or a number of columns, got {words!r}")
    return QuantScheme(
        found["weights"], (rows, columns), found["scales"] or "float", found["zero"] is not None,
        found["more"] is not None, found["activations"] or "none", int(group) if group not in (None, "row") else 0,
        found["static"] is not None, found["first"] is not None, found["tiled"] is not None,
    )  # fmt: skip


FP8_TENSOR = QuantScheme("e4m3", activations="e4m3")
"""One scale per matrix, activations per token: compressed-tensors' tensor strategy."""
FP8_TENSOR_STATIC = QuantScheme("e4m3", activations="e4m3", static=True)
FP8_CHANNEL = QuantScheme("e4m3", (1, 0), activations="e4m3")
"""One scale per row of a weight, activations per token: "FP8 dynamic" of compressed-tensors."""
FP8_BLOCK = QuantScheme("e4m3", (128, 128), activations="e4m3", activation_group=128)
"""DeepSeek-V3's: blocks of 128 x 128, activations in groups of 128."""
FP8_WEIGHTS = QuantScheme("e4m3", (1, 0))
"""Weights alone, one scale per row (W8A16)."""
FP8_BLOCK_WEIGHTS = QuantScheme("e4m3", (128, 128))
INT8_CHANNEL = QuantScheme("int8", (1, 0), activations="int8")
"""One scale per row of a weight, activations per token (W8A8)."""
INT8_WEIGHTS = QuantScheme("int8", (1, 0))
MXFP4 = QuantScheme("e2m1", (1, 32), "e8m0")
"""gpt-oss's: groups of 32, one power of two each (OCP Microscaling)."""
MXFP4_FP8 = QuantScheme("e2m1", (1, 32), "e8m0", activations="e4m3")
"""MXFP4 weights times rows of e4m3, one dynamic scale per token (W4A8). It changes results, so nothing chooses it by
itself: `dataclasses.replace(weights, scheme=...)` gives it to weights of `MXFP4`."""
NVFP4 = QuantScheme("e2m1", (1, 16), "e4m3", global_scales=True)
"""Groups of 16 with e4m3 scales, and one global scale per matrix, which multiplies."""


def int4_scheme(group_size: int = 128, *, zero_points: bool = False, activations: str = "none") -> QuantScheme:
    """Integers of 4 bits, one scale per row and `group_size` columns (0: per row); GPTQ, AWQ, compressed-tensors.

    `activations="e4m3"` multiplies them by rows of e4m3, one dynamic scale per token (W4A8), which changes results.
    """
    return QuantScheme("int4", (1, group_size), zero_points=zero_points, activations=activations)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertScales:
    """The scales of the experts of one layer on one rank. E experts, H hidden_size, I intermediate_size.

    A matrix of R rows and C columns has ceil(R / rows) x ceil(C / columns) blocks; gate and up are matrices of I rows
    of their own, gate's blocks first.
    """

    w13: Tensor
    """[E, blocks of gate's rows and of up's, blocks of columns], dtype of the scheme's scales."""
    w2: Tensor
    """[E, blocks of rows, blocks of columns], dtype of `w13`."""
    w13_zero_points: Tensor | None = None
    """uint8 of the shape of `w13`; int4 with zero points alone."""
    w2_zero_points: Tensor | None = None
    w13_global: Tensor | None = None
    """[E, 2] float32, of gate and of up (without a gate [E, 1]); multiplies."""
    w2_global: Tensor | None = None
    """[E, 1] float32; multiplies."""
    w13_input: Tensor | None = None
    """[E] float32: the scale of the first product's rows; static activations alone."""
    w2_input: Tensor | None = None
    """[E] float32: the same of the second product; None where its rows have dynamic scales."""
    block_start: int = 0
    """Where the first of the I rows of gate and up, and of the I columns of w2, lies in the matrices that these are a
    slice of (tensor parallelism), modulo `QuantScheme.period`: a slice may begin inside a block or group."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The eight tensors in the order of the fields."""
        return (
            self.w13, self.w2, self.w13_zero_points, self.w2_zero_points, self.w13_global, self.w2_global,
            self.w13_input, self.w2_input,
        )  # fmt: skip

    def moved(self, move: Callable[[Tensor], Tensor]) -> "ExpertScales":
        """What `move` makes of every tensor."""
        first, second, *rest = (None if tensor is None else move(tensor) for tensor in self.tensors)
        assert first is not None and second is not None
        a, b, c, d, e, f = rest
        return ExpertScales(first, second, a, b, c, d, e, f, self.block_start)


def blocks_of(size: int, block: int, start: int = 0) -> int:
    """Blocks that `size` rows or columns touch, the first of which is number `start` of a larger matrix."""
    return 1 if not block else -(-(start % block + size) // block)


def scale_shapes(
    scheme: QuantScheme, hidden_size: int, intermediate_size: int, gated: bool, start: int = 0
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of an expert's scales of w13 and of w2."""
    rows, columns = scheme.block
    of_half = blocks_of(intermediate_size, rows, start)
    first = of_half * (2 if gated else 1), blocks_of(hidden_size, columns)
    return first, (blocks_of(hidden_size, rows), blocks_of(intermediate_size, columns, start))
