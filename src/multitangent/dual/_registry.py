"""The registry: which PyTorch function has which rule."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., Any]

RULES: dict[Callable[..., Any], Rule] = {}
VIEWS: set[Callable[..., Any]] = set()
NONDIFFERENTIABLE: set[Callable[..., Any]] = set()
REFUSED: dict[Callable[..., Any], Callable[[], Exception]] = {}
FULL_PRECISION: set[Callable[..., Any]] = set()
COMPOSITES: dict[Callable[..., Any], Callable[..., Any]] = {}
DISPATCH: list[Callable[..., Any]] = []  # what computes a function of dual tensors, once it is set


def register_rule(
    *functions: Callable[..., Any], overwrite: bool = False
) -> Callable[[Rule], Rule]:
    """Teach `DualTensor` how some PyTorch functions act on tangents.

    The decorated rule is called as ``rule(out, *args, **kwargs)`` with the function's own
    arguments, dual tensors among them, and ``out``, the function's value on the primals. It
    returns the tangents of ``out``, ``[K, *out.shape]`` (axes of size 1 where they are constant),
    or a sequence of those for a function with several outputs. `primal`, `tangents` and `add` of
    `multitangent.dual` take the arguments apart. Rules run without autograd.

    Args:
        functions: The exact functions, as PyTorch hands them to ``__torch_function__``:
            ``torch.sin`` and ``torch.Tensor.sin`` are two.
        overwrite: Replace a rule that exists already.

    Raises:
        ValueError: If a function has a rule already and `overwrite` is false.

    Examples:
        >>> import torch
        >>> from multitangent.dual import DualTensor, primal, register_rule, tangents
        >>> @register_rule(torch.special.expit, overwrite=True)
        ... def expit(out, x):
        ...     return tangents(x) * (out * (1 - out))
        >>> x = DualTensor(torch.zeros(2), torch.eye(2))
        >>> torch.special.expit(x).tangents
        tensor([[0.2500, 0.0000],
                [0.0000, 0.2500]])
    """

    def register(rule: Rule) -> Rule:
        for function in functions:
            if function in RULES and not overwrite:
                raise ValueError(
                    f"`functions` should have no rule yet. Found one for {function_name(function)}."
                    " Try `overwrite=True` to replace it."
                )
            RULES[function] = rule
        return rule

    return register


def register_composite(function: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Replace a function, where tangents are carried, by one made of functions that have rules."""

    def register(composite: Rule) -> Rule:
        COMPOSITES[function] = composite
        return composite

    return register


def register_views(*functions: Callable[..., Any]) -> None:
    """Mark functions, which have rules, as returning views of their first argument."""
    VIEWS.update(functions)


def register_full_precision(*functions: Callable[..., Any]) -> None:
    """Mark functions, which have rules, whose tangents are carried in the primal's type."""
    FULL_PRECISION.update(functions)


def register_nondifferentiable(*functions: Callable[..., Any]) -> None:
    """Mark functions whose results do not carry tangents: queries, comparisons, `detach`."""
    NONDIFFERENTIABLE.update(functions)


def register_refused(*functions: Callable[..., Any], error: Callable[[], Exception]) -> None:
    """Mark functions that would lose tangents, with the error that says so."""
    REFUSED.update(dict.fromkeys(functions, error))


def accepts(rule: Rule, kwargs: dict[str, Any]) -> bool:
    """Whether a rule knows all names: PyTorch has several for one argument, such as `axis`."""
    if not kwargs:
        return True
    named = _names(rule)
    return named is None or kwargs.keys() <= named


def by_position(rule: Rule, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a function that was called by names alone, the first of them by position.

    Rules have PyTorch's names, but for the first argument.
    """
    first, *others = (
        p.name
        for p in list(inspect.signature(rule).parameters.values())[1:]
        if p.kind is p.POSITIONAL_OR_KEYWORD
    )
    rest = dict(kwargs)
    first = first if first in rest else "input"
    args = [rest.pop(first)] if first in rest else []
    for name in others if args else ():
        if name not in rest:
            break
        args.append(rest.pop(name))
    return tuple(args), rest


_USUAL_NAMES = {"axis": "dim", "keepdims": "keepdim", "x2": "other"}


def usual_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that rules have, where PyTorch takes NumPy's too."""
    return {_USUAL_NAMES.get(name, name): value for name, value in kwargs.items()}


@functools.cache
def _names(rule: Rule) -> frozenset[str] | None:
    """The names of a rule's arguments, ``None`` if it takes any."""
    parameters = inspect.signature(rule).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)


def is_query(function: Callable[..., Any]) -> bool:
    """Whether a function's result does not depend on values in a way that has derivatives."""
    return function in NONDIFFERENTIABLE or function.__name__ == "__get__"


def has_rule(function: Callable[..., Any]) -> bool:
    """Whether a function has a rule of its own, or needs none."""
    return function in RULES or function in NONDIFFERENTIABLE or function in COMPOSITES


def not_dense(function: Callable[..., Any]) -> NotImplementedError:
    """What is raised where tangents meet a sparse tensor that would have to carry them."""
    return NotImplementedError(
        f"{function_name(function)} should return a dense tensor to carry tangents; a sparse "
        "matrix may be multiplied with one. Found a sparse one that depends on a perturbed value. "
        "Try a dense matrix, or `gather` and `scatter_add` in its place."
    )


class FallbackWarning(UserWarning):
    """A function has no rule of its own: its tangents are right, but slower than need be."""


class _Recorder(threading.local):
    names: set[str] | None = None


_recorder = _Recorder()


def record_fallback(name: str) -> None:
    """Note that a function fell back, for whoever records it."""
    if _recorder.names is not None:
        _recorder.names.add(name)


class record_fallbacks:  # noqa: N801 (a context manager, used like a function)
    """Collect the names of the functions that fall back inside a ``with`` block."""

    def __enter__(self) -> set[str]:
        self._outer = _recorder.names
        _recorder.names = set()
        return _recorder.names

    def __exit__(self, *exception: object) -> None:
        if self._outer is not None and _recorder.names is not None:
            self._outer |= _recorder.names
        _recorder.names = self._outer


def function_name(function: Callable[..., Any]) -> str:
    """A function's name as a reader would look it up."""
    name = getattr(function, "__name__", repr(function))
    if getattr(torch.nn.functional, name, None) is function:
        return f"torch.nn.functional.{name}"
    if getattr(torch, name, None) is function:
        return f"torch.{name}"
    if getattr(torch.autograd, name, None) is function:
        return f"torch.autograd.{name}"
    return f"torch.Tensor.{name}" if hasattr(Tensor, name) else str(name)
