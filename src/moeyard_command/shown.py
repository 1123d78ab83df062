"""What all commands share: consoles, devices, progress, errors that end with status 2. Torch is imported late."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    import torch

console = Console()
errors = Console(stderr=True)


def fail(message: str) -> typer.Exit:
    """Prints an error; to be raised."""
    errors.print(f"error: {message}", highlight=False, markup=False)
    return typer.Exit(2)


def device_of(name: str) -> "torch.device":
    """The device that --device names, "auto" included."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise fail(f"--device: expected cpu or cuda, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise fail(f"--device: expected a device of this machine, got {name!r} and torch sees no GPU")
    return torch.device(name)


def stepper(shown: Progress, what: str, steps: int) -> Callable[[], None]:
    """What moves a new bar on by one step."""
    task = shown.add_task(what, total=steps)
    return lambda: shown.advance(task)


def progress_bars() -> Progress:
    """Bars on stderr, which go away."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=errors, transient=True)
