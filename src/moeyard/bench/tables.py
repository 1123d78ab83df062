"""Result rows as tables in a terminal, from 80 columns on."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

EXPLAINED = "x copy, x read = time over what the bytes take at the copy and at the read bandwidth"
_NUMBERS = ("median", "p10", "p90", "x copy", "x read", "x best")


def tables(rows: list[dict[str, Any]]) -> list[RenderableType]:
    """One table per op and mode, in µs; `x best` is a time over the shortest of its case."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["mode"]), []).append(row)
    return [_table(name, mode, mine) for (name, mode), mine in groups.items()]


def _table(name: str, mode: str, rows: list[dict[str, Any]]) -> RenderableType:
    """Cases have a line of their own, which may be as wide as the terminal; columns are alike in all of them."""
    unit, scale = ("ms", 1e3) if mode == "cold" else ("µs", 1.0)
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(_case(row), []).append(row)
    parts: list[RenderableType] = [Text(f"{name} ({mode}), {unit} per call", style="italic"), _part((), scale, True)]
    for case, mine in cases.items():
        parts += [Text(case, style="bold"), _part(tuple(mine), scale, False)]
    return Group(*parts, Text(""))


def _part(rows: tuple[dict[str, Any], ...], scale: float, header: bool) -> Table:
    table = Table(box=None, show_header=header, pad_edge=False, expand=True)
    table.add_column("provider", ratio=1, overflow="fold")
    for column in _NUMBERS:
        table.add_column(column, justify="right", no_wrap=True, width=6)
    best = min((row["time_us"] for row in rows if row["time_us"] is not None), default=1.0)
    for row in rows:
        label = Text(f"{row['provider']} {row['impl']}")
        if row["time_us"] is None:
            table.add_row(label, "wrong", style="red")
            continue
        times = [_digits(row[key] / scale) for key in ("time_us", "time_us_p10", "time_us_p90")]
        shares = [_over(row["time_us"], row[key]) for key in ("copy_time_us", "read_time_us")]
        table.add_row(label, *times, *shares, _over(row["time_us"], best))
    return table


def _case(row: dict[str, Any]) -> str:
    sizes = [f"{key} {value}" if isinstance(value, int) else str(value) for key, value in row["sizes"].items()]
    return f"{', '.join(sizes)}; {row['routing']}"


def _over(time: float, other: float | None) -> str:
    return _digits(time / other) if other else ""


def _digits(value: float) -> str:
    """Three digits or, above 100, all before the point; thousands of what would not fit."""
    if value >= 1e6:
        return f"{value / 1e3:.0f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
