"""What happens when a PyTorch function meets a dual tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multitangent.dual._adopted import adopt
from multitangent.dual._arguments import find_duals, map_duals, primals
from multitangent.dual._dual_tensor import DualTensor, make_dual
from multitangent.dual._fallback import fallback
from multitangent.dual._grad_mode import constant
from multitangent.dual._graph import GRAPH_QUERIES
from multitangent.dual._kernels import FASTER
from multitangent.dual._product import Product, carried
from multitangent.dual._registry import (
    DISPATCH,
    FULL_PRECISION,
    NONDIFFERENTIABLE,
    REFUSED,
    RULES,
    VIEWS,
    accepts,
    by_position,
    function_name,
    not_dense,
    usual_names,
)
from multitangent.dual._views import Call, make_result, views_of


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The value of a function of dual tensors: the primal once, the tangents by a rule."""
    rule = RULES.get(func)
    if kwargs:
        if kwargs.get("out", func) is None:
            del kwargs["out"]
        elif "out" in kwargs and (rule is not None or _is_written(func, kwargs)):
            raise NotImplementedError(
                f"{function_name(func)} should return its result to carry tangents. Found `out=`. "
                "Try the function without it."
            )
        if not args and rule is not None:
            args, kwargs = by_position(rule, kwargs)
            if not args:
                return fallback(func, args, kwargs)
        if kwargs.pop("inplace", False):
            return _in_place(func, func, args, kwargs)
    if rule is None:
        return _without_rule(func, args, kwargs)
    if kwargs and not accepts(rule, kwargs):
        kwargs = usual_names(kwargs)
        if not accepts(rule, kwargs):
            return fallback(func, args, kwargs)
    out = FASTER.get(func, func)(*primals(args), **primals(kwargs))
    is_view = func in VIEWS
    if is_view and type(args[0]) is not DualTensor:
        return out  # of the other arguments only shape and type count
    try:
        with torch.no_grad():
            tangents = rule(out, *args, **kwargs)
    except RuntimeError as error:
        if not any(len(dual.tangents) for dual in find_duals((args, kwargs))):
            return fallback(func, args, kwargs)  # of no rows there is nothing to compute
        if _is_sparse(out) or any(_is_sparse(arg) for arg in args):
            raise not_dense(func) from error
        raise
    if is_view and tangents is not None:
        return views_of(out, tangents, rule, args, kwargs)
    return _pair(out, tangents, (func, args, kwargs, None), _carried_type(func, args))


def _is_written(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether `out=` takes something that depends on perturbed values, or is a dual tensor."""
    return func not in NONDIFFERENTIABLE or next(find_duals(kwargs["out"]), None) is not None


def _without_rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in NONDIFFERENTIABLE:
        return func(*primals(args), **primals(kwargs))
    if func in REFUSED:
        raise REFUSED[func]()
    if func in GRAPH_QUERIES:
        return GRAPH_QUERIES[func](*args)
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return _attribute(func, args)
    if func in _RANDOM:
        return _overwritten(func, args, kwargs)
    if getattr(func, "__module__", None) == "torch.nn.init":  # which switch gradients off
        return constant(func, args, kwargs)
    if func is Tensor.__setitem__:
        return _in_place(func, set_item, args, kwargs)
    if name.endswith("_") and not name.endswith("__"):
        return _in_place(func, _out_of_place(func, name), args, kwargs)
    return fallback(func, args, kwargs)


DISPATCH.append(dispatch)  # for `DualTensor`, which this file imports


def result_of(
    func: Callable[..., Any], out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What a function returns whose primal is known already."""
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        tangents = RULES[func](out, *args, **kwargs)
        return _pair(out, tangents, (func, (), {}, None), _carried_type(func, args))


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


def _pair(out: Any, tangents: Any, call: Call, dtype: torch.dtype | None) -> Any:
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
        return make_result(out, tangents, call)
    items = [
        _pair(o, t, (*call[:3], i), dtype)
        for i, (o, t) in enumerate(zip(out, tangents, strict=True))
    ]
    return tuple(items) if type(out) is tuple else type(out)(items)


def set_item(target: Tensor, index: Any, value: Any) -> Tensor:
    """``target[index] = value`` without changing `target`."""
    result = target.clone()
    result[index] = value
    return result


def copy_from(target: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
    """``target.copy_(other)`` without changing `target`."""
    return other.to(target.device, target.dtype).expand_as(target).clone()


def _filled_diagonal(target: Tensor, fill_value: Any, wrap: bool = False) -> Tensor:
    return target.clone().fill_diagonal_(fill_value, wrap)


_TWINS: dict[str, Callable[..., Any]] = {
    "copy": copy_from,
    "zero": torch.zeros_like,
    "fill_diagonal": _filled_diagonal,
}


def _out_of_place(func: Callable[..., Any], name: str) -> Callable[..., Any]:
    name = name.removesuffix("_")
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
    with torch.no_grad():
        func(primals(target), *primals(rest), **primals(kwargs))
        if type(target) is DualTensor:
            target.write(target.tangents.new_zeros(0, *[1] * target.primal.ndim))
    return target


def _in_place(
    func: Callable[..., Any],
    twin: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Compute out of place, then write into the first argument and all views of it.

    Args:
        func: The function that writes.
        twin: The same out of place.
        args: The function's arguments, the target first.
        kwargs: Its other arguments.
    """
    if not args:
        args = (kwargs.pop("input"),)
    target = args[0]
    if not target.is_floating_point():
        func(*primals(args), **primals(kwargs))
        return target
    _check_target(func, target)
    if torch.is_grad_enabled() and type(target) is DualTensor:
        # Autograd may keep what the twin is computed from, which is not to be written into.
        copied = make_dual(target.primal.clone(), target.tangents)
        args, kwargs = map_duals(lambda d: copied if d is target else d, (args, kwargs))
    result = dispatch(twin, args, kwargs)
    if result.shape != target.shape:
        raise NotImplementedError(
            f"{function_name(func)} should keep the shape of its target in place. Found "
            f"{list(target.shape)} becoming {list(result.shape)}. Try it out of place."
        )
    if type(target) is not DualTensor:
        source = next(find_duals((args, kwargs)))
        adopt(target, target.dtype if source.carried_type is None else source.carried_type)
    target.check_writable()
    target.primal.copy_(primals(result))
    with torch.no_grad():
        if type(result) is DualTensor:
            target.write(carried(result.tangents, target.tangents.dtype))
        else:
            target.write(target.tangents.new_zeros(0, *[1] * target.primal.ndim))
    return target


def _check_target(func: Callable[..., Any], target: Tensor) -> None:
    if target.requires_grad and target.is_leaf:
        raise RuntimeError(
            f"{function_name(func)} should not write into a tensor that is trained. Found a leaf "
            "that requires a gradient as its target, as backpropagation refuses it too. Try the "
            "function out of place, or `torch.no_grad()` around it."
        )
