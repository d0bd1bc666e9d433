"""What every sweep of one gradient needs to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from multitangent._batch import Part
from multitangent._per_sample_loss import PerSampleLoss
from multitangent.dual import DualTensor, PartOfBatch
from multitangent.tangents import Request, Stream, Tangents, TangentSource


@dataclass(frozen=True)
class Setting:
    """One step: the model, the loss, where tangents come from, and the step's random numbers."""

    model: nn.Module
    loss: PerSampleLoss
    source: TangentSource
    stream: Stream
    correction: float

    def losses(self, output: Any, part: Part) -> Tensor:
        """The losses ``[b]`` of the samples of a part."""
        losses = self.loss(output, part.target, self.correction)
        if losses.shape[0] != part.size:
            raise ValueError(
                "`loss` should return one number per sample. Found "
                f"{losses.shape[0]} numbers for {part.size} samples."
            )
        return losses

    def scale(self, part: Part) -> float:
        """The weight of one sample's loss in the loss of the batch."""
        return self.loss.scale(part.batch_size)

    def draw(
        self,
        tangents: Tangents,
        name: str,
        value: Tensor,
        shape: tuple[int, ...],
        samples: range | None,
        target: Any = None,
    ) -> Tensor:
        """Draw the block of one site and add it to the others."""
        request = Request(
            stream=self.stream,
            site=len(tangents.blocks),
            shape=shape,
            samples=samples,
            offset=tangents.dimension,
            dtype=value.dtype,
            device=value.device,
            primal=value,
            target=target,
        )
        block = self.source.draw(request)
        self._check(block, request)
        tangents.add(name, block)
        return block

    def _check(self, block: Tensor, request: Request) -> None:
        own = 1 if request.samples is None else len(request.samples)
        head, count = list(block.shape[:2]), self.source.num_tangents
        fits = head in ([count, 1], [count, own]) and block.shape[2:] == request.shape
        if not fits or block.dtype != request.dtype:
            wanted = f"[{count}, {own}, *{list(request.shape)}] of {request.dtype}"
            raise ValueError(
                f"`draw` of {self.source!r} should return tangents of shape {wanted}. Found "
                f"{list(block.shape)} of {block.dtype}."
            )

    @contextmanager
    def part_of_batch(self, part: Part, calls: int = 0) -> Iterator[PartOfBatch]:
        """Run a part of the batch with the random numbers of this step, whatever the split.

        Args:
            part: The samples.
            calls: How many calls of dropout came before.
        """

        def generator(call: int, device: torch.device) -> torch.Generator:
            return self.stream.generator(device, self.stream.key("dropout", call))

        with (
            torch.random.fork_rng(devices=[]),
            PartOfBatch(generator, part.rows, part.batch_size) as mode,
        ):
            # Other random functions repeat themselves too, for the same split of the batch.
            key = self.stream.key("other", part.rows.start)
            torch.set_rng_state(self.stream.generator(torch.device("cpu"), key).get_state())
            mode.calls = calls
            yield mode


class Sweep(Protocol):
    """One forward sweep, whose directional derivatives give one set of coefficients."""

    tangents: Tangents

    def push(self) -> tuple[Tensor, Tensor]:
        """Losses ``[b]`` and directional derivatives ``[K]`` or ``[K, b]``, in forward mode."""

    def backpropagate(self) -> tuple[Tensor, Tensor]:
        """The same from backpropagation."""

    def pull(self, coefficients: Tensor) -> None:
        """Combine the tangents and add the gradient to ``.grad`` of the parameters."""


class Perturbation(Protocol):
    """Which values of a model are perturbed."""

    def bind(self, model: nn.Module) -> Callable[[Setting, list[Part]], Iterator[Sweep]]:
        """Check the model; returns what makes the sweeps of one step."""


def split_dual(losses: Tensor, part_size: int) -> tuple[Tensor, Tensor]:
    """Losses ``[b]`` and their directional derivatives ``[K, b]``."""
    if not isinstance(losses, DualTensor):
        raise RuntimeError(
            "`loss` should depend on the perturbed values. Found losses without tangents: the "
            "model's output was detached, or computed without the sites. Try to remove the "
            "`detach()`."
        )
    values, tangents = losses.primal.detach(), losses.tangents
    return values, tangents.expand(-1, part_size)


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to ``.grad``, as backpropagation does."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)
