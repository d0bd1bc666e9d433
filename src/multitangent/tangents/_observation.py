"""What a source of tangents is told, and what it asks to be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Flag, auto

from torch import Tensor

from multitangent.tangents._request import Request


class Needs(Flag):
    """What a source needs of one step, besides its tangents being pushed.

    Members add up: ``Needs.OUTPUT | Needs.UPDATE``.
    """

    NOTHING = 0
    OUTPUT = auto()
    """The model's output and the loss's derivative there, before tangents are drawn."""
    OUTPUT_TANGENTS = auto()
    """Afterwards the derivatives of the model's output along the tangents."""
    UPDATE = auto()
    """A call of `update` after the step."""
    PRIMAL = auto()
    """`request.primal` whatever the model does: a copy, since the model may write into its own."""
    LAST_GRADIENT = auto()
    """The true gradient of the last perturbed value, before tangents are drawn; see `Request`."""


@dataclass(frozen=True)
class Observation:
    """What came of one step, for sources with a state.

    Attributes:
        requests: What was asked for at each site, by its name.
        tangents: V as it was drawn, ``[at most K, 1 or b, *shape]`` by site, where a source needs
            ``OUTPUT_TANGENTS``; elsewhere empty.
        guesses: Which of the K tangents are guesses of the gradient.
        gradients: The forward gradient of each site's value, ``[b, *shape]``; for weights of the
            batch's loss, ``[1, *shape]``.
        output_tangents: The derivatives of the model's output along V, ``[K, b, *output]``, where
            a source needs them.
    """

    requests: Mapping[str, Request]
    tangents: Mapping[str, Tensor]
    guesses: Sequence[bool]
    gradients: Mapping[str, Tensor]
    output_tangents: Tensor | None = None
