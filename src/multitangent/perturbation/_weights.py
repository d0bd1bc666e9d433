"""Weight perturbation: the tangents are directions in the space of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from multitangent._batch import Part, arguments
from multitangent.dual import DualTensor
from multitangent.perturbation._setting import Setting, Sweep, accumulate, split_dual
from multitangent.tangents import Tangents


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

    def bind(self, model: nn.Module) -> Callable[[Setting, list[Part]], Iterator[Sweep]]:
        chosen = _find_parameters(model, self.parameters)

        def sweeps(setting: Setting, parts: list[Part]) -> Iterator[Sweep]:
            yield _WeightSweep(setting, parts, chosen)

        return sweeps


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


class _WeightSweep:
    """All parts of the batch with one set of tangents of the parameters."""

    def __init__(
        self, setting: Setting, parts: list[Part], parameters: dict[str, nn.Parameter]
    ) -> None:
        self.tangents = Tangents()
        self._setting = setting
        self._parts = parts
        self._parameters = parameters
        for name, parameter in parameters.items():
            setting.draw(self.tangents, name, parameter.detach(), tuple(parameter.shape), None)

    @torch.no_grad()
    def push(self) -> tuple[Tensor, Tensor]:
        duals: dict[str, Tensor] = {
            name: DualTensor(parameter.detach(), self.tangents.blocks[name][:, 0])
            for name, parameter in self._parameters.items()
        }
        values, jvps = [], []
        for part in self._parts:
            args, kwargs = arguments(part.inputs)
            with self._setting.part_of_batch(part):
                output = functional_call(self._setting.model, duals, args, kwargs)
                losses, along = split_dual(self._setting.losses(output, part), part.size)
            values.append(losses)
            jvps.append(along.sum(1) * self._setting.scale(part))
        return torch.cat(values), torch.stack(jvps).sum(0)

    @torch.enable_grad()
    def backpropagate(self) -> tuple[Tensor, Tensor]:
        values, jvps = [], []
        copies = {n: p.detach().requires_grad_() for n, p in self._parameters.items()}
        for part in self._parts:
            args, kwargs = arguments(part.inputs)
            with self._setting.part_of_batch(part):
                output = functional_call(self._setting.model, copies, args, kwargs)
                losses = self._setting.losses(output, part)
            total = losses.sum() * self._setting.scale(part)
            gradients = torch.autograd.grad(total, list(copies.values()), allow_unused=True)
            along = [
                self.tangents.blocks[name].flatten(1) @ gradient.flatten()
                for name, gradient in zip(copies, gradients, strict=True)
                if gradient is not None
            ]
            values.append(losses.detach())
            jvps.append(torch.stack(along).sum(0))
        return torch.cat(values), torch.stack(jvps).sum(0)

    def pull(self, coefficients: Tensor) -> None:
        gradient = self.tangents.combine(coefficients.unsqueeze(1))
        for name, parameter in self._parameters.items():
            accumulate(parameter, gradient[name].reshape(parameter.shape))
