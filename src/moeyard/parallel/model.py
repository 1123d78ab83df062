"""A transformers model whose experts are spread over ranks by one call."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from moeyard.parallel.plan import Plan

if TYPE_CHECKING:
    from moeyard.integrations.transformers_parallel import Sharded


def shard_model(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    *,
    plans: Mapping[str, Plan] | None = None,
    top_k: int | None = None,
    max_tokens: int | None = None,
    order: str = "grouped",
    way: str = "auto",
    training: bool = False,
) -> "list[Sharded]":
    """Leaves each rank its experts of every Mixture-of-Experts block of a transformers model; all ranks call it.

    Args:
        model: of transformers 5, whole on every rank, on the device that calls will be on. Its modules with
            transformers' experts interface are changed: their parameters become those of this rank. All else stays
            whole. Every rank then runs its own batch, with as many forwards as the other ranks.
        group: the ranks; the default process group unless given.
        plans: by the name of the experts' module (`model.layers.0.mlp.experts`); `contiguous_plan` where there is none.
        top_k: routes of a token; the `num_experts_per_tok` of the model's configuration unless given.
        max_tokens, order, way, training: as in `connect`.

    Returns one `Sharded` per block, which prints its plan and way. Sets the experts implementation to
    "moeyard-parallel". Raises TypeError or ValueError naming module and parameter: for a gate that is none of our
    activations, a norm behind the second product, sharded parameters (DTensor), a model without experts.
    """
    from moeyard.integrations import transformers_parallel

    return transformers_parallel.shard(
        model, group, plans or {}, top_k, max_tokens=max_tokens, order=order, way=way, training=training
    )
