"""Directional derivatives from the true gradient: the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from multitangent.engine._engine import Derivatives
from multitangent.perturbation import Run
from multitangent.tangents import Needs, Tangents


@dataclass(frozen=True)
class Backpropagation:
    """Differentiates by every perturbed value, and multiplies by the tangents.

    Args:
        statistics: Whether the statistics of batch normalisation are constants, ``"frozen"``, as a
            forward sweep has to take them, or are differentiated too, ``"coupled"``.

    Examples:
        >>> Backpropagation()
        Backpropagation(statistics='frozen')
    """

    statistics: Literal["frozen", "coupled"] = "frozen"

    def __call__(self, run: Run, tangents: Tangents) -> Derivatives:
        losses, gradients = self.gradients(run, tangents)
        return Derivatives(
            losses,
            applied(tangents, gradients, per_sample=run.per_sample),
            self._output_tangents(run, tangents),
        )

    def gradients(
        self, run: Run, tangents: Tangents, *, prepare: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses ``[B]``, and the true gradients of the perturbed values, by name.

        Args:
            run: The batch.
            tangents: Whose blocks name the perturbed values.
            prepare: Whether the run has to be prepared, for statistics and `pullback`.
        """
        if prepare:
            run.prepare(certainly=True)
        losses, gradients = self._differentiated(run, tangents, None)
        return losses, gradients

    def _output_tangents(self, run: Run, tangents: Tangents) -> Tensor | None:
        if not tangents.needs & Needs.OUTPUT_TANGENTS:
            return None
        shape = next(iter(tangents.blocks.values())).request.output.shape  # type: ignore[union-attr]
        jvps = [
            applied(
                tangents,
                self._differentiated(run, tangents, element)[1],
                per_sample=run.per_sample,
            )
            for element in range(shape[1:].numel())
        ]
        return torch.stack(jvps, 2).reshape(*jvps[0].shape, *shape[1:])

    @torch.enable_grad()
    def _differentiated(
        self, run: Run, tangents: Tangents, element: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses, and the gradients by the perturbed values.

        Args:
            run: The batch.
            tangents: Whose blocks name the perturbed values.
            element: Of the model's output, whose gradient is wanted in place of the loss's.
        """
        offsets: dict[str, Tensor] = {}

        def watch(value: Tensor, name: str, samples: slice) -> Tensor:
            """The value, or it and a zero whose gradient is that of the value."""
            if name not in tangents.blocks:
                return value
            if not run.per_sample:  # a parameter, which is a leaf
                offsets[name] = value.detach().requires_grad_()
                return offsets[name]
            offsets[name] = torch.zeros_like(value, requires_grad=True)
            return value + offsets[name]

        evaluation = run.evaluate(run.batch, watch, self.statistics)
        wanted = evaluation.losses
        if element is not None:
            wanted = evaluation.output.flatten(1)[:, element]
        total = wanted.sum() * (1.0 if run.per_sample else run.scale)
        derivatives = torch.autograd.grad(total, list(offsets.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(offset) if gradient is None else gradient
            for (name, offset), gradient in zip(offsets.items(), derivatives, strict=True)
        }
        return evaluation.losses.detach(), gradients


def applied(tangents: Tangents, gradients: Mapping[str, Tensor], *, per_sample: bool) -> Tensor:
    """The directional derivatives of gradients: ``[K, B]``, or ``[K]`` of the batch's loss."""
    if per_sample:
        return tangents.apply(gradients)
    return tangents.apply({name: g.unsqueeze(0) for name, g in gradients.items()})[:, 0]
