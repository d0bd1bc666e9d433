"""Directional derivatives from the true gradient: the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from multitangent.engine._engine import Derivatives
from multitangent.objective import Evaluation, constant_loss, output_tensor
from multitangent.perturbation import Run, discount_of
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
        losses, jvps = self._jvps(run, tangents)
        if jvps is None:
            return Derivatives(losses, losses.new_zeros(tangents.num_tangents, *losses.shape), None)
        needed = tangents.needs & Needs.OUTPUT_TANGENTS
        return Derivatives(losses, jvps, self._output_tangents(run, tangents) if needed else None)

    def _jvps(self, run: Run, tangents: Tangents) -> tuple[Tensor, Tensor | None]:
        """The losses and their directional derivatives, ``None`` if nothing is perturbed."""
        if discount_of(run) is None:
            losses, gradients = self.gradients(run, tangents)
            jvps = applied(tangents, gradients, per_sample=run.per_sample) if gradients else None
            return losses, jvps
        prepared = run.prepare(certainly=True)
        assert prepared is not None
        if not tangents.blocks:
            return prepared.detach(), None
        each = torch.eye(prepared.shape[1], dtype=torch.float64)
        of_tokens = self.gradients_of_sums(run, tangents, each)
        return prepared.detach(), torch.stack(
            [applied(tangents, gradients, per_sample=True) for gradients in of_tokens], -1
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
        losses = run.prepare(certainly=True) if prepare else None
        if not tangents.blocks and losses is not None:  # nothing is before an exact output
            return losses.detach(), {}
        evaluation, gradients = self._differentiated(run, tangents, None)
        return evaluation.losses.detach(), gradients

    def gradients_of_sums(
        self, run: Run, tangents: Tangents, weights: Tensor
    ) -> Iterator[dict[str, Tensor]]:
        """The gradients of the perturbed values, for some weighted sums of the tokens' losses.

        Args:
            run: The prepared batch, with the losses of tokens.
            tangents: Tangents whose blocks name the perturbed values.
            weights: The weights ``[R, T]`` of the tokens' losses in each of R sums.
        """
        evaluation, offsets = self._watched(run, tangents)
        for row in weights.to(evaluation.losses):
            with torch.enable_grad():
                total = (evaluation.losses @ row).sum()
            yield _gradients_by(offsets, total, keep=True)

    def _output_tangents(self, run: Run, tangents: Tangents) -> Tensor:
        """The derivatives of the output ``[B, *shape]``, one element after the other."""
        jvps: list[Tensor] = []
        shape, count = torch.Size(), 1
        while len(jvps) < count:
            evaluation, gradients = self._differentiated(run, tangents, len(jvps))
            shape = output_tensor(evaluation.output).shape
            count = shape[1:].numel() if run.per_sample else shape.numel()
            jvps.append(applied(tangents, gradients, per_sample=run.per_sample))
        return torch.stack(jvps, -1).reshape(-1, *shape)

    @torch.enable_grad()
    def _watched(self, run: Run, tangents: Tangents) -> tuple[Evaluation, dict[str, Tensor]]:
        """The run, and the leaves whose gradients are those of the perturbed values."""
        offsets: dict[str, Tensor] = {}

        def watch(value: Tensor, name: str, samples: slice) -> Tensor:
            if name not in tangents.blocks:
                return value
            if not run.per_sample:  # a parameter, which is a leaf
                offsets[name] = value.detach().requires_grad_()
                return offsets[name]
            offsets[name] = torch.zeros_like(value, requires_grad=True)
            return value + offsets[name]

        return run.evaluate(run.batch, watch, self.statistics), offsets

    @torch.enable_grad()
    def _differentiated(
        self, run: Run, tangents: Tangents, element: int | None
    ) -> tuple[Evaluation, dict[str, Tensor]]:
        """The run, and the gradients with respect to the perturbed values.

        Args:
            run: The batch.
            tangents: Tangents whose blocks name the perturbed values.
            element: An element of the model's output, to differentiate in place of the loss. Where
                each value belongs to one sample, it is that element of every sample's output.
        """
        evaluation, offsets = self._watched(run, tangents)
        if element is None:
            total = evaluation.losses.sum() * (1.0 if run.per_sample else run.scale)
        else:
            total = evaluation.output.flatten(int(run.per_sample))[..., element].sum()
        return evaluation, _gradients_by(offsets, total)


def _gradients_by(
    offsets: Mapping[str, Tensor], total: Tensor, *, keep: bool = False
) -> dict[str, Tensor]:
    """The gradients of a scalar by name; the call releases its graph unless told to keep it."""
    if not total.requires_grad:
        raise constant_loss()
    derivatives = torch.autograd.grad(
        total, list(offsets.values()), allow_unused=True, retain_graph=keep
    )
    return {
        name: torch.zeros_like(offset) if gradient is None else gradient
        for (name, offset), gradient in zip(offsets.items(), derivatives, strict=True)
    }


def applied(tangents: Tangents, gradients: Mapping[str, Tensor], *, per_sample: bool) -> Tensor:
    """The directional derivatives of gradients: ``[K, B]``, or ``[K]`` of the batch's loss."""
    if per_sample:
        return tangents.apply(gradients)
    return tangents.apply({name: g.unsqueeze(0) for name, g in gradients.items()})[:, 0]
