"""What tests and benchmarks of an implementation need: routings, random layers, poison, oracles, comparisons.

Importing it imports torch and nothing else. `moeyard.testing.interpreted` lets Triton's interpreter run bfloat16
kernels on a CPU; `moeyard.testing.hopper` runs cases of the Hopper kernels in a process of its own.
"""

from moeyard.testing.batches import differing, sub_batches
from moeyard.testing.budgets import Judged, judged_experts
from moeyard.testing.comparisons import largest_and_rms, layout_difference, no_worse, same_bits
from moeyard.testing.implementations import CPU, impls_on
from moeyard.testing.layers import draw_routing, draw_weights, plain_activation, plain_experts, wide_weights
from moeyard.testing.oracles import (
    disagreement_error,
    fp8_error,
    layout_error,
    routing_error,
    rows_error,
    sum_error,
    wide_scores,
)
from moeyard.testing.outputs import GUARD, POISON, guard_broken, poisoned, poisoned_layout
from moeyard.testing.processes import SOURCE, python
from moeyard.testing.quantised import draw_quantised
from moeyard.testing.routings import ROUTINGS

__all__ = [
    "CPU",
    "GUARD",
    "POISON",
    "ROUTINGS",
    "SOURCE",
    "Judged",
    "differing",
    "disagreement_error",
    "draw_quantised",
    "draw_routing",
    "draw_weights",
    "fp8_error",
    "guard_broken",
    "impls_on",
    "judged_experts",
    "largest_and_rms",
    "layout_difference",
    "layout_error",
    "no_worse",
    "plain_activation",
    "plain_experts",
    "poisoned",
    "poisoned_layout",
    "python",
    "routing_error",
    "rows_error",
    "same_bits",
    "sub_batches",
    "sum_error",
    "wide_scores",
    "wide_weights",
]
