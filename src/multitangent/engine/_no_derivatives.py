"""No directional derivatives: the model runs for its losses alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from multitangent.dual import primal
from multitangent.engine._engine import Derivatives
from multitangent.perturbation import Run, no_injection
from multitangent.tangents import Tangents


@dataclass(frozen=True)
class NoDerivatives:
    """Runs the whole batch once, and pushes nothing: for aggregators that need no derivatives.

    In place of every directional derivative there is "not a number".

    Args:
        statistics: That of the engine in whose place it stands.

    Examples:
        >>> NoDerivatives()
        NoDerivatives(statistics='frozen')
    """

    statistics: Literal["frozen", "coupled"] = "frozen"

    @torch.no_grad()
    def __call__(self, run: Run, tangents: Tangents) -> Derivatives:
        losses = primal(run.record(no_injection).losses).detach()
        of_losses = losses.shape if run.per_sample else ()
        return Derivatives(losses, losses.new_full((tangents.num_tangents, *of_losses), math.nan))
