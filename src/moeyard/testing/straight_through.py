"""What straight-through gradients are: a loop over experts, in which every rounding has a derivative of 1."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from moeyard.quant import QuantScheme
from moeyard.reference.quant import dequantised, quantise_rows
from moeyard.testing.layers import plain_activation
from moeyard.values import Activation, ExpertWeights, Routing


def rounded_experts(
    hidden: Tensor,
    routing: Routing,
    masters: ExpertWeights,
    codes: ExpertWeights,
    activation: Activation | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """[tokens, hidden_size] on a CPU: the layer of `codes`, which `masters` were rounded to; autograd does the rest.

    Args:
        hidden: of any float dtype; it computes at that.
        routing: ids out of range are dropped.
        masters: what gradients go to, of any float dtypes.
        codes: theirs, of a scheme.
        activation: silu unless given.
        dtype: that of the rows of the layer that is held against this one, which are rounded to it before a scheme
            rounds them.
    """
    kind, scheme = hidden.dtype, codes.scheme
    assert scheme is not None
    plain = replace(codes, w13_bias=None, w2_bias=None)
    w13, w2 = (
        _through(mine.to(kind), theirs.to(kind))
        for mine, theirs in zip((masters.w13, masters.w2), dequantised(plain), strict=True)
    )
    rows, result = _rows(hidden, scheme, dtype), torch.zeros_like(hidden)
    biases = (None if bias is None else bias.to(kind) for bias in (masters.w13_bias, masters.w2_bias))
    first, second = biases
    for expert in range(masters.num_local_experts):
        token, k = torch.where(routing.topk_ids == expert)
        if not len(token):
            continue
        of_first, of_second = (None if bias is None else bias[expert] for bias in (first, second))
        inside = functional.linear(rows[token], w13[expert], of_first)
        inside = plain_activation(inside, activation or Activation(), masters.gated)
        given = functional.linear(_rows(inside, scheme, dtype), w2[expert], of_second)
        result = result.index_add(0, token, (given * routing.topk_weights[token, k, None]).to(kind))
    return result


def gradients_of(
    call: Callable[[Tensor, Routing, ExpertWeights], Tensor], given: tuple[Tensor, ...], ids: Tensor, upstream: Tensor
) -> list[Tensor]:
    """The output of a layer, and its gradients of hidden states, router weights, w13, w2 and biases, in that order."""
    mine = [t.detach().clone().requires_grad_() for t in given]
    rows, factors, w13, w2, *biases = mine
    of_first, of_second = biases or (None, None)
    output = call(rows, Routing(factors, ids), ExpertWeights(w13, w2, of_first, of_second))
    return [output.detach(), *torch.autograd.grad(output, mine, upstream.to(output.dtype))]


def _rows(rows: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> Tensor:
    if scheme.activations == "none":
        return rows
    return _through(rows, quantise_rows(rows.detach().to(dtype), scheme).values.to(rows.dtype))


def _through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, whose derivative by `value` is 1."""
    return value + (rounded - value).detach()
