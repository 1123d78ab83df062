"""Rows into the order of experts, into a tensor that exists."""

from typing import Any

import torch
from torch import Tensor

import moeyard
from moeyard.bench.operators import Case, Operator, Provider, Run, able, reusing
from moeyard.bench.rows import ROW_SIZES, RowInputs, bytes_of_rows, draw_rows
from moeyard.testing import rows_error


def providers(case: Case, device: torch.device) -> list[Provider]:
    """moeyard and plain torch."""
    found = [Provider("moeyard", impl, _moeyard(impl)) for impl in able(case.op, case, device)]
    return [*found, Provider("torch", "plain", reusing(_plain), waits=True)]


def error(_: Case, __: Provider, inputs: RowInputs, got: Tensor) -> str | None:
    """Bit by bit."""
    return rows_error(inputs.hidden_states, inputs.layout, got)


OPERATOR = Operator(ROW_SIZES, draw_rows, providers, error, bytes_of_rows)


def _moeyard(impl: str) -> Run:
    permute = reusing(lambda x, out: moeyard.permute(x.hidden_states, x.layout, out=out, impl=impl))
    return lambda x: permute(x).rows


def _plain(x: RowInputs, out: Any) -> Tensor:
    tokens = torch.div(x.layout.sorted_token_ids, x.layout.top_k, rounding_mode="floor")
    tokens = tokens.clamp(max=x.hidden_states.shape[0] - 1)
    return torch.index_select(x.hidden_states, 0, tokens, out=out)
