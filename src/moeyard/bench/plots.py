"""Pictures: of a result file time over tokens and how many times faster than plain torch; of a trace experts' load."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from moeyard.bench.traces import Trace


def plot(content: dict[str, Any], out: Path, *, mode: str | None = None) -> int:
    """Draws the timed rows of a result file into a PNG or SVG; returns how many providers it shows.

    The left half shows the median time over tokens, one line per provider (10 % to 90 % shaded); the right half bars of
    the baseline's time over each provider's, median over the cases that both timed. The baseline is vLLM where it
    took part, plain torch otherwise.
    """
    rows = [row for row in content["rows"] if row["time_us"] is not None and row["mode"] in _modes(content, mode)]
    if not rows:
        raise ValueError(f"result file: expected timed rows of mode {mode or 'graph or cpu'}, got none")
    named = defaultdict(list)
    for row in rows:
        named[f"{row['provider']} {row['impl']}"].append(row)
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(sorted(named))}
    for name, mine in sorted(named.items()):
        by_tokens = defaultdict(list)
        for row in mine:
            by_tokens[row["sizes"]["num_tokens"]].append(row)
        tokens = sorted(by_tokens)
        medians = [[_median([row[key] for row in by_tokens[t]]) for t in tokens] for key in _TIME_KEYS]
        left.plot(tokens, medians[0], marker="o", markersize=4, label=name, color=colours[name])
        left.fill_between(tokens, medians[1], medians[2], alpha=0.15, color=colours[name])
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time of a call, µs (median over cases)")
    left.legend(fontsize="small")
    left.grid(alpha=0.3)
    baseline = next(
        name for name in [*(n for n in named if n.startswith("vllm")), "torch plain", *named] if name in named
    )
    base = {_key(row): row["time_us"] for row in named[baseline]}
    ratios = {
        name: _median([base[_key(row)] / row["time_us"] for row in mine if _key(row) in base] or [float("nan")])
        for name, mine in named.items()
    }
    ordered = sorted(ratios, key=lambda name: ratios[name])
    bars = right.barh(ordered, [ratios[name] for name in ordered], color=[colours[name] for name in ordered])
    words = [f"{ratios[name]:.2f} ×" if ratios[name] == ratios[name] else "no case in common" for name in ordered]
    right.bar_label(bars, words, padding=3, fontsize="small")
    right.axvline(1, color="black", linewidth=0.8)
    right.set(xlabel=f"times as fast as {baseline} (median over cases)", xmargin=0.15)
    machine, versions = content["machine"], ", ".join(f"{name} {version}" for name, version in content["peers"].items())
    figure.suptitle(
        f"{', '.join(sorted({row['op'] for row in rows}))} on {machine.get('gpu', machine['cpu'])}\n"
        f"{versions}; {content['date'][:10]}",
        fontsize="medium",
    )
    save(figure, out)
    return len(named)


def plot_loads(trace: Trace, out: Path) -> tuple[int, int]:
    """Draws the load of experts in a trace as a heat map into a PNG or SVG; returns its (rows, experts).

    A row is a layer, or a call where there is one layer. The colour is an expert's share of the row's routes over an
    even share: 1 is even. Of layers whose experts were recorded those are drawn, else alignments.
    """
    op = "fused_experts" if any(call.op == "fused_experts" for call in trace.calls) else trace.calls[0].op
    counts, unit = trace.loads(op)
    even = counts.sum(1, keepdim=True).clamp(min=1) / counts.shape[1]
    share = (counts / even).numpy()
    rows, experts = share.shape
    figure, axes = pyplot().subplots(figsize=(9, min(2.4 + 0.16 * rows, 9)), layout="constrained")
    picture = axes.imshow(share, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set(xlabel="expert", ylabel=f"{unit} (in the order recorded)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(picture, ax=axes, label="routes of an expert / an even share")
    worst = divmod(int(share.argmax()), experts)
    machine, routes = trace.machine, int(counts.sum())
    figure.suptitle(
        f"load of experts in {op}: {routes} routes; most: expert {worst[1]} of {unit} {worst[0]}, "
        f"{share.max():.2f} × an even share\n"
        f"{machine['device']}, {machine['date']}, torch {machine['torch']}, moeyard {machine['moeyard']}",
        fontsize="medium",
    )
    save(figure, out)
    return rows, experts


def pyplot() -> Any:
    """matplotlib's pyplot, drawing without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def save(figure: Any, out: Path) -> None:
    """Writes a PNG or SVG and closes the figure. An SVG holds no date, and its names follow from a fixed word."""
    import matplotlib

    out.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "moeyard"}):
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, facecolor="white", dpi=140)
    pyplot().close(figure)


_TIME_KEYS = ("time_us", "time_us_p10", "time_us_p90")


def _modes(content: dict[str, Any], mode: str | None) -> set[str]:
    if mode is not None:
        return {mode}
    present = {row["mode"] for row in content["rows"]}
    return {"graph"} if "graph" in present else {"cpu"}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["op"], row["workload"], row["routing"], tuple(sorted(row["sizes"].items()))


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
