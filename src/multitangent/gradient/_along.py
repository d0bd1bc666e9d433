"""The loss along a line through the parameters: slope and curvature, without a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from multitangent.dual import DualTensor, ordinary_afterwards
from multitangent.engine import split_dual
from multitangent.objective import Batch, Objective
from multitangent.tangents import Stream


@dataclass(frozen=True)
class Line:
    """The loss ``f(x + t u)`` at t = 0, with its first two derivatives by t.

    Attributes:
        losses: Of the samples, ``[B]``.
        slopes: ``u . grad f`` of the samples, ``[B]``.
        curvatures: ``u^T H u`` of the samples, ``[B]``.
        scale: What sums over the samples are multiplied by to give the batch's loss: 1/B for a
            mean.
    """

    losses: Tensor
    slopes: Tensor
    curvatures: Tensor
    scale: float

    @property
    def loss(self) -> Tensor:
        """Of the batch."""
        return self.scale * self.losses.sum()

    @property
    def slope(self) -> Tensor:
        """Of the batch's loss."""
        return self.scale * self.slopes.sum()

    @property
    def curvature(self) -> Tensor:
        """Of the batch's loss."""
        return self.scale * self.curvatures.sum()

    @property
    def slope_variance(self) -> Tensor:
        """Of `slope`, from how the samples differ; 0 for one sample."""
        size = len(self.slopes)
        if size == 1:
            return torch.zeros_like(self.slope)
        return self.scale**2 * size * self.slopes.var()


@torch.no_grad()
def line(
    objective: Objective,
    batch: Batch,
    stream: Stream,
    direction: Mapping[str, Tensor],
    *,
    curvature: bool = True,
) -> Line:
    """Differentiate the loss twice along a direction: forward mode over dual tensors.

    The batch is run as a whole: with one direction there is little to keep. The statistics of batch
    normalisation are differentiated too, its running averages left alone.

    Args:
        objective: The model and its loss.
        batch: The batch.
        stream: Random numbers of the step whose dropout masks are used.
        direction: Tensors by names of parameters; those without one stay where they are.
        curvature: Whether to differentiate a second time; otherwise curvatures are NaN.

    Raises:
        ValueError: If a direction is not of its parameter's shape, or there is none.
        NotImplementedError: If a function has no second derivative.
    """
    model = objective.model
    parameters = _parameters(model, direction)

    def along(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        duals: dict[str, Tensor] = {
            name: DualTensor(value, direction[name].to(value.dtype).unsqueeze(0))
            for name, value in values.items()
        }
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with objective.mode(batch, stream, "coupled"):
            output = objective.output(batch, duals | buffers)
            losses, slopes = split_dual(objective.losses(output, batch), 1)
        return slopes[0], losses

    with objective.preserved(), sdpa_kernel(SDPBackend.MATH), ordinary_afterwards():
        slopes, curvatures, losses = _differentiated(along, parameters, direction, curvature)
    return Line(losses, slopes, curvatures, objective.scale(batch))


def _differentiated(
    along: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]],
    parameters: dict[str, Tensor],
    direction: Mapping[str, Tensor],
    curvature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not curvature:
        slopes, losses = along(parameters)
        return slopes, torch.full_like(slopes, torch.nan), losses
    tangents = {name: direction[name].to(p.dtype) for name, p in parameters.items()}
    try:
        result: Any = jvp(along, (parameters,), (tangents,), has_aux=True)
    except NotImplementedError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise NotImplementedError(
            "The model and its loss should have second derivatives that PyTorch can take, for a "
            f"curvature. Found a function without: {reason}. Try "
            "`curvature=False`, a learning rate of your own, or `register_rule`."
        ) from error
    slopes, curvatures, losses = result
    return slopes, curvatures, losses


def _parameters(model: nn.Module, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    if not direction:
        raise ValueError("`direction` should hold a tensor at least. Found none.")
    for name, value in direction.items():
        if name not in parameters or parameters[name].shape != value.shape:
            description = (
                list(parameters[name].shape) if name in parameters else "no parameter of that name"
            )
            raise ValueError(
                "`direction` should hold tensors of the shapes of parameters, by name. Found "
                f"{list(value.shape)} for {name!r}, which is {description}."
            )
    return {name: parameters[name].detach() for name in direction}
