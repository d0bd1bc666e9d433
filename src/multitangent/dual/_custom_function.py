"""Functions with a backward of their own: the derivative that backpropagation would use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multitangent.dual._arguments import find_duals, map_duals, primals
from multitangent.dual._dual_tensor import DualTensor, expanded, make_dual, pad_rows

# Between `torch.autograd.Function`, whose `apply` users keep under names of their own, and what
# that calls in turn.
Base: Any = torch.autograd.function._SingleLevelFunction


def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.autograd.Function.apply` that takes dual tensors."""
    plain = super(Base, cls).apply
    duals = list(find_duals((args, kwargs)))
    if cls.__module__ == "torch.utils.checkpoint":
        function, _, *inputs = args  # no graph is long enough to save memory: it runs as it is
        return function(*inputs)
    if not duals or not torch.is_grad_enabled():
        return plain(*primals(args), **primals(kwargs))
    with torch._C.DisableTorchFunction(), torch.random.fork_rng(devices=[]):
        tangents = iter(_pushed(cls, plain, args, kwargs, duals))
    out = plain(*primals(args), **primals(kwargs))
    if isinstance(out, Tensor):
        return _paired(out, next(tangents), duals)
    return tuple(
        _paired(item, next(tangents), duals) if isinstance(item, Tensor) else item for item in out
    )


def _paired(out: Tensor, tangents: Tensor | None, duals: list[DualTensor]) -> Tensor:
    """One result; a function that writes into its argument returns that."""
    target = next((dual for dual in duals if dual.primal is out), None)
    if tangents is None:
        return out if target is None else target
    if target is None:
        return make_dual(out, tangents)
    target.write(tangents)
    return target


def _pushed(
    cls: Any,
    plain: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    duals: list[DualTensor],
) -> list[Tensor | None]:
    """The tangents of every tensor that a function returns, ``None`` where there are none.

    Its backward is linear in the gradient u of the output, ``g(u) = J^T u``. So ``J v`` is the
    derivative of ``<g(u), v>`` by u: that of the backward, not of the forward.
    """
    with torch.enable_grad():
        leaves = [dual.primal.detach().clone().requires_grad_() for dual in duals]
        remaining = iter(leaves)
        new_args, new_kwargs = map_duals(lambda _: next(remaining), (args, kwargs))
        # Views of the leaves, since a function may write into its arguments.
        result = plain(*_viewed(new_args), **_viewed(new_kwargs))
        items = result if isinstance(result, tuple) else (result,)
        outputs = [t for t in items if isinstance(t, Tensor) and t.requires_grad]
        if not outputs:
            return [None for t in items if isinstance(t, Tensor)]
        weights = [torch.randn_like(t).requires_grad_() for t in outputs]
        pulled = _pull(outputs, leaves, weights)
        other = _pull(outputs, leaves, [-2 * w for w in weights])
        count = max(len(dual.tangents) for dual in duals)
        rows = [pad_rows(expanded(dual), count).to(dual.primal.dtype) for dual in duals]
        used = [(g, row) for g, row in zip(pulled, rows, strict=True) if g is not None]
        pushed = [
            torch.autograd.grad(
                [gradient for gradient, _ in used],
                weights,
                [row[k] for _, row in used],
                retain_graph=True,
                allow_unused=True,
            )
            for k in range(count)
        ]
    products = [
        (
            sum((g * row[k]).sum() for g, row in used),
            sum(_product(*pair) for pair in zip(weights, rows_out, strict=True)),
            sum(_size(g, row[k]) for g, row in used),
        )
        for k, rows_out in enumerate(pushed)
    ]
    _check_linear(cls, pulled, other, products)
    by_output = {
        id(t): torch.stack(
            [torch.zeros_like(t) if row[i] is None else row[i] for row in pushed]
        ).detach()
        for i, t in enumerate(outputs)
    }
    return [by_output.get(id(t)) for t in items if isinstance(t, Tensor)]


def _viewed(arguments: Any) -> Any:
    if isinstance(arguments, dict):
        return {name: _viewed(value) for name, value in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(_viewed(value) for value in arguments)
    if isinstance(arguments, Tensor) and arguments.requires_grad and arguments.is_leaf:
        return arguments * 1 if arguments.is_floating_point() else arguments
    return arguments


def _pull(
    outputs: list[Tensor], leaves: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        outputs, leaves, weights, create_graph=True, retain_graph=True, allow_unused=True
    )


def _product(weight: Tensor, row: Tensor | None) -> Tensor:
    return weight.new_zeros(()) if row is None else (weight * row).sum()


def _size(gradient: Tensor, row: Tensor) -> Tensor:
    """How large a product is before its terms cancel, but for rounding."""
    terms = (gradient * row).detach()
    return terms.abs().sum() + 1e-3 * gradient.detach().norm() * row.norm()


def _check_linear(
    cls: Any,
    pulled: tuple[Tensor | None, ...],
    other: tuple[Tensor | None, ...],
    products: list[tuple[Any, Any, Any]],
) -> None:
    """Raise unless ``g(-2u) = -2 g(u)`` and ``<g(u), v> = <u, J v>`` for every tangent v."""
    found = [
        (-2 * a, b, a.detach().norm()) for a, b in zip(pulled, other, strict=True) if a is not None
    ]
    for a, b, size in [*found, *products]:
        rounding = max(1e-3, 16 * torch.finfo(a.dtype).eps)
        if b is None or float((a - b).detach().norm()) > rounding * float(size):
            raise NotImplementedError(
                f"The backward of {cls.__qualname__} should be linear in the gradient of the "
                "output, and made of functions that can be differentiated: then it says what the "
                "function does to tangents. Found one that is not, such as a clipped gradient or "
                "`once_differentiable`. Try PyTorch's own functions in its place."
            )
