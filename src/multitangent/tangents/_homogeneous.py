"""Guesses whose part along the value is that of a network without biases."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from multitangent.tangents._observation import Needs
from multitangent.tangents._request import Request
from multitangent.tangents._source import TangentSource


@dataclass(frozen=True)
class Homogeneous(TangentSource):
    """The guesses of a source, with the part along the perturbed value in its place known.

    Linear layers and ReLU without biases are homogeneous: an activation h twice as large makes the
    output z twice as large. By Euler's theorem the derivative of the output along h is then the
    output itself, and that of a sample's loss is

        ``<grad_h f, h> = <grad_z f, z>``,

    with the same number at every site through which all paths go. It is known without a tangent.
    Here every sample's guess g becomes ``g + h (<grad_z f, z> - <g, h>) / |h|^2``, which has that
    derivative along h.

    Guesses that are used as they are miss parts of the gradient that have a mean. Where these push
    all activations outwards, nothing pulls them back, and training diverges at learning rates that
    suit the true gradient. `OwnValue` measures the derivative along h, which takes a tangent of its
    own. Here it costs a few products of vectors, and `SumOfGuesses` can do without any tangent.

    It is exact where every path to the output goes through h, and only linear layers,
    convolutions, ReLU and pooling without biases follow. With biases it is close only where they
    contribute little to the output of that sample. A sample with a small h gets a long and wrong
    guess, as happens in narrow layers. It is wrong in front of batch and layer normalisation, where
    the derivative along h is zero.

    Args:
        inner: The source of the guesses.

    Raises:
        ValueError: If `inner` has random tangents, or mixes its guesses afterwards, as `Normalized`
            does; in a step, if it perturbs weights.

    Examples:
        >>> from multitangent import Activations, Feedback, ForwardGradient, Normal
        >>> from multitangent.aggregation import SumOfGuesses
        >>> first, last = torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 3, bias=False)
        >>> model = torch.nn.Sequential(first, torch.nn.ReLU(), last)
        >>> gradient = ForwardGradient(
        ...     model, torch.nn.CrossEntropyLoss(), Normal(2) + Homogeneous(Feedback()),
        ...     SumOfGuesses(), Activations(share="sample", output="exact"),
        ... )
        >>> x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> value = gradient(x, y)
        >>> estimate = first.weight.grad
        >>> model.zero_grad()
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> along = [(g * first.weight).sum() for g in (estimate, first.weight.grad)]
        >>> torch.allclose(*along)
        True

    Source:
        Euler's theorem on homogeneous functions; for rectifier networks, Du, Hu and Lee,
        "Algorithmic regularization in learning deep homogeneous models" (2018).
    """

    inner: TangentSource
    num_tangents: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tangents", self.inner.num_tangents)
        if not all(self.inner.guesses):
            raise ValueError(
                "`inner` should have guesses only, as random tangents are measured. Found "
                f"{self.inner!r}. Try `Normal(2) + Homogeneous(Feedback())`."
            )
        if self.inner.mixing(torch.eye(self.num_tangents, dtype=torch.float64), 1) is not None:
            raise ValueError(
                "`inner` should draw its guesses as they are to be used. Found that "
                f"{self.inner!r} mixes them afterwards. Try `Homogeneous(Feedback())`."
            )

    @property
    def has_length(self) -> bool:
        return True  # whatever length the guess has along the value

    @property
    def sources(self) -> tuple[TangentSource, ...]:
        return (self.inner,)

    def init(self) -> TangentSource:
        return Homogeneous(self.inner.init())

    def needs(self, step: int) -> Needs:
        return self.inner.needs(step) | Needs.PRIMAL | Needs.OUTPUT

    def draw(self, request: Request) -> Tensor:
        value, error, output = request.primal, request.output_gradient, request.output
        if value is None or error is None or output is None or request.batch is None:
            raise ValueError(
                "`Homogeneous` should be among the tangents of activations. Found a step that "
                "perturbs something else. Try `perturb='activations'`."
            )
        rows = self.inner.draw(request)
        exact = torch.promote_types(rows.dtype, torch.float32)  # squares overflow in float16
        value = value.detach().to(exact)
        squares = _products(value, value)
        known = _products(error.to(exact), output.to(exact))
        missing = known - _products(rows.sum(0, dtype=exact), value)
        share = torch.where(squares > 0, missing / squares, 0.0).view(-1, *[1] * len(request.shape))
        row = min(request.site % self.num_tangents, len(rows) - 1)
        corrected = torch.addcmul(rows[row].to(exact), share, value).to(rows.dtype)
        if len(rows) == 1:
            return corrected.unsqueeze(0)
        others = rows.expand(-1, *corrected.shape).clone()
        others[row] = corrected
        return others


def _products(a: Tensor, b: Tensor) -> Tensor:
    """The scalar product of every sample, ``[b]``."""
    return torch.linalg.vecdot(a.detach().reshape(len(a), -1), b.detach().reshape(len(b), -1))
