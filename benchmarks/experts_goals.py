"""What experts on an H200 are to reach, held against a result file: `python benchmarks/experts_goals.py FILE`."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeyard.bench import experts_cells, results

_ONE_TOKEN_US = (175.0, 25.0, 174.0, 55.0, 23.0)
_OVER_VLLM = {
    1024: (1.25, 1.15, 1.08, 1.08, 1.02),
    4096: (1.28, 1.42, 1.20, 1.24, 1.18),
    16384: (1.20, 1.45, 1.32, 1.38, 1.42),
}
"""Tokens -> vLLM's time over ours, at least; models in the order of `experts_cells.MODELS`."""
_OF_YARDSTICK, _OF_PEER = 1.05, 1.01  # see results.yardstick_us
_SHARD = 2.0
_PRODUCT = {"deep_gemm": 0.97, "torch": 1.05}
_SLOWER = 1.02  # a median above it, with an interval wholly above 1, is slower
_SKEWED = 1.02  # ours / vllm with a skewed routing, over the same with an even one


@dataclass(frozen=True)
class Verdict:
    """One goal of one case."""

    case: str
    wanted: str
    got: str
    met: bool


def verdicts(content: dict[str, Any]) -> Iterator[Verdict]:
    """Every goal that the rows of a result file say something about; of our rows those that "auto" chooses."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        if row["mode"] == "graph":
            key = (row["op"], row["workload"], row["routing"], *row["sizes"].values())
            cases.setdefault(key, []).append(row)
    even = {_sized(row): row["ratio_to"]["vllm"][0] for row in content["rows"] if _is_even(row)}
    for rows in cases.values():
        ours = [row for row in rows if row["provider"] == "moeyard"]
        peers = {row["provider"]: row for row in rows if row["provider"] != "moeyard" and row["correct"]}
        for row in ours:
            impl, _, way = row["impl"].partition(" ")
            if impl != ours[0]["impl"].partition(" ")[0]:
                continue
            label = f"{row['op']} {row['workload']} {row['sizes']['num_tokens']} {row['routing']} {way}".rstrip()
            if not row["correct"]:
                yield Verdict(label, "a right answer", row.get("wrong", "wrong"), False)
            elif row["op"] == "grouped_gemm":
                yield from _of_products(label, row)
            else:
                yield from _of_experts(label, row, peers)
                if row["routing"] != "uniform" and _sized(row) in even and "vllm" in row.get("ratio_to", {}):
                    more = row["ratio_to"]["vllm"][0] / even[_sized(row)]
                    wanted = f"skew costs <= {_SKEWED} x what it costs vllm"
                    yield Verdict(label, wanted, f"{more:.3f} x", more <= _SKEWED)


def _sized(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["op"], row["workload"], *row["sizes"].values()


def _is_even(row: dict[str, Any]) -> bool:
    return row["provider"] == "moeyard" and row["routing"] == "uniform" and "vllm" in row.get("ratio_to", {})


def _of_products(label: str, row: dict[str, Any]) -> Iterator[Verdict]:
    for peer, least in _PRODUCT.items():
        if peer in row.get("ratio_to", {}):
            ratio = 1 / row["ratio_to"][peer][0]
            yield Verdict(label, f"{peer} / ours >= {least}", f"{ratio:.3f}", ratio >= least)


def _of_experts(label: str, row: dict[str, Any], peers: dict[str, dict[str, Any]]) -> Iterator[Verdict]:
    tokens, time = row["sizes"]["num_tokens"], row["time_us"]
    model, _, ranks = row["workload"].partition(" / ")
    model = model.partition(",")[0]
    own = row["workload"] == "gpt-oss-120b"  # with its activation: goals are for the same sizes without
    uniform = row["routing"] == "uniform" and not own and not ranks
    vllm = row.get("ratio_to", {}).get("vllm")
    if uniform and model in experts_cells.MODELS:
        place = experts_cells.MODELS.index(model)
        if tokens == 1:
            most = _ONE_TOKEN_US[place]
            yield Verdict(label, f"<= {most} us", f"{time:.1f} us", time <= most)
        elif 8 <= tokens <= 256:
            best = min((peer["time_us"] for peer in peers.values()), default=0.0)
            least = results.yardstick_us(row)
            assert least is not None
            most = max(_OF_YARDSTICK * least, _OF_PEER * best)
            wanted = f"<= {most:.1f} us ({_OF_YARDSTICK} x copy or product time, or {_OF_PEER} x the best peer)"
            yield Verdict(label, wanted, f"{time:.1f} us, {time / least:.3f} x copy or product time", time <= most)
        elif tokens in _OVER_VLLM and vllm is not None:
            least = _OVER_VLLM[tokens][place]
            yield Verdict(label, f"vllm / ours >= {least}", f"{1 / vllm[0]:.3f}", 1 / vllm[0] >= least)
    if vllm is None:
        return
    if ranks and tokens == 1:
        yield Verdict(label, f"vllm / ours >= {_SHARD}", f"{1 / vllm[0]:.3f}", 1 / vllm[0] >= _SHARD)
    slower = vllm[0] > _SLOWER and vllm[1] > 1
    yield Verdict(
        label, "not slower than vllm", f"ours / vllm {vllm[0]:.3f} [{vllm[1]:.3f}, {vllm[2]:.3f}]", not slower
    )
    ours, theirs = row.get("extra_bytes"), peers.get("vllm", {}).get("extra_bytes")
    if ours is not None and theirs is not None:
        yield Verdict(label, "no more memory than vllm", f"{ours / 1e6:.1f} of {theirs / 1e6:.1f} MB", ours <= theirs)


def main(arguments: Sequence[str]) -> int:
    """Prints the goals that are not met, and how many are; 1 if one is not."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python benchmarks/experts_goals.py FILE\n")
        return 2
    found = list(verdicts(results.read(Path(arguments[0]))))
    missed = [verdict for verdict in found if not verdict.met]
    for verdict in missed:
        sys.stdout.write(f"{verdict.case}: wanted {verdict.wanted}, got {verdict.got}\n")
    sys.stdout.write(f"{len(found) - len(missed)} of {len(found)} goals met\n")
    return 1 if missed or not found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
