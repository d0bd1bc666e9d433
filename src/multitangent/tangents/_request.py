"""What a source of tangents is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from multitangent._structures import map_tensors
from multitangent.tangents._independent import IndependentRows
from multitangent.tangents._stream import Stream


@dataclass(frozen=True)
class Request:
    """One block of tangents to be drawn: those of one site.

    Attributes:
        stream: Random numbers of the step.
        site: The count of the site in the sweep.
        shape: The shape of the perturbed value, of one sample for activations.
        samples: The samples that want tangents of their own, ``None`` to share one set.
        offset: How many perturbed scalars the sites before have.
        dtype: Of the perturbed value.
        device: Of the perturbed value.
        first: The number of tangents that other sources draw before this one.
        name: The name of the site.
        value: What `primal` returns.
        version: The count of the writes into `value` when it was perturbed.
        target: What the loss compares with, for activations.
        loss: From outputs and target to the losses ``[b]``.
        output: The model's output, ``[b, *output]``, where a source asked for it.
        output_gradient: The derivative of each sample's loss by it, of the same shape.
        last_gradient: The derivative of each sample's loss by the last value of the run that is
            perturbed, ``[b, *its shape]``, where a source asked for it and the output is exact.
    """

    stream: Stream
    site: int
    shape: tuple[int, ...]
    samples: Sequence[int] | None
    offset: int
    dtype: torch.dtype
    device: torch.device
    first: int = 0
    name: str = ""
    value: Tensor | None = None
    version: int | None = None
    target: Any = None
    loss: Callable[[Any, Any], Tensor] | None = None
    output: Tensor | None = None
    output_gradient: Tensor | None = None
    last_gradient: Tensor | None = None

    @property
    def random(self) -> IndependentRows:
        """Random rows for this block: ``request.random.normal(K)``."""
        return IndependentRows(
            self.stream,
            self.site,
            self.shape,
            self.samples,
            self.first,
            self.dtype,
            self.device,
        )

    @property
    def primal(self) -> Tensor | None:
        """The perturbed value, ``[b, *shape]`` for activations and ``[*shape]`` for weights.

        Raises:
            RuntimeError: If the model has overwritten it, and the source did not ask for a copy.
        """
        if self.value is not None and self.value._version != self.version:
            raise RuntimeError(
                "`request.primal` should be the value that was perturbed. Found that the model has "
                f"written into it in place, at {self.name!r}. Try a source whose `needs` has "
                "`Needs.PRIMAL` among what it returns: it gets a copy."
            )
        return self.value

    @property
    def batch(self) -> int | None:
        """The number of samples, ``None`` where the perturbed value is not one of each sample."""
        if self.samples is not None:
            return len(self.samples)
        if self.value is None or self.value.ndim == len(self.shape):
            return None
        return len(self.value)

    @property
    def is_weight(self) -> bool:
        """Whether the perturbed value is known, and is not one of each sample."""
        return self.value is not None and self.batch is None

    def take(self, samples: slice) -> Request:
        """The same for some of the samples."""
        if (count := self.batch) is None:
            return self

        def part(value: Tensor) -> Tensor:
            return value[samples] if value.shape[:1] == (count,) else value

        def optional(value: Tensor | None) -> Tensor | None:
            return None if value is None else part(value)

        return replace(
            self,
            samples=None if self.samples is None else self.samples[samples],
            value=optional(self.value),
            target=map_tensors(part, self.target),
            output=optional(self.output),
            output_gradient=optional(self.output_gradient),
            last_gradient=optional(self.last_gradient),
        )
