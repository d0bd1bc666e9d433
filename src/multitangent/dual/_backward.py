"""Derivatives as backpropagation takes them: its conventions at kinks, ties and zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from multitangent.dual._algebra import add
from multitangent.dual._arguments import find_duals, map_duals

Outputs = Callable[..., tuple[Tensor, ...]]
_vjp: Callable[..., Any] = torch.func.vjp
_functorch: Any = torch._C._functorch


def slopes(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    points: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The derivative of the sum of a function's value by each dual tensor among its arguments.

    Where a number of the value depends on numbers of its own, this holds all derivatives at once.

    Args:
        func: From the arguments to one tensor.
        args: The arguments, dual tensors among them.
        kwargs: More of them.
        points: What takes the place of the dual tensors, by default their primals.
    """
    if points is None:
        points = [dual.primal for dual in find_duals((args, kwargs))]
    function = function_of_duals(func, args, kwargs)
    pulled = _pulled_by_vjp if _is_transformed() else _pulled
    return [finite(slope) for slope in pulled(function, points)]


def _is_transformed() -> bool:
    """Whether `torch.func` looks on."""
    return _functorch.peek_interpreter_stack() is not None


def _pulled(function: Outputs, points: Sequence[Tensor]) -> Sequence[Tensor]:
    with torch.enable_grad():
        leaves = [point.detach().requires_grad_() for point in points]
        outputs = [out for out in function(*leaves) if out.requires_grad]
        if not outputs:
            return [torch.zeros_like(leaf) for leaf in leaves]
        ones = [torch.ones_like(out) for out in outputs]
        return torch.autograd.grad(outputs, leaves, ones, materialize_grads=True)


def _pulled_by_vjp(function: Outputs, points: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same inside `torch.func`, which is slower."""
    out, pull = _vjp(function, *points)
    slopes: tuple[Tensor, ...] = pull(tuple(torch.ones_like(item) for item in out))
    return slopes


def finite(slope: Tensor) -> Tensor:
    """Slopes without infinities, the largest numbers in their place.

    A tangent of zero stays one: backpropagation too forgets an infinite slope behind a function
    that chooses, such as ReLU.
    """
    largest = torch.finfo(slope.dtype).max
    return slope.clamp(-largest, largest)


def function_of_duals(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Outputs:
    """A function of what takes the place of its dual arguments, to its floating-point tensors."""

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(values)
        new_args, new_kwargs = map_duals(lambda _: next(remaining), (args, kwargs))
        return tuple(floating(func(*new_args, **new_kwargs)))

    return function


def push(function: Outputs, points: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """The tangents ``[K, *shape]`` of every output, from those of the inputs.

    The backward of a function is linear in the gradient u of its outputs, ``g(u) = J^T u``, so
    that ``J v`` is the derivative of ``<g(u), v>`` by u.
    """
    _functorch._set_vmap_fallback_warning_enabled(False)  # which ask for an issue
    try:
        return (_pushed_by_vjp if _is_transformed() else _pushed)(function, points, rows)
    finally:
        _functorch._set_vmap_fallback_warning_enabled(True)


def _pushed(function: Outputs, points: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [point.detach().requires_grad_() for point in points]
        outputs = function(*leaves)
        used = [out for out in outputs if out.requires_grad]
        if not used:
            return [out.new_zeros(0, *[1] * out.ndim) for out in outputs]
        weights = [torch.ones_like(out).requires_grad_() for out in used]
        is_number = len(outputs) == 1 and outputs[0].ndim == 0
        pulled = torch.autograd.grad(
            used, leaves, weights, create_graph=not is_number, materialize_grads=True
        )
        if is_number:  # the gradient itself: nothing has to be transposed
            return [add(*_products(pulled, rows))]
        pairs = [(g, row) for g, row in zip(pulled, rows, strict=True) if g.requires_grad]
        gradients, tangents = zip(*pairs, strict=True)
        pushed = torch.autograd.grad(
            gradients, weights, tangents, is_grads_batched=True, allow_unused=True
        )
    by_output = {id(out): t for out, t in zip(used, pushed, strict=True) if t is not None}
    return [by_output.get(id(out), out.new_zeros(0, *[1] * out.ndim)) for out in outputs]


def _pushed_by_vjp(
    function: Outputs, points: Sequence[Tensor], rows: Sequence[Tensor]
) -> list[Tensor]:
    """The same inside `torch.func`, which is slower."""
    out, pull = _vjp(function, *points)
    _, transposed = _vjp(pull, tuple(torch.ones_like(item) for item in out))
    return list(torch.func.vmap(lambda *tangents: transposed(tangents)[0])(*rows))


def _products(gradients: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """``<gradient, tangent>`` for all K tangents of every input."""
    return [
        (row * finite(gradient)).reshape(len(row), -1).sum(1)
        for gradient, row in zip(gradients, rows, strict=True)
    ]


def floating(out: Any) -> list[Tensor]:
    """The floating-point tensors among a function's outputs."""
    if isinstance(out, Tensor):
        if out.is_complex():
            raise NotImplementedError(
                "Tangents should be real. Found a function whose result is complex. Try an "
                "equivalent in real numbers, such as torch.view_as_real's layout."
            )
        return [out] if out.is_floating_point() else []
    if isinstance(out, (tuple, list)):
        return [tensor for item in out for tensor in floating(item)]
    return []
