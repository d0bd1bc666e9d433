"""What happens when a PyTorch function meets a dual tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multitangent.dual._arguments import find_duals, primals
from multitangent.dual._dual_tensor import DualTensor
from multitangent.dual._fallback import fallback
from multitangent.dual._grad_mode import constant
from multitangent.dual._kernels import FASTER
from multitangent.dual._product import Product, carried
from multitangent.dual._registry import (
    DISPATCH,
    FULL_PRECISION,
    NONDIFFERENTIABLE,
    RULES,
    VIEWS,
    accepts,
    function_name,
    not_dense,
)
from multitangent.dual._views import make_result, views_of


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of a function of dual tensors: the primal once, the tangents by a rule."""
    rule = RULES.get(func)
    if func in NONDIFFERENTIABLE:
        return func(*primals(args), **primals(kwargs))
    if rule is None and func.__name__ == "__get__":
        return _attribute(func, args)
    if kwargs.pop("out", None) is not None:
        raise NotImplementedError(
            f"{function_name(func)} should return its result to carry tangents. Found `out=`. "
            "Try the function without it."
        )
    if kwargs.pop("inplace", False):
        return _in_place(func, args, kwargs)
    if func in _RANDOM:
        return _overwritten(func, args, kwargs)
    if getattr(func, "__module__", None) == "torch.nn.init":  # which switch gradients off
        return constant(func, args, kwargs)
    if rule is None and _is_in_place(func):
        return _in_place(_out_of_place(func), args, kwargs)
    if func is Tensor.__setitem__:
        return _in_place(set_item, args, kwargs)
    if "input" in kwargs and not args:
        args = (kwargs.pop("input"),)
    if rule is None or not accepts(rule, kwargs):
        return fallback(func, args, kwargs)
    out = FASTER.get(func, func)(*primals(args), **primals(kwargs))
    try:
        with torch.no_grad():
            tangents = rule(out, *args, **kwargs)
    except RuntimeError as error:
        if _is_sparse(out) or any(_is_sparse(arg) for arg in args):
            raise not_dense(func) from error
        raise
    if func in VIEWS and type(args[0]) is DualTensor:
        return views_of(out, tangents, rule, args, kwargs)
    return _pair(out, tangents, args[0] if args else None, _carried_type(func, args))


DISPATCH.append(dispatch)  # for `DualTensor`, which this file imports


def result_of(
    func: Callable[..., Any], out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What a function returns whose primal is known already."""
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        return _pair(out, RULES[func](out, *args, **kwargs), None, _carried_type(func, args))


def _is_sparse(value: Any) -> bool:
    return isinstance(value, Tensor) and primals(value).layout is not torch.strided


def _carried_type(func: Callable[..., Any], args: tuple[Any, ...]) -> torch.dtype | None:
    """The type in which the arguments' tangents are carried, if that is not their primal's.

    Losses are left in full precision: what they return is summed up over the samples.
    """
    source = args[0] if args and type(args[0]) is DualTensor else next(find_duals(args), None)
    return None if source is None or func in FULL_PRECISION else source.carried_type


def _attribute(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """An attribute of a dual tensor: its primal's, unless that is a tensor that depends on it."""
    name = func.__self__.__name__  # type: ignore[attr-defined]
    value = func(*primals(args))
    if isinstance(value, Tensor) and name not in ("data", "grad"):
        raise NotImplementedError(
            f"`{name}` of a tensor that carries tangents should have a rule: the attribute would "
            "lose them. Try a function in its place."
        )
    return value


def _pair(out: Any, tangents: Any, source: Any, dtype: torch.dtype | None) -> Any:
    """Dual tensors from primals and their tangents, one or a sequence of them."""
    if tangents is None:
        return out
    if isinstance(out, Tensor):
        if type(tangents) is not Product and tangents.ndim != out.ndim + 1:
            raise ValueError(
                f"A rule should return tangents of shape [K, *{list(out.shape)}]. Found "
                f"{list(tangents.shape)}."
            )
        dtype = out.dtype if dtype is None else dtype
        if type(tangents) is Product and tangents.dtype is not dtype:
            tangents = tangents.computed()
        if isinstance(tangents, Tensor):
            tangents = carried(tangents, dtype)
        return make_result(out, tangents, source)
    items = [_pair(o, t, source, dtype) for o, t in zip(out, tangents, strict=True)]
    return tuple(items) if type(out) is tuple else type(out)(items)


def set_item(target: Tensor, index: Any, value: Any) -> Tensor:
    """``target[index] = value`` without changing `target`."""
    result = target.clone()
    result[index] = value
    return result


def copy_from(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``target.copy_(source)`` without changing `target`."""
    return source.to(target.device, target.dtype).expand_as(target).clone()


_TWINS: dict[str, Callable[..., Any]] = {"copy": copy_from, "zero": torch.zeros_like}


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = func.__name__
    return name.endswith("_") and not name.endswith("__")


def _out_of_place(func: Callable[..., Any]) -> Callable[..., Any]:
    name = func.__name__.removesuffix("_")
    if name in _TWINS:
        return _TWINS[name]
    for home in (Tensor, torch, torch.nn.functional):
        if callable(twin := getattr(home, name, None)):
            return twin
    raise NotImplementedError(
        f"{function_name(func)} should have a twin without the trailing underscore to carry "
        f"tangents. Found none. Try an operation that is not in place."
    )


# Functions that fill their first argument with random numbers, whatever was there.
_RANDOM = frozenset(
    getattr(Tensor, f"{name}_")
    for name in (
        "bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "random",
        "uniform",
    )
)  # fmt: skip


def _overwritten(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Fill a tensor anew: its tangents are zero from here on."""
    target, *rest = args
    _check_target(func, target)
    with torch.no_grad():
        func(target.primal, *primals(rest), **primals(kwargs))
        target.write(target.tangents.new_zeros(0, *[1] * target.primal.ndim))
    return target


def _check_target(func: Callable[..., Any], target: Any) -> None:
    if type(target) is not DualTensor:
        raise RuntimeError(
            f"{function_name(func)} should write into a tensor that carries tangents. Found an "
            "ordinary tensor as the target of an in-place operation with a dual tensor, whose "
            "tangents would be lost. Try `x.new_zeros(...)` or `torch.zeros_like(x)`, with `x` a "
            "tensor inside the model, in place of `torch.zeros(...)`."
        )


def _in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute out of place, then write into the first argument and all views of it."""
    target = args[0]
    _check_target(func, target)
    result = dispatch(func, args, kwargs)
    if result.shape != target.primal.shape:
        raise NotImplementedError(
            f"{function_name(func)} should keep the shape of its target in place. Found "
            f"{list(target.primal.shape)} becoming {list(result.shape)}. Try it out of place."
        )
    tangents = result.tangents if type(result) is DualTensor else None
    target.primal.copy_(primals(result))
    with torch.no_grad():
        if tangents is not None:
            target.write(tangents)
        else:
            target.write(target.tangents.new_zeros(0, *[1] * target.primal.ndim))
    return target
