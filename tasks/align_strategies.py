"""What the property of the align tasks draws: ids of any range, for few and many experts."""

import numpy as np
from hypothesis import strategies


@strategies.composite
def ids(draw: strategies.DrawFn) -> tuple[np.ndarray, int, int]:  # type: ignore[type-arg]
    """[tokens, top_k] int32, a number of experts and a block size; some ids name no expert."""
    experts = draw(strategies.sampled_from([1, 2, 7, 64, 256, 300, 8192]))
    shape = draw(strategies.integers(0, 200)), draw(strategies.integers(1, 8))
    generator = np.random.default_rng(draw(strategies.integers(0, 2**31)))
    few = draw(strategies.booleans())
    high = min(experts, 3) if few else experts + experts // 8 + 1
    return generator.integers(-1, high, shape, dtype=np.int32), experts, draw(strategies.sampled_from([1, 16, 64, 128]))
