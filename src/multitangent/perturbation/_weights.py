"""Weight perturbation: the tangents are directions in the space of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multitangent.objective import (
    Batch,
    BatchRecord,
    Evaluation,
    Objective,
    Statistics,
    normalizes_batches,
)
from multitangent.perturbation._perturbation import BoundPerturbation, Inject, no_injection
from multitangent.tangents import Needs, Stream, Tangents


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

    def bind(self, objective: Objective) -> BoundPerturbation:
        return _BoundWeights(objective, _find_parameters(objective.model, self.parameters))


@dataclass(frozen=True)
class _BoundWeights:
    objective: Objective
    parameters: dict[str, nn.Parameter]

    def parameters_by_site(self) -> dict[str, list[nn.Parameter]]:
        return {name: [parameter] for name, parameter in self.parameters.items()}

    def __call__(self, batch: Batch, stream: Stream, tangents: Tangents) -> _WeightRun:
        return _WeightRun(self.objective, batch, stream, tangents, self.parameters)


class _WeightRun:
    """A batch, run through the model with something in place of its parameters."""

    per_sample = False

    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        stream: Stream,
        tangents: Tangents,
        parameters: dict[str, nn.Parameter],
    ) -> None:
        self.batch = batch
        self.scale = objective.scale(batch)
        self._objective = objective
        self._stream = stream
        self._parameters = parameters
        self._record: BatchRecord | None = None
        self._keeps_output = bool(tangents.needs & Needs.OUTPUT_TANGENTS)
        for name, parameter in parameters.items():
            tangents.add(name, parameter.detach())

    def record(self, inject: Inject) -> Evaluation:
        return self._evaluated(self.batch, inject, "update")

    @torch.no_grad()
    def prepare(self, *, certainly: bool = False) -> Tensor | None:
        """The statistics of the whole batch, where there are any."""
        modules = self._objective.model.modules()
        if not certainly and not any(normalizes_batches(module) for module in modules):
            return None
        self._record = BatchRecord(reuse=False)
        return self._evaluated(self.batch, no_injection, "update").losses

    def evaluate(
        self, part: Batch, inject: Inject, statistics: Statistics = "frozen", *, reuse: bool = False
    ) -> Evaluation:
        if statistics == "frozen" and self._record is None:  # there are none to freeze
            statistics = "update"
        return self._evaluated(part, inject, statistics)

    def _evaluated(self, part: Batch, inject: Inject, statistics: Statistics) -> Evaluation:
        values = {
            name: inject(parameter.detach(), name, slice(None))
            for name, parameter in self._parameters.items()
        }
        with self._objective.mode(part, self._stream, statistics, record=self._record):
            output = self._objective.output(part, values)
            return self._objective.evaluation(output, part, keep=self._keeps_output)

    def pullback(self, gradients: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
        return {parameter: gradients[name] for name, parameter in self._parameters.items()}


def _find_parameters(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters())
    for name in names or ():
        if name not in parameters:
            raise ValueError(
                f"`parameters` should name parameters of the model. Found {name!r}, which is none "
                f"of {sorted(parameters)}."
            )
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    chosen = trainable if names is None else {name: parameters[name] for name in names}
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
