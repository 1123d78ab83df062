"""A layer's kernels compiled ahead of time, without a GPU: into Triton's own cache, where later calls find them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moeyard.dispatch.call import LayerFacts
from moeyard.dispatch.processes import in_processes
from moeyard.dispatch.sizes import changes
from moeyard.triton import align_kernels, coded_kernels, four_bits_kernels, kernels
from moeyard.triton.experts import fused_experts_launch, grouped_gemm_launch
from moeyard.triton.launch import Asked, Step, planning
from moeyard.triton.plan import Card
from moeyard.values import ExpertCall, ExpertWeights, Segments

_ROOMS = (align_kernels, kernels, coded_kernels, four_bits_kernels)
CARDS = {
    (8, 0): Card((8, 0), 108, 166912),
    (8, 6): Card((8, 6), 84, 101376),
    (8, 9): Card((8, 9), 142, 101376),
    (9, 0): Card((9, 0), 132, 232448),
    (10, 0): Card((10, 0), 148, 232448),
    (12, 0): Card((12, 0), 188, 101376),
}
"""Compute capability -> its card with the most multiprocessors in use."""


def all_asked(facts: LayerFacts, card: Card, max_tokens: int) -> dict[Asked, tuple[int, ...]]:
    """What the experts of a layer start for 1 to `max_tokens` tokens, and sizes that each is compiled for."""

    def asked(tokens: int) -> dict[Asked, tuple[int, ...]]:
        with planning(card) as plan:
            _experts(facts, facts.weights, facts.router.top_k, facts.num_experts, tokens)
            if facts.shared is not None:
                _experts(facts, facts.shared, 1, 1, tokens)
            if facts.batch_invariant:
                _router_product(facts, tokens)
        return plan.asked

    found: dict[Asked, tuple[int, ...]] = {}
    for count in changes(lambda tokens: asked(tokens).keys(), max_tokens):
        found = asked(count) | found
    return found


def _experts(facts: LayerFacts, weights: ExpertWeights, top_k: int, num_experts: int, tokens: int) -> None:
    def empty(*shape: int, dtype: torch.dtype = facts.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden = empty(tokens, weights.hidden_size)
    mapping = empty(num_experts, dtype=torch.int32) if facts.mapped and weights is facts.weights else None
    factors, ids = empty(tokens, top_k, dtype=torch.float32), empty(tokens, top_k, dtype=torch.int32)
    call = ExpertCall(weights, facts.activation, num_experts, mapping, batch_invariant=facts.batch_invariant)
    fused_experts_launch(hidden, factors, ids, call, out=torch.empty_like(hidden))


def _router_product(facts: LayerFacts, tokens: int) -> None:
    """`_linear_by_row` in experts.py; a router of biased experts has a bias, too."""

    def empty(*shape: int, dtype: torch.dtype = facts.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden, count = empty(tokens, facts.weights.hidden_size), facts.num_experts
    bias = None if facts.weights.w13_bias is None else empty(1, count)
    one = Segments(empty(1, dtype=torch.int64), empty(1, dtype=torch.int32), batch_invariant=True)
    weight = empty(1, count, facts.weights.hidden_size)
    grouped_gemm_launch(hidden, weight, bias, None, one, out=empty(tokens, count))


def compile_layer(
    facts: LayerFacts,
    capability: tuple[int, int],
    max_tokens: int,
    jobs: int,
    begun: Callable[[int], Callable[[], object]],
    card: Card | None = None,
) -> int:
    """Compiles the experts of a layer, in processes; how many kernels that are, those of the cache included.
    `begun(count)` gives what is called after each of so many.
    """
    asked = all_asked(facts, card or CARDS[capability], max_tokens)
    tasks = [
        (one.kernel, one.dtypes, sizes, one.constants, one.warps, one.stages, capability)
        for one, sizes in asked.items()
    ]
    tasks.sort(key=lambda task: "product" not in task[0])  # the longest first
    in_processes("moeyard.triton.ahead:compile_step", tasks, jobs, begun(len(tasks)))
    return len(tasks)


def compile_step(
    kernel: str,
    dtypes: Sequence[str | None],
    sizes: Sequence[int],
    constants: Sequence[tuple[str, Any]],
    warps: int,
    stages: int,
    capability: Sequence[int],
) -> None:
    """Compiles a kernel for a compute capability, whatever device there is. It changes this process: Triton takes that
    for its device from now on.
    """
    driver.set_active(_Target(GPUTarget("cuda", 10 * capability[0] + capability[1], 32)))
    found = next(getattr(room, kernel) for room in _ROOMS if hasattr(room, kernel))
    step = Step(found, (1, 1), tuple(sizes), warps, stages, **dict(constants))
    step.compile(*(None if name is None else getattr(torch, name) for name in dtypes))


class _Target:
    """What Triton's compiler asks a driver for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        """The architecture."""
        return self._target

    def get_current_device(self) -> int:
        """A number, by which compiled kernels are kept."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """None is started."""
        return 0
