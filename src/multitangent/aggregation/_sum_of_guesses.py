"""The guesses of the gradient as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multitangent.aggregation._aggregator import Aggregator, Measured


@dataclass(frozen=True)
class SumOfGuesses(Aggregator):
    """``c = 1`` for a guess of the gradient, 0 for any other tangent.

    The guesses are the gradient, and those of one site add up. Their length is not measured, and
    nothing makes up for what they miss. No directional derivative is needed, so that no tangent is
    pushed where nothing else, such as a source that learns, asks for it. `Projection` and
    `ControlVariate` measure.

    Raises:
        ValueError: When called, if there is no guess among the tangents.

    Examples:
        >>> SumOfGuesses()(torch.eye(2), torch.tensor([3.0, 4.0]), guesses=[True, False])
        tensor([1., 0.], dtype=torch.float64)
    """

    needs_derivatives = False

    def coefficients(self, measured: Measured) -> Tensor:
        return self.of_guesses(measured.guesses, measured.jvps.movedim(-1, 0)).movedim(0, -1)

    def of_guesses(self, guesses: Sequence[bool], jvps: Tensor) -> Tensor:
        """The coefficients in float64, of the shape of `jvps`, whose values do not count."""
        if not any(guesses):
            raise ValueError(
                "`tangents` should have guesses of the gradient among them for `SumOfGuesses`. "
                "Found none. Try `Residual()`, or another aggregator."
            )
        ones = torch.tensor(guesses, dtype=torch.float64, device=jvps.device)
        return ones.view(-1, *[1] * (jvps.ndim - 1)).expand_as(jvps)
