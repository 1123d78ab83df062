"""Ids to a layout, into fresh tensors."""

import importlib
from typing import Any

import torch
from torch import Generator, Tensor

import moeyard
from moeyard.bench import vllm_peer
from moeyard.bench.operators import Case, Operator, Provider, Run, able, reusing
from moeyard.bench.peers import installed, peer_version
from moeyard.bench.rows import LAYOUT_SIZES, draw_ids, named
from moeyard.testing import layout_error
from moeyard.values import Layout


def inputs(case: Case, device: torch.device, generator: Generator) -> Tensor:
    """Ids, [num_tokens, top_k] int32."""
    return draw_ids(case, device, generator)


def providers(case: Case, device: torch.device) -> list[Provider]:
    """moeyard, plain torch, on a CPU a bare counting sort, on a GPU vLLM."""
    found = [
        Provider("moeyard", impl, _moeyard(case, impl), eager=_other_calls(case) if impl == "cuda" else ())
        for impl in able(case.op, case, device)
    ]
    found.append(
        Provider("torch", "plain", lambda ids: _plain(ids, case["num_experts"], case["block_size"]), waits=True)
    )
    if device.type == "cpu" and installed("numba"):
        found.append(Provider("numba", "bare", _bare(case)))
    if device.type == "cuda" and peer_version("vllm"):
        align = vllm_peer.function("moe_align_block_size", "moe_align_block_size")
        theirs: Run = lambda ids: align(ids, case["block_size"], case["num_experts"])  # noqa: E731
        found.append(Provider("vllm", peer_version("vllm"), theirs, stable=False))
    return found


def error(case: Case, provider: Provider, ids: Tensor, got: Any) -> str | None:
    """Properties that only the right layout has."""
    return layout_error(ids, case["num_experts"], case["block_size"], named(got), stable=provider.stable)


def bytes_moved(case: Case) -> int:
    """Ids read, sorted_token_ids and route_rows written; the rest is small or padding."""
    return int(12 * case["num_tokens"] * case["top_k"])


OPERATOR = Operator(LAYOUT_SIZES, inputs, providers, error, bytes_moved)


def _moeyard(case: Case, impl: str) -> Run:
    sizes = {"num_experts": case["num_experts"], "block_size": case["block_size"]}
    return lambda ids: moeyard.moe_align_block_size(ids, impl=impl, **sizes)


def _other_calls(case: Case) -> tuple[tuple[str, Run], ...]:
    """Into a layout that is there already, and behind vLLM's signature: the triple alone."""
    experts, block = case["num_experts"], case["block_size"]

    def into(ids: Tensor, out: Layout | None) -> Layout:
        return moeyard.moe_align_block_size(ids, num_experts=experts, block_size=block, out=out, impl="cuda")

    def triple(ids: Tensor) -> Any:
        from moeyard.integrations.vllm import moe_align_block_size

        return moe_align_block_size(ids, block, experts)

    return ("eager_out", reusing(into)), ("eager_triple", triple)


def _plain(topk_ids: Tensor, num_experts: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What one writes in eager torch without a library."""
    ids = topk_ids.reshape(-1).long()
    n, device = ids.shape[0], ids.device
    keys = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    blocks = (counts + block_size - 1) // block_size
    ends = torch.cumsum(blocks * block_size, 0)
    order = torch.argsort(keys, stable=True)[: int(counts.sum())]
    shift = (ends - blocks * block_size) - (torch.cumsum(counts, 0) - counts)
    slots = torch.arange(order.shape[0], device=device) + shift.repeat_interleave(counts)
    capacity = -(-(n + min(n, num_experts) * (block_size - 1)) // block_size) * block_size
    sorted_token_ids = torch.full((capacity,), n, dtype=torch.int32, device=device)
    sorted_token_ids[slots] = order.int()
    expert_ids = torch.full((capacity // block_size,), -1, dtype=torch.int32, device=device)
    experts = torch.arange(num_experts, dtype=torch.int32, device=device).repeat_interleave(blocks)
    expert_ids[: experts.shape[0]] = experts
    return sorted_token_ids, expert_ids, ends[-1:].int()


def _bare(case: Case) -> Run:
    """A counting sort into arrays that exist, nothing checked or allocated: the least that a call from Python takes."""
    sort = importlib.import_module("moeyard.bench.bare").counting_sort
    n, experts, block = case["num_tokens"] * case["top_k"], case["num_experts"], case["block_size"]
    out = moeyard.empty_layout(n, num_experts=experts, block_size=block, top_k=case["top_k"])
    arrays = [tensor.numpy() for tensor in out.tensors]
    flat: dict[int, Any] = {}

    def run(ids: Tensor) -> Layout:
        if id(ids) not in flat:
            flat[id(ids)] = ids.numpy().reshape(-1)
        sort(flat[id(ids)], block, *arrays)
        return out

    return run
