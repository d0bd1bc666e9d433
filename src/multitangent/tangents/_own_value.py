"""Tangents along the values themselves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from multitangent.tangents._guesses import GuessSource, guess_block
from multitangent.tangents._observation import Needs
from multitangent.tangents._request import Request


@dataclass(frozen=True)
class OwnValue(GuessSource):
    """The perturbed value as the tangent: the derivative by the value's own scale.

    For a layer ``z = W x`` it makes the part of the gradient along W exact, ``<grad W, W> = sum
    grad z . z``, and so how the layer's weights and outputs grow. Guesses of the gradient miss
    parts of it that have a mean; where these push all activations outwards, nothing that a guess
    holds pulls them back, the curvature grows with them, and training diverges at learning rates
    that suit the true gradient. This tangent beside the guesses pulls them back.

    Args:
        num_tangents: K. Site i has its value in tangent i modulo K.

    Raises:
        ValueError: If `num_tangents` is not an integer of at least 1.

    Examples:
        >>> from multitangent import Normal
        >>> Normal(2) + OwnValue(3)
        Normal(num_tangents=2) + OwnValue(num_tangents=3)
    """

    num_tangents: int = 1

    @property
    def has_length(self) -> bool:
        return False

    def needs(self, step: int) -> Needs:
        return Needs.PRIMAL

    def draw(self, request: Request) -> Tensor:
        if request.primal is None:
            raise ValueError(
                "`OwnValue` should be drawn for a value. Found none. Try ForwardGradient."
            )
        value = request.primal.detach()
        values = value if request.batch is not None else value.unsqueeze(0)
        return guess_block(values, request, self.num_tangents)
