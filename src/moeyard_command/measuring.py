"""`moeyard bench`: signatures and help need no torch; what a command does imports it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeyard_command.shown import console, device_of, errors, fail, progress_bars

if TYPE_CHECKING:
    import torch

    from moeyard.bench.operators import Case, Provider
    from moeyard.bench.others import Giving

bench_app = typer.Typer(invoke_without_command=True)


@bench_app.callback()
def bench(
    context: typer.Context,
    workload: Annotated[
        list[str] | None,
        typer.Option("--workload", "-w", help="A workload by name, a TOML file or a .trace file; seed unless given."),
    ] = None,
    op: Annotated[list[str] | None, typer.Option("--op", help="Only these ops of the workloads.")] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider",
            "-p",
            help="Only these: moeyard, moeyard:cpu, torch, vllm, ... Besides: module:function, a kernel of yours.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; cuda where there is one unless given.")] = "auto",
    rounds: Annotated[int, typer.Option(min=3, help="Samples of every provider, taken in turn.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    scale: Annotated[int, typer.Option(min=1, help="Divide hidden and intermediate sizes of models by this.")] = 1,
    cold_: Annotated[bool, typer.Option("--cold", help="Also time first calls in fresh processes (CPU).")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a JSON result file.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the workloads and stop.")] = False,
) -> None:
    """Time every provider of a workload: checked first, then in turn, median and spread."""
    if context.invoked_subcommand is not None:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        if given:
            raise fail(f"bench {context.invoked_subcommand}: expected its own options behind it, got {given} before")
        return
    from moeyard.bench import cold, peers, results, run, timing, workloads
    from moeyard.bench.tables import EXPLAINED, tables

    if list_:
        for name, description in workloads.names().items():
            console.print(f"[bold]{name}[/]: {description}")
        return
    place = device_of(device)
    cases = _cases(workload or ["seed"], op, scale)
    named, theirs = _providers(provider or [], cases, place)
    first = next((case for case in cases if case.op == cold.OP), None)
    if cold_ and first is None:
        raise fail(f"--cold: expected a workload of {cold.OP}, got none")
    rows: list[dict[str, Any]] = []
    with progress_bars() as progress:
        steps = len(cases) * rounds * (2 if place.type == "cuda" else 1)
        cold_rounds = 5
        task = progress.add_task("measuring rates", total=steps + cold_ * cold.COLD_KINDS * (cold_rounds + 1))
        rates = timing.rates(place)
        for case in cases:
            progress.update(task, description=str(case))
            rows += run.run_case(
                case,
                place,
                rates=rates,
                rounds=rounds,
                wanted=lambda p: _is_wanted(p, named),
                others=lambda case, device: [p for giving in theirs for p in giving(case, device)],
                seed=seed,
                advance=lambda: progress.advance(task),
            )
        if cold_ and first is not None:
            progress.update(task, description="first calls in fresh processes")
            rows += cold.run_cold(first, place, cold_rounds, lambda: progress.advance(task))
    facts = results.machine(place, rates)
    for shown in tables(rows):
        console.print(shown)
    where = f"{facts.get('gpu', facts['cpu'])}, copy bandwidth {rates.copy_gb_s:.1f} GB/s, read {rates.read_gb_s:.1f}"
    console.print(f"{where}; {EXPLAINED}")
    if out is not None:
        results.write(out, results.document(rows, facts, peers.versions(place)))
        console.print(f"wrote {out}")
    wrong = [row for row in rows if not row["correct"]]
    for row in wrong:
        whose = f"{row['provider']} {row['impl']}, {row['op']} {row['sizes']} {row['routing']}"
        errors.print(f"wrong, not timed: {whose}: {row['wrong']}", style="red", highlight=False, markup=False)
    if wrong:
        raise typer.Exit(1)


@bench_app.command()
def experts(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result file and of logs/.")],
    seconds: Annotated[float, typer.Option(help="Everything ends by then.")] = 170.0,
    name: Annotated[str, typer.Option(help="The result file's name without .json.")] = "experts_bf16",
    models: Annotated[str, typer.Option(help="Comma-separated; all unless given.")] = "",
    tokens: Annotated[str, typer.Option(help="Comma-separated; what each part is made for unless given.")] = "",
    parts: Annotated[str, typer.Option(help="Comma-separated, in the order wanted; 16-bit weights unless given.")] = "",
    providers: Annotated[str, typer.Option(help="Comma-separated; only these: vllm, moeyard:cuda, ...")] = "",
    all_: Annotated[bool, typer.Option("--all", help="All of moeyard's implementations but torch's.")] = False,
    variants: Annotated[str, typer.Option(help="MODULE:FUNCTION; it gives (label, run) pairs for a case.")] = "",
    others: Annotated[str, typer.Option(help="MODULE:FUNCTION; it gives (name, version, run) of more peers.")] = "",
    cell_seconds: Annotated[float, typer.Option(help="About how long a case's rounds last.")] = 0.8,
    rounds: Annotated[int | None, typer.Option(help="At most so many rounds per case.")] = None,
    shares: Annotated[int, typer.Option(help="Processes per model that compile ahead; 0 for none.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    scale: Annotated[int, typer.Option(min=1, help="Divide hidden and intermediate sizes by this.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
) -> None:
    """Time experts beside vLLM, torch and DeepGEMM within a time limit, one process per model."""
    from moeyard.bench import experts_cells, experts_gpu, timing

    try:
        wanted = experts_gpu.Options(
            out, seconds, name, _names(models) or tuple(experts_cells.MODELS), _numbers(tokens),
            _names(parts) or experts_cells.USUAL, _names(providers), all_, variants, others, cell_seconds,
            timing.MOST_ROUNDS if rounds is None else rounds, shares, seed, scale, device_of(device).type,
        )  # fmt: skip
        if not experts_gpu.measure(wanted):
            raise typer.Exit(1)
    except ValueError as problem:
        raise fail(str(problem)) from None


def _cases(names: list[str], ops: list[str] | None, scale: int) -> "list[Case]":
    from moeyard.bench import workloads

    try:
        found = [case for name in names for case in workloads.load(name, scale)]
    except ValueError as problem:
        raise fail(str(problem)) from None
    known = list(dict.fromkeys(case.op for case in found))
    unknown = [op for op in ops or [] if op not in known]
    if unknown:
        raise fail(f"--op: expected ops of these workloads ({', '.join(known)}), got {', '.join(unknown)}")
    return [case for case in found if not ops or case.op in ops]


def _providers(names: list[str], cases: "list[Case]", place: "torch.device") -> "tuple[list[str], list[Giving]]":
    """(names of providers of ours and our peers, functions of others), of what --provider lists."""
    from moeyard.bench import others
    from moeyard.bench.operators import operators

    everyone = [p for case in cases for p in operators()[case.op].providers(case, place)]
    known = {p.name for p in everyone} | {p.label for p in everyone}
    try:
        found = {name: others.find(name) for name in names if name not in known}
    except ValueError as problem:
        raise fail(str(problem)) from None
    unknown = [name for name, giving in found.items() if giving is None]
    if unknown:
        labels = ", ".join(sorted({p.label for p in everyone}))
        words = f"--provider: expected some of {labels}, or module:function; got {', '.join(unknown)}"
        if len(unknown) == len(names):
            raise fail(words)
        errors.print(f"left out: {words}", highlight=False, markup=False)  # a peer that is not installed here
    theirs = [giving for giving in found.values() if giving is not None]
    if theirs and not any(giving(case, place) for giving in theirs for case in cases):
        raise fail(f"--provider: expected a function that takes one of these cases, got {', '.join(found)}")
    return [name for name in names if name in known], theirs


def _is_wanted(provider: "Provider", names: list[str] | None) -> bool:
    return not names or provider.name in names or provider.label in names


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(filter(None, text.split(","))) if text else None


def _numbers(text: str) -> tuple[int, ...] | None:
    found = _names(text)
    if found is not None and not all(part.isdecimal() for part in found):
        raise fail(f"--tokens: expected integers with commas between them, got {text!r}")
    return None if found is None else tuple(map(int, found))
