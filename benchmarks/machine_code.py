"""Digests of the machine code of a named list of CUDA kernels: `python benchmarks/machine_code.py [FILE]`.

Sources are compiled with NVRTC for sm_90a; no GPU is needed. A digest covers the instructions, the literals, the
registers and the static shared memory of all kernels of a cubin, and no names. With FILE the digests are compared with
those that it holds, and the exit status is 1 if any differs; without it they are printed as JSON.
"""

import argparse
import hashlib
import json
import re
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from moeyard.cuda.align.launchers import align_defines
from moeyard.cuda.align.plan import AlignPlan, align_plan
from moeyard.cuda.experts.few_tokens import few_tokens_defines
from moeyard.cuda.experts.few_tokens_plan import ExpertSizes, few_tokens_plan
from moeyard.cuda.experts.plan import Way, product_plan
from moeyard.cuda.experts.product import product_defines
from moeyard.cuda.route.launchers import router_defines
from moeyard.cuda.route.plan import route_align_plan, router_plan
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.compile import compile_source, compiler_version
from moeyard.cuda.runtime.sources import SOURCES
from moeyard.dispatch.sizes import layout_capacity
from moeyard.values import GPT_OSS_ACTIVATION, Activation

ARCH = "sm_90a"
H200 = Card(132, 232448, True)
Defines = tuple[tuple[str, str], ...]
Kernels = Iterator[tuple[str, str, Defines]]
"""(name, source, definitions)"""
ROUTES = {"tiny": 8, "alone": 2048, "cluster": 65536, "grid": 1 << 19, "long": 1 << 24}


def alignments() -> Kernels:
    """Every exchange for 64 and 256 experts, and both layouts of batches."""
    for exchange, routes in ROUTES.items():
        for experts in (64, 256):
            plan: AlignPlan = align_plan(routes, experts, layout_capacity(routes, experts, 16), H200)
            assert plan.exchange == exchange.upper()
            yield (
                f"align {exchange}, {experts} experts",
                "align.cu",
                align_defines(plan, experts, "int", True, True, True),
            )
            wide = align_defines(plan, experts, "i64", False, False, False)
            yield f"align {exchange}, {experts} experts, mapped int64, first outputs", "align.cu", wide
    for threads, per in ((128, 1), (256, 1), (1024, 8)):
        yield f"batched, {threads} threads", "batched.cu", (("BLOCK", str(threads)), ("EXPERTS_A_THREAD", str(per)))


def routers() -> Kernels:
    """Routers of a warp, of a block, and with the alignment in the same launch."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for experts in (64, 128, 256, 512):
        for name, dtype in kinds.items():
            defines = router_defines(experts, 1, dtype, "softmax", None, 0, router_plan(experts, 1))
            yield f"route, {experts} experts, {name}", "route.cu", defines
    grouped = router_defines(256, 8, torch.float32, "sigmoid", 0, 0, router_plan(256, 8))
    yield "route, 256 experts in 8 groups, sigmoid with a bias", "route.cu", grouped
    block = router_defines(2048, 64, torch.bfloat16, "sigmoid", 0, 0, router_plan(2048, 64))
    yield "route_block, 2048 experts in 64 groups", "route_block.cu", block
    for tokens in (1, 8, 64):
        for experts in (64, 256):
            plan = route_align_plan(tokens, 8, experts, layout_capacity(tokens * 8, experts, 16), H200)
            assert plan is not None
            defines = (
                *router_defines(experts, 1, torch.bfloat16, "softmax", None, 0, router_plan(experts, 1)),
                *align_defines(plan.align, experts, "int", True, True, True),
                ("SHARED_IDS", "1"),
                ("BLOCKS_THAT_SHARE", str(plan.peers)),
            )
            yield f"route_align, {tokens} tokens, {experts} experts", "route_align.cu", defines


def rows() -> Kernels:
    """Rows that are sent, gathered, summed and quantised."""
    common = {"BLOCK": 256, "LOADS": 2, "STORE": "__stcs"}

    def given(**more: object) -> Defines:
        return tuple((name, str(value)) for name, value in (common | more).items())

    for word, scale in ((16, 0), (8, 4), (1, 1)):
        yield f"send, words of {word}", "send.cu", given(MAP_TYPE="int", WORD=word, SCALE_WORD=scale)
    yield "shuffle, int64", "send.cu", given(MAP_TYPE="i64", WORD=16, SCALE_WORD=0)
    for kind in ("FLOAT32", "BFLOAT16", "FLOAT16"):
        for top_k, routes in ((8, "MAPPED"), (2, "ALL_ROUTES"), (0, "BY_MAP"), (10, "BY_ID")):
            weights = "true" if routes == "MAPPED" else "false"
            defines = given(ROW_KIND=kind, WORD=16, STATIC_TOP_K=top_k, WEIGHTS=weights, ROUTES=routes, ID="int")
            yield f"sum, {kind}, {routes}", "sum.cu", defines
        for grouped in ("true", "false"):
            defines = given(
                ROW_KIND=kind, WORD=16, GROUPS=grouped, WHOLE_ROW="true", THREADS_A_ROW=64, MAP_TYPE="int",
                CODE_IS_INT8="false", IN_PLACE="false", COUNTED="false",
            )  # fmt: skip
            yield f"quantize, {kind}, groups {grouped}", "quantize.cu", defines


def products() -> Kernels:
    """First, second and lone products in all heights of tiles."""
    plain = dict.fromkeys(("gated", "clamped", "gather", "by_route", "biased", "weighted", "ready"), False)
    first, second = {**plain, "gated": True}, {**plain, "ready": True}
    lone = {**plain, "gather": True, "by_route": True, "weighted": True, "biased": True}
    for height in (8, 16, 32, 64, 128, 192):
        ways = {
            "first, gathered": ("SILU", {**first, "gather": True}),
            "first, ordered": ("SILU", {**first, "ready": True}),
            "second": ("IDENTITY", second),
            "by route": ("IDENTITY", lone),
        }
        if height in (16, 192):
            ways |= {
                f"first, gathered, {curve}, clamped, biased": (
                    curve,
                    {**first, "gather": True, "clamped": True, "biased": True},
                )
                for curve in ("SILU", "GELU", "GELU_TANH", "RELU2")
            }
            ways["first, not gated, RELU2"] = ("RELU2", {**plain, "gather": True})
        for way, (curve, flags) in ways.items():
            plan = product_plan(height * 64, 64, 2048, flags["gated"], flags["by_route"], H200, Way(rows=height))
            for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
                if dtype == torch.float16 and (height != 64 or "clamped" in way):
                    continue
                yield f"experts, tiles of {height}, {way}, {name}", "experts.cu", product_defines(
                    plan, dtype, curve, **flags
                )  # fmt: skip


def few_tokens() -> Kernels:
    """Both kernels of a few tokens, of several models and activations."""
    silu, none = Activation(), (False, False)
    cases = {
        "Qwen3-30B, 1 token": (ExpertSizes(1, 8, 2048, 768, True), torch.bfloat16, silu, False, none, False),
        "Qwen3-30B, 4 tokens": (ExpertSizes(4, 8, 2048, 768, True), torch.bfloat16, silu, False, none, False),
        "DeepSeek-V3, 1 token": (ExpertSizes(1, 8, 7168, 2048, True), torch.bfloat16, silu, True, none, False),
        "gpt-oss, 2 tokens": (
            ExpertSizes(2, 4, 2880, 2880, True), torch.bfloat16, GPT_OSS_ACTIVATION, False, (True, True), False,
        ),
        "gelu, float16, weights on the input": (
            ExpertSizes(3, 8, 2048, 512, True), torch.float16, Activation("gelu"), False, none, True,
        ),
        "gelu_tanh, limited": (
            ExpertSizes(1, 4, 1024, 512, True), torch.bfloat16, Activation("gelu_tanh", limit=2.0), False, none, False,
        ),
        "relu2, not gated": (
            ExpertSizes(1, 4, 1024, 512, False), torch.bfloat16, Activation("relu2", limit=3.0), False,
            (True, True), False,
        ),
    }  # fmt: skip
    for name, (sizes, dtype, activation, mapped, biased, on_input) in cases.items():
        plan = few_tokens_plan(sizes, H200)
        assert plan is not None
        defines = few_tokens_defines(sizes, plan, H200, dtype, "int", mapped, biased, activation, on_input)
        yield f"few tokens, up and down, {name}", "few_tokens.cu", defines


def digest(code: bytes) -> str:
    """Of what the kernels of a cubin run: instructions, literals, shared memory, registers.

    Left out are names, and initialised constants of the source that nothing reads (.nv.global, .nv.constant4).
    """
    found = []
    at, entry, count, names = *struct.unpack_from("<Q", code, 40), *struct.unpack_from("<HHH", code, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, at + i * entry) for i in range(count)]
    base = sections[names][4]
    for name_at, kind, _, _, offset, size, *_ in sections:
        name = code[base + name_at : code.index(b"\0", base + name_at)].decode()
        content = b"" if kind == _NO_BITS else code[offset : offset + size]
        if name == ".nv.info":
            content = repr(sorted(registers(content))).encode()
        elif not re.match(r"\.text\.|\.nv\.constant[0-3]\.|\.nv\.shared\.", name):
            continue
        found.append(hashlib.sha256(repr((name.split(".")[1:-1], size)).encode() + content).hexdigest())
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:32]


def registers(attributes: bytes) -> Iterator[int]:
    """How many registers each kernel takes: (format, attribute, size, symbol, registers) among others."""
    at = 0
    while at < len(attributes):
        form, attribute, size = struct.unpack_from("<BBH", attributes, at)
        if (form, attribute) == (_SIZED, _REGISTERS):
            yield struct.unpack_from("<I", attributes, at + 8)[0]
        at += 4 + (size if form == _SIZED else 0)


_NO_BITS = 8
"""The type of an ELF section that has a size and no content."""
_SIZED, _REGISTERS = 4, 0x2F
"""An attribute of .nv.info with content of its own, and the one that counts registers."""


def digests() -> dict[str, str]:
    """Name -> digest of every kernel of the list."""
    kernels = [*alignments(), *routers(), *rows(), *products(), *few_tokens()]

    def one(kernel: tuple[str, str, Defines]) -> str:
        _, source, defines = kernel
        return digest(compile_source(SOURCES[source], defines, ARCH))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((name for name, *_ in kernels), pool.map(one, kernels), strict=True))


def main() -> int:
    """Prints or compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="digests to compare with")
    given = parser.parse_args().file
    made = {"compiler": "NVRTC " + ".".join(map(str, compiler_version())), "arch": ARCH, "digests": digests()}
    if given is None:
        print(json.dumps(made, indent=1))
        return 0
    held = json.loads(given.read_text())
    names = sorted(held["digests"].keys() | made["digests"].keys())
    other = [name for name in names if held["digests"].get(name) != made["digests"].get(name)]
    print(f"{len(names) - len(other)} of {len(names)} kernels agree; {made['compiler']} here, {held['compiler']} there")
    print("".join(f"  differs: {name}\n" for name in other), end="")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
