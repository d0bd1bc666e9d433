"""Guesses of the gradient from the error at the end of a residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from multitangent.tangents._guesses import GuessSource, guess_block
from multitangent.tangents._observation import Needs
from multitangent.tangents._request import Request


@dataclass(frozen=True)
class Residual(GuessSource):
    """The true gradient of the last perturbed value as the guess for all values of its shape.

    The blocks of a residual network add to one stream, ``x_{i+1} = x_i + f_i(x_i)``. With e the
    gradient of a sample's loss by the end of the stream, that by an earlier place is
    ``(I + J_1)^T (I + J_2)^T ... e``, with the Jacobians J of the blocks between. The guess leaves
    the J out: it is e itself. It is exact where the blocks between are the identity, and at the
    last perturbed value always.

    e comes from the local step of what follows the last perturbed value, such as the last block and
    the head, which gives the gradients of its own parameters too. Nothing is learned, and nothing
    of any other layer is used. A value of another shape than e has a guess of zero.

    It needs ``Activations(output="exact")``. With `SumOfGuesses` nothing is pushed at all.

    Args:
        num_tangents: K. Site i has its guess in tangent i modulo K: with one tangent all sites
            have a common length to be found, with one for every site each its own.

    Raises:
        ValueError: If `num_tangents` is not an integer of at least 1; in a step, if it perturbs
            weights or the output.

    Examples:
        >>> import torch
        >>> from multitangent import Activations, ForwardGradient
        >>> from multitangent.aggregation import SumOfGuesses
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> gradient = ForwardGradient(
        ...     model, torch.nn.CrossEntropyLoss(), Residual(), SumOfGuesses(),
        ...     Activations(output="exact"),
        ... )
        >>> x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> value = gradient(x, y)
        >>> estimate = [layer.weight.grad for layer in model]
        >>> model.zero_grad()
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> [torch.allclose(g, layer.weight.grad) for g, layer in zip(estimate, model)]
        [False, True, True]
    """

    num_tangents: int = 1

    def needs(self, step: int) -> Needs:
        return Needs.LAST_GRADIENT

    def draw(self, request: Request) -> Tensor:
        gradient = request.last_gradient
        if gradient is None:
            raise _without_gradient(request)
        if gradient.shape[1:] != request.shape:
            gradient = gradient.new_zeros(len(gradient), *request.shape)
        return guess_block(gradient.to(request.dtype), request, self.num_tangents)


def _without_gradient(request: Request) -> ValueError:
    found = "a step that perturbs weights" if request.is_weight else f"none at {request.name!r}"
    return ValueError(
        "`Residual` needs the gradient of the last perturbed value, which the exact output gives. "
        f"Found {found}. Try `perturb=Activations(output='exact')`."
    )
