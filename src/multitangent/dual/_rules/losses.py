"""Cross-entropy and mean squared error."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual._algebra import add, full, primal, scaled
from multitangent.dual._registry import register_full_precision, register_rule


@register_rule(F.cross_entropy)
def _cross_entropy(
    out: Tensor,
    x: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    _refuse_old_reductions(size_average, reduce)
    logits = x.primal
    classes = 0 if logits.ndim == 1 else 1
    wanted, total = _wanted(logits, target, classes, weight, ignore_index, label_smoothing)
    # The loss is -sum(wanted * log_softmax): its gradient is softmax * sum(wanted) - wanted.
    gradient = logits.softmax(classes) * wanted.sum(classes, keepdim=True) - wanted
    jvps = (full(x, classes) * gradient).sum(classes + 1)
    if reduction == "none":
        return jvps
    jvps = jvps.expand(jvps.shape[0], *gradient.select(classes, 0).shape)
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
    shape = [1] * logits.ndim
    shape[classes] = count
    if weight is None and label_smoothing == 0 and not target.is_floating_point():
        kept = target != ignore_index
        index = torch.where(kept, target, 0).unsqueeze(classes)  # what is ignored may be no class
        present = kept.unsqueeze(classes).to(logits.dtype)
        return torch.zeros_like(logits).scatter_(classes, index, present), kept.sum()
    scale = torch.ones_like(logits[:1]) if weight is None else weight.reshape(shape)
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
    x: Any,
    y: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    _refuse_old_reductions(size_average, reduce)
    difference = 2 * (primal(x) - primal(y))
    if weight is not None:
        difference = difference * weight
    jvps = add(scaled(x, difference, difference.ndim), scaled(y, -difference, difference.ndim))
    if reduction == "none":
        return jvps
    summed = jvps.expand(jvps.shape[0], *difference.shape)
    if difference.ndim:
        summed = summed.flatten(1).sum(1)
    if reduction == "sum":
        return summed
    return summed / (difference.numel() if weight is None else weight.expand_as(difference).sum())


def _refuse_old_reductions(size_average: Any, reduce: Any) -> None:
    if size_average is not None or reduce is not None:
        raise NotImplementedError(
            "`reduction` should be used where tangents are carried. Found the deprecated "
            "`size_average` or `reduce`. Try `reduction='mean'`, 'sum' or 'none'."
        )


register_full_precision(F.cross_entropy, F.mse_loss)
