"""The command line: moeyard bench | doctor | warmup | plot. It needs typer and rich, the extra `cli`."""

import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import moeyard
from moeyard import impls
from moeyard.bench import plots, results, run, workloads
from moeyard.bench import providers as who
from moeyard.bench.timing import copy_gb_s

app = typer.Typer(help="Mixture-of-Experts operators: measure them, see what runs here.", no_args_is_help=True)
_console = Console()
_errors = Console(stderr=True)


def _version(asked: bool) -> None:
    if asked:
        print(f"moeyard {moeyard.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def bench(
    workload: Annotated[
        list[str] | None,
        typer.Option("--workload", "-w", help="A workload by name, or a TOML file; seed unless given."),
    ] = None,
    op: Annotated[list[str] | None, typer.Option("--op", help="Only these ops of the workloads.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option("--provider", "-p", help="Only these: moeyard, moeyard:cpu, torch, vllm, ...")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; cuda where there is one unless given.")] = "auto",
    rounds: Annotated[int, typer.Option(min=3, help="Samples of every provider, taken in turn.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    scale: Annotated[int, typer.Option(min=1, help="Divide hidden and intermediate sizes of models by this.")] = 1,
    cold: Annotated[bool, typer.Option("--cold", help="Also time first calls in fresh processes (CPU).")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a JSON result file.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the workloads and stop.")] = False,
) -> None:
    """Time every provider of a workload: checked first, then in turn, median and spread."""
    if list_:
        for name, description in workloads.names().items():
            _console.print(f"[bold]{name}[/]: {description}")
        return
    place = _device(device)
    try:
        cases = [
            case for name in workload or ["seed"] for case in workloads.load(name, scale) if not op or case.op in op
        ]
    except ValueError as problem:
        raise _fail(str(problem)) from None
    if not cases:
        raise _fail(f"--op: expected ops of these workloads, got {op}")

    def wanted(name: str, impl: str) -> bool:
        return not provider or name in provider or f"{name}:{impl}" in provider

    if provider and not any(wanted(p.name, p.impl) for case in cases for p in who.providers(case, place)):
        known = sorted({f"{p.name}:{p.impl}" for case in cases for p in who.providers(case, place)})
        raise _fail(f"--provider: expected some of {known}, got {provider}")
    rows: list[dict[str, Any]] = []
    with _progress() as progress:
        steps = rounds * (2 if place.type == "cuda" else 1)
        cold_rounds = 5 if cold else 0
        total = len(cases) * steps + run.COLD_KINDS * (cold_rounds + bool(cold))
        task = progress.add_task("measuring bandwidth", total=total)
        bandwidth = copy_gb_s(place)
        for case in cases:
            progress.update(task, description=str(case))
            rows += run.run_case(
                case,
                place,
                bandwidth=bandwidth,
                rounds=rounds,
                wanted=wanted,
                seed=seed,
                advance=lambda: progress.advance(task),
            )
        if cold:
            first = next((case for case in cases if case.op == "moe_align_block_size"), None)
            if first is None:
                raise _fail("--cold: expected a workload of moe_align_block_size, got none")
            progress.update(task, description="first calls in fresh processes")
            rows += run.run_cold(first, place, cold_rounds, lambda: progress.advance(task))
    facts = results.machine(place, bandwidth)
    for table in _tables(rows):
        _console.print(table)
    _console.print(f"{facts.get('gpu', facts['cpu'])}, copy bandwidth {bandwidth:.1f} GB/s; floor = bytes / bandwidth")
    if out is not None:
        results.write(out, results.document(rows, facts, results.peers(results.peer_version("vllm"))))
        _console.print(f"wrote {out}")
    wrong = [row for row in rows if not row["correct"]]
    for row in wrong:
        where = f"{row['provider']} {row['impl']}, {row['op']} {row['sizes']} {row['routing']}"
        _errors.print(f"wrong, not timed: {where}: {row['wrong']}", style="red", highlight=False, markup=False)
    if wrong:
        raise typer.Exit(1)


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="A result file of `moeyard bench --out`.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .png or .svg file.")] = None,
    mode: Annotated[str | None, typer.Option(help="graph, eager or cpu.")] = None,
) -> None:
    """Draw a result file: time over tokens, and ratios."""
    target = out or result.with_suffix(".png")
    if target.suffix not in (".png", ".svg"):
        raise _fail(f"--out: expected a .png or .svg file, got {target}")
    if not impls.installed("matplotlib"):
        raise _fail("matplotlib is not installed (pip install 'moeyard[plot]')")
    try:
        shown = plots.plot(results.read(result), target, mode=mode)
    except ValueError as problem:
        raise _fail(str(problem)) from None
    _console.print(f"wrote {target}: {shown} providers")


@app.command()
def doctor() -> None:
    """Say what this machine can run, and why not the rest."""
    _console.print(f"moeyard {moeyard.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    cuda = torch.cuda.is_available()
    if cuda:
        _console.print(f"GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    elif torch.version.cuda is None:
        _console.print("no GPU: this build of torch is without CUDA")
    else:
        _console.print(f"no GPU: torch is built for CUDA {torch.version.cuda} but sees no device")
    for package, how, use in _OPTIONAL:
        state = "installed" if impls.installed(package) else f"missing ({how})"
        _console.print(f"{package}: {state}: {use}", highlight=False, markup=False)
    for place in ["cpu", *(["cuda"] if cuda else [])]:
        table = Table(title=f"{place} tensors", title_justify="left")
        for column in ("op", "auto takes", "the others"):
            table.add_column(column)
        for name in impls.TABLE:
            seen = impls.explain(name, place)
            rest = [f"{impl}: {why}" for impl, why in seen.reasons.items() if impl != seen.chosen]
            table.add_row(name, seen.chosen, Text("\n".join(rest)))
        _console.print(table)


_OPTIONAL = (
    ("numba", "pip install 'moeyard[cpu]'", "the cpu implementations"),
    ("cuda.core", "pip install 'moeyard[gpu]'", "the cuda implementations"),
    ("matplotlib", "pip install 'moeyard[plot]'", "moeyard plot"),
    ("transformers", "pip install transformers", "its experts as providers of moeyard bench"),
    ("vllm", "install a release that fits this torch", "vLLM as a provider of moeyard bench"),
)


@app.command()
def warmup(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; all there are unless given.")] = None,
) -> None:
    """Compile and cache kernels now, so that first calls need not."""
    place = None if device is None else _device(device)
    with _errors.status("compiling kernels"):
        seconds = moeyard.warmup(place)
    for name, spent in seconds.items():
        _console.print(f"{spent * 1e3:8.1f} ms  {name}", highlight=False)


def _fail(message: str) -> typer.Exit:
    _errors.print(f"error: {message}", highlight=False, markup=False)
    return typer.Exit(2)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise _fail(f"--device: expected cpu or cuda, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise _fail(f"--device: expected a device of this machine, got {name!r} and torch sees no GPU")
    return torch.device(name)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=_errors, transient=True)


def _tables(rows: list[dict[str, Any]]) -> list[Table]:
    """One table an op and mode; times relative to the best of a case stand in the last column."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["mode"]), []).append(row)
    tables = []
    for (name, mode), mine in groups.items():
        unit, scale = ("ms", 1e3) if mode == "cold" else ("µs", 1.0)
        table = Table(title=f"{name} ({mode}), {unit} a call", title_justify="left", box=box.SIMPLE)
        for column in ("sizes", "routing", "provider"):
            table.add_column(column, no_wrap=column == "provider")
        for column in ("median", "p10", "p90", "x floor", "x best"):
            table.add_column(column, justify="right", no_wrap=True)
        best: dict[str, float] = {}
        for row in mine:
            if row["time_us"] is not None:
                key = f"{row['sizes']} {row['routing']}"
                best[key] = min(best.get(key, float("inf")), row["time_us"])
        previous = ""
        for row in mine:
            key = f"{row['sizes']} {row['routing']}"
            sizes = ", ".join(str(value) for value in row["sizes"].values()) if key != previous else ""
            start = [sizes, row["routing"] if key != previous else "", f"{row['provider']} {row['impl']}"]
            if row["time_us"] is None:
                table.add_row(*start, "wrong", style="red")
            else:
                floor = f"{row['time_us'] / row['floor_us']:.2f}" if row["floor_us"] else ""
                times = [f"{row[k] / scale:.1f}" for k in ("time_us", "time_us_p10", "time_us_p90")]
                table.add_row(*start, *times, floor, f"{row['time_us'] / best[key]:.2f}")
            previous = key
        table.caption = "sizes: " + ", ".join(mine[0]["sizes"])
        tables.append(table)
    return tables
