"""How a call reaches its launcher: straight when nothing is watching, through torch's dispatcher otherwise.

Every op is registered as `torch.ops.moeyard.<op>` (schema, fake kernel, gradient where rows are floats), which is
what torch.compile, export, tracing and autograd see. That way costs 4 us and more a call, so eager calls on plain
tensors go to the launcher directly.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from moeyard.ids import local_expert_ids, narrow_ids
from moeyard.impls import launcher
from moeyard.outputs import allocate_fp8, allocate_layout, batched_lengths, layout_lengths
from moeyard.values import Layout

_LIBRARY = torch.library.Library("moeyard", "DEF")
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_functorch_level: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
_LAYOUT = (
    "(Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded, Tensor expert_offsets, "
    "Tensor expert_counts, Tensor route_rows)"
)
_SIZES = "SymInt num_experts, SymInt num_local_experts, SymInt block_size, SymInt top_k"


def goes_straight(*tensors: Tensor | None) -> bool:
    """Whether nothing needs to see this call: no compiler, mode, transform, tensor subclass or gradient."""
    if torch.compiler.is_compiling() or _dispatch_modes() or _function_modes() or _functorch_level() is not None:
        return False
    for tensor in tensors:
        if tensor is not None:
            kind = type(tensor)
            if kind is not Tensor and kind is not Parameter:
                return False
            if tensor.requires_grad and torch.is_grad_enabled():
                return False
    return True


def define(schema: str, allocate: Callable[..., Any], launch: Callable[..., None]) -> None:
    """Registers an op whose kernel is `allocate` then `launch`, and whose fake kernel is `allocate` alone.

    `allocate(*arguments)` returns the outputs; `launch(outputs, *arguments)` fills them.
    """
    name = schema[: schema.index("(")]

    def tensors(outputs: Any) -> Any:
        return outputs.tensors if isinstance(outputs, Layout) else outputs

    def kernel(*arguments: Any) -> Any:
        outputs = allocate(*arguments)
        launch(outputs, *arguments)
        return tensors(outputs)

    def fake(*arguments: Any) -> Any:
        return tensors(allocate(*arguments))

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moeyard::{name}", fake, lib=_LIBRARY)


def find(op: str, impl: str, tensor: Tensor) -> Callable[..., None]:
    """The launcher of a call whose device and dtype are those of `tensor`."""
    return launcher(op, impl, tensor.device, tensor.dtype)


# Layouts


def _align(out: Layout, topk_ids: Tensor, expert_map: Tensor | None, *sizes_and_impl: Any) -> None:
    launch = find("moe_align_block_size", sizes_and_impl[-1], topk_ids)
    launch(narrow_ids(topk_ids), expert_map, out)


def _batched_align(out: Layout, expert_num_tokens: Tensor, max_num_tokens: int, block_size: int, impl: str) -> None:
    find("batched_moe_align_block_size", impl, expert_num_tokens)(expert_num_tokens, max_num_tokens, out)


def _lora_align(
    out: Layout, topk_ids: Tensor, token_lora_mapping: Tensor, expert_map: Tensor | None, *sizes_and_impl: Any
) -> None:
    launch = find("moe_lora_align_block_size", sizes_and_impl[-1], topk_ids)
    launch(narrow_ids(topk_ids), token_lora_mapping, expert_map, out)


def _allocate_align(topk_ids: Tensor, expert_map: Tensor | None, *sizes_and_impl: Any) -> Layout:
    *sizes, _ = sizes_and_impl
    _, num_local_experts, block_size, _ = sizes
    lengths = layout_lengths(topk_ids.numel(), num_local_experts, block_size)
    return allocate_layout(topk_ids.new_empty, lengths, tuple(sizes))


def _allocate_batched_align(expert_num_tokens: Tensor, max_num_tokens: int, block_size: int, impl: str) -> Layout:
    num_experts = expert_num_tokens.shape[0]
    lengths = batched_lengths(num_experts, max_num_tokens, block_size)
    return allocate_layout(expert_num_tokens.new_empty, lengths, (num_experts, num_experts, block_size, 1))


def _allocate_lora_align(
    topk_ids: Tensor, token_lora_mapping: Tensor, expert_map: Tensor | None, max_loras: int, *sizes_and_impl: Any
) -> Layout:
    *sizes, _ = sizes_and_impl
    _, num_local_experts, block_size, _ = sizes
    lengths = layout_lengths(topk_ids.numel(), num_local_experts, block_size)
    return allocate_layout(topk_ids.new_empty, lengths, tuple(sizes), stack=(max_loras,))


define(
    f"moe_align_block_size(Tensor topk_ids, Tensor? expert_map, {_SIZES}, str impl) -> {_LAYOUT}",
    _allocate_align,
    _align,
)
define(
    "batched_moe_align_block_size(Tensor expert_num_tokens, SymInt max_num_tokens, SymInt block_size, str impl) -> "
    + _LAYOUT,
    _allocate_batched_align,
    _batched_align,
)
define(
    "moe_lora_align_block_size(Tensor topk_ids, Tensor token_lora_mapping, Tensor? expert_map, SymInt max_loras, "
    f"{_SIZES}, str impl) -> {_LAYOUT}",
    _allocate_lora_align,
    _lora_align,
)


# Rows


def _allocate_permuted(
    hidden_states: Tensor, scales: Tensor | None, sorted_token_ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    capacity = sorted_token_ids.shape[0]
    rows = hidden_states.new_empty((capacity, hidden_states.shape[1]))
    if scales is None:
        return rows, hidden_states.new_empty((0,))
    return rows, scales.new_empty((capacity, *scales.shape[1:]))


def _permute(
    out: tuple[Tensor, Tensor],
    hidden_states: Tensor,
    scales: Tensor | None,
    sorted_token_ids: Tensor,
    route_rows: Tensor,
    top_k: int,
    impl: str,
) -> None:
    find("permute", impl, hidden_states)(
        hidden_states,
        scales,
        sorted_token_ids=sorted_token_ids,
        route_rows=route_rows,
        top_k=top_k,
        rows=out[0],
        row_scales=None if scales is None else out[1],
    )


def _permute_to_fp8(
    out: tuple[Tensor, Tensor],
    hidden_states: Tensor,
    sorted_token_ids: Tensor,
    route_rows: Tensor,
    top_k: int,
    group_size: int | None,
    impl: str,
) -> None:
    find("permute_to_fp8", impl, hidden_states)(
        hidden_states,
        sorted_token_ids=sorted_token_ids,
        route_rows=route_rows,
        top_k=top_k,
        group_size=group_size,
        rows=out[0],
        row_scales=out[1],
    )


def _shuffle_rows(out: Tensor, input: Tensor, dst2src_map: Tensor, impl: str) -> None:
    find("shuffle_rows", impl, input)(input, dst2src_map, out=out)


def _combine(out: Tensor, rows: Tensor, route_rows: Tensor, topk_weights: Tensor | None, top_k: int, impl: str) -> None:
    find("combine", impl, rows)(rows, topk_weights, route_rows=route_rows, top_k=top_k, out=out)


def _moe_sum(out: Tensor, rows: Tensor, topk_ids: Tensor | None, expert_map: Tensor | None, impl: str) -> None:
    find("moe_sum", impl, rows)(rows, None if topk_ids is None else narrow_ids(topk_ids), expert_map, out=out)


define(
    "permute(Tensor hidden_states, Tensor? scales, Tensor sorted_token_ids, Tensor route_rows, SymInt top_k, "
    "str impl) -> (Tensor rows, Tensor row_scales)",
    _allocate_permuted,
    _permute,
)
define(
    "permute_to_fp8(Tensor hidden_states, Tensor sorted_token_ids, Tensor route_rows, SymInt top_k, int? group_size, "
    "str impl) -> (Tensor rows, Tensor row_scales)",
    lambda rows, slots, _routes, _top_k, group_size, _impl: allocate_fp8(rows, slots.shape[0], group_size),
    _permute_to_fp8,
)
define(
    "shuffle_rows(Tensor input, Tensor dst2src_map, str impl) -> Tensor",
    lambda input, dst2src_map, impl: input.new_empty((dst2src_map.shape[0], input.shape[1])),
    _shuffle_rows,
)
define(
    "combine(Tensor rows, Tensor route_rows, Tensor? topk_weights, SymInt top_k, str impl) -> Tensor",
    lambda rows, route_rows, weights, top_k, impl: rows.new_empty((route_rows.shape[0] // top_k, rows.shape[1])),
    _combine,
)
define(
    "moe_sum(Tensor rows, Tensor? topk_ids, Tensor? expert_map, str impl) -> Tensor",
    lambda rows, topk_ids, expert_map, impl: rows.new_empty((rows.shape[0], rows.shape[2])),
    _moe_sum,
)


# Gradients of the row ops. Each is the other's transpose, so each is written with the other's registered op.


def register_gradient(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives a registered op its backward."""
    torch.library.register_autograd(f"moeyard::{name}", backward, setup_context=setup, lib=_LIBRARY)


def _permute_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, _, route_rows, ctx.top_k, ctx.impl = inputs
    ctx.save_for_backward(route_rows)
    if output[1].is_floating_point():
        ctx.mark_non_differentiable(output[1])


def _permute_backward(ctx: Any, grad_rows: Tensor, _grad_scales: Any) -> tuple[Any, ...]:
    (route_rows,) = ctx.saved_tensors
    grad = torch.ops.moeyard.combine(grad_rows, route_rows, None, ctx.top_k, ctx.impl)
    return grad, None, None, None, None, None


def _combine_setup(ctx: Any, inputs: Any, output: Any) -> None:
    rows, route_rows, topk_weights, ctx.top_k, _ = inputs
    ctx.save_for_backward(rows, route_rows, topk_weights)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, route_rows, topk_weights = ctx.saved_tensors
    valid = (route_rows >= 0).unsqueeze(1)
    slots = torch.where(route_rows >= 0, route_rows, rows.shape[0])  # one more row takes what is dropped
    routes = grad.repeat_interleave(ctx.top_k, dim=0)
    grad_weights = None
    if ctx.needs_input_grad[2]:
        taken = torch.where(valid, rows[route_rows.clamp(min=0)], 0).float()
        grad_weights = (taken * routes.float()).sum(1).view_as(topk_weights)
    if topk_weights is not None:
        routes = routes.float() * topk_weights.reshape(-1, 1)
    base = rows.new_zeros(rows.shape[0] + 1, rows.shape[1])
    grad_rows = base.index_copy(0, slots.long(), torch.where(valid, routes, 0).to(rows.dtype))[:-1]
    return grad_rows, None, grad_weights, None, None


def _shuffle_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.num_rows = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _shuffle_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (sources,) = ctx.saved_tensors
    valid = (sources >= 0) & (sources < ctx.num_rows)
    base = grad.new_zeros(ctx.num_rows + 1, grad.shape[1])
    return base.index_add(0, torch.where(valid, sources, ctx.num_rows).long(), grad)[:-1], None, None


def _moe_sum_setup(ctx: Any, inputs: Any, output: Any) -> None:
    rows, topk_ids, expert_map, _ = inputs
    ctx.shape = rows.shape
    ctx.save_for_backward(topk_ids, expert_map)


def _moe_sum_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    topk_ids, expert_map = ctx.saved_tensors
    spread = grad.unsqueeze(1).expand(ctx.shape)
    if topk_ids is not None:
        taken = local_expert_ids(narrow_ids(topk_ids), expert_map) >= 0
        spread = torch.where(taken.unsqueeze(2), spread, 0)
    return spread, None, None, None


register_gradient("permute", _permute_setup, _permute_backward)
register_gradient("combine", _combine_setup, _combine_backward)
register_gradient("shuffle_rows", _shuffle_setup, _shuffle_backward)
register_gradient("moe_sum", _moe_sum_setup, _moe_sum_backward)
