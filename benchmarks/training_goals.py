"""What training on a GPU is to reach, held against a result file: `python benchmarks/training_goals.py FILE`."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experts_goals import Verdict
from moeyard.bench import results

PEERS = ("torch", "scattermoe", "liger")
_OVER_PEERS = 1.15  # the best peer's time over ours, at least
_OF_FORWARD = 0.85  # TFLOP/s of a step over those of our own forward, at least
_OF_TORCH = 0.6  # our peak of memory over that of torch, at most, in the cell that memory counts most in
_LARGE = ("qwen3-30b-a3b", 32768)
_FROM_HAND = 0.05  # how far a measured peak may be from the count by hand


def verdicts(content: dict[str, Any]) -> Iterator[Verdict]:
    """Every goal of every cell of a file; a peer that did not run is a goal that is not met."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        cells.setdefault((row["workload"], *row["sizes"].values()), []).append(row)
    for rows in cells.values():
        label = f"{rows[0]['workload']}, {rows[0]['sizes']['tokens']} tokens"
        steps = [row for row in rows if row["op"] == "training step"]
        wrong = [row for row in steps if row["provider"] == "moeyard" and not row["correct"]]
        for row in wrong:
            yield Verdict(label, f"a right answer of {row['impl']}", row["wrong"], False)
        ours = [row for row in steps if row["provider"] == "moeyard" and row["correct"]]
        theirs = {row["provider"]: row for row in steps if row["provider"] in PEERS and row["correct"]}
        for name in PEERS:
            said = next((row.get("wrong", "ran") for row in steps if row["provider"] == name), "is not there")
            yield Verdict(label, f"{name} runs", said, name in theirs)
        if ours:
            forward = next(row for row in rows if row["op"] == "forward")
            yield from _of_time(label, ours, theirs, forward)
            yield from _of_memory(label, ours, theirs)


def _of_time(
    label: str, ours: list[dict[str, Any]], theirs: dict[str, dict[str, Any]], forward: dict[str, Any]
) -> Iterator[Verdict]:
    best = min(ours, key=lambda row: row["time_us"])
    if theirs:
        name, peer = min(theirs.items(), key=lambda item: item[1]["time_us"])
        ratio = peer["time_us"] / best["time_us"]
        yield Verdict(label, f"best peer ({name}) / ours >= {_OVER_PEERS}", f"{ratio:.3f}", ratio >= _OVER_PEERS)
    share = best["tflops"] / forward["tflops"]
    got = f"{share:.3f} ({best['tflops']:.0f} of {forward['tflops']:.0f} TFLOP/s)"
    yield Verdict(label, f"TFLOP/s of a step / of our forward >= {_OF_FORWARD}", got, share >= _OF_FORWARD)


def _of_memory(label: str, ours: list[dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> Iterator[Verdict]:
    saved = next((row for row in ours if row.get("peak_bytes") and row.get("peak_bytes_by_hand")), None)
    if saved is None:
        return
    peak = saved["peak_bytes"]
    by_hand = {max(parts.values()) for parts in saved["peak_bytes_by_hand"].values()}
    nearest = min(by_hand, key=lambda count: abs(count - peak))
    got = f"{peak / 1e6:.0f} MB, by hand {nearest / 1e6:.0f} MB"
    near = abs(peak - nearest) <= _FROM_HAND * nearest
    yield Verdict(label, f"peak within {_FROM_HAND:.0%} of the count by hand", got, near)
    cell = saved["workload"], saved["sizes"]["tokens"]
    for name, most in (("torch", _OF_TORCH), ("scattermoe", 1.0)) if cell == _LARGE else ():
        if theirs.get(name, {}).get("peak_bytes"):
            share = peak / theirs[name]["peak_bytes"]
            yield Verdict(label, f"peak of ours / of {name} <= {most}", f"{share:.3f}", share <= most)


def main(arguments: Sequence[str]) -> int:
    """Prints every goal and whether it is met; 1 if one is not."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python benchmarks/training_goals.py FILE\n")
        return 2
    found = list(verdicts(results.read(Path(arguments[0]))))
    for verdict in found:
        sys.stdout.write(f"{'met' if verdict.met else 'NOT met'}: {verdict.case}: {verdict.wanted}: {verdict.got}\n")
    met = sum(verdict.met for verdict in found)
    sys.stdout.write(f"{met} of {len(found)} goals met\n")
    return 0 if found and met == len(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
