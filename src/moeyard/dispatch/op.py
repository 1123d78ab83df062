"""An operator: one schema, one allocation and one launch for all callers.

Every operator is registered as `torch.ops.moeyard.<name>`, which torch.compile, export, tracing and autograd see. That
way costs 4 us and more per call. So an eager call on plain tensors allocates and launches directly. Both ways run the
functions that an `Op` was made of, and give equal results.
"""

from collections.abc import Callable
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from moeyard.dispatch.again import plain, watched
from moeyard.dispatch.memory import refuse_overlap
from moeyard.dispatch.table import launcher
from moeyard.values import Layout, Permuted

LAYOUT = (
    "(Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded, Tensor expert_offsets, "
    "Tensor expert_counts, Tensor route_rows)"
)
"""What registered layout operators return."""
SIZES = "SymInt num_experts, SymInt num_local_experts, SymInt block_size, SymInt top_k"
"""The integers of a layout, in the order in which registered operators take them."""
ops = torch.ops.moeyard


def _library() -> torch.library.Library:
    """The registrations of this import; those of an earlier one, whose modules were dropped, are taken back."""
    earlier = ops.__dict__.pop("_library", None)
    if earlier is not None:
        earlier._destroy()
    mine = torch.library.Library("moeyard", "DEF")
    ops.__dict__["_library"] = mine
    return mine


_LIBRARY = _library()
_transform: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
_PLAIN = (Tensor, Parameter)


def goes_straight(*tensors: Tensor | None) -> bool:
    """Whether nothing needs to see a call: no compiler, mode, transform, tangent, lazy view, subclass or gradient."""
    return not watched() and plain(*tensors)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd wants the gradient of one of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class Gradient(NamedTuple):
    """The backward of an operator, as torch.library.register_autograd takes it."""

    inputs: tuple[str, ...]
    """The tensors that have one."""
    setup: Callable[..., None]
    backward: Callable[..., Any]
    applies: Callable[..., bool] = lambda *_: True
    """(*what the schema lists beside `impl`) -> whether a call has a gradient at all."""


class Op:
    """An operator of the table; calling it allocates unless outputs are given, launches, and returns the outputs.

    Args:
        schema: of the registered operator. The tensors that callers give come first, `impl` comes last. Only what an
            operator took on later follows it, with a default, so that older calls stay valid.
        allocate: (*arguments) -> outputs: a tensor, Layout, Permuted or Routing, uninitialised; or a NamedTuple of
            tensors, for operators without `out=`.
        launch: (launcher, outputs, *arguments) fills them.
        allocate_eagerly: `allocate` where outputs may share an allocation, which registered operators may not.
        flatten: (*arguments) -> what the schema lists beside `impl`; the arguments themselves unless given.
        gather: the inverse of `flatten`.
        seen: (*arguments) -> the tensors that callers give; unless given, those at the front of arguments and schema.
        assemble: (what the registered operator returned, *arguments) -> outputs, unless that is one tensor.
        call: (*arguments) -> what implementations are chosen by (`table.Call`) beyond the first tensor's device and
            dtype.
        gradient: None for an operator without one. A tensor that needs a gradient which is not there is refused.
        composed: whether it has no rows in the table: it is made of other operators, and `launch` takes `impl` for a
            launcher.
    """

    def __init__(
        self,
        schema: str,
        *,
        allocate: Callable[..., Any],
        launch: Callable[..., None],
        allocate_eagerly: Callable[..., Any] | None = None,
        flatten: Callable[..., tuple[Any, ...]] | None = None,
        gather: Callable[..., tuple[Any, ...]] | None = None,
        seen: Callable[..., tuple[Tensor | None, ...]] | None = None,
        assemble: Callable[..., Any] | None = None,
        call: Callable[..., Any] | None = None,
        gradient: Gradient | None = None,
        composed: bool = False,
    ) -> None:
        self.name = schema[: schema.index("(")]
        listed = [part.split() for part in schema[schema.index("(") + 1 : schema.index(")")].split(",")]
        names = [name.partition("=")[0] for _, name in listed]
        self._place = names.index("impl")
        self._inputs = [name for name in names if name != "impl"]
        self._leading = sum(1 for _ in takewhile(lambda part: part[0].startswith("Tensor"), listed))
        self._allocate, self._launch = allocate, launch
        self._allocate_eagerly = allocate_eagerly or allocate
        self._flatten, self._gather, self._seen = flatten, gather, seen
        self._assemble, self._call = assemble, call
        self._gradient, self._composed = gradient, composed
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self._kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"moeyard::{self.name}", self._fake, lib=_LIBRARY)
        if gradient is not None:
            torch.library.register_autograd(
                f"moeyard::{self.name}", gradient.backward, setup_context=gradient.setup, lib=_LIBRARY
            )
        self._registered = getattr(ops, self.name)
        self._defaults = tuple(one.default_value for one in self._registered.default._schema.arguments)
        REGISTERED[self.name] = self

    @property
    def gradients(self) -> tuple[str, ...]:
        """The arguments that have a gradient."""
        return () if self._gradient is None else self._gradient.inputs

    def __call__(self, arguments: tuple[Any, ...], impl: str, out: Any = None, apart: bool = False) -> Any:
        """The outputs: `out` with its contents if one is given, which was checked against shapes and dtypes.

        `apart` says that the caller knows `out` to share no memory with the arguments.
        """
        if not goes_straight(*(arguments[: self._leading] if self._seen is None else self._seen(*arguments))):
            return self._through_dispatcher(arguments, impl, out)
        launch = self._launcher(arguments, impl)
        if out is None:
            out = self._allocate_eagerly(*arguments)
            self._launch(launch, out, *arguments)
            return out
        if not apart:
            flat = arguments if self._flatten is None else self._flatten(*arguments)
            refuse_overlap(_named(out), zip(self._inputs, flat, strict=True))
        increment_version(_tensors(out))  # first, since a launch that is interrupted has written, too
        self._launch(launch, out, *arguments)
        return out

    def fill(self, out: Any, result: Any, arguments: tuple[Any, ...]) -> Any:
        """`out` with the values of `result`, the answer to `arguments`, with which it may share no memory."""
        self._refuse_overlap(out, arguments if self._flatten is None else self._flatten(*arguments))
        for (name, mine), theirs in zip(_named(out), _tensors(result), strict=True):
            _write(name, mine, theirs)
        return out

    def _launcher(self, arguments: tuple[Any, ...], impl: str) -> Any:
        if self._composed:
            return impl
        first = arguments[0]
        facts = None if self._call is None else self._call(*arguments)
        return launcher(self.name, impl, first.device, first.dtype, facts)

    def _refuse_overlap(self, out: Any, flat: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or _transform() is not None:
            return
        if all(type(t) in _PLAIN for t in (*flat, *_tensors(out)) if isinstance(t, Tensor)):
            refuse_overlap(_named(out), zip(self._inputs, flat, strict=True))

    def _through_dispatcher(self, arguments: tuple[Any, ...], impl: str, out: Any) -> Any:
        flat = arguments if self._flatten is None else self._flatten(*arguments)
        self._refuse_gradients(flat)
        if not torch.compiler.is_compiling():
            self._refuse_transforms(flat)
        if out is not None:
            self._refuse_overlap(out, flat)  # before anything is computed
        fields = self._registered(*flat[: self._place], impl, *flat[self._place :])
        result = fields if self._assemble is None else self._assemble(fields, *arguments)
        return result if out is None else self.fill(out, result, arguments)

    def _refuse_gradients(self, flat: tuple[Any, ...]) -> None:
        """ValueError for a tensor whose gradient this operator would lose."""
        if not torch.is_grad_enabled():
            return
        gradient = self._gradient
        having = gradient.inputs if gradient is not None and gradient.applies(*flat) else ()
        for name, value in zip(self._inputs, flat, strict=True):
            if isinstance(value, Tensor) and value.requires_grad and name not in having:
                raise ValueError(
                    f"{name}: expected a tensor that needs no gradient ({self.name} has none for it: torch.no_grad()), "
                    "got one with requires_grad=True"
                )

    def _refuse_transforms(self, flat: tuple[Any, ...]) -> None:
        """ValueError for what forward-mode differentiation and torch.func would lose or fail at."""
        transform = _transform()
        reverse = transform is not None and transform.key() == torch._C._functorch.TransformType.Grad
        for name, value in zip(self._inputs, flat, strict=True):
            if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
                continue
            if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
                raise ValueError(
                    f"{name}: expected a tensor without a tangent ({self.name} has no forward-mode derivative), "
                    "got one with a tangent"
                )
            if reverse and value.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name}: expected a call outside torch.func.grad, vjp and jacrev ({self.name} has a gradient for "
                    "torch.autograd alone), got a tensor that one of them differentiates"
                )

    def _apart(self, given: tuple[Any, ...]) -> tuple[tuple[Any, ...], str]:
        """What a registered call lists beside `impl`, and that. Dispatchers leave out what is as by default."""
        given = (*given, *self._defaults[len(given) :])
        return given[: self._place] + given[self._place + 1 :], given[self._place]

    def _kernel(self, *given: Any) -> Any:
        flat, impl = self._apart(given)
        arguments = tuple(flat) if self._gather is None else self._gather(*flat)
        outputs = self._allocate(*arguments)
        self._launch(self._launcher(arguments, impl), outputs, *arguments)
        return _fields(outputs)

    def _fake(self, *given: Any) -> Any:
        flat, _ = self._apart(given)
        return _fields(self._allocate(*(flat if self._gather is None else self._gather(*flat))))


REGISTERED: dict[str, Op] = {}
"""Name -> operator, of all `torch.ops.moeyard` that are there."""


def _named(outputs: Any) -> list[tuple[str, Tensor]]:
    """The tensors of outputs with the names that errors have for them."""
    if isinstance(outputs, Tensor):
        return [("out", outputs)]
    if isinstance(outputs, Layout):
        return [(f"out.{name}", getattr(outputs, name)) for name in Layout.TENSORS]
    names = ("rows", "scales") if isinstance(outputs, Permuted) else ("topk_weights", "topk_ids")
    return [(f"out.{name}", t) for name in names if (t := getattr(outputs, name)) is not None]


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    if isinstance(outputs, Layout):
        return outputs.tensors
    if isinstance(outputs, tuple):
        return outputs
    return tuple(tensor for _, tensor in _named(outputs))


def _write(name: str, out: Tensor, result: Tensor) -> None:
    """Copies `result` into `out`, whose shape and dtype are equal.

    Compilers turn `copy_` into a copy of the whole storage behind `out`. They fail where that is not a whole number of
    elements: where `out` is a view of a workspace of another dtype. `clone.out` names no storage, but loses gradients.
    """
    if not torch.compiler.is_compiling():
        out.copy_(result)
    elif not result.requires_grad:
        torch.ops.aten.clone.out(result, out=out)
    elif out.untyped_storage().size() % out.itemsize:
        raise ValueError(
            f"{name}: expected a storage of whole elements of {out.itemsize} bytes where a compiler needs gradients, "
            f"got {out.untyped_storage().size()} bytes"
        )
    else:
        out.copy_(result)


def _fields(outputs: Any) -> Any:
    """What a registered operator returns: a tensor for scales that were not given, too."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Permuted) and outputs.scales is None:
        return outputs.rows, outputs.rows.new_empty(0)
    return _tensors(outputs)
