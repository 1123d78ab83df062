"""README's numbers as sentences, computed from result files: each names its condition, its comparison and its file."""

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from moeyard.bench import results

_KEY = ("op", "workload", "routing", "mode")


def numbers(root: Path) -> str:
    """The sentences as a Markdown list."""
    return "\n".join(f"- {claim(root / 'benchmarks' / 'results')}" for claim in _CLAIMS) + "\n"


def _experts(folder: Path) -> str:
    name = "h200/experts_bf16.json"
    content = results.read(folder / name)
    rows = [row for row in content["rows"] if row["op"] == "fused_experts" and row["mode"] == "graph"]
    factors = _inverse(row["ratio_to"]["vllm"][0] for row in rows if "vllm" in row.get("ratio_to", {}))
    tokens = [row["sizes"]["num_tokens"] for row in rows]
    layers = len({row["workload"] for row in rows})
    return (
        f"**{median(factors):.2f} times as fast as vLLM {content['peers']['vllm']}** at a layer's experts: the median "
        f"of {len(factors)} cases ({layers} layers, {min(tokens)} to {max(tokens)} tokens, even and skewed routing), "
        f"from {factors[0]:.2f} to {factors[-1]:.2f}. bfloat16, CUDA graphs, {_where(content)} ({_link(name)})"
    )


def _alignment(folder: Path) -> str:
    name = "h200/align.json"
    content = results.read(folder / name)
    times = _times(content["rows"], lambda row: row["mode"] == "graph")
    factors = sorted(case["vllm"] / case["moeyard"] for case in times if {"vllm", "moeyard"} <= set(case))
    return (
        f"**{median(factors):.1f} times as fast as vLLM {content['peers']['vllm']}** at `moe_align_block_size`: the "
        f"median of {len(factors)} cases, from {factors[0]:.1f} to {factors[-1]:.0f}. CUDA graphs, {_where(content)} "
        f"({_link(name)})"
    )


def _on_cpu(folder: Path) -> str:
    name = "cpu-2core/experts-qwen3.json"
    content = results.read(folder / name)
    times = _times(content["rows"], lambda row: row["sizes"]["num_tokens"] > 1)
    factors = sorted(
        case["transformers"] / case["moeyard"] for case in times if {"transformers", "moeyard"} <= set(case)
    )
    tokens = sorted({row["sizes"]["num_tokens"] for row in content["rows"]} - {1})
    alone = _times(content["rows"], lambda row: row["sizes"]["num_tokens"] == 1)
    single = sorted(case["transformers"] / case["moeyard"] for case in alone)
    counts, version = " and ".join(map(str, tokens)), content["peers"]["transformers"]
    return (
        f"**{factors[0]:.1f} to {factors[-1]:.1f} times as fast as the best of transformers {version}** at the experts "
        f"of Qwen3-30B-A3B with {counts} tokens (one token: {single[0]:.2f} to {single[-1]:.2f}). "
        f"float32 and bfloat16, {_where(content)} ({_link(name)})"
    )


_CLAIMS = (_experts, _alignment, _on_cpu)


def _times(rows: list[dict[str, Any]], wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, float]]:
    """Case by case: provider -> its shortest median time, of the answers that were right."""
    cases: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if wanted(row) and row["time_us"] is not None:
            case = cases.setdefault((*(row[key] for key in _KEY), *row["sizes"].items()), {})
            case[row["provider"]] = min(row["time_us"], case.get(row["provider"], row["time_us"]))
    return list(cases.values())


def _inverse(ratios: Iterable[float]) -> list[float]:
    return sorted(1 / ratio for ratio in ratios)


def _where(content: dict[str, Any]) -> str:
    machine = content["machine"]
    place = machine.get("gpu") or f"{machine['threads']} threads of {machine['cpu']}"
    return f"{place}, {content['date'][:10]}"


def _link(name: str) -> str:
    return f"[`{name}`](benchmarks/results/{name})"
