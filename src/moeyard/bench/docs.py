"""Tables, numbers and pictures of README and docs from the result files: `python -m moeyard.bench.docs .`.

A block of a page between `<!-- results: FILE [picture] [ratios] [ops=OP,OP] [tokens=N,N] -->` and `<!-- /results -->`
is replaced by a table of benchmarks/results/FILE.json; with `picture`, a picture of it is drawn to docs/pictures and
shown above the table; with `ops`, it is a table of those operators, and of what their bytes take at the machine's
bandwidths; with `ratios`, a line has one of our times, each peer's, and each peer's over ours with its interval; with
`tokens`, only cases of so many are shown.

A block between `<!-- made: WHAT -->` and `<!-- /made -->` is replaced by what `_MADE` has under that name.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeyard.bench import claims, drawings, hosts, plots, results, support

_BLOCK = re.compile(
    r"(<!-- results: (\S+)( picture)?( ratios)?(?: ops=(\S+))?(?: tokens=(\S+))? -->\n).*?(<!-- /results -->)",
    re.DOTALL,
)
_MADE_BLOCK = re.compile(r"(<!-- made: (\S+) -->\n).*?(<!-- /made -->)", re.DOTALL)
PICTURES = Path("docs") / "pictures"
_LAYER = ("h200/experts_bf16", "qwen3-30b-a3b", "The experts of a layer of Qwen3-30B-A3B, bfloat16")
"""Result file, workload and title of README's picture."""


def pages(root: Path) -> list[Path]:
    """The pages that have blocks."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [page for page in found if _BLOCK.search(page.read_text()) or _MADE_BLOCK.search(page.read_text())]


def regenerate(page: Path, root: Path, *, draw: bool) -> str:
    """A page's text with every block made anew; `draw` also writes its pictures."""

    def image(name: str, words: str, make: Callable[[Path], object]) -> str:
        path = root / PICTURES / f"{name}.svg"
        if draw:
            make(path)
        return f"![{words}]({os.path.relpath(path, page.parent)})\n"

    def fill(match: re.Match[str]) -> str:
        start, name, picture, ratios, ops, tokens, end = match.groups()
        content = results.read(root / "benchmarks" / "results" / f"{name}.json")
        if tokens:
            kept = [row for row in content["rows"] if str(row["sizes"]["num_tokens"]) in tokens.split(",")]
            content = {**content, "rows": kept}
        shown = image(name.replace("/", "-"), name, lambda path: plots.plot(content, path)) + "\n" if picture else ""
        made = ratio_table if ratios else table
        return start + shown + made(content, ops.split(",") if ops else None) + end

    def make(match: re.Match[str]) -> str:
        start, what, end = match.groups()
        if what not in _MADE:
            raise ValueError(f"{page}: expected one of {sorted(_MADE)} behind 'made:', got {what!r}")
        return start + _MADE[what](root, image) + end

    return _MADE_BLOCK.sub(make, _BLOCK.sub(fill, page.read_text()))


def _layer(root: Path, image: Callable[..., str]) -> str:
    file, workload, title = _LAYER
    content = results.read(root / "benchmarks" / "results" / f"{file}.json")
    return image(workload, f"{title}: time over tokens", lambda path: drawings.layer(content, path, workload, title))


_MADE: dict[str, Callable[[Path, Callable[..., str]], str]] = {
    "layer": _layer,
    "layout": lambda _, image: image("layout-example", "Where every route goes", drawings.layout),
    "numbers": lambda root, _: claims.numbers(root),
    "operators": lambda *_: support.operators(),
    "schemes": lambda *_: support.schemes(),
    "serving": lambda root, _: hosts.tables(root),
}
"""What blocks may name: (root, what draws and shows a picture) -> Markdown."""


def table(content: dict[str, Any], ops: list[str] | None = None) -> str:
    """Median microseconds as Markdown: one line per case, one column per provider.

    With `ops`, lines of these alone, and columns of what their bytes and operations take at the machine's rates.
    """
    rows = [row for row in content["rows"] if ops is None or row["op"] in ops]
    columns = list(dict.fromkeys((row["provider"], row["impl"], row["mode"]) for row in rows))
    limits = _limits(content, rows) if ops is not None else {}
    cases: dict[str, dict[tuple[str, str, str], str]] = {}
    for row in rows:
        sizes = ", ".join(f"{value} {_UNITS.get(key, key)}" for key, value in row["sizes"].items())
        label = f"{row['op']}: {sizes}; {row['routing']}"
        time = "wrong" if row["time_us"] is None else _digits(row["time_us"])
        cases.setdefault(label, {})[row["provider"], row["impl"], row["mode"]] = time
        cases[label] |= {("", head, ""): _digits(row[key]) for key, head in limits.items()}
    modes = {mode for *_, mode in columns}
    columns += [("", head, "") for head in limits.values()]
    heads = [f"{who} {impl}".strip() + (f", {mode}" if mode and len(modes) > 1 else "") for who, impl, mode in columns]
    lines = [f"| µs per call | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    lines += [f"| {label} | {' | '.join(times.get(c, '') for c in columns)} |" for label, times in cases.items()]
    return "\n".join([*lines, "", _source(content), ""])


def ratio_table(content: dict[str, Any], ops: list[str] | None = None) -> str:
    """Medians beside the peers as Markdown: one line per case and way of ours that "auto" chooses.

    The first columns are what bytes and operations take at the machine's rates, and our time over `yardstick_us`. A
    ratio is a peer's time over ours, paired in rounds, with its interval of 95 %; memory is what a call needs at its
    peak, its result included.
    """
    rows = [r for r in content["rows"] if (ops is None or r["op"] in ops) and r["mode"] in ("graph", "cpu")]
    peers = list(dict.fromkeys(r["provider"] for r in rows if r["provider"] != "moeyard"))
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        label = f"{row['workload']}, {row['sizes']['num_tokens']} tokens"
        cases.setdefault(label + (f", {row['routing']}" if row["routing"] != "uniform" else ""), []).append(row)
    limits = _limits(content, rows)
    over = "moeyard / copy or product time" if _has_products(content) else "moeyard / copy time"
    heads = [*limits.values(), "moeyard", over, *peers, *(f"{peer} / moeyard" for peer in peers), "MB moeyard"]
    heads += [f"MB {peer}" for peer in peers]
    lines = [f"| µs per call | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for label, found in cases.items():
        ours = [r for r in found if r["provider"] == "moeyard"]
        others = {r["provider"]: r for r in found if r["provider"] != "moeyard"}
        for row in ours:
            name, _, way = row["impl"].partition(" ")
            if name != ours[0]["impl"].partition(" ")[0]:
                continue  # not what "auto" chooses
            time, yardstick = row["time_us"], results.yardstick_us(row)
            cells = [_digits(row[key]) for key in limits]
            cells += [_time(row), "" if time is None or not yardstick else f"{time / yardstick:.2f}"]
            cells += [_time(others[peer]) if peer in others else "" for peer in peers]
            cells += [_inverse(row.get("ratio_to", {}).get(peer)) for peer in peers]
            cells += [_megabytes(r) for r in (row, *(others.get(peer, {}) for peer in peers))]
            lines.append(f"| {label}{f', {way}' if way else ''} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _source(content), ""])


_HEADS = {
    "copy_time_us": "bytes / copy bandwidth",
    "read_time_us": "bytes / read bandwidth",
    "product_time_us": "FLOPs / product rate",
}


def _limits(content: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    """Key -> head of the columns that say what bytes and operations take at the machine's rates."""
    if content["schema"] == 1:
        return {"floor_us": "copy or product time" if _has_products(content) else "bytes / copy bandwidth"}
    return {key: head for key, head in _HEADS.items() if any(row[key] is not None for row in rows)}


def _has_products(content: dict[str, Any]) -> bool:
    """Whether the rate of products is part of what times are held against."""
    return "matrix_tflops" in content["machine"]


def _time(row: dict[str, Any]) -> str:
    return "wrong" if row["time_us"] is None else _digits(row["time_us"])


def _inverse(ratio: list[float] | None) -> str:
    """A peer's time over ours from [ours / theirs, lower end, upper end]."""
    return "" if ratio is None else f"{1 / ratio[0]:.2f} [{1 / ratio[2]:.2f}, {1 / ratio[1]:.2f}]"


def _megabytes(row: dict[str, Any]) -> str:
    extra = row.get("extra_bytes")
    return "" if extra is None else _digits(extra / 1e6)


def _source(content: dict[str, Any]) -> str:
    """Where and when, on what, beside what."""
    machine = content["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    read = f", read bandwidth {machine['read_gb_s']:.1f} GB/s" if "read_gb_s" in machine else ""
    product = ""
    if _has_products(content):  # files of schema 1 do not name bfloat16
        product = f"; {machine.get('matrix_dtype', 'bfloat16')} product {_digits(machine['matrix_tflops'])} TFLOP/s"
    versions = ", ".join(f"{name} {version}" for name, version in content["peers"].items())
    return f"{where}; copy bandwidth {machine['copy_gb_s']:.1f} GB/s{read}{product}; {versions}; {content['date'][:10]}"


_UNITS = {
    "num_tokens": "tokens",
    "num_experts": "experts",
    "hidden_size": "wide",
    "intermediate_size": "inside",
    "dtype": "",
    "scheme": "",
}


def _digits(value: float | None) -> str:
    """Three digits; nothing for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main() -> int:
    """Rewrites the pages of the checkout given as argument."""
    if len(sys.argv) != 2:
        print("usage: python -m moeyard.bench.docs ROOT", file=sys.stderr)
        return 2
    root = Path(sys.argv[1]).resolve()
    for page in pages(root):
        page.write_text(regenerate(page, root, draw=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
