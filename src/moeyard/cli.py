"""The command line: `moeyard --help` lists the commands. It needs typer and rich, the extra `cli`."""

import platform
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import moeyard
from moeyard.bench import (
    cold,
    experts_cells,
    experts_gpu,
    others,
    peers,
    plots,
    results,
    run,
    served,
    timing,
    traces,
    workloads,
)
from moeyard.bench.operators import Case, Provider, operators
from moeyard.bench.tables import EXPLAINED, tables
from moeyard.checkpoints import describe
from moeyard.dispatch.table import TABLE, explain
from moeyard.integrations.vllm import plugin

app = typer.Typer(help="Mixture-of-Experts operators: measure them, see what runs here.", no_args_is_help=True)
bench_app = typer.Typer(invoke_without_command=True)
app.add_typer(bench_app, name="bench")
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
            raise _fail(f"bench {context.invoked_subcommand}: expected its own options behind it, got {given} before")
        return
    if list_:
        for name, description in workloads.names().items():
            _console.print(f"[bold]{name}[/]: {description}")
        return
    place = _device(device)
    cases = _cases(workload or ["seed"], op, scale)
    named, theirs = _providers(provider or [], cases, place)
    first = next((case for case in cases if case.op == cold.OP), None)
    if cold_ and first is None:
        raise _fail(f"--cold: expected a workload of {cold.OP}, got none")
    rows: list[dict[str, Any]] = []
    with _progress() as progress:
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
        _console.print(shown)
    where = f"{facts.get('gpu', facts['cpu'])}, copy bandwidth {rates.copy_gb_s:.1f} GB/s, read {rates.read_gb_s:.1f}"
    _console.print(f"{where}; {EXPLAINED}")
    if out is not None:
        results.write(out, results.document(rows, facts, peers.versions(place)))
        _console.print(f"wrote {out}")
    wrong = [row for row in rows if not row["correct"]]
    for row in wrong:
        whose = f"{row['provider']} {row['impl']}, {row['op']} {row['sizes']} {row['routing']}"
        _errors.print(f"wrong, not timed: {whose}: {row['wrong']}", style="red", highlight=False, markup=False)
    if wrong:
        raise typer.Exit(1)


def _cases(names: list[str], ops: list[str] | None, scale: int) -> list[Case]:
    try:
        found = [case for name in names for case in workloads.load(name, scale)]
    except ValueError as problem:
        raise _fail(str(problem)) from None
    known = list(dict.fromkeys(case.op for case in found))
    unknown = [op for op in ops or [] if op not in known]
    if unknown:
        raise _fail(f"--op: expected ops of these workloads ({', '.join(known)}), got {', '.join(unknown)}")
    return [case for case in found if not ops or case.op in ops]


def _providers(names: list[str], cases: list[Case], place: torch.device) -> tuple[list[str], list[others.Giving]]:
    """(names of providers of ours and our peers, functions of others), of what --provider lists."""
    everyone = [p for case in cases for p in operators()[case.op].providers(case, place)]
    known = {p.name for p in everyone} | {p.label for p in everyone}
    try:
        found = {name: others.find(name) for name in names if name not in known}
    except ValueError as problem:
        raise _fail(str(problem)) from None
    unknown = [name for name, giving in found.items() if giving is None]
    if unknown:
        labels = ", ".join(sorted({p.label for p in everyone}))
        words = f"--provider: expected some of {labels}, or module:function; got {', '.join(unknown)}"
        if len(unknown) == len(names):
            raise _fail(words)
        _errors.print(f"left out: {words}", highlight=False, markup=False)  # a peer that is not installed here
    theirs = [giving for giving in found.values() if giving is not None]
    if theirs and not any(giving(case, place) for giving in theirs for case in cases):
        raise _fail(f"--provider: expected a function that takes one of these cases, got {', '.join(found)}")
    return [name for name in names if name in known], theirs


def _is_wanted(provider: Provider, names: list[str] | None) -> bool:
    return not names or provider.name in names or provider.label in names


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(filter(None, text.split(","))) if text else None


def _numbers(text: str) -> tuple[int, ...] | None:
    found = _names(text)
    if found is not None and not all(part.isdecimal() for part in found):
        raise _fail(f"--tokens: expected integers with commas between them, got {text!r}")
    return None if found is None else tuple(map(int, found))


@bench_app.command()
def experts(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the result file and of logs/.")],
    seconds: Annotated[float, typer.Option(help="Everything ends by then.")] = 170.0,
    name: Annotated[str, typer.Option(help="The result file's name without .json.")] = "experts_bf16",
    models: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(experts_cells.MODELS),
    tokens: Annotated[str, typer.Option(help="Comma-separated; what each part is made for unless given.")] = "",
    parts: Annotated[str, typer.Option(help="Comma-separated, in the order wanted.")] = ",".join(experts_cells.USUAL),
    providers: Annotated[str, typer.Option(help="Comma-separated; only these: vllm, moeyard:cuda, ...")] = "",
    all_: Annotated[bool, typer.Option("--all", help="All of moeyard's implementations but torch's.")] = False,
    variants: Annotated[str, typer.Option(help="MODULE:FUNCTION; it gives (label, run) pairs for a case.")] = "",
    others: Annotated[str, typer.Option(help="MODULE:FUNCTION; it gives (name, version, run) of more peers.")] = "",
    cell_seconds: Annotated[float, typer.Option(help="About how long a case's rounds last.")] = 0.8,
    rounds: Annotated[int, typer.Option(help="At most so many rounds per case.")] = timing.MOST_ROUNDS,
    shares: Annotated[int, typer.Option(help="Processes per model that compile ahead; 0 for none.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    scale: Annotated[int, typer.Option(min=1, help="Divide hidden and intermediate sizes by this.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
) -> None:
    """Time experts beside vLLM, torch and DeepGEMM within a time limit, one process per model."""
    try:
        wanted = experts_gpu.Options(
            out, seconds, name, _names(models) or (), _numbers(tokens),
            _names(parts) or (), _names(providers), all_, variants, others, cell_seconds, rounds, shares, seed,
            scale, _device(device).type,
        )  # fmt: skip
        if not experts_gpu.measure(wanted):
            raise typer.Exit(1)
    except ValueError as problem:
        raise _fail(str(problem)) from None


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="A result file of `moeyard bench --out`, or a .trace file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .png or .svg file.")] = None,
    mode: Annotated[str | None, typer.Option(help="graph, eager or cpu.")] = None,
) -> None:
    """Draw a result file: time over tokens, and ratios. Draw a trace: the load of experts."""
    target = out or result.with_suffix(".png")
    if target.suffix not in (".png", ".svg"):
        raise _fail(f"--out: expected a .png or .svg file, got {target}")
    if not peers.installed("matplotlib"):
        raise _fail("matplotlib is not installed (pip install 'moeyard[plot]')")
    try:
        if result.suffix == traces.SUFFIX:
            rows, experts = plots.plot_loads(traces.read(result), target)
            shown = f"{rows} x {experts} experts"
        else:
            shown = f"{plots.plot(results.read(result), target, mode=mode)} providers"
    except ValueError as problem:
        raise _fail(str(problem)) from None
    _console.print(f"wrote {target}: {shown}")


@app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})
def trace(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="A Python script; what follows are its own arguments.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path(f"moeyard{traces.SUFFIX}"),
) -> None:
    """Run a script and record which experts its tokens go to, for `bench -w` and `plot`."""
    if not script.is_file():
        raise _fail(f"SCRIPT: expected a file, got {script}")
    if out.suffix != traces.SUFFIX:
        raise _fail(f"--out: expected a {traces.SUFFIX} file, got {out}")
    sys.argv = [str(script), *context.args]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        with traces.record(out):
            runpy.run_path(str(script), run_name="__main__")
    except traces.NothingRecordedError as problem:
        raise _fail(str(problem)) from None
    _errors.print(f"wrote {out}: {len(traces.read(out).calls)} calls")


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
        state = "installed" if peers.installed(package) else f"missing ({how})"
        _console.print(f"{package}: {state}: {use}", highlight=False, markup=False)
    try:
        for line in plugin.describe():
            _console.print(line, highlight=False, markup=False, soft_wrap=True)
    except ValueError as problem:
        raise _fail(str(problem)) from None
    for place in ["cpu", *(["cuda"] if cuda else [])]:
        table = Table(title=f"{place} tensors", title_justify="left")
        for column in ("op", "auto takes", "the others"):
            table.add_column(column)
        for name in TABLE:
            seen = explain(name, place)
            rest = [f"{impl}: {why}" for impl, why in seen.reasons.items() if why != "chosen"]
            table.add_row(name, seen.chosen, Text("\n".join(rest)))
        _console.print(table)


_OPTIONAL = (
    ("numba", "pip install 'moeyard[cpu]'", "the cpu implementations"),
    ("cuda.core", "pip install 'moeyard[gpu]'", "the cuda implementations"),
    ("triton", "pip install 'moeyard[gpu]'", "the triton implementations"),
    ("matplotlib", "pip install 'moeyard[plot]'", "moeyard plot"),
    ("compressed_tensors", "pip install 'moeyard[checkpoints]'", "load_experts checks its configurations with it"),
    ("transformers", "pip install transformers", "its experts as providers of moeyard bench"),
    ("vllm", "install a release that fits this torch", "vLLM as a provider of moeyard bench"),
)


@app.command()
def warmup(
    device: Annotated[str | None, typer.Option(help="Without a model: cpu or cuda; both unless given.")] = None,
    model: Annotated[
        str, typer.Option(help="A model by name or config.json: all kernels of its layer; --model list lists names.")
    ] = "",
    arch: Annotated[str, typer.Option(help="What a model's kernels are compiled for, without a GPU.")] = "sm_90a",
    impl: Annotated[str, typer.Option(help="Of a model's experts: auto, cuda or triton.")] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of a call.")] = 16384,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: as many as cores.")] = 0,
) -> None:
    """Compile and cache kernels now, so that first calls need not."""
    if model == "list":
        _console.print("\n".join(served.models()))
        return
    if model and device is not None:
        raise _fail("--device: expected --arch beside --model, got --device")
    try:
        if model:
            layer = served.served(model)
            with _progress() as progress:
                seconds = moeyard.warmup(
                    layer.weights, max_tokens=max_tokens, arch=arch, impl=impl, jobs=jobs or None,
                    progress=lambda what, steps: _stepper(progress, what, steps), **served.options_of(layer),
                )  # fmt: skip
        else:
            with _errors.status("compiling kernels"):
                seconds = moeyard.warmup(None if device is None else _device(device))
    except (ValueError, RuntimeError) as problem:
        raise _fail(str(problem)) from None
    except KeyboardInterrupt:
        raise _fail("interrupted; what was compiled is kept") from None
    for name, spent in seconds.items():
        _console.print(f"{spent * 1e3:8.1f} ms  {name}", highlight=False)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A folder with safetensors files and config.json, or one such file.")],
    prefix: Annotated[
        list[str] | None, typer.Option(help="What stands before experts' names; all layers unless given.")
    ] = None,
) -> None:
    """Say what the experts of a checkpoint are: scheme, sizes, files. Reads no weights."""
    try:
        prefixes = prefix or describe.prefixes_in(path)
        if not prefixes:
            raise _fail(f"PATH: expected a checkpoint with experts, got none in {path}")
        for name in prefixes:
            found = describe.describe(path, name)
            sizes = f"hidden_size {found.hidden_size}, intermediate_size {found.intermediate_size}"
            what = f"{found.num_experts} experts, {sizes}; {found.scheme} ({found.format}, {found.stored})"
            files = f"{found.files[0]}{f' and {len(found.files) - 1} more' if len(found.files) > 1 else ''}"
            note = f"; {found.note}" if found.note else ""
            line = f"{name}: {what}; {found.gigabytes:.3g} GB in {files}{note}"
            _console.print(line, highlight=False, markup=False, soft_wrap=True)
    except ValueError as problem:
        raise _fail(str(problem)) from None


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


def _stepper(progress: Progress, what: str, steps: int) -> Callable[[], None]:
    task = progress.add_task(what, total=steps)
    return lambda: progress.advance(task)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=_errors, transient=True)
