"""Whether a model is causal in time: no loss depends on what is perturbed at a later position."""

from __future__ import annotations

import torch
from torch import Tensor

from multitangent.engine import Backpropagation
from multitangent.gradient._verification_error import VerificationError
from multitangent.perturbation import Run
from multitangent.tangents import Tangents, TangentsInTime

_MOST_CUTS = 16
_SLACKS = {torch.float64: 1e-9}  # relative to the whole gradient; those of a mask are exact zeros
_SLACK = 1e-5


def token_weights(num_tokens: int) -> Tensor:
    """A different weight for every token, ``[T]``, so that mixed-up tokens show."""
    return torch.linspace(0.5, 1.5, num_tokens, dtype=torch.float64)


def cuts(num_tokens: int) -> list[int]:
    """The positions that are tested: all of a short sequence, some of a long one."""
    count = min(num_tokens - 1, _MOST_CUTS)
    return torch.linspace(1, num_tokens - 1, count).long().tolist()


def check_causality(run: Run, tangents: Tangents, num_tokens: int) -> None:
    """Raise if the losses of tokens depend on perturbed values at later positions.

    Backpropagation differentiates the losses of the tokens before a position. Batch normalisation
    in training mode stays as it is, because its statistics come from all positions.

    Args:
        run: The run of a few samples.
        tangents: Tangents whose blocks name the perturbed values.
        num_tokens: T.

    Raises:
        ValueError: If a perturbed value has no axis for the tokens.
        VerificationError: If the model is not causal.
    """
    TangentsInTime(tangents, num_tokens)
    places = cuts(num_tokens)
    if not places or not tangents.blocks:
        return
    before = torch.arange(num_tokens) < torch.tensor(places)[:, None]
    sums = Backpropagation("coupled").gradients_of_sums(
        run, tangents, before * token_weights(num_tokens)
    )
    for place, gradients in zip(places, sums, strict=True):
        total = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
        for name, gradient in reversed(gradients.items()):
            later = float(gradient[:, place:].double().norm())
            if later > _SLACKS.get(gradient.dtype, _SLACK) * total**0.5:
                raise not_causal(name, place)


def not_causal(name: str, place: int) -> VerificationError:
    """The error for a model that is not causal in time."""
    return VerificationError(
        "`model` and `loss` should be causal in time for `Activations(credit='token')`: the loss "
        "of a token should not depend on later positions. Found that the losses before position "
        f"{place} depend on the output of {name!r} from there on. Try `credit='sample'`, or look "
        "after that module for attention without a causal mask, or for a mean, statistics or a "
        "normalisation over time."
    )
