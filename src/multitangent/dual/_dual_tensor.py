"""A tensor that carries K tangents through unmodified PyTorch code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from multitangent.dual._deferred import Deferred, Factored
from multitangent.dual._product import Product
from multitangent.dual._registry import COMPOSITES, DISPATCH
from multitangent.dual._sweep import CURRENT, check_sweep

D = TypeVar("D", bound=Deferred)


class DualTensor(Tensor):
    """A primal tensor together with K tangents of it.

    ``tangents`` has the shape ``[K, *shape]``, where every axis after the first is either that of
    the primal or 1: the tangent is then constant along it. A tangent that all samples share stays
    ``[K, 1, ...]`` for as long as the operations allow. Functions of PyTorch that receive a dual
    tensor return dual tensors: each computes its primal once and its K tangents by a rule, or
    through `torch.func` where there is no rule (see `multitangent.dual.register_rule`).

    Operands may carry different numbers of tangents: the missing last ones are zero.

    Args:
        primal: The value, any floating-point tensor ``[*shape]``.
        tangents: Its tangents, ``[K, *shape]`` or with axes of size 1.

    Raises:
        TypeError: If the primal is not a real floating-point tensor.
        ValueError: If the shape of the tangents does not fit the primal's.

    Examples:
        >>> x = DualTensor(torch.tensor([1.0, 2.0]), torch.eye(2))
        >>> (x * x).sum().tangents
        tensor([2., 4.])
    """

    # What a dual tensor is made of. Views remember the tensor they look into (`_parent`) and how
    # (`_replay`), so that a write through one of them reaches all; `_writes` counts the writes and
    # is shared by all views of one tensor. `_sweep` is the run of the model that it belongs to.
    _primal: Tensor
    _tangents: Tensor | Deferred
    _parent: DualTensor | None
    _replay: Callable[[Tensor], Tensor] | None
    _writes: list[int]
    _seen: int
    _carried: torch.dtype
    _sweep: object | None
    _is_param: bool = False  # for `isinstance(x, nn.Parameter)`

    @staticmethod
    def __new__(cls, primal: Tensor, tangents: Tensor) -> DualTensor:
        _check(primal, tangents)
        return make_dual(primal, tangents)

    def __init__(self, primal: Tensor, tangents: Tensor) -> None:
        super().__init__()

    @classmethod
    def deferred(cls, primal: Tensor, tangents: Tensor | Deferred) -> DualTensor:
        """A dual tensor, made without checks. Deferred tangents are computed when needed."""
        return make_dual(primal, tangents)

    @property
    def primal(self) -> Tensor:
        """The value, a plain tensor ``[*shape]``."""
        return self._primal

    @property
    def tangents(self) -> Tensor:
        """The tangents ``[K, *shape]``; axes along which they are constant may have size 1."""
        if self._sweep is not CURRENT.sweep:
            check_sweep(self._sweep)
        if self._parent is not None and self._seen != self._writes[0]:
            self._tangents = self._again(expanded(self._parent))
            self._seen = self._writes[0]
        stored = self._tangents
        if isinstance(stored, Tensor):
            return stored
        computed = stored.computed()
        if stored.is_kept:
            self._tangents = computed
        return computed

    @property
    def product(self) -> Product:
        """The tangents as what may not be computed yet."""
        stored = self._tangents
        if type(stored) is not Product or self._sweep is not CURRENT.sweep:
            return Product(self.tangents)
        return stored

    @property
    def factored(self) -> Factored | None:
        """The factors of the tangents, where they are products of some."""
        stored = self.held(Deferred)  # type: ignore[type-abstract]
        return None if stored is None else stored.factored()

    def held(self, kind: type[D]) -> D | None:
        """What the tangents will be computed from, where it is of that kind."""
        stored = self._tangents
        if not isinstance(stored, kind):
            return None
        is_written = self._parent is not None and self._seen != self._writes[0]
        if self._sweep is not CURRENT.sweep or is_written:
            return None  # `tangents` raises, or takes the view again
        return stored

    @property
    def is_pending(self) -> bool:
        """Whether the tangents are not computed yet."""
        return type(self._tangents) is Product

    @property
    def carried_type(self) -> torch.dtype | None:
        """The type of the tangents, if it is not the primal's."""
        return None if self._carried is self._primal.dtype else self._carried

    def detached(self) -> DualTensor:
        """The same tangents of a primal without its graph."""
        tangents = self._tangents if self._parent is None else self.tangents
        return make_dual(self._primal.detach(), tangents)

    def write(self, tangents: Tensor) -> None:
        """Replace the tangents after the primal changed in place, through all views."""
        self._writes[0] += 1
        self._set(tangents)

    def check_writable(self) -> None:
        """Raise if several numbers of a view lie in one place."""
        if self._parent is not None and _overlaps(self._primal):
            raise NotImplementedError(
                "A write in place should reach every number of a view in a place of its own. "
                "Found a view whose numbers share memory, such as `expand` and `unfold` make. Try "
                "`.clone()` before the write."
            )

    def _set(self, tangents: Tensor) -> None:
        if self._parent is not None:
            self.check_writable()
            grown = pad_rows(expanded(self._parent), tangents.shape[0]).clone(
                memory_format=torch.contiguous_format
            )
            if len(grown):
                place = self._again(grown)
                if not shares_memory(place, grown):
                    raise _not_a_view()
                place.copy_(pad_rows(tangents, len(grown)))
            self._parent._set(grown)
        self._tangents = tangents
        self._seen = self._writes[0]

    def _again(self, tangents: Tensor) -> Tensor:
        """This view of tangents of its parent."""
        if self._replay is None:
            raise _not_a_view()
        return self._replay(tangents)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in COMPOSITES:
            return COMPOSITES[func](*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return DISPATCH[0](func, args, dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.detach.default:  # as `torch.tensor` does of a tensor
            return args[0]._primal.detach()
        raise NotImplementedError(
            f"{func} should be reached through PyTorch's Python functions, where the tangents can "
            "be carried along. Found a call that bypasses them, such as a compiled or scripted "
            "function, or an operation with `out=`. Try the eager function without `out=`."
        )

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"DualTensor({self._primal!r}, num_tangents={self.tangents.shape[0]})"


def make_dual(primal: Tensor, tangents: Tensor | Deferred) -> DualTensor:
    """A dual tensor without the checks of the constructor."""
    dual: DualTensor = Tensor._make_wrapper_subclass(
        DualTensor, primal.shape, dtype=primal.dtype, device=primal.device
    )
    dual._primal = primal
    dual._tangents = tangents
    dual._parent = None
    dual._replay = None
    dual._writes = [0]
    dual._seen = 0
    dual._carried = tangents.dtype
    dual._sweep = CURRENT.sweep
    return dual


def _not_a_view() -> NotImplementedError:
    return NotImplementedError(
        "A tensor that shares memory with others should be written in place only through views "
        "that can be taken of tangents too, such as slices and reshapes. Found another one. Try "
        "`.clone()` before the write."
    )


def without_base(value: Tensor) -> Tensor:
    """The same value for autograd to record writes into, where it was a view made without it."""
    if type(value) is DualTensor:
        value._primal = without_base(value._primal)
        return value
    return value.detach() if value._is_view() and not value.requires_grad else value


def as_parameter(value: Tensor) -> Tensor:
    """The same tensor, which counts as a parameter, and as a leaf if it carries tangents."""
    value._is_param = True
    return value


def expanded(dual: DualTensor) -> Tensor:
    """All tangents in the primal's full shape ``[K, *shape]``."""
    tangents = dual.tangents
    return tangents.expand(tangents.shape[0], *dual.primal.shape)


def _overlaps(view: Tensor) -> bool:
    """Whether several numbers of a tensor may lie in one place."""
    reached = 1
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1:
            if stride < reached:
                return True
            reached = stride * size
    return False


def pad_rows(tangents: Tensor, count: int) -> Tensor:
    """Tangents ``[at most K, ...]`` as ``[K, ...]``: rows that are missing at the end are zero."""
    missing = count - tangents.shape[0]
    if missing <= 0:
        return tangents
    return torch.cat([tangents, tangents.new_zeros(missing, *tangents.shape[1:])])


def shares_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are views of one memory."""
    return _storage(x) == _storage(y)


def _storage(x: Tensor) -> int:
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x.untyped_storage().data_ptr()


def _check(primal: Tensor, tangents: Tensor) -> None:
    if not primal.is_floating_point():
        raise TypeError(
            "`primal` should be a real floating-point tensor: only those have directional "
            f"derivatives here. Found {primal.dtype}. Try `primal.float()`."
        )
    fits = tangents.ndim == primal.ndim + 1 and all(
        size in (1, full) for size, full in zip(tangents.shape[1:], primal.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`tangents` should have the shape [K, *{list(primal.shape)}], or 1 in place of an "
            f"axis after the first. Found {list(tangents.shape)}."
        )
