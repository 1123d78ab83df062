"""Bytes of a training step of one layer, counted by hand from what its operators allocate."""

from typing import NamedTuple

from moeyard.grouped_gemm import width_of_parts


class TrainingStep(NamedTuple):
    """Sizes of one layer of experts without biases, and of a step through it."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    inside: int
    """intermediate_size; w13 is twice as tall."""
    itemsize: int = 2

    @property
    def routes(self) -> int:
        """Rows of products."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """Of forward and backward: three forwards, of two products with 3 * inside * hidden weights per expert."""
        return 3 * 2 * self.routes * 3 * self.inside * self.hidden

    @property
    def weight_bytes(self) -> int:
        """Of w13 and w2."""
        return self.experts * 3 * self.inside * self.hidden * self.itemsize


def _layout_bytes(step: TrainingStep) -> int:
    """A layout of block_size 1: slots, blocks and inverse of int32, offsets of int64, counts, total."""
    return 3 * 4 * step.routes + 8 * (step.experts + 1) + 4 * step.experts + 4


def kept_bytes(step: TrainingStep, save: str) -> int:
    """What autograd keeps between forward and backward besides weights, hidden states and router weights included."""
    inputs = step.tokens * step.hidden * step.itemsize + 4 * step.routes
    if save == "inputs":
        return inputs + 4 * step.routes  # ids of int32
    return inputs + step.routes * 2 * step.inside * step.itemsize + _layout_bytes(step)


def peak_bytes(step: TrainingStep, save: str, *, copied: bool = False) -> dict[str, int]:
    """The most bytes at a time in each part of a step, beyond weights, hidden states, router weights, ids and the
    gradient of the result. The result stays until the end, gradients are handed over in the dtype of the weights.

    Args:
        step: its sizes.
        save: that of `fused_experts`.
        copied: whether products of the forward copy rows into the order of experts, as `cuda` on Hopper does from 128
            rows per expert on.
    """
    item, routes = step.itemsize, step.routes
    product, middle, rows = (routes * width * item for width in (2 * step.inside, step.inside, step.hidden))
    states, layout = step.tokens * step.hidden * item, _layout_bytes(step)
    second, first = step.weight_bytes // 3, step.weight_bytes // 3 * 2
    width = width_of_parts(routes, step.hidden, item, step.top_k)
    spread, whole = routes * width * item, 0 if width >= step.hidden else states
    found = {
        "backward, second product": states + layout + 2 * product + middle + max(middle, second) + 4 * routes,
        "backward, first product": states + layout + product + second + states + max(spread, whole, first),
    }
    if save == "inputs":
        return {"forward": states + layout + middle + rows, **found}
    return {
        "forward, first product": layout + product + rows * copied,
        "forward, second product": layout + product + states + middle + rows + middle * copied,
        **found,
    }
