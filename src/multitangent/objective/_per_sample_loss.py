"""Losses per sample, and the reduction to the loss of the batch that the user means."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitangent.dual import primal
from multitangent.objective._logits_loss import LogitsLoss


class PerSampleLoss:
    """A loss as ``[B]`` numbers, whose mean or sum is the loss of the batch.

    Args:
        loss: A callable ``(output, target) -> [B]``, of which the mean is meant, or a loss module
            of PyTorch, whose ``reduction`` is read.
        takes_scalar: Whether one number for the whole batch is accepted too, a tensor ``[]`` then.
        has_tokens: Whether a sample's loss consists of the losses of its tokens. A callable then
            returns ``[B, T]``, and the loss of a sample is the mean over T.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        *,
        takes_scalar: bool = False,
        has_tokens: bool = False,
    ) -> None:
        self._function = loss
        self._takes_scalar = takes_scalar
        self.has_tokens = has_tokens
        self.is_of_batch = False  # whether the last value was one number for the whole batch
        self._takes_tensors = type(loss).__module__.startswith("torch.nn.")
        self._module = isinstance(loss, nn.Module) and hasattr(loss, "reduction")

    @property
    def is_pure(self) -> bool:
        """Whether it is certain that the loss keeps nothing and draws no random numbers."""
        loss = self._function
        is_own = type(loss).__module__ == nn.CrossEntropyLoss.__module__
        if not is_own or not isinstance(loss, nn.Module):
            return False
        everywhere = nn.modules.module
        hooks = (
            loss._forward_hooks,
            loss._forward_pre_hooks,
            everywhere._global_forward_hooks,
            everywhere._global_forward_pre_hooks,
        )
        takes_function = isinstance(loss, nn.TripletMarginWithDistanceLoss)
        is_changed = "forward" in vars(loss) or loss._compiled_call_impl is not None
        has_parts = next(loss.children(), None) is not None
        return not (takes_function or is_changed or has_parts or any(hooks))

    @property
    def _stated(self) -> str:
        """The reduction of a loss module, which may change between steps."""
        return str(self._function.reduction) if self._module else "none"  # type: ignore[attr-defined]

    @property
    def reduction(self) -> Literal["mean", "sum"]:
        """Whether the loss of the batch is the mean or the sum."""
        return "sum" if self._stated == "sum" else "mean"

    def scale(self, batch_size: int) -> float:
        """What the sum over the samples is multiplied by to give the loss of the batch."""
        return 1.0 if self.reduction == "sum" else 1.0 / batch_size

    def weight(self, target: Any, size: int) -> float:
        """What a weighted mean over some samples divides by, which is their number elsewhere."""
        if self._stated != "mean" or not isinstance(
            self._function, (nn.CrossEntropyLoss, nn.NLLLoss)
        ):
            return float(size)
        if not isinstance(target, Tensor):
            return float(size)
        if target.is_floating_point():  # class probabilities, of B times some positions
            return float(size) if target.ndim < 2 else target.numel() / target.shape[1]
        if isinstance(self._function, LogitsLoss):
            target = self._function.counted(target)
        kept = target != self._function.ignore_index
        weight = self._function.weight
        if weight is None:
            return float(kept.sum())
        return float(weight[torch.where(kept, target.long(), 0)].mul(kept).sum())

    def __call__(
        self,
        output: Any,
        target: Any,
        correction: float = 1.0,
        has_target_per_sample: bool = False,
    ) -> Tensor:
        """The losses ``[b]`` of b samples."""
        if self.has_tokens:
            return self.of_tokens(output, target, correction, has_target_per_sample).sum(1)
        losses = self._unreduced(output, target)
        self.is_of_batch = self._takes_scalar and _is_scalar(losses)
        if self.is_of_batch:
            return torch.as_tensor(losses)
        if self._module and has_target_per_sample:
            _check_alignment(losses, output, target)
        if not self._module or not isinstance(losses, Tensor) or losses.ndim == 0:
            _check_per_sample(losses)
            return losses
        losses = self._reduced(losses, 1)
        return losses if correction == 1.0 else losses * correction

    def of_tokens(
        self,
        output: Any,
        target: Any,
        correction: float = 1.0,
        has_target_per_sample: bool = False,
    ) -> Tensor:
        """The losses ``[b, T]`` of the tokens, which add up to the losses ``[b]`` of the samples.

        The loss is 0 for a label that does not count, and for a last token without a label.
        """
        losses = self._unreduced(output, target)
        if self._module and has_target_per_sample:
            _check_alignment(losses, output, target)
        _check_per_token(losses, may_have_more=self._module)
        if isinstance(self._function, LogitsLoss) and self._function.shift:
            losses = F.pad(losses, (0, 0) * (losses.ndim - 2) + (0, 1))
        losses = self._reduced(losses, 2)
        weight = correction if self._adds_elements else correction / losses.shape[1]
        return losses if weight == 1.0 else losses * weight

    def _reduced(self, losses: Tensor, ndim: int) -> Tensor:
        """Losses of so many axes, each the sum or the mean over all further axes."""
        if losses.ndim <= ndim:
            return losses
        rest = list(range(ndim, losses.ndim))
        return losses.sum(rest) if self._adds_elements else losses.mean(rest)

    @property
    def _adds_elements(self) -> bool:
        """Whether a sample's loss is the sum over its elements, not their mean."""
        return self._stated in ("sum", "batchmean") or isinstance(
            self._function, (nn.CrossEntropyLoss, nn.NLLLoss)
        )

    def stated(self, output: Any, target: Any) -> Tensor | None:
        """The loss of the batch as a loss module itself reduces it, ``None`` if it does not."""
        if not self._module or self._function.reduction == "none":  # type: ignore[attr-defined]
            return None
        value = self._function(output, target)
        return value.detach() if isinstance(value, Tensor) and value.ndim == 0 else None

    def _unreduced(self, output: Any, target: Any) -> Any:
        if self._takes_tensors and not isinstance(output, Tensor):
            raise _no_tensor(self._function, output)
        if not self._module:
            return self._function(output, target)
        module: Any = self._function
        stated, module.reduction = module.reduction, "none"
        try:
            return module(output, target)
        finally:
            module.reduction = stated


def _check_alignment(losses: Any, output: Any, target: Any) -> None:
    """Refuse an elementwise loss that compares every sample with every other."""
    if not all(isinstance(value, Tensor) for value in (losses, output, target)):
        return
    losses, output, target = primal(losses), primal(output), primal(target)
    with torch._C.DisableTorchFunction():  # nothing here concerns the model's functions
        ndims = losses.ndim, output.ndim, target.ndim
    if ndims[1] != ndims[2] and ndims[0] == max(ndims[1:]):
        raise ValueError(
            "`loss` should compare the output with a target of the same shape: the axis of the "
            "batch is the first one of both, but broadcasting aligns the last ones, so that every "
            f"sample is compared with every other. Found {list(output.shape)} and "
            f"{list(target.shape)}. Try `unsqueeze` or `squeeze` on one of them."
        )


def _no_tensor(loss: Any, output: Any) -> ValueError:
    return ValueError(
        f"{type(loss).__name__} should get a tensor. Found that the model returns "
        f"{type(output).__name__}. Try a callable that takes the tensor from it, such as `lambda "
        "out, y: torch.nn.functional.cross_entropy(out.logits, y, reduction='none')`, or a module "
        "around the model that returns the tensor."
    )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0)


def _check_per_sample(losses: Any) -> None:
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        description = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise ValueError(
            "`loss` should return one number per sample, a tensor of shape [B]: directional "
            f"derivatives are taken sample by sample. Found {description}. Try a loss module such "
            "as torch.nn.CrossEntropyLoss(), multitangent.objective.LogitsLoss() for a model that "
            "returns an object with logits, or reduction='none' and a mean over all axes but the "
            "first."
        )


def _check_per_token(losses: Any, *, may_have_more: bool) -> None:
    """Raise unless losses are ``[b, T]``, or have further axes that a module reduces."""
    fits = isinstance(losses, Tensor) and (losses.ndim == 2 or (may_have_more and losses.ndim > 2))
    if fits and losses.shape[1] > 0:
        return
    description = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
    raise ValueError(
        "`loss` should return one number per token, a tensor of shape [B, T], for "
        f"`Activations(credit='token')`. Found {description}. Try a loss module such as "
        "torch.nn.CrossEntropyLoss() for logits [B, classes, T], "
        "multitangent.objective.LogitsLoss() for logits [B, T, classes], reduction='none', or "
        "credit='sample'."
    )
