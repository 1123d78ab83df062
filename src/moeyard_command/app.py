"""The command line: `moeyard --help` lists the commands. It needs typer and rich, the extra `cli`.

It is a package beside moeyard, since importing that imports torch. Help needs no torch; what a command does imports it.
"""

import platform
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from moeyard_command.measuring import bench_app
from moeyard_command.shown import console, device_of, errors, fail, progress_bars, stepper

app = typer.Typer(help="Mixture-of-Experts operators: measure them, see what runs here.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


def _version(asked: bool) -> None:
    if asked:
        import moeyard

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
def plot(
    result: Annotated[Path, typer.Argument(help="A result file of `moeyard bench --out`, or a .trace file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .png or .svg file.")] = None,
    mode: Annotated[str | None, typer.Option(help="graph, eager or cpu.")] = None,
) -> None:
    """Draw a result file: time over tokens, and ratios. Draw a trace: the load of experts."""
    from moeyard.bench import peers, plots, results, traces

    target = out or result.with_suffix(".png")
    if target.suffix not in (".png", ".svg"):
        raise fail(f"--out: expected a .png or .svg file, got {target}")
    if not peers.installed("matplotlib"):
        raise fail("matplotlib is not installed (pip install 'moeyard[plot]')")
    try:
        if result.suffix == traces.SUFFIX:
            rows, experts = plots.plot_loads(traces.read(result), target)
            shown = f"{rows} x {experts} experts"
        else:
            shown = f"{plots.plot(results.read(result), target, mode=mode)} providers"
    except ValueError as problem:
        raise fail(str(problem)) from None
    console.print(f"wrote {target}: {shown}")


@app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})
def trace(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="A Python script; what follows are its own arguments.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("moeyard.trace"),
) -> None:
    """Run a script and record which experts its tokens go to, for `bench -w` and `plot`."""
    from moeyard.bench import traces

    if not script.is_file():
        raise fail(f"SCRIPT: expected a file, got {script}")
    if out.suffix != traces.SUFFIX:
        raise fail(f"--out: expected a {traces.SUFFIX} file, got {out}")
    sys.argv = [str(script), *context.args]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        with traces.record(out):
            runpy.run_path(str(script), run_name="__main__")
    except traces.NothingRecordedError as problem:
        raise fail(str(problem)) from None
    errors.print(f"wrote {out}: {len(traces.read(out).calls)} calls")


@app.command()
def doctor() -> None:
    """Say what this machine can run, and why not the rest."""
    import torch
    from rich.table import Table
    from rich.text import Text

    import moeyard
    from moeyard.bench import peers
    from moeyard.dispatch.table import TABLE
    from moeyard.integrations.vllm import plugin

    console.print(f"moeyard {moeyard.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    cuda = torch.cuda.is_available()
    if cuda:
        console.print(f"GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    elif torch.version.cuda is None:
        console.print("no GPU: this build of torch is without CUDA")
    else:
        console.print(f"no GPU: torch is built for CUDA {torch.version.cuda} but sees no device")
    for package, how, use in _OPTIONAL:
        state = "installed" if peers.installed(package) else f"missing ({how})"
        console.print(f"{package}: {state}: {use}", highlight=False, markup=False)
    try:
        for line in plugin.describe():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    except ValueError as problem:
        raise fail(str(problem)) from None
    for place in ["cpu", *(["cuda"] if cuda else [])]:
        table = Table(title=f"{place} tensors", title_justify="left")
        for column in ("op", "auto takes", "the others"):
            table.add_column(column)
        for name in TABLE:
            seen = moeyard.explain(name, place)
            rest = [f"{impl}: {why}" for impl, why in seen.reasons.items() if why != "chosen"]
            table.add_row(name, seen.chosen, Text("\n".join(rest)))
        console.print(table)


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
    import moeyard
    from moeyard.bench import served

    if model == "list":
        console.print("\n".join(served.models()))
        return
    if model and device is not None:
        raise fail("--device: expected --arch beside --model, got --device")
    try:
        if model:
            layer = served.served(model)
            with progress_bars() as progress:
                seconds = moeyard.warmup(
                    layer.weights, max_tokens=max_tokens, arch=arch, impl=impl, jobs=jobs or None,
                    progress=lambda what, steps: stepper(progress, what, steps), **served.options_of(layer),
                )  # fmt: skip
        else:
            with errors.status("compiling kernels"):
                seconds = moeyard.warmup(None if device is None else device_of(device))
    except (ValueError, RuntimeError) as problem:
        raise fail(str(problem)) from None
    except KeyboardInterrupt:
        raise fail("interrupted; what was compiled is kept") from None
    for name, spent in seconds.items():
        console.print(f"{spent * 1e3:8.1f} ms  {name}", highlight=False)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A folder with safetensors files and config.json, or one such file.")],
    prefix: Annotated[
        list[str] | None, typer.Option(help="What stands before experts' names; all layers unless given.")
    ] = None,
) -> None:
    """Say what the experts of a checkpoint are: scheme, sizes, files. Reads no weights."""
    from moeyard.checkpoints import describe

    try:
        prefixes = prefix or describe.prefixes_in(path)
        if not prefixes:
            raise fail(f"PATH: expected a checkpoint with experts, got none in {path}")
        for name in prefixes:
            found = describe.describe(path, name)
            sizes = f"hidden_size {found.hidden_size}, intermediate_size {found.intermediate_size}"
            what = f"{found.num_experts} experts, {sizes}; {found.scheme} ({found.format}, {found.stored})"
            files = f"{found.files[0]}{f' and {len(found.files) - 1} more' if len(found.files) > 1 else ''}"
            note = f"; {found.note}" if found.note else ""
            line = f"{name}: {what}; {found.gigabytes:.3g} GB in {files}{note}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    except ValueError as problem:
        raise fail(str(problem)) from None


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="An operator by name; list lists them.")],
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU need not be there.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of rows, such as bfloat16; of an alignment's ids.")] = "",
    capability: Annotated[str, typer.Option(help="Of a GPU that need not be there, such as 9.0.")] = "",
    model: Annotated[str, typer.Option(help="Whose experts: a model by name or config.json. It says all sizes.")] = "",
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a call, beside --model.")] = None,
    scheme: Annotated[str, typer.Option(help="How a model's weights are quantised, as 'e4m3 1x*, e4m3 per row'.")] = "",
) -> None:
    """Say which implementation "auto" takes for an operator, and why not the others."""
    import moeyard
    from moeyard.dispatch.table import TABLE
    from moeyard_command import asked

    if op == "list":
        console.print("\n".join(TABLE))
        return
    try:
        seen = moeyard.explain(
            op, asked.place_of(device), asked.dtype_of(dtype), capability=asked.capability_of(capability),
            **asked.sizes_of(model, tokens, scheme),
        )  # fmt: skip
    except ValueError as problem:
        raise fail(str(problem)) from None
    console.print(str(seen), highlight=False, markup=False, soft_wrap=True)
    if asked.is_guess(seen.call):
        errors.print("no GPU here: what its sizes decide was not asked; --capability 9.0 names one", highlight=False)
