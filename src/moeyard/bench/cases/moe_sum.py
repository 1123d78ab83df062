"""The top_k rows of every token, summed into a tensor that exists."""

from typing import Any

import torch
from torch import Generator, Tensor

import moeyard
from moeyard.bench import vllm_peer
from moeyard.bench.operators import Case, Operator, Provider, Run, able, generator_on, reusing
from moeyard.bench.peers import peer_version
from moeyard.bench.rows import bytes_of_rows
from moeyard.testing import sum_error


def inputs(case: Case, device: torch.device, generator: Generator) -> Tensor:
    """Rows, [num_tokens, top_k, hidden_size]."""
    generator = generator_on(device, generator)
    shape = (case["num_tokens"], case["top_k"], case["hidden_size"])
    return torch.randn(shape, generator=generator, device=generator.device).to(case.dtype)


def providers(case: Case, device: torch.device) -> list[Provider]:
    """moeyard, plain torch, on a GPU vLLM."""
    found = [Provider("moeyard", impl, _moeyard(impl)) for impl in able(case.op, case, device)]
    found.append(Provider("torch", "plain", lambda rows: rows.sum(1), waits=True))
    if device.type == "cuda" and peer_version("vllm"):
        found.append(Provider("vllm", peer_version("vllm"), _vllm()))
    return found


def error(case: Case, _: Provider, rows: Tensor, got: Tensor) -> str | None:
    """Against float64."""
    return sum_error(rows.double().sum(1), got, case["top_k"])


OPERATOR = Operator(("num_tokens", "top_k", "hidden_size", "dtype"), inputs, providers, error, bytes_of_rows)


def _moeyard(impl: str) -> Run:
    return reusing(lambda rows, out: moeyard.moe_sum(rows, out=out, impl=impl))


def _vllm() -> Run:
    vllm_peer.load()

    def call(rows: Tensor, out: Any) -> Any:
        out = torch.empty_like(rows[:, 0]) if out is None else out
        torch.ops._moe_C.moe_sum(rows, out)
        return out

    return reusing(call)
