"""The page about serving: host times, stalls and warm-up of each card with a file of benchmarks/serving.py."""

from pathlib import Path
from typing import Any

from moeyard.bench import results

NOTHING = "No card has such a file yet: `python benchmarks/serving.py --out benchmarks/results/CARD/serving.json`.\n"


def tables(root: Path) -> str:
    """Sections in Markdown, one per card."""
    files = sorted((root / "benchmarks" / "results").glob("*/serving.json"))
    return "\n".join(_section(results.read(file)) for file in files) or NOTHING


def _section(content: dict[str, Any]) -> str:
    machine = content["machine"]
    where = f"{machine.get('gpu') or machine['cpu']}, {content['date'][:10]}"
    lines = [f"### {where}", "", *_hosts(content["rows"]), ""]
    lines += [
        f"- Warm-up of {one['workload']} for `{one['impl']}`: {sum(one['seconds'].values()):.1f} s from empty caches."
        for one in content["warm_up"]
    ]
    for one in content["stalls"]:
        longest, tokens = max(one["longest_ms"].values())
        lines.append(
            f"- {one['calls']} calls of `{one['impl']}` at random numbers of tokens ({one['workload']}): "
            f"{one['compilations']} compilations, {one['over_5_ms']} calls over 5 ms, the longest {longest:.2f} ms at "
            f"{tokens} tokens."
        )
    for one in content["few"]:
        ratios = sorted(one["ratios"].items(), key=lambda found: found[1])
        (least, low), (most, high) = ratios[0], ratios[-1]
        lines.append(
            f"- `MOEYARD_KERNELS={one['kernels']}` over all kernels ({one['workload']}): from {low:.2f} ({least}) to "
            f"{high:.2f} ({most})."
        )
    return "\n".join(lines) + "\n"


def _hosts(rows: list[dict[str, Any]]) -> list[str]:
    """One line per operator and provider: microseconds by tokens, and over the product of the same tokens."""
    times = {
        (row["workload"], row["op"], row["provider"], row["impl"], row["sizes"]["num_tokens"]): row["time_us"]
        for row in rows
    }
    tokens = sorted({key[-1] for key in times})
    product = {(key[0], key[-1]): time for key, time in times.items() if key[1] == "mm"}
    shown = [
        "| layer | call | " + " | ".join(f"{count} tokens" for count in tokens) + " |",
        "|---|---|" + "---:|" * len(tokens),
    ]
    for workload, op, provider, impl in dict.fromkeys(key[:-1] for key in times):
        cells = []
        for count in tokens:
            time, base = times.get((workload, op, provider, impl, count)), product.get((workload, count))
            over = f" ({time / base:.1f})" if time is not None and base and op != "mm" else ""
            cells.append("" if time is None else f"{time:.1f}{over}")
        shown.append(f"| {workload} | {op}: {provider} {impl} | " + " | ".join(cells) + " |")
    return shown
