"""Weight perturbation: the tangents are directions in the space of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from multitangent._batch import Part, arguments, call_model
from multitangent.dual import DualTensor, Recorded, Statistics, with_rows
from multitangent.perturbation._setting import (
    BoundPerturbation,
    Setting,
    accumulate,
    normalizes_batches,
)
from multitangent.perturbation._sites import Site
from multitangent.tangents import Block, Tangents


@dataclass(frozen=True)
class Weights:
    """Perturb the parameters themselves; n is their number.

    The directional derivatives are those of the loss of the batch, ``[K]``.

    Args:
        parameters: The names of the parameters, by default all trainable ones.

    Raises:
        ValueError: When bound to a model, if a name is unknown or a trainable parameter left out.
        TypeError: When bound to a model, if a parameter is not a real floating-point tensor.

    Examples:
        >>> Weights()
        Weights(parameters=None)
    """

    parameters: Sequence[str] | None = None

    def bind(self, model: nn.Module) -> BoundPerturbation:
        return _Bound(_find_parameters(model, self.parameters))


@dataclass(frozen=True)
class _Bound:
    parameters: dict[str, nn.Parameter]
    sites: Sequence[Site] = ()

    def parameters_by_site(self) -> dict[str, list[nn.Parameter]]:
        return {name: [parameter] for name, parameter in self.parameters.items()}

    def __call__(self, setting: Setting, batch: Part) -> _WeightSweep:
        return _WeightSweep(setting, batch, self.parameters)


def _find_parameters(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    known = dict(model.named_parameters())
    for name in names or ():
        if name not in known:
            raise ValueError(
                f"`parameters` should name parameters of the model. Found {name!r}, which is none "
                f"of {sorted(known)}."
            )
    trainable = {name: p for name, p in known.items() if p.requires_grad}
    chosen = trainable if names is None else {name: known[name] for name in names}
    for name, parameter in chosen.items():
        if not parameter.is_floating_point():
            raise TypeError(
                "`parameters` should be real floating-point tensors: only those have directional "
                f"derivatives here. Found {name} of {parameter.dtype}. Try to leave it out."
            )
    if outside := [name for name in trainable if name not in chosen]:
        raise ValueError(
            "`parameters` should contain every trainable parameter. Found outside of them: "
            f"{', '.join(outside)}. Try to add them, or freeze them with `requires_grad_(False)`."
        )
    if not chosen:
        raise ValueError(
            "`model` should have trainable parameters. Found none: nothing would be trained. Try "
            "`requires_grad_(True)` on the parameters that should be."
        )
    return chosen


def _dual(parameter: nn.Parameter, block: Block) -> DualTensor:
    return DualTensor.drawn(parameter.detach(), lambda: block.rows()[:, 0], block.dtype)


class _WeightSweep:
    """A batch, all its micro-batches with one set of tangents of the parameters."""

    def __init__(self, setting: Setting, batch: Part, parameters: dict[str, nn.Parameter]) -> None:
        self.tangents = Tangents()
        self._setting = setting
        self._batch = batch
        self._parameters = parameters
        self.output_tangents: Tensor | None = None
        self._recorded = Recorded(reuse=False)
        for name, parameter in parameters.items():
            setting.draw(self.tangents, name, parameter.detach(), tuple(parameter.shape), None)

    @torch.no_grad()
    def push(self) -> tuple[Tensor, Tensor]:
        model, setting = self._setting.model, self._setting
        parts = list(self._batch.split(setting.micro_batch))
        statistics: Statistics = "update"
        if len(parts) > 1 and any(normalizes_batches(m) for m in model.modules()):
            self._record_statistics()
            statistics = "hold"
        duals: dict[str, Tensor] = {
            name: _dual(parameter, self.tangents.blocks[name])
            for name, parameter in self._parameters.items()
        }
        values, jvps = [], []
        for part in parts:
            args, kwargs = arguments(part.inputs)
            recorded = self._recorded if statistics == "hold" else None
            with setting.part_of_batch(part, statistics, recorded=recorded):
                output = functional_call(model, duals, args, kwargs)
                losses, along = setting.split(setting.losses(output, part), part)
            values.append(losses)
            jvps.append(along.sum(1) * setting.scale(part))
        return torch.cat(values), torch.stack(jvps).sum(0)

    @torch.no_grad()
    def _record_statistics(self) -> None:
        """Of the whole batch's normalisation, where it is pushed in parts."""
        with self._setting.part_of_batch(self._batch, "update", recorded=self._recorded):
            call_model(self._setting.model, self._batch.inputs)

    def true_gradients(self, statistics: Statistics) -> dict[str, Tensor]:
        _, gradients = self._backpropagated(statistics)
        return {
            name: (torch.zeros_like(self._parameters[name]) if g is None else g).unsqueeze(0)
            for name, g in zip(self._parameters, gradients, strict=True)
        }

    def backpropagate(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        losses, gradients = self._backpropagated(statistics)
        along = [
            with_rows(block.rows(), block.count).to(gradient.dtype).flatten(1) @ gradient.flatten()
            for block, gradient in zip(self.tangents.blocks.values(), gradients, strict=True)
            if gradient is not None
        ]
        return losses, torch.stack(along).sum(0)

    @torch.enable_grad()
    def _backpropagated(self, statistics: Statistics) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The losses, and the gradients of the batch's loss by the perturbed parameters."""
        self._record_statistics()
        copies = {n: p.detach().requires_grad_() for n, p in self._parameters.items()}
        args, kwargs = arguments(self._batch.inputs)
        with self._setting.part_of_batch(self._batch, statistics, recorded=self._recorded):
            output = functional_call(self._setting.model, copies, args, kwargs)
            losses = self._setting.losses(output, self._batch)
        total = losses.sum() * self._setting.scale(self._batch)
        gradients = torch.autograd.grad(total, list(copies.values()), allow_unused=True)
        return losses.detach(), gradients

    def pull(self, coefficients: Tensor) -> dict[str, Tensor]:
        gradients = self.tangents.combine(coefficients.unsqueeze(1))
        for name, parameter in self._parameters.items():
            accumulate(parameter, gradients[name].reshape(parameter.shape))
        return gradients
