"""Routers row by row: one scan for the best keys, exponentials of whole vectors only where scores need them."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from moeyard.cpu import dots
from moeyard.cpu.dots import LANES
from moeyard.cpu.pointers import float32_at, int32_at, kernel, uint8_at
from moeyard.cpu.products import FLOAT32, KINDS
from moeyard.cpu.rows import add_row
from moeyard.cpu.threads import count_parts, dense, run_parts
from moeyard.values import Router, Routing

_TINY = np.float32(1e-36)  # scores below this may have been flushed to 0, and are computed again in float64
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
SOFTMAX, SIGMOID = 0, 1
_LEAST_LOGITS = 1 << 14  # a part smaller than this is not worth the hand-over to a thread


def route_launch(
    router_logits: Tensor,
    selection_bias: Tensor | None,
    is_padding: Tensor | None,
    router: Router,
    *,
    out: Routing,
) -> None:
    """Fills a routing from logits [T, E]."""
    num_tokens, num_experts = router_logits.shape
    if router_logits.stride(1) != 1:
        router_logits = router_logits.contiguous()
    run_parts(
        _route_kernel, count_parts(num_tokens * num_experts, _LEAST_LOGITS), num_tokens,
        (router_logits, dense(selection_bias), dense(is_padding), out.topk_weights, out.topk_ids),
        KINDS[router_logits.dtype], router_logits.stride(0) * router_logits.element_size(), num_experts, router.top_k,
        SCORINGS.index(router.scoring), *router[2:],
    )  # fmt: skip


@kernel
def _insert(key: Any, expert: int, held: int, keys: Any, ids: Any) -> None:
    """Puts a candidate behind all that are as good, into `held` sorted ones; the last falls out if there is no room."""
    at = min(held, keys.size - 1)
    while at > 0 and keys[at - 1] < key:
        keys[at] = keys[at - 1]
        ids[at] = ids[at - 1]
        at -= 1
    keys[at] = key
    ids[at] = expert


@kernel
def _scan(candidates: Any, start: int, stop: int, held: int, keys: Any, ids: Any) -> int:
    """Takes candidates [start, stop) into the best; returns how many are held."""
    size = keys.size
    for i in range(start, stop):
        if held < size:
            _insert(candidates[i], i, held, keys, ids)
            held += 1
        elif candidates[i] > keys[size - 1]:
            _insert(candidates[i], i, held, keys, ids)
    return held


@kernel
def _choose_groups(
    candidates: Any, num_groups: int, biased: bool, group_keys: Any, best_keys: Any, best_groups: Any
) -> None:
    """Leaves the groups with the largest keys in `best_groups`, ascending."""
    size = candidates.size // num_groups
    for group in range(num_groups):
        first, second = np.float32(-np.inf), np.float32(-np.inf)
        for i in range(group * size, (group + 1) * size):
            if candidates[i] > first:
                first, second = candidates[i], first
            elif candidates[i] > second:
                second = candidates[i]
        total = first + second if biased and size > 1 else first
        group_keys[group] = total if total == total else np.float32(-np.inf)
    _scan(group_keys, 0, num_groups, 0, best_keys, best_groups)
    best_groups.sort()


@kernel
def _sqrt_softplus(value: Any) -> Any:
    wide = np.float64(value)
    return math.sqrt(max(wide, 0.0) + math.log1p(math.exp(-abs(wide))))


@kernel
def _tiny_scores(values: Any, top: Any, scoring: int, chosen: Any, scores: Any) -> Any:
    """Fills the scores of the chosen and returns their sum where quick exponentials, which flush to 0, lose them."""
    total = 1.0
    if scoring == SOFTMAX:
        total = 0.0
        for i in range(values.size):
            total += math.exp(np.float64(values[i]) - top)
    kept = 0.0
    for k in range(chosen.size):
        value = np.float64(values[chosen[k]])
        if scoring == SOFTMAX:
            score = math.exp(value - top) / total
        elif scoring == SIGMOID:
            score = 1.0 / (1.0 + math.exp(-value))
        else:
            score = _sqrt_softplus(value)
        scores[k] = np.float32(score) if score < np.inf else np.float32(0)
        kept += scores[k]
    return np.float32(kept)


@kernel
def _route_kernel(
    part: int, start: int, stop: int, logits: int, bias: int, padding: int, weights: int, ids: int, kind: int,
    stride: int, num_experts: int, top_k: int, scoring: int, renormalize: bool, num_groups: int, top_k_groups: int,
    factor: float,
) -> None:  # fmt: skip
    room = (num_experts + LANES) // LANES * LANES
    values, keys, scores = np.zeros(room, np.float32), np.zeros(room, np.float32), np.zeros(room, np.float32)
    best_keys, best_ids = np.empty(top_k, np.float32), np.empty(top_k, np.int32)
    group_keys, best_group_keys = np.empty(num_groups, np.float32), np.empty(top_k_groups, np.float32)
    best_groups = np.empty(top_k_groups, np.int32)
    all_weights, all_ids = float32_at(weights, stop * top_k), int32_at(ids, stop * top_k)
    biases, skipped = float32_at(bias, num_experts), uint8_at(padding, stop)
    softmax = scoring == SOFTMAX
    for token in range(start, stop):
        mine, chosen = all_weights[token * top_k : (token + 1) * top_k], all_ids[token * top_k : (token + 1) * top_k]
        if padding != 0 and skipped[token]:
            mine[:] = 0
            chosen[:] = -1
            continue
        row = logits + token * stride
        if kind == FLOAT32:
            values[:num_experts] = float32_at(row, num_experts)
        else:
            values[:num_experts] = 0
            add_row(kind, values.ctypes.data, np.float32(1), row, row, num_experts)
        top, numbers = np.float32(-np.inf), True
        for i in range(num_experts):
            numbers = numbers and values[i] == values[i]
            top = max(top, values[i])
        defined = not softmax or (numbers and -np.inf < top < np.inf)
        every = bias != 0 or (softmax and not renormalize)  # whether all scores are needed
        total = np.float32(1)
        if every and defined:
            if softmax:
                for i in range(num_experts):
                    keys[i] = values[i] - top
                total = np.float32(0)
                for i in range(0, num_experts, LANES):
                    dots.exponentials(scores.ctypes.data + 4 * i, keys.ctypes.data + 4 * i)
                for i in range(num_experts):
                    total += scores[i]
            elif scoring == SIGMOID:
                for i in range(0, num_experts, LANES):
                    dots.sigmoids(scores.ctypes.data + 4 * i, values.ctypes.data + 4 * i)
            else:
                for i in range(num_experts):
                    scores[i] = np.float32(_sqrt_softplus(values[i]))
        if bias != 0:
            if not defined:
                scores[:num_experts] = 0
            elif softmax:
                for i in range(num_experts):
                    scores[i] /= total
                total = np.float32(1)
            for i in range(num_experts):
                key = (scores[i] if scores[i] < np.inf else np.float32(0)) + biases[i]
                keys[i] = key if key == key else np.float32(-np.inf)
        elif defined:
            for i in range(num_experts):
                keys[i] = values[i] if values[i] == values[i] else np.float32(-np.inf)
        else:
            keys[:num_experts] = 0
        held = 0
        if num_groups > 1:
            size = num_experts // num_groups
            _choose_groups(keys[:num_experts], num_groups, bias != 0, group_keys, best_group_keys, best_groups)
            for group in best_groups:
                held = _scan(keys, group * size, (group + 1) * size, held, best_keys, best_ids)
        else:
            _scan(keys, 0, num_experts, 0, best_keys, best_ids)
        chosen[:] = best_ids
        if not defined:
            mine[:] = 0
            continue
        for k in range(top_k):  # the scores of the chosen, in the front of `keys`
            keys[k] = scores[best_ids[k]] if every else (values[best_ids[k]] - top if softmax else values[best_ids[k]])
        if not every:
            for k in range(0, top_k, LANES):
                if softmax:
                    dots.exponentials(keys.ctypes.data + 4 * k, keys.ctypes.data + 4 * k)
                elif scoring == SIGMOID:
                    dots.sigmoids(keys.ctypes.data + 4 * k, keys.ctypes.data + 4 * k)
                else:
                    for i in range(k, min(k + LANES, top_k)):
                        keys[i] = np.float32(_sqrt_softplus(keys[i]))
        kept, least = np.float32(0), np.float32(1)
        for k in range(top_k):
            keys[k] = keys[k] / total if keys[k] < np.inf else np.float32(0)
            kept += keys[k]
            least = min(least, keys[k])
        if renormalize and least < _TINY:
            kept = _tiny_scores(values[:num_experts], top, scoring, best_ids, keys)
        scale = np.float32(factor)
        for k in range(top_k):
            mine[k] = (keys[k] / kept if renormalize and kept > 0 else keys[k]) * scale
