"""Alignment and permute together, into a layout and rows that exist, as vLLM's moe_permute does both."""

from typing import Any

import torch
from torch import Tensor

import moeyard
from moeyard.bench import vllm_peer
from moeyard.bench.operators import Case, Operator, Provider, Run, able, reusing
from moeyard.bench.peers import peer_version
from moeyard.bench.rows import ROW_SIZES, RowInputs, bytes_of_rows, draw_rows
from moeyard.testing import rows_error


def providers(case: Case, device: torch.device) -> list[Provider]:
    """moeyard, plain torch, on a GPU vLLM."""
    found = [Provider("moeyard", impl, _moeyard(case, impl)) for impl in able("permute", case, device)]
    found.append(Provider("torch", "plain", lambda x: x.hidden_states[_order(x.topk_ids) // case["top_k"]], waits=True))
    if device.type == "cuda" and peer_version("vllm"):
        found.append(Provider("vllm", peer_version("vllm"), _vllm(case)))
    return found


def error(_: Case, __: Provider, inputs: RowInputs, got: Tensor) -> str | None:
    """Bit by bit."""
    return rows_error(inputs.hidden_states, inputs.layout, got)


OPERATOR = Operator(ROW_SIZES, draw_rows, providers, error, bytes_of_rows)


def _order(topk_ids: Tensor) -> Tensor:
    return topk_ids.view(-1).argsort(stable=True)


def _moeyard(case: Case, impl: str) -> Run:
    sizes = {"num_experts": case["num_experts"], "block_size": case["block_size"]}
    align = reusing(lambda x, out: moeyard.moe_align_block_size(x.topk_ids, out=out, impl=impl, **sizes))
    permute = reusing(lambda x, out: moeyard.permute(x.hidden_states, align(x), out=out, impl=impl))
    return lambda x: permute(x).rows


def _vllm(case: Case) -> Run:
    permute = vllm_peer.function("moe_permute_unpermute", "moe_permute")

    def call(x: RowInputs, out: Any) -> Any:
        if out is None:
            out = x.hidden_states.new_empty((x.topk_ids.numel(), x.hidden_states.shape[1]))
        return permute(x.hidden_states, None, x.topk_ids, case["num_experts"], permuted_hidden_states=out)[0]

    return reusing(call)
