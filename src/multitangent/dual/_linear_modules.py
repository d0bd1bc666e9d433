"""Modules that are linear in their input, whatever kernel computes them, such as quantised ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import handle_torch_function, has_torch_function_unary

from multitangent._deferred_checks import tracing
from multitangent._structures import tensors_of
from multitangent.dual._algebra import each_sample, primal
from multitangent.dual._dual_tensor import DualTensor, expanded, shares_memory
from multitangent.dual._registry import register_rule

M = TypeVar("M", bound=type[nn.Module])
Forward = Callable[..., Any]
Transposed = Callable[[Any, Tensor], Tensor]

# Tangents are multiplied by this before the bias is added, and divided by it after the bias is
# subtracted. A power of two rounds nothing, and the rounding of a large bias does not reach them.
_ENLARGED = 2.0**20


def register_linear_module(
    kind: M,
    *,
    transposed: Transposed | None = None,
) -> M:
    """Declare that a module is linear in its input, apart from a bias, and is not trained.

    All K tangents then go through the module's own ``forward`` as one batch, whatever kernels it
    calls. One sample of zeros goes through it too. This gives the bias, which is subtracted again.
    ``verify="first"`` finds a wrong declaration wherever backpropagation has a gradient.

    The class gets a new ``forward`` that looks at its input first, and classes that inherit
    ``forward`` get it too. Ordinary tensors without a graph go to the module as before.

    Args:
        kind: The class. Its ``forward`` maps every sample of ``[B, *sample]`` by itself, or one
            tensor ``[D]``. Further arguments are constant. If the first axis of one of them is the
            batch, the K tangents go through one after the other.
        transposed: ``transposed(module, gradient)`` takes the gradient of the output and returns
            that of the input, ``[B, *sample]``. This is the product with the transposed matrix.
            Backpropagation uses it, and so does activity perturbation inside the blocks that hold
            the module. It is needed if ``forward`` has no derivative of its own.

    Returns:
        The class itself, so that this function is also a decorator.

    Raises:
        TypeError: If `kind` is not a class of modules.
        ValueError: If the class is registered already. While a model runs: if something inside such
            a module is trained, if its output is not one tensor of the samples, or if two calls
            return the same memory.
        NotImplementedError: While a model runs, if a gradient is needed and `forward` has none.

    Examples:
        >>> class Halved(nn.Module):
        ...     def forward(self, x):
        ...         return torch.from_numpy(x.detach().numpy() / 2) + 1  # PyTorch does not see it
        >>> _ = register_linear_module(Halved, transposed=lambda module, gradient: gradient / 2)
        >>> y = Halved()(DualTensor(torch.ones(2), torch.eye(2)))
        >>> y.primal, y.tangents
        (tensor([1.5000, 1.5000]), tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]]))
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(
            f"`kind` should be a class of modules. Found {kind!r}. Try its class, or "
            "`register_rule` for a function."
        )
    plain: Forward = kind.forward
    if hasattr(plain, "is_linear_module"):
        raise ValueError(
            "`kind` should be registered once, either itself or as the class that it inherits "
            f"`forward` from. Found {kind.__qualname__} a second time. Try it without this call."
        )
    first = list(inspect.signature(plain).parameters)[1]

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not args and first in kwargs:
            args = (kwargs.pop(first),)
        if not args or not isinstance(args[0], Tensor):
            return plain(self, *args, **kwargs)
        if has_torch_function_unary(args[0]):
            if type(args[0]) is DualTensor:
                _refuse_trained(self)
            out = handle_torch_function(forward, args[:1], self, *args, **kwargs)
            return args[0] if primal(out) is primal(args[0]) else out
        if not (torch.is_grad_enabled() and args[0].requires_grad):
            return plain(self, *args, **kwargs)
        return _recorded(plain, transposed, self, args, kwargs)

    @register_rule(forward)
    def rule(out: Any, self: nn.Module, x: DualTensor, *args: Any, **kwargs: Any) -> Tensor | None:
        _check(self, x, out, (args, kwargs))
        if type(x) is not DualTensor or len(x.tangents) == 0:
            return None

        def of_samples(rows: Tensor, zeros: Tensor) -> Tensor:
            scale = 1.0 if torch.float16 in (x.primal.dtype, out.dtype) else _ENLARGED
            scaled: Tensor = plain(self, rows.to(x.primal.dtype) * scale, *args, **kwargs)
            bias = plain(self, zeros, *args, **kwargs)
            _refuse_shared(self, (out, scaled, bias))
            return scaled.sub_(bias).div_(scale)

        if _are_of_samples(x, (args, kwargs)):
            return torch.stack([of_samples(t, torch.zeros_like(t)) for t in expanded(x)])
        zeros = _zeros(x)
        return each_sample(x, lambda rows: of_samples(rows, zeros), max(x.primal.ndim - 1, 1))

    forward.__name__ = f"{kind.__qualname__}.forward"
    forward.is_linear_module = True  # type: ignore[attr-defined]
    kind.forward = forward
    return kind


def _zeros(x: DualTensor) -> Tensor:
    """One sample of zeros, or zeros for the one vector that there is."""
    return torch.zeros_like(x.primal[:1] if x.primal.ndim > 1 else x.primal)


def _are_of_samples(x: DualTensor, others: Any) -> bool:
    """Whether further arguments may belong to single samples, so that the batch keeps its size."""
    size = len(x.primal)
    return (
        x.primal.ndim > 1 and size > 1 and any(t.shape[:1] == (size,) for t in tensors_of(others))
    )


def _refuse_shared(module: nn.Module, outputs: Sequence[Tensor]) -> None:
    """Raise if the outputs of two calls share memory, where only the last output is left."""
    if tracing() or not all(out.numel() for out in outputs):
        return
    if any(shares_memory(*pair) for pair in combinations(outputs, 2)):
        raise ValueError(
            f"{type(module).__qualname__} is registered as linear: every call should return memory "
            "of its own. Found the outputs of two calls in the same memory. Try `.clone()` of the "
            "output."
        )


def _check(module: nn.Module, x: Any, out: Any, others: Any) -> None:
    """Raise if another argument varies too, or if the output is not one tensor of the samples."""
    name = type(module).__qualname__
    _refuse_others(module, others)
    size = x.shape[:1] if x.ndim > 1 else ()
    if not isinstance(out, Tensor) or out.shape[: len(size)] != size:
        found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"{name} is registered as linear: it should return one tensor whose first axis is that "
            f"of its input, {list(x.shape)}. Found {found}. Try to register a module inside it."
        )


def _refuse_trained(module: nn.Module) -> None:
    """Raise if something inside a module is trained."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if type(value) is DualTensor or value.requires_grad:
            raise ValueError(
                f"{type(module).__qualname__} is registered as linear: nothing inside of it should "
                f"be trained. Found {name!r}, which is trained. Try `requires_grad_(False)`, or "
                "put what is trained into a module around it."
            )


def _refuse_others(module: nn.Module, others: Any) -> None:
    """Raise if more than the first argument varies."""
    if any(type(value) is DualTensor or value.requires_grad for value in tensors_of(others)):
        raise ValueError(
            f"{type(module).__qualname__} is registered as linear in its first argument: the "
            "others should be constant. Found one that depends on something that is trained. Try "
            "it without `register_linear_module`."
        )


def _recorded(
    plain: Forward,
    transposed: Transposed | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What `forward` returns, recorded so that autograd knows how it depends on the input."""
    if transposed is not None:
        _refuse_trained(module)
        _refuse_others(module, (args[1:], kwargs))
        apply: Forward = _Recorded.apply
        return apply(args[0], plain, transposed, module, args[1:], kwargs)
    source = get_gradient_edge(args[0]).node
    out = plain(module, *args, **kwargs)
    if isinstance(out, Tensor) and not (out.requires_grad and _leads_to(out, source)):
        raise _no_gradient(module)
    return out


def _leads_to(out: Tensor, source: Node) -> bool:
    """Whether a graph leads back to a node. Other paths end at what is trained inside."""
    seen: set[Node] = set()
    waiting: list[Node | None] = [get_gradient_edge(out).node]
    while waiting:
        node = waiting.pop()
        if node is source:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return False


def _no_gradient(module: nn.Module) -> NotImplementedError:
    return NotImplementedError(
        f"{type(module).__qualname__} should pass a gradient on to its input: something before it "
        "is trained by backpropagation, or by the local step of activity perturbation. Found a "
        "`forward` that has no derivative. Try `register_linear_module(..., transposed=...)`, or "
        "`perturb='weights'` with `verify=False`."
    )


_compared: WeakSet[nn.Module] = WeakSet()  # modules whose `transposed` fits their `forward`


class WrongTransposeError(ValueError):
    """The `transposed` of a module that is registered as linear does not fit its `forward`."""


@torch.no_grad()
def _compare_transposed(ctx: Any, gradient: Tensor) -> None:
    """Raise unless ``<A x, g> = <x, A^T g>`` for random x and two g, with A the linear part."""
    others, kwargs = ctx.arguments
    generator = torch.Generator().manual_seed(0)
    with torch._C.DisableTorchFunction():
        x = torch.randn(ctx.shape, generator=generator).to(gradient)
        out = ctx.plain(x, *others, **kwargs).clone()
        out -= ctx.plain(torch.zeros_like(x), *others, **kwargs)
        random = torch.randn(out.shape, generator=generator).to(gradient)
        for g in (out, random):
            terms = out.double() * g
            found = float((x.double() * ctx.transposed(ctx.module, g)).sum())
            tolerance = 0.1 if gradient.dtype.itemsize == 2 else 0.003
            if not abs(found - float(terms.sum())) <= tolerance * float(terms.norm()):
                raise _wrong_transpose(ctx.module, float(terms.sum()), found)


def _wrong_transpose(module: nn.Module, expected: float, found: float) -> WrongTransposeError:
    return WrongTransposeError(
        f"{type(module).__qualname__} is registered as linear: `forward` and `transposed` should "
        "multiply with one matrix A and its transpose, so that <A x, g> = <x, A^T g>. Found "
        f"{expected:.4g} and {found:.4g} for random vectors. Try another `transposed`, or the "
        "model without `register_linear_module`."
    )


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plain: Forward,
        transposed: Transposed,
        module: nn.Module,
        others: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        ctx.transposed, ctx.module, ctx.shape = transposed, module, x.shape
        ctx.plain = functools.partial(plain, module)
        ctx.arguments = others, kwargs
        return plain(module, x, *others, **kwargs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pulled = ctx.transposed(ctx.module, gradient)
        if pulled.shape != ctx.shape:
            raise ValueError(
                f"`transposed` of {type(ctx.module).__qualname__} should return the gradient of "
                f"the input, {list(ctx.shape)}. Found {list(pulled.shape)}. Try the product with "
                "the transposed matrix."
            )
        if ctx.module not in _compared and not tracing():
            _compare_transposed(ctx, gradient)
            _compared.add(ctx.module)
        return pulled, None, None, None, None, None
