"""Cross-entropy, negative log-likelihood and mean squared error."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import add, full, primal, scaled
from multitangent.dual._arguments import find_duals
from multitangent.dual._dual_tensor import DualTensor
from multitangent.dual._fallback import jvp_by_vmap
from multitangent.dual._linear_tangents import LinearTangents, linear_tangents
from multitangent.dual._registry import register_full_precision, register_rule

_CHUNK = 2**21  # logits whose derivatives are computed at a time


@register_rule(F.cross_entropy)
def _cross_entropy(
    out: Tensor,
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    _refuse_old_reductions(size_average, reduce)
    logits, labels = primal(input), _labels(target)
    classes = 0 if logits.ndim == 1 else 1
    waiting = linear_tangents(input) if type(input) is DualTensor else None
    if waiting is not None and waiting.axis == classes and type(target) is not DualTensor:
        options = weight, ignore_index, label_smoothing
        jvps, total = _in_chunks(waiting, logits, labels, *options)
        return _reduced(jvps, jvps.shape[1:], reduction, total)
    wanted, total = _wanted(logits, labels, classes, weight, ignore_index, label_smoothing)
    # The loss is -sum(wanted * log_softmax).
    through = of_target = None
    if type(input) is DualTensor:
        gradient = logits.softmax(classes) * wanted.sum(classes, keepdim=True) - wanted
        through = (full(input, classes) * gradient).sum(classes + 1)
    if type(target) is DualTensor:
        gradient = (label_smoothing - 1) * logits.log_softmax(classes)
        if weight is not None:
            gradient = gradient * _along(weight, classes, logits.ndim)
        of_target = (full(target, classes) * gradient).sum(classes + 1)
    shape = wanted.select(classes, 0).shape
    return _reduced(add(through, of_target), shape, reduction, total)


def _in_chunks(
    waiting: LinearTangents, logits: Tensor, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor | float]:
    """The derivatives ``[K, *positions]``, and what their mean divides by, some rows at a time.

    The derivative of a row's loss with respect to its logits is multiplied by the weights once
    for all tangents, so that the tangents of the logits are never made.
    """
    classes = waiting.axis
    rows = logits.movedim(classes, -1)
    positions = rows.shape[:-1]
    rows = rows.reshape(-1, rows.shape[-1])
    if labels.is_floating_point():
        labels = labels.movedim(classes, -1).reshape(rows.shape)
    else:
        labels = labels.reshape(-1)
    total: Tensor | float = 0.0
    tangents, jvps = waiting.as_rows(), []
    for chunk in _chunks(rows):
        wanted, share = _wanted(rows[chunk], labels[chunk], 1, *options)
        gradient = rows[chunk].softmax(1).mul_(wanted.sum(1, keepdim=True)).sub_(wanted)
        del wanted
        jvps.append(tangents.along(chunk, gradient))
        total = total + share
    joined = torch.cat(jvps, 1)
    return joined.reshape(len(joined), *positions), total


def _chunks(rows: Tensor) -> list[slice]:
    """Slices of at most an eighth of the rows, unless those are small."""
    size = max(_CHUNK // rows.shape[1], -(-len(rows) // 8), 1)
    return [slice(start, start + size) for start in range(0, len(rows), size)]


@register_rule(F.nll_loss)
def _nll_loss(
    out: Tensor,
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Tensor:
    _refuse_old_reductions(size_average, reduce)
    x = input.primal
    classes = 0 if x.ndim == 1 else 1
    wanted, total = _wanted(x, _labels(target), classes, weight, ignore_index, 0.0)
    jvps = (full(input, classes) * -wanted).sum(classes + 1)
    return _reduced(jvps, wanted.select(classes, 0).shape, reduction, total)


def _labels(target: Any) -> Tensor:
    """Probabilities, or numbers of classes of a type that can be an index."""
    labels: Tensor = primal(target)
    return labels if labels.is_floating_point() else labels.long()


def _along(weight: Tensor, axis: int, ndim: int) -> Tensor:
    """A vector, aligned with an axis of a tensor."""
    return weight.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _reduced(jvps: Tensor, shape: torch.Size, reduction: str, total: Tensor | float) -> Tensor:
    if reduction == "none":
        return jvps
    jvps = jvps.expand(jvps.shape[0], *shape)
    summed = jvps.sum(list(range(1, jvps.ndim))) if jvps.ndim > 1 else jvps
    return summed if reduction == "sum" else summed / total


def _wanted(
    logits: Tensor,
    target: Tensor,
    classes: int,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor | float]:
    """The weights of the log-probabilities in the loss, and what its mean divides by."""
    count = logits.shape[classes]
    if weight is None and label_smoothing == 0 and not target.is_floating_point():
        kept = target != ignore_index
        index = torch.where(kept, target, 0).unsqueeze(classes)  # what is ignored may be no class
        present = kept.unsqueeze(classes).to(logits.dtype)
        return torch.zeros_like(logits).scatter_(classes, index, present), kept.sum()
    scale = torch.ones_like(logits[:1]) if weight is None else _along(weight, classes, logits.ndim)
    if target.is_floating_point():  # class probabilities
        smoothed = target * (1 - label_smoothing) + label_smoothing / count
        return smoothed * scale, float(logits.numel() // count)
    kept = target != ignore_index
    index = torch.where(kept, target, torch.zeros_like(target)).unsqueeze(classes)
    one_hot = torch.zeros_like(logits).scatter_(classes, index, 1.0)
    of_target = (one_hot * scale).sum(classes) * kept
    wanted = one_hot * scale * (1 - label_smoothing) + scale * label_smoothing / count
    return wanted * kept.unsqueeze(classes), of_target.sum()


@register_rule(F.mse_loss)
def _mse_loss(
    out: Tensor,
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    _refuse_old_reductions(size_average, reduce)
    if type(weight) is DualTensor:
        count = max(len(d.tangents) for d in find_duals((input, target, weight)))
        options = {"reduction": reduction, "weight": weight}
        return jvp_by_vmap(F.mse_loss, (input, target), options, count)[0]
    difference = 2 * (primal(input) - primal(target))
    if weight is not None:
        difference = difference * weight
    ndim = difference.ndim
    jvps = add(scaled(input, difference, ndim), scaled(target, -difference, ndim))
    total = difference.numel() if weight is None else weight.expand_as(difference).sum()
    return _reduced(jvps, difference.shape, reduction, total)


def _refuse_old_reductions(size_average: Any, reduce: Any) -> None:
    if size_average is not None or reduce is not None:
        raise NotImplementedError(
            "`reduction` should be used where tangents are carried. Found the deprecated "
            "`size_average` or `reduce`. Try `reduction='mean'`, 'sum' or 'none'."
        )


register_full_precision(F.cross_entropy, F.nll_loss, F.mse_loss)
