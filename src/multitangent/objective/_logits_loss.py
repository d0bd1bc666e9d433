"""The loss of models whose output holds logits, such as those of `transformers`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class LogitsLoss(nn.CrossEntropyLoss):
    """Cross-entropy of the logits in a model's output, with a loss for each sample.

    A model that computes ``output.loss`` by itself gives one number for the batch, which is enough
    where weights are perturbed. Activations need the losses of the samples: those of this module
    have the same mean. Labels of -100 do not count, as there.

    Args:
        shift: Whether the logits of a token belong to the label of the next one, as in causal
            language models. The labels are the tokens themselves then.
        ignore_index: The label that does not count.
        reduction: ``"mean"`` over the labels that count, or ``"sum"``.

    Shape:
        Logits ``[B, *places, classes]``, as a tensor or as the attribute ``logits`` of the output;
        labels ``[B, *places]``.

    Examples:
        >>> import torch
        >>> logits, tokens = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
        >>> loss = LogitsLoss(shift=True)(logits, tokens)
        >>> right = nn.CrossEntropyLoss()(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        >>> torch.allclose(loss, right)
        True
    """

    def __init__(
        self, *, shift: bool = False, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        self.shift = shift

    def forward(self, output: Any, target: Tensor) -> Tensor:
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ValueError(
                "`LogitsLoss` should get logits, as a tensor or as the attribute `logits` of the "
                f"output. Found {type(output).__name__} without. Try a function "
                "`(output, target) -> [B]`."
            )
        if logits.ndim < 3 or target.shape != logits.shape[:-1] or target.is_floating_point():
            if self.shift:
                raise ValueError(
                    "`LogitsLoss(shift=True)` should get logits [B, T, classes] and the tokens "
                    f"[B, T]. Found {list(logits.shape)} and {list(target.shape)} of "
                    f"{target.dtype}. Try to leave out `shift`."
                )
            return super().forward(logits.movedim(-1, 1), target)
        labels = target
        if self.shift:  # the last logits have no label, which saves a copy of the others
            of_axes = (0, 0) * (target.ndim - 2) + (0, 1)  # from the last axis to the second one
            labels = F.pad(target[:, 1:].long(), of_axes, value=self.ignore_index)
        losses = super().forward(logits.flatten(0, -2), labels.flatten())
        if self.reduction != "none":
            return losses
        losses = losses.reshape(labels.shape)
        return losses[:, :-1] if self.shift else losses

    def counted(self, target: Tensor) -> Tensor:
        """The labels that logits are compared with."""
        return target[:, 1:] if self.shift else target
