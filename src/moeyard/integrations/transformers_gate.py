"""Which of our activations the gate of an experts module of transformers is: found by asking the gate itself."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

import moeyard
from moeyard.values import Activation

PRODUCTS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
"""The parameters of an experts module that its two products read."""
NORM = "post_expert_norm"
_PLAIN = (bool, int, float, str)


class Gate(NamedTuple):
    """What stands between the two products of an experts module."""

    activation: Activation | None
    """None where ours do not express it: the module's own gate is called."""
    in_turn: bool
    """Whether the rows of the first matrix take turns (gate 0, up 0, gate 1, ...); else the gate half comes first."""
    numbers: tuple[tuple[str, float], ...]
    """Attributes of the module that the gate may read, with the values that they had."""
    curve: str
    """The class of the module's activation function."""


def facts_of(module: nn.Module) -> tuple[Any, ...]:
    """All that a gate may depend on and that may change: other facts, other gate."""
    own = getattr(module, "_apply_gate", None)
    values = [item for item in vars(module).items() if type(item[1]) in _PLAIN]
    return getattr(own, "__func__", own), getattr(module, "act_fn", None), *values


def gate_of(module: nn.Module) -> Gate:
    """The gate of an experts module, recognised by its results.

    The gate gets float32 rows of the width that it has in the model, on the CPU: values up to 40000, so that every
    limit is met. Its results are compared with those of our activations, whose numbers are among the module's own. It
    is ours where every result agrees within a relative 1e-5, or within 2e-6 of (1 + |gate|) * (1 + |up|). A gate with
    tensors of its own is never ours, since these may change. One that cannot be asked is never ours either.
    """
    numbers = tuple((name, value) for name, value in vars(module).items() if type(value) in (int, float))
    curve = type(getattr(module, "act_fn", None)).__name__
    own = Gate(None, False, numbers, curve)
    tensors = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    if any(name not in PRODUCTS and not name.startswith(f"{NORM}.") for name in tensors):
        return own
    gated, first = bool(module.has_gate), module.gate_up_proj if module.has_gate else module.up_proj
    assert isinstance(first, Tensor)
    columns = first.shape[2 if module.is_transposed else 1]
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        rows = _probe(columns)
        got = _ask(module._apply_gate if gated else module.act_fn, rows)
        if got is None or tuple(got.shape) != (rows.shape[0], columns // (1 + gated)):
            return own
        for in_turn in (False, True) if gated else (False,):
            activation = _find(_pairs(rows, gated, in_turn), got.double().reshape(-1), gated, numbers)
            if activation is not None:
                return Gate(activation, in_turn, numbers, curve)
    return own


def _ask(gate: Any, rows: Tensor) -> Tensor | None:
    """What a module's own gate makes of rows; None where it cannot be asked here."""
    try:
        result = gate(rows.clone())
    except Exception:  # any error of code that is not ours says that it cannot be asked
        return None
    return result if type(result) is Tensor and result.is_cpu else None


def _probe(columns: int) -> Tensor:
    """[rows, columns] float32: mostly a few units, some of tens, some of thousands; no two columns alike."""
    num_rows = max(8, -(-_LEAST // max(columns, 1)))
    generator = torch.Generator().manual_seed(0)
    rows = 3 * torch.randn(num_rows, columns, generator=generator, device="cpu", dtype=torch.float32)
    kind = torch.rand(num_rows, columns, generator=generator, device="cpu", dtype=torch.float32)
    return torch.where(kind < 0.1, 10_000 * rows, torch.where(kind < 0.3, 10 * rows, rows)).clamp_(-40_000, 40_000)


_LEAST = 2048


def _pairs(rows: Tensor, gated: bool, in_turn: bool) -> Tensor:
    """[results, 2] float64 gate and up of every result; [results, 1] without a gate."""
    wide = rows.double()
    if not gated:
        return wide.reshape(-1, 1)
    gate, up = (wide[:, 0::2], wide[:, 1::2]) if in_turn else wide.chunk(2, 1)
    return torch.stack((gate.reshape(-1), up.reshape(-1)), 1)


def _find(pairs: Tensor, got: Tensor, gated: bool, numbers: tuple[tuple[str, float], ...]) -> Activation | None:
    """The activation that gives these results."""
    some = slice(0, _LEAST // 4)
    for activation in _candidates(gated, [float(value) for _, value in numbers]):
        if _agrees(pairs[some], got[some], activation, gated) and _agrees(pairs, got, activation, gated):
            return activation
    return None


def _agrees(pairs: Tensor, got: Tensor, activation: Activation, gated: bool) -> bool:
    wanted = moeyard.activate(pairs, activation, gated=gated, impl="reference").reshape(-1)
    size = (1 + pairs.abs()).prod(1)
    return bool(((got - wanted).abs() <= 1e-5 * wanted.abs() + 2e-6 * size).all())


def _candidates(gated: bool, numbers: list[float]) -> Iterator[Activation]:
    """Our activations with the module's numbers, the plainest first."""
    positive = sorted({number for number in numbers if number > 0})
    curves = [(name, 1.0) for name in Activation.NAMES]
    curves += [("silu", alpha) for alpha in sorted({1.702, *positive} - {1.0})]
    choices = list(product(curves, (0.0, 1.0) if gated else (0.0,), (None, *positive)))
    plainness: Callable[[Any], int] = lambda c: (c[0][1] != 1.0) + (c[1] != 0.0) + (c[2] is not None)  # noqa: E731
    for (name, alpha), beta, limit in sorted(choices, key=plainness):
        yield Activation(name, alpha, beta, limit)
