"""How files lay out the values of a matrix, and what each layout becomes. N: rows of a weight, K: its columns.

Words are int32, lowest bits first, on little-endian machines. So the four bytes of a word of consecutive codes along K
hold two codes each, the even column in the low half: what `quant.py` stores.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its eight columns each four bits of an AWQ word hold, lowest bits first."""


class Stored(NamedTuple):
    """How a file stores a matrix of [N, K] values, and how a part of it is turned into values."""

    dtypes: tuple[str, ...]
    """What safetensors may call the dtype."""
    per_n: int = 1
    """Values along N in a stored item."""
    per_k: int = 1
    turned: bool = False
    """Whether the file's rows run along K, so that its last axis is N."""
    unpack: Callable[[Tensor], Tensor] | None = None
    """Stored items [n, k], or [k, n] if `turned` -> values [N, K], two columns in a byte where `per_byte` is 2. None:
    they are the values."""
    per_byte: int = 1
    """Columns in an element of what `unpack` gives."""
    raw: bool = False
    """Whether the file's bytes are those of the values, if the columns fill the last item of a row."""
    last: int = 0
    """If not 0: the file splits its last axis into pieces of so many items."""

    def shape(self, n: int, k: int) -> tuple[int, int]:
        """The file's (rows, columns) of a matrix of n x k values."""
        items = -(-n // self.per_n), -(-k // self.per_k)
        return (items[1], items[0]) if self.turned else items


def nibbles(items: Tensor) -> Tensor:
    """Codes of four bits along the last axis, [..., w] of int32 or uint8 -> [..., codes] uint8, lowest bits first."""
    pairs = _bytes(items)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


def paired(codes: Tensor) -> Tensor:
    """uint8 codes [..., 2 n] -> [..., n] uint8, the even one in the low four bits."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def words_of(pairs: Tensor) -> Tensor:
    """uint8 [..., bytes] -> [..., ceil(bytes / 4)] int32, lowest byte first, zeros behind the last."""
    return _viewed(torch.nn.functional.pad(pairs, (0, -pairs.shape[-1] % 4)), torch.int32)


def _bytes(items: Tensor) -> Tensor:
    """The bytes of items, along the last axis."""
    return _viewed(items, torch.uint8)


def _viewed(items: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense items as another dtype, along the last axis. An axis of 1 may have any stride, which `view` refuses."""
    flat = items.contiguous().as_strided((items.numel(),), (1,))
    return flat.view(dtype).view(*items.shape[:-1], -1)


def _signed(items: Tensor) -> Tensor:
    """Bytes of code + 128 -> int8."""
    return (_bytes(items) ^ 0x80).view(torch.int8)


def _four_of_eight(items: Tensor) -> Tensor:
    """int8 codes from -8 to 7 -> code + 8, two in a byte."""
    codes = items.view(torch.uint8) + 8
    if bool((codes > 15).any()):
        raise ValueError("expected codes from -8 to 7 (4 bits in bytes)")
    return paired(codes)


def _in_columns(items: Tensor) -> Tensor:
    """AWQ's words [k, n / 8] -> codes [k, n] uint8 in the order of columns."""
    codes = nibbles(items).view(*items.shape, 8)
    return torch.stack([codes[..., AWQ_COLUMNS.index(column)] for column in range(8)], -1).flatten(-2)


def _awq(items: Tensor) -> Tensor:
    """AWQ's words [k, n / 8] -> [n, k / 2] uint8, two codes along k in a byte.

    Words of eight rows are a matrix of 8 x 8 codes. It is transposed in three steps, in which halves, quarters and
    eighths of words change places (Warren, Hacker's Delight, 7-3). Then whole words are transposed: quicker than bytes.
    """
    k, n = items.shape
    rows = torch.nn.functional.pad(items, (0, 0, 0, -k % 8)).unflatten(0, (-1, 8)).unbind(1)
    words = [row.clone() for row in rows]
    for step, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        for low in (number for number in range(8) if not number & step):
            one, two = words[low], words[low + step]
            swapped = (one >> 4 * step).bitwise_xor_(two).bitwise_and_(mask)
            two ^= swapped
            one ^= swapped.bitwise_left_shift_(4 * step)
    in_columns = torch.stack([words[AWQ_COLUMNS.index(column)] for column in range(8)], -1)
    return _bytes(in_columns.view(-1, 8 * n).t())[:, : k // 2]


PLAIN = Stored(("F32", "F16", "BF16", "F64"))
TURNED = PLAIN._replace(turned=True, unpack=lambda items: items.t())
E4M3 = Stored(("F8_E4M3",), raw=True)
INT8 = Stored(("I8",), raw=True)
INT4_IN_BYTES = Stored(("I8",), unpack=_four_of_eight, per_byte=2)
"""compressed-tensors' int-quantized with 4 bits, as llm-compressor writes W4AFP8."""
PAIRS = Stored(("U8",), per_k=2, per_byte=2, raw=True)
"""Two columns in a byte: NVFP4 and MXFP4."""
BLOCKS = PAIRS._replace(last=16)
"""gpt-oss's: the same, the last axis in groups of 32 columns."""
WORDS = {
    4: Stored(("I32",), per_k=8, unpack=_bytes, per_byte=2, raw=True),
    8: Stored(("I32",), per_k=4, unpack=_signed),
}
"""compressed-tensors' pack-quantized, by bits."""
GPTQ = {
    4: Stored(("I32",), per_k=8, turned=True, unpack=lambda items: _bytes(items.t()), per_byte=2),
    8: Stored(("I32",), per_k=4, turned=True, unpack=lambda items: _signed(items.t())),
}
AWQ = Stored(("I32",), per_n=8, turned=True, unpack=_awq, per_byte=2)

SCALES = Stored(("F32", "BF16", "F16"))
EXACT_SCALES = Stored((*SCALES.dtypes, "F8_E8M0"))
"""Block scales: powers of two are made float32, which has them all."""
TURNED_SCALES = SCALES._replace(turned=True, unpack=lambda items: items.t())
POWERS = Stored(("U8", "F8_E8M0"), unpack=lambda items: _viewed(items, torch.float8_e8m0fnu), raw=True)
E4M3_SCALES = Stored(("F8_E4M3",), raw=True)

ZEROS = Stored(("I32",), per_n=8, unpack=lambda items: nibbles(items.t()).t())
"""compressed-tensors' zero points: packed along N, plus 8, as codes are."""
AWQ_ZEROS = Stored(("I32",), per_n=8, turned=True, unpack=lambda items: _in_columns(items).t())
GPTQ_ZEROS = {
    1: Stored(("I32",), per_n=8, turned=True, unpack=lambda items: (nibbles(items).t() + 1) & 15),
    2: Stored(("I32",), per_n=8, turned=True, unpack=lambda items: nibbles(items).t()),
}
"""By the version of the file: 1 stores the zero point less 1, so that 15 stands for 0."""
