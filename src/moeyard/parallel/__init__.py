"""Experts that are spread over the ranks of a process group of torch.distributed.

    plan = moeyard.parallel.plan_experts(load, ranks)           # or contiguous_plan(num_experts, ranks)
    mine = moeyard.parallel.slice_experts(weights, plan, rank)  # or load_experts, a rank's share of a checkpoint
    connection = moeyard.parallel.connect(mine, plan, top_k=8)  # all ranks agree, once
    hidden = moeyard.parallel.fused_experts(hidden, routing, mine, connection)

The last line is `dispatch`, `local_experts` and `combine`. `experts_in_order` computes the same sums on one device.
Importing moeyard does not import this.
"""

from moeyard.parallel.batches import Batches, from_batches, to_batches
from moeyard.parallel.connection import Connection, connect, explain
from moeyard.parallel.layer import Dispatched, combine, dispatch, fused_experts, local_experts
from moeyard.parallel.model import shard_model
from moeyard.parallel.order import experts_in_order
from moeyard.parallel.plan import Plan, contiguous_plan, plan_experts
from moeyard.parallel.weights import slice_experts

__all__ = [
    "Batches",
    "Connection",
    "Dispatched",
    "Plan",
    "combine",
    "connect",
    "contiguous_plan",
    "dispatch",
    "experts_in_order",
    "explain",
    "from_batches",
    "fused_experts",
    "local_experts",
    "plan_experts",
    "shard_model",
    "slice_experts",
    "to_batches",
]
