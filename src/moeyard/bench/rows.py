"""Inputs of cases that move rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

import moeyard
from moeyard.bench.operators import Case, generator_on
from moeyard.testing import ROUTINGS
from moeyard.values import Layout

LAYOUT_SIZES = ("num_tokens", "num_experts", "top_k", "block_size")
ROW_SIZES = (*LAYOUT_SIZES, "hidden_size", "dtype")


@dataclass(frozen=True)
class RowInputs:
    """Tokens and where their rows go."""

    topk_ids: Tensor
    """[num_tokens, top_k] int32"""
    topk_weights: Tensor
    """[num_tokens, top_k] float32"""
    hidden_states: Tensor
    """[num_tokens, hidden_size]"""
    layout: Layout


def draw_ids(case: Case, device: torch.device, generator: Generator) -> Tensor:
    """Ids of a case's routing, [num_tokens, top_k] int32, drawn on the host."""
    return ROUTINGS[case.routing](case["num_tokens"], case["num_experts"], case["top_k"], generator).to(device)


def draw_rows(case: Case, device: torch.device, generator: Generator) -> RowInputs:
    """Fresh tokens, weights and their layout."""
    ids = draw_ids(case, device, generator)
    generator = generator_on(device, generator)
    hidden = torch.randn(case["num_tokens"], case["hidden_size"], generator=generator, device=generator.device)
    weights = torch.rand(ids.shape, generator=generator, device=generator.device)
    layout = moeyard.moe_align_block_size(ids, num_experts=case["num_experts"], block_size=case["block_size"])
    return RowInputs(ids, weights, hidden.to(case.dtype), layout)


def bytes_of_rows(case: Case) -> int:
    """The bytes of every token's row once and of every route's row once."""
    rows = case["num_tokens"] * (1 + case["top_k"])
    return int(rows * case["hidden_size"] * case.dtype.itemsize)


def named(answer: Any) -> dict[str, Tensor]:
    """A layout's tensors by name; peers answer with vLLM's triple."""
    if isinstance(answer, Layout):
        return dict(zip(Layout.TENSORS, answer.tensors, strict=True))
    return dict(zip(Layout.TENSORS[:3], answer, strict=True))
