"""Triton's kernels compiled for cards that are not there, as launchers have them compiled."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moeyard.triton.launch import Step
from moeyard.triton.plan import Card

KINDS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def _source(step: Step, dtypes: tuple[torch.dtype | None, ...]) -> ASTSource:
    """A step's kernel as launchers have it compiled: aligned pointers, sizes by divisibility where that counts."""
    names = step.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    values: list[Any] = [*dtypes, *step.sizes, *step.constants.values()]
    assert names[len(dtypes) + len(step.sizes) :] == list(step.constants)
    for i, (name, value, parameter) in enumerate(zip(names, values, step.kernel.params, strict=True)):
        special = not parameter.do_not_specialize
        if isinstance(value, torch.dtype):
            signature[name] = KINDS[value]
        elif i < len(dtypes) + len(step.sizes) and value is not None and not (special and value == 1):
            signature[name] = "i32" if value < 2**31 else "i64"
        else:
            signature[name], constants[(i,)] = "constexpr", value
        if isinstance(value, torch.dtype) or (signature[name] != "constexpr" and special and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(step.kernel, signature, constants, attributes)


def built(step: Step, dtypes: tuple[torch.dtype | None, ...], card: Card, path: Path) -> dict[str, Any]:
    """What the compiler and ptxas say of a step on a card, compiled without one: spilled bytes, instructions, PTX."""
    arch = card.capability[0] * 10 + card.capability[1]
    kernel = triton.compile(_source(step, dtypes), target=GPUTarget("cuda", arch, 32), options=step.options)
    source = path / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    command = [
        knobs.nvidia.ptxas.path,
        "-v",
        f"--gpu-name=sm_{arch}{'a' * (arch == 90)}",
        str(source),
        "-o",
        os.devnull,
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills is not None
    return {
        "spilled": int(spills[1]) + int(spills[2]),
        "shared": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "mma": kernel.asm["ptx"].count("mma.sync"),
        "ptx": kernel.asm["ptx"],
    }
