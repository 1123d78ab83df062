"""README's pictures: one layer's time over tokens beside its peers and its limit, and the example of a Layout."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from moeyard.bench.plots import pyplot, save
from moeyard.bench.results import yardstick_us
from moeyard.layout import moe_align_block_size
from moeyard.values import Layout

EXAMPLE = ((2, 0), (2, 1), (0, 2))
"""The ids of the example of `Layout`: three tokens, two experts each."""
_COLOURS = ("#d1495b", "#2e6f95", "#edae49")
"""By expert."""
_LIMIT = "limit: bytes / copy bandwidth or FLOPs / product rate"


def layer(content: dict[str, Any], out: Path, workload: str, title: str) -> int:
    """Draws the experts of one model, evenly routed and replayed as CUDA graphs; returns how many providers it shows.

    Above, the median time of a call over tokens, 10 % to 90 % shaded; below, that time over the limit of the same run.
    The limit is what bytes or products take at the machine's measured rates. It is no bound from below.
    """
    figure, (above, below) = pyplot().subplots(
        2, 1, figsize=(8.6, 6.4), layout="constrained", sharex=True, height_ratios=(3, 2)
    )
    wanted = {"op": "fused_experts", "workload": workload, "routing": "uniform", "mode": "graph"}
    rows = [row for row in content["rows"] if all(row[key] == value for key, value in wanted.items())]
    if not rows:
        raise ValueError(f"result file: expected rows of {wanted}, got none")
    named: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["time_us"] is not None:
            named[_name(row)][row["sizes"]["num_tokens"]] = row
    limits = {row["sizes"]["num_tokens"]: yardstick_us(row) or float("nan") for row in rows}
    every = sorted(limits)
    above.plot(every, [limits[count] for count in every], "--", color="black", linewidth=1, label=_LIMIT)
    for i, (name, mine) in enumerate(sorted(named.items(), key=lambda pair: not pair[0].startswith("moeyard"))):
        tokens = sorted(mine)
        times = [[mine[count][key] for count in tokens] for key in ("time_us", "time_us_p10", "time_us_p90")]
        above.plot(tokens, times[0], marker="o", markersize=4, color=f"C{i}", label=name)
        above.fill_between(tokens, times[1], times[2], color=f"C{i}", alpha=0.2)
        shares = [time / limits[count] for time, count in zip(times[0], tokens, strict=True)]
        below.plot(tokens, shares, marker="o", markersize=4, color=f"C{i}")
    above.set(xscale="log", yscale="log", ylabel="time of a call, µs")
    above.set_xscale("log", base=2)
    above.set_xticks(every, [f"{count // 1024}k" if count >= 1024 else str(count) for count in every])
    above.legend(fontsize="small")
    below.axhline(1, color="black", linestyle="--", linewidth=1)
    below.set(xlabel="tokens of a call", ylabel="time / limit", ylim=(0, None))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    versions = ", ".join(f"{name} {content['peers'][name]}" for name in ("torch", "vllm") if name in content["peers"])
    figure.suptitle(
        f"{title}\n{content['machine']['gpu']}, CUDA graphs, even routing, {versions}, {content['date'][:10]}",
        fontsize="medium",
    )
    save(figure, out)
    return len(named)


def example() -> Layout:
    """The layout that `Layout` tells as its example, computed."""
    return moe_align_block_size(torch.tensor(EXAMPLE, dtype=torch.int32), num_experts=3, block_size=2, impl="reference")


def layout(out: Path) -> None:
    """Draws the example: tokens with their routes, slots in blocks by expert, and where each route goes."""
    from matplotlib.patches import Rectangle

    found, ids = example(), [expert for token in EXAMPLE for expert in token]
    slots, used = found.sorted_token_ids.tolist(), int(found.num_tokens_post_padded)
    of_blocks, places = found.expert_ids.tolist(), found.route_rows.tolist()
    figure, axes = pyplot().subplots(figsize=(8.6, 3.9), layout="constrained")

    def cell(x: float, y: float, text: str, expert: int | None) -> None:
        colour = "#eceff1" if expert is None else _COLOURS[expert]
        axes.add_patch(Rectangle((x, y), 0.92, 0.7, facecolor=colour, edgecolor="white"))
        ink = "#90a4ae" if expert is None else "black" if expert == 2 else "white"
        axes.text(x + 0.46, y + 0.35, text, ha="center", va="center", color=ink)

    starts = [1.4 + route + 0.8 * (route // 2) for route in range(len(ids))]
    for route, (x, expert) in enumerate(zip(starts, ids, strict=True)):
        cell(x, 3, f"{route}", expert)
        axes.text(x + 0.46, 3.85, f"expert {expert}", ha="center", fontsize="small", color=_COLOURS[expert])
        end = places[route] + 0.35 * (places[route] // 2)
        line = {"arrowstyle": "-|>", "color": _COLOURS[expert], "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (end + 0.46, 1.75), (x + 0.46, 2.98), arrowprops=line)
    for token in range(len(EXAMPLE)):
        axes.text(starts[2 * token] + 0.96, 4.3, f"token {token}", ha="center", weight="bold")
    for slot, route in enumerate(slots):
        expert = of_blocks[slot // 2]
        padding = route == len(ids)
        cell(slot + 0.35 * (slot // 2), 1, "pad" if padding else f"{route}", None if padding else expert)
    for block, expert in enumerate(of_blocks):
        words = f"expert {expert}" if expert >= 0 else "unused"
        axes.text(2.35 * block + 0.96, 0.66, words, ha="center", fontsize="small")
    axes.text(-0.25, 3.35, "routes", ha="right", va="center")
    axes.text(-0.25, 1.35, "sorted_token_ids", ha="right", va="center")
    axes.text(-0.25, 0.74, "expert_ids", ha="right", va="center")
    told = f"route_rows {places}     expert_counts {found.expert_counts.tolist()}"
    axes.text(0, -0.05, f"{told}     expert_offsets {found.expert_offsets.tolist()}", fontsize="small")
    axes.text(0, -0.5, f"num_tokens_post_padded [{used}]     block_size 2     capacity {len(slots)}", fontsize="small")
    axes.set(xlim=(-2.9, 2.35 * len(of_blocks)), ylim=(-0.75, 4.75))
    axes.axis("off")
    save(figure, out)


def _name(row: dict[str, Any]) -> str:
    return f"{row['provider']} {row['impl']}"
