"""Weight perturbation: the tangents are directions in the space of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multitangent._structures import map_tensors, tensors_of
from multitangent.dual import DualTensor, as_parameter, ordinary_afterwards, primal
from multitangent.objective import (
    Batch,
    BatchMode,
    BatchRecord,
    Change,
    Evaluation,
    GraphQuery,
    Objective,
    SavedState,
    Statistics,
    replaced_in_use,
)
from multitangent.perturbation._perturbation import (
    BoundPerturbation,
    Inject,
    again,
    check_unwritten,
    no_injection,
    reading,
    zero_injection,
)
from multitangent.perturbation._pullback import leaves
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
        self.starts_after = False
        self._record: BatchRecord | None = None
        self._change: Change | None = None  # by the run of the whole batch
        self._of_losses: dict[int, dict[nn.Parameter, Tensor]] = {}  # by a part's first sample
        self._keeps_output = bool(tangents.needs & Needs.OUTPUT_TANGENTS)
        for name, parameter in parameters.items():
            tangents.add(name, parameter.detach())

    def record(self, inject: Inject) -> Evaluation:
        if inject is no_injection:
            return self._plainly(self._objective.saved_state())
        return self._evaluated(self.batch, inject, "update")

    @torch.no_grad()
    def prepare(self, *, certainly: bool = False) -> Tensor | None:
        """What random functions and the statistics of the whole batch are."""
        if not certainly:
            return None
        before = self._objective.saved_state()
        with reading(self.batch):
            losses = primal(self._plainly(before).losses)
        self._change = Change(before)
        return losses

    def _plainly(self, before: SavedState) -> Evaluation:
        """Run the whole batch with no value replaced, whatever the model asks its tensors."""
        versions = self.batch.versions
        try:
            return self._recorded(no_injection)
        except GraphQuery:
            check_unwritten(self.batch, versions)
            before.restore()
            with ordinary_afterwards():
                return self._recorded(zero_injection)

    def _recorded(self, inject: Inject) -> Evaluation:
        self._record = BatchRecord(reuse=False)
        return self._evaluated(self.batch, inject, "update")

    def evaluate(
        self, part: Batch, inject: Inject, statistics: Statistics = "frozen", *, reuse: bool = False
    ) -> Evaluation:
        if statistics == "frozen" and self._record is None:  # there are none to freeze
            statistics = "update"
        with again(self._change, self.starts_after):
            return self._evaluated(part, inject, statistics)

    def evaluate_lazily(
        self, part: Batch, inject: Inject, statistics: Statistics = "frozen"
    ) -> Evaluation:
        if statistics == "frozen" and self._record is None:  # there are none to freeze
            statistics = "update"
        objective = self._objective

        def stand_in(name: str) -> Tensor:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                value = inject(self._parameters[name].detach(), name, slice(None))
                return as_parameter(value)

        in_use = replaced_in_use(objective.model, stand_in, self._parameters)
        with (
            torch.no_grad(),
            again(self._change, self.starts_after),
            objective.mode(part, self._stream, statistics, record=self._record) as mode,
            in_use as mode.stand_ins,
        ):
            output = objective.output(part)
            return objective.evaluation(output, part, keep=self._keeps_output)

    def _evaluated(self, part: Batch, inject: Inject, statistics: Statistics) -> Evaluation:
        objective = self._objective
        with objective.mode(part, self._stream, statistics, record=self._record) as mode:
            values = {
                name: as_parameter(inject(parameter.detach(), name, slice(None)))
                for name, parameter in self._parameters.items()
            }
            mode.is_plain = inject is no_injection
            records_graph, mode.records_graph = mode.records_graph, True
            mode.stand_ins = {id(p): values[name] for name, p in self._parameters.items()}
            output = objective.output(part, values)
            is_apart = not (records_graph or _has_graph(output))
            copy = None if is_apart else map_tensors(_copied, output)  # the loss may write into it
            losses, output = objective.evaluation(output, part, keep=self._keeps_output)
            with torch._C.DisableTorchFunction():
                has_parameters = primal(losses).requires_grad
            if has_parameters and is_apart:
                self._differentiate(primal(losses), part)
            elif has_parameters:
                self._differentiate_loss(copy, part, mode)
        if records_graph:
            return Evaluation(losses, output)
        losses = losses.detached() if isinstance(losses, DualTensor) else losses.detach()
        return Evaluation(losses, output)

    def _differentiate_loss(self, output: Any, part: Batch, mode: BatchMode) -> None:
        """The gradients of what the loss itself is made of, such as its own parameters."""
        mode.stand_ins = {id(p): p.detach() for p in self._parameters.values()}
        with torch.enable_grad():
            self._differentiate(self._objective.losses(output, part), part)

    def _differentiate(self, losses: Tensor, part: Batch) -> None:
        """The gradients of all that the graph of some losses begins with."""
        with torch.enable_grad():
            found = list(leaves(losses))
            gradients = torch.autograd.grad(losses.sum() * self.scale, found) if found else ()
        if part.rows.start == self.batch.rows.start:  # the first part of another run of the batch
            self._of_losses.clear()
        self._of_losses[part.rows.start] = dict(zip(found, gradients, strict=True))

    def pullback(self, gradients: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
        if self._of_losses and self.batch.size < self.batch.batch_size:
            raise NotImplementedError(
                "`loss` should have no parameters of its own, and use none of the model's, where "
                "every process has samples of its own: their gradients would be those of one "
                "process. Found some. Try the axis 'tangent' of `mesh`, or "
                "`perturb='activations'`."
            )
        total = {parameter: gradients[name] for name, parameter in self._parameters.items()}
        for of_part in self._of_losses.values():
            for parameter, gradient in of_part.items():
                total[parameter] = total[parameter] + gradient if parameter in total else gradient
        return total


def _has_graph(output: Any) -> bool:
    """Whether autograd knows where an output comes from."""
    with torch._C.DisableTorchFunction():
        return any(primal(value).requires_grad for value in tensors_of(output))


def _copied(value: Tensor) -> Tensor:
    copy: Tensor = primal(value).detach().clone()
    return copy


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
