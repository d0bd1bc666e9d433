"""What every sweep of one gradient needs to know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from multitangent._batch import Part
from multitangent._per_sample_loss import PerSampleLoss
from multitangent.dual import DualTensor, PartOfBatch, Recorded, Statistics, with_rows
from multitangent.perturbation._sites import Site
from multitangent.tangents import Block, Request, Stream, Tangents, TangentSource


@dataclass(frozen=True)
class Setting:
    """One step: the model, the loss, where tangents come from, and the step's random numbers.

    Attributes:
        model: The model.
        loss: Of one sample each.
        source: Where tangents come from.
        stream: The random numbers of the step.
        correction: What a weighted mean multiplies the losses by.
        micro_batch: How many samples are pushed at a time.
        store_tangents: Whether tangents are kept, or drawn again where they are needed.
        tangent_dtype: The type in which tangents are carried, by default the perturbed value's.
    """

    model: nn.Module
    loss: PerSampleLoss
    source: TangentSource
    stream: Stream
    correction: float
    micro_batch: int
    store_tangents: bool = True
    tangent_dtype: torch.dtype | None = None

    def losses(self, output: Any, part: Part) -> Tensor:
        """The losses ``[b]`` of the samples of a part."""
        losses = self.loss(output, part.target, self.correction)
        if losses.shape[0] != part.size:
            raise ValueError(
                "`loss` should return one number per sample. Found "
                f"{losses.shape[0]} numbers for {part.size} samples."
            )
        return losses

    def split(self, losses: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Losses ``[b]`` and their directional derivatives ``[K, b]``."""
        return split_dual(losses, part.size, self.source.num_tangents)

    def scale(self, part: Part) -> float:
        """The weight of one sample's loss in the loss of the batch."""
        return self.loss.scale(part.batch_size)

    def draw(
        self,
        tangents: Tangents,
        name: str,
        value: Tensor,
        shape: tuple[int, ...],
        samples: Sequence[int] | None,
        target: Any = None,
    ) -> Block:
        """Draw the block of one site and add it to the others."""
        request = Request(
            stream=self.stream,
            site=len(tangents.blocks),
            shape=shape,
            samples=samples,
            offset=tangents.dimension,
            dtype=value.dtype,
            device=value.device,
            name=name,
            primal=value,
            target=target,
            loss=self.loss,
        )
        block = Block(self.source, request, store=self.store_tangents, dtype=self.tangent_dtype)
        tangents.add(name, block)
        return block

    @contextmanager
    def part_of_batch(
        self,
        part: Part,
        statistics: Statistics,
        *,
        recorded: Recorded | None = None,
        calls: int = 0,
    ) -> Iterator[PartOfBatch]:
        """Run a part of the batch with the random numbers of this step, whatever the split.

        Args:
            part: The samples.
            statistics: What batch normalisation in training mode does: see `PartOfBatch`.
            recorded: What the whole batch leaves for its parts.
            calls: How many calls of dropout came before.
        """

        def generator(call: int, device: torch.device) -> torch.Generator:
            return self.stream.generator(device, self.stream.key("dropout", call))

        mode = PartOfBatch(generator, part.rows, part.batch_size, statistics, recorded)
        device = _device_of(part)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), mode:
            # Other random functions repeat themselves too, for the same split of the batch.
            key = self.stream.key("other", part.rows.start)
            torch.set_rng_state(self.stream.generator(torch.device("cpu"), key).get_state())
            if device.type == "cuda":
                torch.cuda.set_rng_state(self.stream.generator(device, key).get_state(), device)
            mode.calls = calls
            if statistics == "update":
                yield mode
            else:
                with _counts_kept(self.model):
                    yield mode


def _device_of(part: Part) -> torch.device:
    """The device of the first input."""
    leaves = pytree.tree_leaves(part.inputs)
    return next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))


@contextmanager
def _counts_kept(model: nn.Module) -> Iterator[None]:
    """Batch normalisation counts its batches; a batch that runs again is the same one."""
    counters: list[Any] = [m.num_batches_tracked for m in model.modules() if counts_batches(m)]
    before = [counter.clone() for counter in counters]
    try:
        yield
    finally:
        for counter, value in zip(counters, before, strict=True):
            counter.copy_(value)


def counts_batches(module: nn.Module) -> bool:
    """Whether a module normalises by its batch's statistics, and counts the batches."""
    return module.training and getattr(module, "num_batches_tracked", None) is not None


def normalizes_batches(module: nn.Module) -> bool:
    """Whether a module normalises by its batch's statistics."""
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch_norm and (module.training or not module.track_running_stats)


class Sweep(Protocol):
    """One step through the model, whose directional derivatives give the coefficients.

    Attributes:
        tangents: V.
        output_tangents: The derivatives of the model's output along V, ``[K, B, *output]``, once
            they are known; only where the source sees the output.
    """

    tangents: Tangents
    output_tangents: Tensor | None

    def push(self) -> tuple[Tensor, Tensor]:
        """Losses ``[B]`` and directional derivatives ``[K]`` or ``[K, B]``, in forward mode."""

    def backpropagate(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """The same from backpropagation."""

    def true_gradients(self, statistics: Statistics) -> dict[str, Tensor]:
        """What `pull` returns where the estimate is exact, by backpropagation."""

    def pull(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Combine the tangents and add the gradient to ``.grad`` of the parameters.

        Returns:
            The gradient of every perturbed value by name, ``[b, *shape]`` of the samples' losses,
            or ``[1, *shape]`` of the batch's.
        """


class BoundPerturbation(Protocol):
    """A perturbation of one model.

    Attributes:
        sites: Where tangents enter, from the first of them on; none if they enter everywhere.
    """

    @property
    def sites(self) -> Sequence[Site]: ...

    def parameters_by_site(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters whose gradients each site yields, by its name."""

    def __call__(self, setting: Setting, batch: Part) -> Sweep:
        """The sweep of one step."""


class Perturbation(Protocol):
    """Which values of a model are perturbed."""

    def bind(self, model: nn.Module) -> BoundPerturbation:
        """Check the model; returns what makes the sweeps."""


def split_dual(losses: Tensor, part_size: int, num_tangents: int) -> tuple[Tensor, Tensor]:
    """Losses ``[b]`` and their directional derivatives ``[K, b]``."""
    if not isinstance(losses, DualTensor):
        raise RuntimeError(
            "`loss` should depend on the perturbed values. Found losses without tangents: the "
            "model's output was detached, or computed without the sites. Try to remove the "
            "`detach()`."
        )
    values, tangents = losses.primal.detach(), with_rows(losses.tangents, num_tangents)
    return values, tangents.expand(-1, part_size)


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to ``.grad``, as backpropagation does."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)
