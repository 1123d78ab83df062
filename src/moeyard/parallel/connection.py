"""What the ranks of a process group agree on, once: placement, sizes, dtypes, the order of sums, the way of rows."""

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moeyard.dispatch.checks import FLOATS, ID_DTYPES, check_flag, check_int, check_tensor
from moeyard.parallel.plan import Plan, Tables, map_of, tables_of
from moeyard.parallel.pushed import Pushes, open_pushes, push_sizes, refusal_of_pushes
from moeyard.parallel.symmetric import Part, Window, open_window
from moeyard.parallel.ways import ORDERS, RowFormat, Sizes, WayExplanation, bytes_of_row, choose_way, format_of_rows
from moeyard.parallel.weights import refuse_sharded, slots_agree
from moeyard.parallel.wire import gather, on_host
from moeyard.quant import QuantScheme
from moeyard.values import ExpertWeights

_BYTES = 4096
"""Of a rank's description. All ranks send as many."""


@dataclass(frozen=True, slots=True, eq=False)
class Connection:
    """What all ranks of a group agreed on; made by `connect`, passed to every call."""

    group: dist.ProcessGroup
    rank: int
    plan: Plan
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    """Of hidden states."""
    device: torch.device
    scheme: QuantScheme | None
    order: str
    """"grouped" or "exact"."""
    max_tokens: int | None
    training: bool
    weight_on_input: bool
    rows: RowFormat
    """How rows are sent."""
    explanation: WayExplanation
    tables: Tables
    expert_map: Tensor
    """[num_slots] int32: the local expert of each slot on this rank, -1 for slots of other ranks."""
    window: Window | None
    """Of the symmetric way."""
    pushes: Pushes | None
    """Of the pushed way."""

    @property
    def way(self) -> str:
        """Of `WAYS`, the one that calls take."""
        return self.explanation.chosen

    @property
    def ranks(self) -> int:
        """Ranks of the group."""
        return self.plan.ranks


def explain(
    plan: Plan,
    *,
    top_k: int,
    hidden_size: int,
    dtype: torch.dtype = torch.bfloat16,
    scheme: QuantScheme | None = None,
    max_tokens: int | None = None,
    order: str = "grouped",
    way: str = "auto",
    training: bool = False,
    apply_router_weight_on_input: bool = False,
    send_codes: bool = True,
) -> WayExplanation:
    """Which way rows take between the ranks of a plan, why, and as what; printing it gives one line per way.

    Arguments are those of `connect`; `hidden_size`, `dtype` and `scheme` are of hidden states and weights. No rank is
    asked. Raises TypeError or ValueError naming the argument.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan, got {type(plan).__name__}")
    check_int("top_k", top_k, low=1)
    check_int("hidden_size", hidden_size, low=1)
    if max_tokens is not None:
        check_int("max_tokens", max_tokens, low=1)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected one of {FLOATS}, got {dtype!r}")
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
    check_flag("training", training)
    check_flag("apply_router_weight_on_input", apply_router_weight_on_input)
    check_flag("send_codes", send_codes)
    if order == "exact" and plan.tensor > 1:
        raise ValueError(
            f"order: 'exact' adds rows of whole experts: expected a plan with tensor=1, got tensor={plan.tensor}"
        )
    if training and scheme is not None:
        raise ValueError(f"training: expected False for experts of scheme {str(scheme)!r}, which have no gradients")
    if training and plan.num_slots > plan.num_experts:
        raise ValueError(
            f"training: expected a plan without replicas ({plan.num_experts} slots), whose gradients nothing adds up, "
            f"got {plan.num_slots} slots"
        )
    form = format_of_rows(scheme, hidden_size, dtype, apply_router_weight_on_input, send_codes)
    size = bytes_of_row(form, hidden_size, top_k, dtype)
    unpushed = refusal_of_pushes(plan.ranks, top_k, hidden_size, dtype, form, max_tokens)
    sizes = Sizes(plan.ranks, len(plan.experts), top_k, size, order, max_tokens, training, unpushed)
    return choose_way(sizes, way, form.words)


def connect(
    weights: ExpertWeights,
    plan: Plan,
    *,
    top_k: int,
    group: dist.ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
    max_tokens: int | None = None,
    order: str = "grouped",
    way: str = "auto",
    training: bool = False,
    apply_router_weight_on_input: bool = False,
    send_codes: bool = True,
) -> Connection:
    """Makes the ranks of a group agree on one configuration of experts, before any row moves; all ranks call it.

    Args:
        weights: of this rank: `slice_experts` cuts them. Layers of the same sizes may share a connection.
        plan: who holds which experts, for as many ranks as the group has.
        top_k: routes of a token.
        group: a process group of any backend that has all_to_all_single; the default one unless given.
        dtype: of hidden states; that of `weights` unless given, bfloat16 for quantised ones.
        max_tokens: the most tokens of a rank in any call. Without it no way has fixed shapes.
        order: "grouped": each rank adds up its own rows of a token, as `fused_experts` does, rounded to the dtype; then
            ranks are added in rank order, in float32. "exact": every route's row comes back, rounded to the dtype, and
            is weighted and added in k order, in float32, as `combine` does: the plan changes nothing.
        way: "pushed" and "symmetric" (one host), "gathered", "all_to_all", or "auto"; `explain` says which, and why.
        training: whether gradients flow to hidden states, router weights and weights. Then all ranks run the backward.
        apply_router_weight_on_input: as in `fused_experts`.
        send_codes: whether rows cross as codes and scales where all experts would quantise them alike. Results are the
            same bit by bit; codes take half the wire, and a pass over the rows that arrive.

    Returns a `Connection`. Raises TypeError or ValueError on every rank if arguments of one rank are wrong, or differ
    from those of rank 0. The error names argument and rank. If a rank does not call, the others get an error of the
    group's backend after the timeout of the group.
    """
    group = dist.group.WORLD if group is None else group
    if group is None or not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            "group: expected a process group of this rank (torch.distributed.init_process_group makes one), got "
            f"{group!r}"
        )
    problem: Exception | None = None
    description: dict[str, str] = {}
    try:
        refuse_sharded(weights)
        dtype = dtype or (weights.w13.dtype if weights.scheme is None else torch.bfloat16)
        explanation = explain(
            plan, top_k=top_k, hidden_size=weights.hidden_size, dtype=dtype, scheme=weights.scheme,
            max_tokens=max_tokens, order=order, way=way, training=training,
            apply_router_weight_on_input=apply_router_weight_on_input, send_codes=send_codes,
        )  # fmt: skip
        _check_own(weights, plan, group)
        description = {
            "plan": digest(plan),
            "hidden_size": str(weights.hidden_size), "intermediate_size": str(weights.intermediate_size),
            "gated": str(weights.gated), "scheme": str(weights.scheme), "dtype": str(dtype), "top_k": str(top_k),
            "max_tokens": str(max_tokens), "order": order, "way": explanation.chosen, "training": str(training),
            "apply_router_weight_on_input": str(apply_router_weight_on_input), "send_codes": str(send_codes),
        }  # fmt: skip
    except (TypeError, ValueError) as error:
        problem = error
    try:
        agree(description if problem is None else {"error": str(problem)}, group, device_of(weights, group))
    except ValueError as error:
        raise problem or error from None
    assert dtype is not None
    rank = group.rank()
    form = format_of_rows(weights.scheme, weights.hidden_size, dtype, apply_router_weight_on_input, send_codes)
    device, tables = weights.w13.device, tables_of(plan, weights.w13.device)
    window = pushes = None
    if explanation.chosen == "symmetric":
        assert max_tokens is not None
        window = open_window(_parts(form, weights.hidden_size, dtype, top_k), max_tokens, group, device)
    if explanation.chosen == "pushed":
        assert max_tokens is not None
        fixed = push_sizes(plan.ranks, top_k, weights.hidden_size, dtype, form, max_tokens, order)
        pushes = open_pushes(fixed, plan, tables, torch.uint8 if form.quantised else dtype, group, device)
    return Connection(
        group, rank, plan, top_k, weights.hidden_size, dtype, device, weights.scheme, order, max_tokens, training,
        apply_router_weight_on_input, form, explanation, tables, map_of(plan, rank, device), window, pushes,
    )  # fmt: skip


def _parts(form: RowFormat, hidden_size: int, dtype: torch.dtype, top_k: int) -> list[Part]:
    """What is dispatched: codes and scales or rows, then slots with router weights; and what comes back."""
    rows = [Part((hidden_size,), dtype)]
    coded = [Part((hidden_size,), torch.uint8), Part((hidden_size // form.group,), torch.float32)]
    return [*(coded if form.quantised else rows), Part((2 * top_k,), torch.int32), *rows]


def _check_own(weights: ExpertWeights, plan: Plan, group: dist.ProcessGroup) -> None:
    if plan.ranks != group.size():
        raise ValueError(f"plan: expected one for the {group.size()} ranks of group, got one for {plan.ranks}")
    disagreement = slots_agree(weights, plan.experts_of(group.rank()))
    if disagreement:
        raise ValueError(disagreement)


def device_of(weights: object, group: dist.ProcessGroup) -> torch.device:
    """Where ranks exchange what they agree on, whatever their arguments: on the CPU if a backend of it is there."""
    if torch.device("cpu") in group._device_types:
        return torch.device("cpu")
    if isinstance(weights, ExpertWeights) and isinstance(weights.w13, Tensor) and weights.w13.is_cuda:
        return weights.w13.device
    return torch.device("cuda", torch.cuda.current_device())


def digest(value: object) -> str:
    """A short word that differs where the `repr` of values does."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def agree(description: dict[str, str], group: dist.ProcessGroup, device: torch.device) -> None:
    """ValueError on all ranks of a group where descriptions differ, or where one says "error"; all ranks call it."""
    lines = "\n".join(f"{name}\t{' '.join(value.split())[:1000]}" for name, value in description.items())
    mine = torch.zeros(_BYTES, dtype=torch.uint8)
    text = lines.encode()[:_BYTES]
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = on_host(gather(mine.to(device), group.size(), group).view(-1, _BYTES))
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
    found = [{line.partition("\t")[0]: line.partition("\t")[2] for line in text.split("\n")} for text in texts]
    for rank, theirs in enumerate(found):
        if "error" in theirs:
            raise ValueError(f"rank {rank} of the group refuses its arguments: {theirs['error']}")
    for rank, theirs in enumerate(found):
        for name, value in found[0].items():
            if theirs.get(name) != value:
                raise ValueError(f"{name}: expected {value!r} on all ranks, as rank 0 has, got {theirs.get(name)!r} "
                                 f"on rank {rank}")  # fmt: skip


def check_call(connection: Connection, hidden_states: object, topk_weights: object, topk_ids: object) -> None:
    """Tokens and their routing fit a connection."""
    device = connection.device
    check_tensor("hidden_states", hidden_states, dtypes=(connection.dtype,), ndim=(2,), device=device)
    check_tensor("routing.topk_ids", topk_ids, dtypes=ID_DTYPES, ndim=(2,), device=device)
    check_tensor("routing.topk_weights", topk_weights, dtypes=(torch.float32,), ndim=(2,), device=device)
    assert isinstance(hidden_states, Tensor) and isinstance(topk_ids, Tensor) and isinstance(topk_weights, Tensor)
    tokens, size = hidden_states.shape
    if size != connection.hidden_size:
        raise ValueError(f"hidden_states: expected {connection.hidden_size} columns, as the ranks agreed, got {size}")
    for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        if tuple(tensor.shape) != (tokens, connection.top_k):
            raise ValueError(
                f"routing.{name}: expected shape {(tokens, connection.top_k)} (tokens, and top_k as the ranks agreed), "
                f"got {tuple(tensor.shape)}"
            )
    if connection.max_tokens is not None and tokens > connection.max_tokens:
        raise ValueError(f"hidden_states: expected at most max_tokens={connection.max_tokens} tokens, got {tokens}")
    wants = any(t.requires_grad for t in (hidden_states, topk_weights)) and torch.is_grad_enabled()
    if wants and not connection.training:
        raise ValueError("training: expected a connection with training=True where gradients are wanted, got False")
