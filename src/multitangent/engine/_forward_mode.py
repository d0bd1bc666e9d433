"""Directional derivatives in forward mode: tangents are pushed through the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from multitangent.dual import (
    Deferred,
    Drawn,
    DualTensor,
    add_to,
    computed,
    ordinary_afterwards,
    pad_rows,
    primal,
)
from multitangent.dual import tangents as tangents_of
from multitangent.engine._engine import Derivatives
from multitangent.engine._split import SplitError, agree, losses_of_two_parts
from multitangent.objective import Evaluation, constant_loss, output_tensor
from multitangent.perturbation import Inject, Run
from multitangent.tangents import FactoredBlock, Needs, Tangents

_BEFORE_DRAWING = Needs.OUTPUT | Needs.LAST_GRADIENT  # what a run without tangents finds out


@dataclass(frozen=True)
class ForwardMode:
    """Pushes all K tangents through the model, a micro-batch at a time.

    A batch that fits one micro-batch is recorded and pushed in one run. Otherwise, and where
    tangents depend on the model's output or on a gradient, it is run once for its primals first;
    the parts have to give the same losses.

    Args:
        micro_batch: How many samples are pushed at a time.
        is_plain: Whether parts of the batch certainly need nothing of the whole, so that weight
            perturbation can leave out the run of the whole batch.
        compares: Whether the first two parts are then run as one, and have to give the same losses.

    Raises:
        SplitError: If the parts give other losses than the whole batch, or fail where it does not.

    Examples:
        >>> ForwardMode(8)
        ForwardMode(micro_batch=8, is_plain=False, compares=False)
    """

    micro_batch: int
    is_plain: bool = False
    compares: bool = False
    statistics: ClassVar[Literal["frozen"]] = "frozen"

    @torch.no_grad()
    def __call__(self, run: Run, tangents: Tangents) -> Derivatives:
        inject = partial(_add_tangents, tangents)
        if run.batch.size <= self.micro_batch and not tangents.needs & _BEFORE_DRAWING:
            primal_losses, pushed = None, [_pushed(partial(run.record, inject), tangents)]
        else:
            primal_losses = run.prepare(certainly=not self.is_plain)
            pushed = self._parts(run, tangents, inject, primal_losses)
        losses, jvps, outputs = zip(*pushed, strict=True)
        derivatives = _joined(jvps, 1)
        if not run.per_sample:
            derivatives = derivatives.sum(1) * run.scale
        return Derivatives(
            _joined(losses, 0) if primal_losses is None else primal_losses,
            derivatives,
            _joined(outputs, 1) if outputs[0] is not None else None,
        )

    def _parts(
        self, run: Run, tangents: Tangents, inject: Inject, whole: Tensor | None
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """The parts, each run with what modules kept before the whole batch, or after it."""
        if whole is None and self.compares:
            whole = losses_of_two_parts(run, self.micro_batch)
        for run.starts_after in (False, True):
            try:
                pushed = [
                    _pushed(partial(run.evaluate, part, inject, reuse=True), tangents)
                    for part in run.batch.split(self.micro_batch)
                ]
            except (torch.OutOfMemoryError, NotImplementedError):
                raise
            except Exception as error:
                if self.micro_batch >= run.batch.size:
                    raise
                raise SplitError(f"{type(error).__name__}: {error}") from error
            losses = torch.cat([losses for losses, *_ in pushed])
            if whole is None or agree(losses[: len(whole)], whole):
                return pushed
        raise SplitError("their losses differ from those of the whole batch")


def _add_tangents(tangents: Tangents, value: Tensor, name: str, samples: slice) -> Tensor:
    """The value with its block's tangents added to those that reached it."""
    block = tangents.block(name)
    if block is None:  # none at the output, if that is exact
        return value
    if isinstance(block, FactoredBlock):
        return DualTensor.deferred(value, block.deferred())
    if block.request.batch is None and not block.is_stored:
        draw = Drawn(lambda: _aligned(block.rows(), value.ndim), block.dtype)
        return DualTensor.deferred(value, draw)

    def total() -> Tensor | Deferred:
        rows = _aligned(block.rows(samples), value.ndim)
        return add_to(value, rows) if isinstance(value, DualTensor) else rows

    if block.may_be_unused:
        return DualTensor.deferred(primal(value), Drawn(lambda: computed(total()), block.dtype))
    return DualTensor.deferred(primal(value), total())


def _aligned(rows: Tensor, ndim: int) -> Tensor:
    """Rows ``[K, 1 or b, *shape]`` as tangents of a value of so many axes.

    A value that is not one of each sample has no axis for them, and axes before it count as 1.
    """
    if rows.ndim > ndim + 1:
        return rows[:, 0]
    return rows.reshape(len(rows), *[1] * (ndim + 1 - rows.ndim), *rows.shape[1:])


def _pushed(
    evaluate: Callable[[], Evaluation], tangents: Tangents
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses ``[b]``, their derivatives ``[K, b]``, and those of the output if they are needed.

    What the model keeps, such as a buffer that it wrote into, keeps no tangents.
    """
    with ordinary_afterwards():
        return _split(evaluate(), tangents)


def _split(evaluation: Evaluation, tangents: Tangents) -> tuple[Tensor, Tensor, Tensor | None]:
    if not tangents.blocks:  # nothing is perturbed before an exact output
        losses = primal(evaluation.losses).detach()
        return losses, losses.new_zeros(tangents.num_tangents, *losses.shape), None
    losses, jvps = split_dual(evaluation.losses, tangents.num_tangents)
    if not tangents.needs & Needs.OUTPUT_TANGENTS:
        return losses, jvps, None
    value, rows = output_tensor(evaluation.output), tangents_of(evaluation.output)
    if rows is None:
        return losses, jvps, value.new_zeros(tangents.num_tangents, *value.shape)
    return losses, jvps, pad_rows(rows, tangents.num_tangents).expand(-1, *value.shape)


def split_dual(losses: Tensor, num_tangents: int) -> tuple[Tensor, Tensor]:
    """Losses ``[*losses]`` and their directional derivatives ``[K, *losses]``.

    Raises:
        RuntimeError: If the losses carry no tangents.
    """
    if not isinstance(losses, DualTensor):
        raise constant_loss()
    rows = pad_rows(losses.tangents, num_tangents)
    return losses.primal.detach(), rows.expand(-1, *losses.primal.shape)


def _joined(parts: tuple[Tensor, ...], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
