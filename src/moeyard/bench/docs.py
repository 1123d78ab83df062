"""README's tables and pictures from the result files: `python -m moeyard.bench.docs README.md`.

A block of README between `<!-- results: FILE [picture] [ops=OP,OP] -->` and `<!-- /results -->` is replaced by a table
of benchmarks/results/FILE.json; with `picture`, a picture of it is drawn to docs/FILE.svg and shown above the table;
with `ops`, it is a table of those operators, and of the time that their bytes take at the copy bandwidth.
"""

import re
import sys
from pathlib import Path
from typing import Any

from moeyard.bench import plots, results

_BLOCK = re.compile(r"(<!-- results: (\S+)( picture)?(?: ops=(\S+))? -->\n).*?(<!-- /results -->)", re.DOTALL)


def regenerate(readme: str, root: Path, *, draw: bool) -> str:
    """README's text with every block of results made anew."""

    def fill(match: re.Match[str]) -> str:
        start, name, picture, ops, end = match.groups()
        content = results.read(root / "benchmarks" / "results" / f"{name}.json")
        shown = ""
        if picture:
            image = Path("docs") / f"{name}.svg"
            if draw:
                plots.plot(content, root / image)
            shown = f"![{name}]({image})\n\n"
        return start + shown + table(content, ops.split(",") if ops else None) + end

    return _BLOCK.sub(fill, readme)


def table(content: dict[str, Any], ops: list[str] | None = None) -> str:
    """Median microseconds as Markdown: one line a case, one column a provider; with `ops`, theirs and the floor."""
    rows = [row for row in content["rows"] if ops is None or row["op"] in ops]
    columns = list(dict.fromkeys((row["provider"], row["impl"], row["mode"]) for row in rows))
    cases: dict[str, dict[tuple[str, str, str], str]] = {}
    for row in rows:
        sizes = ", ".join(f"{value} {_UNITS.get(key, key)}" for key, value in row["sizes"].items())
        label = f"{row['op']}: {sizes}; {row['routing']}"
        time = "wrong" if row["time_us"] is None else _three_digits(row["time_us"])
        cases.setdefault(label, {})[row["provider"], row["impl"], row["mode"]] = time
        if ops is not None:
            cases[label]["", "floor", ""] = _three_digits(row["floor_us"])
    machine = content["machine"]
    modes = {mode for *_, mode in columns}
    if ops is not None:
        columns.append(("", "floor", ""))
    heads = [f"{who} {impl}".strip() + (f", {mode}" if mode and len(modes) > 1 else "") for who, impl, mode in columns]
    lines = [f"| µs a call | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    lines += [f"| {label} | {' | '.join(times.get(c, '') for c in columns)} |" for label, times in cases.items()]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in content["peers"].items())
    lines += ["", f"{where}; copy bandwidth {machine['copy_gb_s']:.1f} GB/s; {versions}; {content['date'][:10]}", ""]
    return "\n".join(lines)


_UNITS = {
    "num_tokens": "tokens",
    "num_experts": "experts",
    "hidden_size": "wide",
    "intermediate_size": "inside",
    "dtype": "",
}


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main() -> int:
    """Rewrites the README given as argument."""
    if len(sys.argv) != 2:
        print("usage: python -m moeyard.bench.docs README.md", file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    path.write_text(regenerate(path.read_text(), path.resolve().parent, draw=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
