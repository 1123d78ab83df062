"""Is an answer right? Each oracle knows properties that only the right one has, and says in words what is wrong."""

import torch
from torch import Tensor

from moeyard.values import Layout, Permuted, Routing


def layout_error(
    topk_ids: Tensor, num_experts: int, block_size: int, got: dict[str, Tensor], *, stable: bool
) -> str | None:
    """What is wrong with a layout of these ids (no map), by properties that only the right one has.

    `got` holds any of Layout's tensors, of which sorted_token_ids, expert_ids and num_tokens_post_padded must be
    there; longer ones than needed are judged by what their entries past the end must be. Unless `stable`, routes of
    an expert may be in any order.
    """
    found = {name: tensor.detach().cpu().long() for name, tensor in got.items()}
    ids = topk_ids.detach().cpu().reshape(-1).long()
    n, experts = len(ids), torch.arange(num_experts)
    valid = (ids >= 0) & (ids < num_experts)
    counts = torch.bincount(ids[valid], minlength=num_experts)
    blocks = (counts + block_size - 1) // block_size
    offsets = torch.cat((experts.new_zeros(1), (blocks * block_size).cumsum(0)))
    total = int(offsets[-1])
    if found["num_tokens_post_padded"].tolist() != [total]:
        return f"num_tokens_post_padded is {found['num_tokens_post_padded'].tolist()}, not [{total}]"
    expert_ids = experts.repeat_interleave(blocks)
    if not torch.equal(found["expert_ids"][: len(expert_ids)], expert_ids):
        return "expert_ids name other experts than the blocks hold"
    if not bool((found["expert_ids"][len(expert_ids) :] == -1).all()):
        return "expert_ids past the used blocks are not -1"
    slots = found["sorted_token_ids"]
    if len(slots) < total:
        return f"sorted_token_ids has {len(slots)} slots, fewer than the {total} used"
    order = torch.where(valid, ids, num_experts).argsort(stable=True)[: int(counts.sum())]
    place = (offsets[:-1] - counts.cumsum(0) + counts).repeat_interleave(counts) + torch.arange(len(order))
    held = torch.full((len(slots),), n)
    held[place] = order
    if not stable:  # sort what each expert got, then it must be the same
        owner = torch.full((len(slots),), num_experts)
        owner[:total] = experts.repeat_interleave(blocks * block_size)
        ascending = slots.argsort(stable=True)
        slots = slots[ascending[owner[ascending].argsort(stable=True)]]
    if not torch.equal(slots, held):
        where = int((slots != held).nonzero()[0])
        return f"sorted_token_ids[{where}] is {int(slots[where])}, not {int(held[where])}"
    if "expert_offsets" in found and not torch.equal(found["expert_offsets"], offsets):
        return "expert_offsets are not the first slots of the experts"
    if "expert_counts" in found and not torch.equal(found["expert_counts"], counts):
        return "expert_counts are not the numbers of routes"
    if "route_rows" in found:
        rows = torch.full((n,), -1)
        rows[order] = place
        if not torch.equal(found["route_rows"], rows):
            return "route_rows is not the inverse of sorted_token_ids"
    return None


def rows_error(hidden_states: Tensor, layout: Layout, rows: Tensor) -> str | None:
    """What is wrong with permuted rows: every held slot has its token's row, bit by bit."""
    held = layout.sorted_token_ids < layout.num_routes
    tokens = layout.sorted_token_ids[held].long() // layout.top_k
    wrong = (rows[held].view(torch.uint8) != hidden_states[tokens].view(torch.uint8)).any(dim=1)
    if bool(wrong.any()):
        return f"{int(wrong.sum())} of {len(tokens)} rows differ from their token's"
    return None


def fp8_error(hidden_states: Tensor, layout: Layout, got: Permuted, group_size: int | None) -> str | None:
    """What is wrong with quantised rows and scales, bit by bit: max(magnitude, 1e-10) / 448 and value / scale."""
    num_tokens, hidden_size = hidden_states.shape
    size = group_size or hidden_size
    groups = hidden_states.float().view(num_tokens, hidden_size // size, size)
    largest = groups.abs().amax(2).clamp(min=1e-10)
    scales = largest / torch.full_like(largest, 448.0)
    values = (groups / scales.unsqueeze(2)).clamp(-448, 448).to(torch.float8_e4m3fn).view(num_tokens, hidden_size)
    held = layout.sorted_token_ids < layout.num_routes
    tokens = layout.sorted_token_ids[held].long() // layout.top_k
    wrong = (got.rows.view(torch.uint8)[held] != values.view(torch.uint8)[tokens]).any(dim=1)
    if bool(wrong.any()):
        return f"{int(wrong.sum())} of {len(tokens)} quantised rows differ from their token's"
    assert got.scales is not None
    if not torch.equal(got.scales[held].view(len(tokens), -1), scales[tokens]):
        return "scales differ from the scales of the tokens"
    return None


def sum_error(wide: Tensor, got: Tensor, terms: int) -> str | None:
    """What is wrong with sums: against the float64 answer `wide`, a bound of one rounding to the output's dtype.

    `terms` float32 products and sums add at most `terms` + 1 roundings of 2^-24 of the largest magnitude.
    """
    if got.shape != wide.shape:
        return f"shape {tuple(got.shape)}, not {tuple(wide.shape)}"
    scale = float(wide.abs().max()) if wide.numel() else 0.0
    error = (got.double() - wide).abs()
    bound = wide.abs() * torch.finfo(got.dtype).eps * 0.51 + (terms + 1) * 2.0**-23 * scale
    if not bool((error <= bound).all()):  # NaN fails too
        return f"largest error {float(error.max()):.2e} where {float(bound.max()):.2e} is allowed"
    return None


def wide_scores(logits: Tensor, scoring: str) -> Tensor:
    """Scores of router logits [T, E] as a router of this name defines them, in the dtype of the logits."""
    if scoring == "softmax":
        return torch.softmax(logits, 1)
    return torch.sigmoid(logits) if scoring == "sigmoid" else torch.nn.functional.softplus(logits, threshold=40).sqrt()


def routing_error(
    router_logits: Tensor,
    got: Routing,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    routed_scaling_factor: float = 1.0,
) -> str | None:
    """What is wrong with a router's choice for finite logits without padding.

    Ids are judged by keys in float64, with a tolerance where float32 scores make the keys; weights by the float64
    scores of the ids.
    """
    logits = router_logits.detach().cpu().double()
    ids, weights = got.topk_ids.detach().cpu().long(), got.topk_weights.detach().cpu().double()
    num_experts, top_k = logits.shape[1], ids.shape[1]
    if not bool(((ids >= 0) & (ids < num_experts)).all()):
        return "topk_ids outside the experts"
    if bool((ids.sort(1).values.diff(dim=1) == 0).any()):
        return "topk_ids name an expert twice"
    scores = wide_scores(logits, scoring)
    keys, slack = logits, 0.0
    if selection_bias is not None:
        keys = scores + selection_bias.detach().cpu().double()
        slack = 4e-7 * max(1.0, float(scores.max()) if scores.numel() else 0.0)
    if num_groups > 1:
        grouped = keys.view(len(keys), num_groups, -1)
        two = min(2, grouped.shape[2])
        best = grouped.amax(2) if selection_bias is None else grouped.topk(two, 2).values.sum(2)
        least = best.topk(top_k_groups, 1).values[:, -1:]
        group = ids // grouped.shape[2]
        if bool((best.gather(1, group) < least - 3 * slack).any()):
            return "topk_ids in groups that are not among the best"
        sure = (best < least - 3 * slack).repeat_interleave(grouped.shape[2], 1)
        keys = keys.masked_fill(sure, -torch.inf)
        if slack and bool(((best - least).abs() < 3 * slack).sum(1).gt(1).any()):
            return None  # groups too close for a verdict on what else is chosen
    chosen = keys.gather(1, ids)
    if bool((chosen.diff(dim=1) > slack).any()):
        return "topk_ids are not in the order of their keys"
    if bool((keys.topk(top_k, 1).values[:, -1] > chosen[:, -1] + slack).any()):
        return "topk_ids are not the best experts"
    wide = scores.gather(1, ids)
    if renormalize:
        wide = wide / wide.sum(1, keepdim=True)
    wide = wide * routed_scaling_factor
    error = ((weights - wide).abs() / wide.clamp(min=1e-30)).amax()
    return None if bool(error <= 1e-5) else f"topk_weights are off by {float(error):.1e} of their value"


def disagreement_error(first: Tensor, other: Tensor, largest: float) -> str | None:
    """What is wrong between two answers of a 16-bit dtype: rows [num_rows, columns] whose difference has a root mean
    square above `largest` of the two's. A row that nobody wrote is found wherever it is.
    """
    if first.shape != other.shape:
        return f"shape {tuple(other.shape)}, not {tuple(first.shape)}"
    worst, where = 0.0, -1
    for start in range(0, first.shape[0], 4096):
        one, two = (x[start : start + 4096].float() for x in (first, other))
        scale = (one.square().mean(1) + two.square().mean(1)).div(2).sqrt()
        share = ((one - two).square().mean(1).sqrt() / scale.clamp(min=1e-30)).nan_to_num(torch.inf, torch.inf)
        most, row = share.max(0)
        if float(most) > worst:
            worst, where = float(most), start + int(row)
    return None if worst <= largest else f"row {where} differs by {worst:.2e} of its value from another provider's"
