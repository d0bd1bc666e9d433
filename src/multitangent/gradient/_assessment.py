"""How good an estimate is, beside the true gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multitangent.aggregation import Projection
from multitangent.engine import Backpropagation
from multitangent.gradient._step import Problem, Step
from multitangent.objective import Batch, Objective
from multitangent.perturbation import discount_of
from multitangent.tangents import Stream, Tangents, TangentSource


@dataclass(frozen=True)
class Assessment:
    """An estimate beside the true gradient, on one batch.

    Attributes:
        cosine: Between the gradients of all parameters, estimated and true, the cosine of their
            angle.
        cosines: The same for the parameters of each site alone, by the site's name.
        captured: The share of the squared length of the perturbed values' gradients, summed over
            the samples, that lies in the span of each source's tangents, by the source's text (with
            a count behind it if it stands there twice); and under ``"all"`` that of all tangents.
            With ``credit="token"`` the sum is over the gradients of the tokens' losses, each of
            which takes a backward pass.
            Shares of sources that overlap do not add up. Where tangents see the statistics of a
            batch held constant, so does the gradient here.
    """

    cosine: float
    cosines: Mapping[str, float]
    captured: Mapping[str, float]


def assess(
    objective: Objective,
    sites: Mapping[str, Sequence[nn.Parameter]],
    tangents: TangentSource,
    result: Step,
    problem: Problem,
    batch: Batch,
    stream: Stream,
) -> Assessment:
    """The next gradient and the true one; everything is left as it was.

    Args:
        objective: The model and its loss.
        sites: The trainable parameters of each site, by its name.
        tangents: The source as the user described it, whose summands are told apart.
        result: The next step.
        problem: What that step is made of.
        batch: The batch.
        stream: The random numbers of the step.
    """
    with objective.preserved():
        true = _backpropagated(objective, batch, stream)
    with objective.preserved():
        length = _squared_length(problem, batch, stream)
    pairs = {p: (g, true[p]) for p, g in result.gradients.items() if p in true}
    return Assessment(
        cosine=_cosine(list(pairs.values())),
        cosines={
            site: _cosine([pairs[p] for p in parameters if p in pairs])
            for site, parameters in sites.items()
        },
        captured={
            place: _captured(result, tangents_of_place) / length if length else 0.0
            for place, tangents_of_place in _places(tangents)
        },
    )


def _places(tangents: TangentSource) -> Iterator[tuple[str, list[int]]]:
    """The sources that add up to one, each with the places of its tangents."""
    first = 0
    texts: list[str] = []
    for source in tangents.summands:
        texts.append(repr(source))
        count = texts.count(texts[-1])
        place = texts[-1] if count == 1 else f"{texts[-1]} #{count}"
        yield place, list(range(first, first + source.num_tangents))
        first += source.num_tangents
    yield "all", list(range(first))


def _captured(result: Step, k: list[int]) -> float:
    """The squared length of the projection of all samples' gradients onto some tangents."""
    gram, jvps = result.combination.gram, result.combination.jvps
    system = gram[..., k, :][..., k], jvps[k]
    return float((jvps[k] * Projection()(*system)).sum())


def _squared_length(problem: Problem, batch: Batch, stream: Stream) -> float:
    """Of the true gradients of the perturbed values, summed over the samples, or their tokens."""
    tangents = Tangents(problem.source, stream)
    run = problem.perturbation(batch, stream, tangents)
    engine = Backpropagation(problem.engine.statistics)
    losses, gradients = engine.gradients(run, tangents)
    if discount_of(run) is None or not gradients:
        return _squares(gradients)
    each = torch.eye(losses.shape[1], dtype=torch.float64)
    return sum(map(_squares, engine.gradients_of_sums(run, tangents, each)))


def _squares(gradients: Mapping[str, Tensor]) -> float:
    return sum(float(gradient.double().square().sum()) for gradient in gradients.values())


def _backpropagated(
    objective: Objective, batch: Batch, stream: Stream
) -> dict[nn.Parameter, Tensor]:
    """The true gradients of all trainable parameters."""
    parameters = [p for p in objective.model.parameters() if p.requires_grad]
    with torch.enable_grad(), objective.mode(batch, stream, "coupled"):
        losses = objective.losses(objective.output(batch), batch)
        total = losses.sum() * objective.scale(batch)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return {parameter: gradient.detach() for parameter, gradient in pairs if gradient is not None}


def _cosine(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Of two gradients, given in pairs of parts; 0 where one of them is zero."""
    product = sum(float((a.double() * b.double()).sum()) for a, b in pairs)
    squares = [sum(float(pair[i].double().square().sum()) for pair in pairs) for i in (0, 1)]
    length = (squares[0] * squares[1]) ** 0.5
    return product / length if length > 0 else 0.0
