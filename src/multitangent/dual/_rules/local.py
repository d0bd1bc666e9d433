"""Functions each of whose numbers depends on few others: one backward gives every derivative.

So the conventions at kinks, ties and zeros are those of backpropagation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import add, primal, scaled, tangents, times
from multitangent.dual._arguments import find_duals
from multitangent.dual._backward import slopes
from multitangent.dual._product import Product
from multitangent.dual._registry import RULES, register_full_precision, register_rule

_broadcast_shapes: Callable[..., torch.Size] = torch.broadcast_shapes
_HOMES: tuple[Any, ...] = (torch, Tensor, F, torch.special, torch.linalg)


def _named(names: str) -> list[Callable[..., Any]]:
    """The functions of these names, wherever PyTorch keeps them, that have no rule yet."""
    found = [getattr(home, name, None) for name in names.split() for home in _HOMES]
    return [f for f in dict.fromkeys(found) if f is not None and f not in RULES]


def elementwise(func: Callable[..., Any], out: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The rule of a function whose arguments broadcast with one another."""
    duals = list(find_duals((args, kwargs)))
    points = [dual.primal.expand(out.shape) for dual in duals]
    found = slopes(func, args, kwargs, points)
    if len(duals) == 1 and duals[0].primal.ndim == out.ndim:
        return times(duals[0], found[0])
    return add(*[scaled(dual, slope, out.ndim) for dual, slope in zip(duals, found, strict=True)])


def contracted(
    func: Callable[..., Any],
    axes: Sequence[int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    keepdim: bool = False,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """The tangents of a function that reduces some axes, each slice for itself.

    Args:
        func: From the arguments to one tensor.
        axes: The axes that are reduced.
        args: The arguments, dual tensors among them.
        kwargs: More of them.
        keepdim: Whether those axes stay.
        shape: That of the arguments when they have been broadcast, by default of the dual ones.
    """
    duals = list(find_duals((args, kwargs)))
    if shape is None:
        shape = _broadcast_shapes(*[dual.primal.shape for dual in duals])
    points = [dual.primal.expand(shape) for dual in duals]
    axes = [axis % len(shape) for axis in axes] if shape else []
    terms = []
    for dual, slope in zip(duals, slopes(func, args, kwargs, points), strict=True):
        t = tangents(dual, len(shape))
        assert t is not None
        terms.append(Product(t, slope).summed(shape, axes, keepdim) if shape else t * slope)
    return add(*terms)


def to_one_number(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tangents of a function whose value is a single number."""
    terms = []
    for dual, slope in zip(find_duals((args, kwargs)), slopes(func, args, kwargs), strict=True):
        shape = slope.shape
        terms.append(
            times(dual, slope).summed(shape, range(len(shape)), False)
            if shape
            else dual.tangents * slope
        )
    return add(*terms)


for _function in _named("""
    acos acosh addcdiv addcmul arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh
    atan atan2 atanh celu clamp_max clamp_min copysign cosh deg2rad digamma elu entr erf erfc
    erfinv exp2 expit fmax fmin fmod frac hardshrink hardswish hardtanh
    ldexp lerp lgamma log10 log2 log_ndtr logaddexp logaddexp2 logit logsigmoid maximum
    minimum nan_to_num ndtr rad2deg relu6 selu sinc sinh softshrink softsign tan
    tanhshrink threshold xlog1py xlogy
"""):
    register_rule(_function)(partial(elementwise, _function))


def _undefined_somewhere(
    func: Callable[..., Any], out: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """The same where a slope may be 0 / 0: a tangent of zero stays one, as for what is constant."""
    duals = list(find_duals((args, kwargs)))
    shape = _broadcast_shapes(out.shape, *[dual.primal.shape for dual in duals])
    points = [dual.primal.expand(shape) for dual in duals]
    terms = []
    for dual, slope in zip(duals, slopes(func, args, kwargs, points), strict=True):
        t = tangents(dual, len(shape))
        assert t is not None
        terms.append(torch.where(t == 0, 0, t * slope))
    total = add(*terms)
    return total if out.ndim else total.reshape(total.shape[0], -1).sum(1)


for _function in _named("float_power hypot kl_div"):
    register_rule(_function)(partial(_undefined_somewhere, _function))
register_full_precision(F.kl_div)


def _loss(func: Callable[..., Any], out: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An elementwise loss, whose reduction leaves one number or none."""
    if out.ndim == 0:
        return to_one_number(func, args, kwargs)
    return elementwise(func, out, *args, **kwargs)


def _row_loss(func: Callable[..., Any], out: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A loss of rows, the last axis of its arguments."""
    if out.ndim == 0:
        return to_one_number(func, args, kwargs)
    return contracted(func, [-1], args, kwargs)


for _function in _named("""
    binary_cross_entropy binary_cross_entropy_with_logits gaussian_nll_loss hinge_embedding_loss
    huber_loss l1_loss margin_ranking_loss poisson_nll_loss smooth_l1_loss soft_margin_loss
"""):
    register_rule(_function)(partial(_loss, _function))
    register_full_precision(_function)
for _function in _named("""
    cosine_embedding_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss
"""):
    register_rule(_function)(partial(_row_loss, _function))
    register_full_precision(_function)


@register_rule(F.ctc_loss)
def _ctc_loss(out: Tensor, log_probs: Any, *args: Any, **kwargs: Any) -> Any:
    if out.ndim == 0:
        return to_one_number(F.ctc_loss, (log_probs, *args), kwargs)
    return contracted(F.ctc_loss, [0, -1], (log_probs, *args), kwargs)


register_full_precision(F.ctc_loss)


def named_axes(place: int, args: tuple[Any, ...], kwargs: dict[str, Any], default: Any) -> Any:
    """What a call says of axes: at a place among its arguments, or by either name of them."""
    if len(args) > place:
        return args[place]
    return kwargs.get("dim", kwargs.get("axis", default))


def _reduction(func: Callable[..., Any], place: int, out: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A reduction over the axes that stand at a place among the arguments, or over all."""
    if out.ndim == 0:
        return to_one_number(func, args, kwargs)
    dim = named_axes(place, args, kwargs, None)
    ndim = next(find_duals((args, kwargs))).primal.ndim
    axes = [dim] if isinstance(dim, int) else list(dim or range(ndim))
    return contracted(func, axes, args, kwargs, keepdim=out.ndim == ndim)


for _place, _names in {
    1: "amax amin logsumexp nanmean nansum prod std var",
    2: "norm vector_norm",
}.items():
    for _function in _named(_names):
        register_rule(_function)(partial(_reduction, _function, _place))


@register_rule(torch.std_mean)
def _std_mean(out: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return _with_mean(torch.std, out, x, args, kwargs)


@register_rule(torch.var_mean)
def _var_mean(out: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return _with_mean(torch.var, out, x, args, kwargs)


def _with_mean(
    func: Callable[..., Any], out: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    def mean(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = torch.var_mean(x, *args, **kwargs)[1]
        return result

    return tuple(
        _reduction(f, 1, item, x, *args, **kwargs)
        for f, item in zip((func, mean), out, strict=True)
    )


@register_rule(F.cosine_similarity)
def _cosine_similarity(out: Tensor, x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Tensor:
    shape = _broadcast_shapes(x1.shape, x2.shape)
    return contracted(F.cosine_similarity, [dim], (x1, x2, dim, eps), {}, shape=shape)


@register_rule(F.pairwise_distance)
def _pairwise_distance(
    out: Tensor, x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Tensor:
    arguments, shape = (x1, x2, p, eps, keepdim), _broadcast_shapes(x1.shape, x2.shape)
    return contracted(F.pairwise_distance, [-1], arguments, {}, keepdim=keepdim, shape=shape)


@register_rule(F.prelu, Tensor.prelu)
def _prelu(out: Tensor, x: Any, weight: Any) -> Tensor:
    if out.ndim == 0:
        number: Tensor = to_one_number(F.prelu, (x, weight), {})
        return number
    count = primal(weight).numel()
    shape = [1, count, *[1] * (out.ndim - 2)] if out.ndim > 1 else [count]
    positive = primal(x) > 0
    slope = torch.where(positive, 1.0, primal(weight).reshape(shape))
    growth = torch.where(positive, 0.0, primal(x))
    t = tangents(weight)
    of_weight = None if t is None else t.expand(-1, *weight.shape).reshape(len(t), *shape) * growth
    return add(scaled(x, slope, out.ndim), of_weight)
