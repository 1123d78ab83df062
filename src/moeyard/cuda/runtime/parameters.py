"""How values reach a kernel: numbers as 64-bit parameters, dtypes as macros."""

import struct

import torch

KINDS = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}
"""The names of dtypes in rows.cuh."""


def float_bits(value: float) -> int:
    """The bits of a float32."""
    return int(struct.unpack("I", struct.pack("f", value))[0])


def division(divisor: int) -> tuple[int, int]:
    """(magic, shift) such that x // divisor == x * magic >> shift for every x in [0, 2^31), with magic in 32 bits."""
    shift = 31 + (divisor - 1).bit_length()
    return (1 << shift) // divisor + 1, shift


def id_type(dtype: torch.dtype) -> str:
    """The C++ type of ids of a dtype."""
    return "i64" if dtype == torch.int64 else "int"
