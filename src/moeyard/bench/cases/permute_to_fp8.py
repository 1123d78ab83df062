"""Rows into the order of experts, quantised by token (a group_size of 0) or by groups of 128 values."""

import torch

import moeyard
from moeyard.bench.operators import Case, Operator, Provider, Run, able, reusing
from moeyard.bench.rows import ROW_SIZES, RowInputs, draw_rows
from moeyard.testing import fp8_error
from moeyard.values import Permuted


def providers(case: Case, device: torch.device) -> list[Provider]:
    """moeyard and plain torch."""
    found = [Provider("moeyard", impl, _moeyard(case, impl)) for impl in able(case.op, case, device)]
    size = case["group_size"] or case["hidden_size"]
    return [*found, Provider("torch", "plain", lambda x: _plain(x, size), waits=True)]


def error(case: Case, _: Provider, inputs: RowInputs, got: Permuted) -> str | None:
    """Values and scales, bit by bit."""
    return fp8_error(inputs.hidden_states, inputs.layout, got, case["group_size"] or None)


def bytes_moved(case: Case) -> int:
    """Every token's row read, every route's values and scales written."""
    hidden, size = case["hidden_size"], case["group_size"]
    written = hidden + 4 * (hidden // size if size else 1)
    return int(case["num_tokens"] * (hidden * case.dtype.itemsize + case["top_k"] * written))


SIZES = (*ROW_SIZES[:-1], "group_size", "dtype")
OPERATOR = Operator(SIZES, draw_rows, providers, error, bytes_moved, values={"group_size": (0, 128)})


def _moeyard(case: Case, impl: str) -> Run:
    size = case["group_size"] or None
    permute = moeyard.permute_to_fp8
    return reusing(lambda x, out: permute(x.hidden_states, x.layout, group_size=size, out=out, impl=impl))


def _plain(x: RowInputs, size: int) -> Permuted:
    tokens, hidden = x.hidden_states.shape
    groups = x.hidden_states.float().view(tokens, hidden // size, size)
    largest = groups.abs().amax(2).clamp(min=1e-10)
    scales = largest / torch.full_like(largest, 448.0)
    values = (groups / scales.unsqueeze(2)).clamp(-448, 448).to(torch.float8_e4m3fn).view(tokens, hidden)
    source = (x.layout.sorted_token_ids // x.layout.top_k).clamp(max=tokens - 1)
    rows = values.view(torch.uint8)[source].view(torch.float8_e4m3fn)
    return Permuted(rows, scales[source])
