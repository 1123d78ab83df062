"""Providers of others: a function `module:function`, or an entry point of the group `moeyard.providers`.

The function is asked for every case and device, and gives what is to be timed:

    def permute(case, device):              # my_kernels.py; moeyard bench -w rows --provider my_kernels:permute
        if case.op != "permute" or device.type != "cuda":
            return None                     # takes no part in this case
        return lambda inputs: my_permute(inputs.hidden_states, inputs.layout)

`case` is a `moeyard.bench.operators.Case` (`case.op`, `case["num_tokens"]`, `case.dtype`), `inputs` is what the
operator's module in moeyard/bench/cases makes, and the answer has the form that moeyard's own providers there give. A
`Provider` in place of the call says more: whether it is stable, or waits for the device. Answers meet the same gates as
moeyard's own: a wrong one is shown as wrong and not timed.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import torch

from moeyard.bench.operators import Case, Provider, Run

GROUP = "moeyard.providers"
Maker = Callable[[Case, torch.device], Run | Provider | None]
Giving = Callable[[Case, torch.device], list[Provider]]


def find(name: str) -> Giving | None:
    """What gives the providers of a name for a case: one or none. None where the name is no function of others.

    Raises ValueError where a module or its function is not there, or is no function.
    """
    registered = {point.name: point for point in entry_points(group=GROUP)}
    if name in registered:
        maker, label = registered[name].load(), (name, registered[name].value.partition(":")[2])
    elif ":" in name:
        place, _, function = name.partition(":")
        maker, label = _imported(place, function, name), (place, function)
    else:
        return None
    if not callable(maker):
        raise ValueError(f"--provider: expected a function at {name}, got {type(maker).__name__}")

    def providers(case: Case, device: torch.device) -> list[Provider]:
        made = maker(case, device)
        if made is None:
            return []
        if isinstance(made, Provider):
            return [replace(made, name=label[0], impl=label[1])]
        return [Provider(*label, made)]

    return providers


def _imported(place: str, function: str, name: str) -> Maker:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # the command's own folder is that of its script
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as problem:
        if not f"{place}.".startswith(f"{problem.name}."):
            raise
        raise ValueError(f"--provider: expected a module to import, got {name!r} ({problem})") from None
    if not hasattr(module, function):
        raise ValueError(f"--provider: expected a function of {place}, got {function!r}")
    maker: Maker = getattr(module, function)
    return maker
