"""Rows of experts, weighted and summed for their tokens, into a tensor that exists."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

import moeyard
from moeyard.bench import vllm_peer
from moeyard.bench.operators import Case, Operator, Provider, Run, able, reusing
from moeyard.bench.peers import peer_version
from moeyard.bench.rows import ROW_SIZES, bytes_of_rows, draw_rows
from moeyard.testing import sum_error
from moeyard.values import Layout


@dataclass(frozen=True)
class Inputs:
    """What a case hands to every provider."""

    rows: Tensor
    """[capacity, hidden_size], in the order of experts"""
    layout: Layout
    topk_weights: Tensor


def inputs(case: Case, device: torch.device, generator: Generator) -> Inputs:
    """Rows as permute leaves them."""
    drawn = draw_rows(case, device, generator)
    return Inputs(moeyard.permute(drawn.hidden_states, drawn.layout).rows, drawn.layout, drawn.topk_weights)


def providers(case: Case, device: torch.device) -> list[Provider]:
    """moeyard, plain torch, on a GPU vLLM."""
    found = [Provider("moeyard", impl, _moeyard(impl)) for impl in able(case.op, case, device)]
    found.append(Provider("torch", "plain", _plain, waits=True))
    if device.type == "cuda" and peer_version("vllm"):
        found.append(Provider("vllm", peer_version("vllm"), _vllm(case)))
    return found


def error(case: Case, _: Provider, given: Inputs, got: Tensor) -> str | None:
    """Against float64."""
    row = given.layout.route_rows.view(-1, case["top_k"])
    wide = torch.zeros(row.shape[0], given.rows.shape[1], dtype=torch.float64, device=given.rows.device)
    for k in range(case["top_k"]):
        taken = given.rows[row[:, k].clamp(min=0)].double() * given.topk_weights[:, k : k + 1].double()
        wide += torch.where((row[:, k] >= 0).unsqueeze(1), taken, 0)
    return sum_error(wide, got, case["top_k"])


OPERATOR = Operator(ROW_SIZES, inputs, providers, error, bytes_of_rows)


def _moeyard(impl: str) -> Run:
    return reusing(lambda x, out: moeyard.combine(x.rows, x.layout, x.topk_weights, out=out, impl=impl))


def _plain(x: Inputs) -> Tensor:
    taken = x.rows[x.layout.route_rows.clamp(min=0)].view(*x.topk_weights.shape, -1)
    dropped = (x.layout.route_rows < 0).view(*x.topk_weights.shape, 1)
    weighted = (taken * x.topk_weights.unsqueeze(2)).masked_fill(dropped, 0)
    return weighted.sum(1).to(x.rows.dtype)


def _vllm(case: Case) -> Run:
    unpermute = vllm_peer.function("moe_permute_unpermute", "moe_unpermute")

    def call(x: Inputs, out: Any) -> Any:
        if out is None:
            out = x.rows.new_empty(case["num_tokens"], case["hidden_size"])
        unpermute(out, x.rows, x.topk_weights, x.layout.route_rows, x.layout.expert_offsets)
        return out

    return reusing(call)
