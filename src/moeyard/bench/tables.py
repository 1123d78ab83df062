"""Result rows as tables in a terminal."""

from typing import Any

from rich import box
from rich.table import Table

EXPLAINED = "x copy, x read = time over what the bytes take at the copy and at the read bandwidth"


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """One table per op and mode, in µs; `x best` is a time over the shortest of its case."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["mode"]), []).append(row)
    return [_table(name, mode, mine) for (name, mode), mine in groups.items()]


def _table(name: str, mode: str, rows: list[dict[str, Any]]) -> Table:
    unit, scale = ("ms", 1e3) if mode == "cold" else ("µs", 1.0)
    table = Table(title=f"{name} ({mode}), {unit} per call", title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("provider")
    for column in ("median", "p10", "p90", "x copy", "x read", "x best"):
        table.add_column(column, justify="right", no_wrap=True)
    best: dict[str, float] = {}
    for row in rows:
        if row["time_us"] is not None:
            best[_case(row)] = min(best.get(_case(row), float("inf")), row["time_us"])
    previous = ""
    for row in rows:
        if _case(row) != previous:
            table.add_row(f"[bold]{_case(row)}[/]")
        previous, label = _case(row), f"  {row['provider']} {row['impl']}"
        if row["time_us"] is None:
            table.add_row(label, "wrong", style="red")
            continue
        times = [_digits(row[key] / scale) for key in ("time_us", "time_us_p10", "time_us_p90")]
        shares = [_over(row["time_us"], row[key]) for key in ("copy_time_us", "read_time_us")]
        table.add_row(label, *times, *shares, _over(row["time_us"], best[_case(row)]))
    table.caption = f"in bold: {', '.join(rows[0]['sizes'])}, routing"
    return table


def _case(row: dict[str, Any]) -> str:
    return ", ".join(map(str, (*row["sizes"].values(), row["routing"])))


def _over(time: float, other: float | None) -> str:
    return _digits(time / other) if other else ""


def _digits(value: float) -> str:
    """Three digits or, above 100, all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
