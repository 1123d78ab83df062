"""What the benchmark of experts on a GPU measures, the most wanted first."""

from collections.abc import Iterator
from dataclasses import replace

from moeyard.bench import workloads
from moeyard.bench.operators import Case

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-120b", "qwen3-next-80b-a3b")
PARTS = ("targets", "shards", "grouped", "grid", "skew", "biased", "eight bits", "four bits")
USUAL = PARTS[:-2]
"""What is measured unless other parts are asked for: 16-bit weights."""
TARGET_TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
GRID_TOKENS = tuple(2**i for i in range(16))
SKEW_TOKENS = (64, 1024, 8192)
_GROUPED_TOKENS = (8192, 1024)
_SHARDS = (("qwen3-next-80b-a3b", 4), ("qwen3-235b-a22b", 8))
_EIGHT_BITS = (
    ("qwen3-30b-a3b", "fp8 channel"), ("qwen3-30b-a3b", "fp8 block"), ("deepseek-v3", "fp8 block"),
    ("qwen3-30b-a3b", "int8 channel"),
)  # fmt: skip
_FOUR_BITS = (
    ("gpt-oss-120b", "mxfp4 weights"), ("qwen3-30b-a3b", "int4 weights"), ("qwen3-30b-a3b", "nvfp4 weights"),
)  # fmt: skip
_OWN = {"activation", "bias", "transformers"}
"""What the [model] table of gpt-oss says that comparisons are without: they are for plain silu."""


def cells(
    part: str, models: tuple[str, ...] = MODELS, tokens: tuple[int, ...] | None = None, scale: int = 1
) -> Iterator[Case]:
    """The cases of one of `PARTS`, in the order in which they are wanted.

    targets: few tokens, many tokens, of five models. shards: one token on a tensor-parallel rank. grouped: the first
    product alone. grid: all powers of two that targets lack. skew: uneven routings. biased: gpt-oss with its own
    activation and biases, which all others are without. eight bits: codes of e4m3 and int8. four
    bits: weights of 4 bits, gpt-oss as "biased".
    """
    if part == "targets":
        yield from _experts(models, tokens or TARGET_TOKENS, scale)
    elif part == "grid":
        left = tuple(n for n in tokens or GRID_TOKENS if tokens or n not in TARGET_TOKENS)
        yield from _experts(models, left, scale)
    elif part == "skew":
        for routing in ("zipf", "one_hot"):
            for case in _experts(models, tokens or SKEW_TOKENS, scale):
                yield replace(case, routing=routing)
    elif part == "biased":
        if "gpt-oss-120b" in models:
            for count in tokens or TARGET_TOKENS:
                yield _sized("gpt-oss-120b", count, scale)
    elif part in ("eight bits", "four bits"):
        for count in tokens or TARGET_TOKENS:
            for model, scheme in _EIGHT_BITS if part == "eight bits" else _FOUR_BITS:
                if model in models:
                    yield quantised(_sized(model, count, scale), scheme)
    elif part == "grouped":
        for count in tokens or _GROUPED_TOKENS:
            for routing in ("equal", "zipf"):
                for case in _experts(models, (count,), scale):
                    yield replace(case, op="grouped_gemm", routing=routing)
    elif part == "shards":
        for model, ranks in _SHARDS:
            for count in tokens or (1,):
                yield shard(_plain(_sized(model, count, scale)), ranks)
    else:
        raise ValueError(f"part: expected one of {PARTS}, got {part!r}")


def quantised(case: Case, scheme: str) -> Case:
    """A case with weights of a scheme by its name in `bench.quantised`."""
    sizes = {**dict(case.sizes), "scheme": scheme}
    short = scheme.removesuffix(" weights").replace("int8 channel", "int8")
    return replace(case, workload=f"{case.workload} {short}", sizes=tuple(sizes.items()))


def shard(case: Case, ranks: int) -> Case:
    """A case on one of `ranks` tensor-parallel ranks, which share the intermediate size."""
    sizes = {**dict(case.sizes), "intermediate_size": case["intermediate_size"] // ranks}
    return replace(case, workload=f"{case.workload} / {ranks}", sizes=tuple(sizes.items()))


def _experts(models: tuple[str, ...], tokens: tuple[int, ...], scale: int) -> Iterator[Case]:
    for count in tokens:
        for model in models:
            yield _plain(_sized(model, count, scale))


def _sized(model: str, tokens: int, scale: int) -> Case:
    """The experts of a model at some number of tokens, bfloat16, uniform routing."""
    found = (c for c in workloads.load(model, scale) if c.op == "fused_experts" and c["dtype"] == "bfloat16")
    case = next(found)
    sizes = {**dict(case.sizes), "num_tokens": tokens}
    return replace(case, routing="uniform", sizes=tuple(sizes.items()))


def _plain(case: Case) -> Case:
    if "activation" not in case.model:
        return case
    model = {key: value for key, value in case.model.items() if key not in _OWN}
    return replace(case, workload=f"{case.workload}, silu", model=model)
