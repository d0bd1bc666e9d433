"""What an engine is."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from multitangent.perturbation import Run
from multitangent.tangents import Tangents


class Derivatives(NamedTuple):
    """What an engine finds out about one batch.

    Attributes:
        losses: Of the samples, ``[B]``, or of their tokens, ``[B, T]``.
        jvps: Directional derivatives: ``[K, B]`` of the samples' losses, ``[K, B, T]`` of the
            tokens', ``[K]`` of the batch's.
        output_tangents: The derivatives of the model's output along V, ``[K, B, *output]``, where
            the source of the tangents needs them.
    """

    losses: Tensor
    jvps: Tensor
    output_tangents: Tensor | None = None


class Engine(Protocol):
    """How directional derivatives are obtained.

    Attributes:
        statistics: Whether those of batch normalisation are constants along tangents, ``"frozen"``,
            or are differentiated too, ``"coupled"``.
    """

    @property
    def statistics(self) -> Literal["frozen", "coupled"]: ...

    def __call__(self, run: Run, tangents: Tangents) -> Derivatives:
        """The losses of a batch and their derivatives along the tangents.

        Args:
            run: The batch, not run yet; afterwards it can pull gradients back.
            tangents: V, whose blocks the run adds.
        """


def precision_of(engine: Engine, dtype: torch.dtype) -> float | None:
    """The relative precision of an engine's derivatives, ``None`` if it is that of their type.

    An engine that rounds more has a method `precision` from the type of the derivatives.
    """
    precision = getattr(engine, "precision", None)
    return None if precision is None else float(precision(dtype))
