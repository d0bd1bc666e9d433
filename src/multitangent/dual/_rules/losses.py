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
    options = weight, ignore_index, label_smoothing
    waiting = linear_tangents(input) if type(input) is DualTensor else None
    through = of_target = None
    if waiting is not None and waiting.axis == classes and type(target) is not DualTensor:
        through = _in_chunks(waiting, logits, labels, *options)
    elif type(input) is DualTensor:
        gradient = _gradient(logits, labels, classes, *options)
        through = (full(input, classes) * gradient).sum(classes + 1)
    if type(target) is DualTensor:
        # The loss is -sum(wanted * log_softmax).
        gradient = (label_smoothing - 1) * logits.log_softmax(classes)
        if weight is not None:
            gradient = gradient * _along(weight, classes, logits.ndim)
        of_target = (full(target, classes) * gradient).sum(classes + 1)
    jvps = add(through, of_target)
    return _reduced(jvps, logits, labels, classes, weight, ignore_index, reduction)


def _in_chunks(waiting: LinearTangents, logits: Tensor, labels: Tensor, *options: Any) -> Tensor:
    """The derivatives ``[K, *positions]`` of the losses, some rows at a time.

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
    tangents = waiting.as_rows()
    jvps = [
        tangents.along(chunk, _gradient(rows[chunk], labels[chunk], 1, *options))
        for chunk in _chunks(rows)
    ]
    joined = torch.cat(jvps, 1)
    return joined.reshape(len(joined), *positions)


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
    labels = _labels(target)
    wanted = _wanted(x, labels, classes, weight, ignore_index, 0.0)
    jvps = (full(input, classes) * -wanted).sum(classes + 1)
    return _reduced(jvps, x, labels, classes, weight, ignore_index, reduction)


def _labels(target: Any) -> Tensor:
    """Probabilities, or numbers of classes of a type that can be an index."""
    labels: Tensor = primal(target)
    return labels if labels.is_floating_point() else labels.long()


def _along(weight: Tensor, axis: int, ndim: int) -> Tensor:
    """A vector, aligned with an axis of a tensor."""
    return weight.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _reduced(
    jvps: Tensor,
    logits: Tensor,
    labels: Tensor,
    classes: int,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The derivatives of the losses ``[K, *positions]``, or of their sum or mean."""
    if reduction != "mean":
        return _summed(jvps, logits.select(classes, 0).shape, reduction)
    total = _divisor(logits, labels, classes, weight, ignore_index)
    return _summed(jvps, logits.select(classes, 0).shape, reduction) / total


def _summed(jvps: Tensor, shape: torch.Size, reduction: str) -> Tensor:
    if reduction == "none":
        return jvps
    jvps = jvps.expand(jvps.shape[0], *shape)
    return jvps.sum(list(range(1, jvps.ndim))) if jvps.ndim > 1 else jvps


def _divisor(
    logits: Tensor, labels: Tensor, classes: int, weight: Tensor | None, ignore_index: int
) -> Tensor | float:
    """What the mean over the losses divides by."""
    if labels.is_floating_point():  # class probabilities
        return float(logits.numel() // logits.shape[classes])
    kept = labels != ignore_index
    if weight is None:
        return kept.sum()
    return (weight[torch.where(kept, labels, 0)] * kept).sum()


def _gradient(
    logits: Tensor,
    labels: Tensor,
    classes: int,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The derivative of the sum of the losses with respect to the logits."""
    if weight is None and label_smoothing == 0 and not labels.is_floating_point():
        kept = (labels != ignore_index).unsqueeze(classes)
        index = labels.unsqueeze(classes) * kept  # an ignored label may not be a class
        present = kept.to(logits.dtype)
        return logits.softmax(classes).mul_(present).scatter_add_(classes, index, -present)
    wanted = _wanted(logits, labels, classes, weight, ignore_index, label_smoothing)
    return logits.softmax(classes).mul_(wanted.sum(classes, keepdim=True)).sub_(wanted)


def _wanted(
    logits: Tensor,
    labels: Tensor,
    classes: int,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The weights of the log-probabilities in the loss."""
    scale = torch.ones_like(logits[:1]) if weight is None else _along(weight, classes, logits.ndim)
    if labels.is_floating_point():  # class probabilities
        return (labels * (1 - label_smoothing) + label_smoothing / logits.shape[classes]) * scale
    kept = labels != ignore_index
    index = torch.where(kept, labels, 0).unsqueeze(classes)
    one_hot = torch.zeros_like(logits).scatter_(classes, index, 1.0)
    wanted = one_hot * scale * (1 - label_smoothing)
    if label_smoothing:
        wanted = wanted + scale * label_smoothing / logits.shape[classes]
    return wanted * kept.unsqueeze(classes)


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
    summed = _summed(jvps, difference.shape, reduction)
    if reduction != "mean":
        return summed
    total = difference.numel() if weight is None else weight.expand_as(difference).sum()
    return summed / total


def _refuse_old_reductions(size_average: Any, reduce: Any) -> None:
    if size_average is not None or reduce is not None:
        raise NotImplementedError(
            "`reduction` should be used where tangents are carried. Found the deprecated "
            "`size_average` or `reduce`. Try `reduction='mean'`, 'sum' or 'none'."
        )


register_full_precision(F.cross_entropy, F.nll_loss, F.mse_loss)
