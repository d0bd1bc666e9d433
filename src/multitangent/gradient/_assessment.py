"""How good an estimate is, beside the true gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from multitangent.aggregation import Projection
from multitangent.engine import Backpropagation
from multitangent.gradient._bias import Sums
from multitangent.gradient._redrawn_source import RedrawnSource
from multitangent.gradient._step import Problem, Step
from multitangent.objective import Batch, Objective
from multitangent.perturbation import discount_of
from multitangent.tangents import Stream, Tangents, TangentSource


@dataclass(frozen=True)
class Assessment:
    """Estimates beside the true gradient, on one batch.

    The error of an estimate has two parts. *Noise* differs from estimate to estimate and averages
    out over steps. A *bias* is the same in all of them and adds up. The cosine of one estimate
    does not tell them apart; the mean of N estimates does.

    Attributes:
        cosine: The cosine of the angle between the next step's estimate and the true gradient, of
            all parameters.
        cosines: The same for the parameters of each site alone, by the site's name.
        captured: The share of the squared length of the perturbed values' gradients, summed over
            the samples, that lies in the span of each source's tangents, by the source's text (with
            a count behind it if it stands there twice); and under ``"all"`` that of all tangents.
            With ``credit="token"`` the sum is over the gradients of the tokens' losses, and each
            of them takes a backward pass.
            Shares of sources that overlap do not add up. Where tangents see the statistics of a
            batch held constant, so does the gradient here.
        estimates: N, the number of estimates that were made: `repeats`, or one if the source draws
            no random numbers.
        cosine_of_mean: The same as `cosine`, for the mean of the N estimates.
        cosines_of_mean: The same for each site.
        limit: The estimated limit of `cosine_of_mean` for large N, 1 without a bias of the
            direction. It subtracts the noise's share of ``|mean|^2``, so its size is larger than
            that of `cosine_of_mean`. The share of ``|mean|^2`` that is not noise is
            ``(cosine_of_mean / limit)^2``. The limit is uncertain where this share is small. It is
            ``None`` for one estimate, and where all of ``|mean|^2`` may be noise.
        limits: The same for each site.
    """

    cosine: float
    cosines: Mapping[str, float]
    captured: Mapping[str, float]
    estimates: int
    cosine_of_mean: float
    cosines_of_mean: Mapping[str, float]
    limit: float | None
    limits: Mapping[str, float | None]


def assess(
    objective: Objective,
    sites: Mapping[str, Sequence[nn.Parameter]],
    tangents: TangentSource,
    step: Callable[[Problem, Batch, Stream], Step],
    problem: Problem,
    batch: Batch,
    stream: Stream,
    *,
    repeats: int,
) -> Assessment:
    """The next gradient and the true one; everything is left as it was.

    Args:
        objective: The model and its loss.
        sites: The trainable parameters of each site, by its name.
        tangents: The source as the user described it, whose summands are told apart.
        step: Takes a step.
        problem: What the next step is made of.
        batch: The batch.
        stream: The random numbers of the step.
        repeats: N, the number of estimates, which differ in their tangents.
    """

    def estimate(source: TangentSource, *, measures: bool = False) -> Step:
        with objective.preserved():
            return step(replace(problem, source=source, measures=measures), batch, stream)

    first = RedrawnSource(problem.source, stream)
    result = estimate(first if repeats > 1 else problem.source, measures=True)
    with objective.preserved():
        true = _backpropagated(objective, batch, stream)
    with objective.preserved():
        length = _squared_length(problem, batch, stream)
    one, several = Sums(true), Sums(true)
    one.add(result.gradients)
    several.add(result.gradients)
    if repeats > 1 and not first.is_random:
        several.add(result.gradients)  # every other estimate would be the same
    for i in range(1, repeats if first.is_random else 1):
        other = RedrawnSource(
            problem.source, Stream(stream.fold_in("estimate", i), stream.step, stream.kind)
        )
        several.add(estimate(other).gradients)
    overall = several.products(several.parameters)
    by_site = {site: several.products(parameters) for site, parameters in sites.items()}
    return Assessment(
        cosine=one.products(one.parameters).cosine,
        cosines={site: one.products(parameters).cosine for site, parameters in sites.items()},
        captured={
            place: _captured(result, tangents_of_place) / length if length else 0.0
            for place, tangents_of_place in _places(tangents)
        },
        estimates=several.count if first.is_random else 1,
        cosine_of_mean=overall.cosine,
        cosines_of_mean={site: products.cosine for site, products in by_site.items()},
        limit=overall.limit,
        limits={site: products.limit for site, products in by_site.items()},
    )


def _places(tangents: TangentSource) -> Iterator[tuple[str, list[int]]]:
    """The sources that add up to one, each with the places of its tangents."""
    first = 0
    texts: list[str] = []
    for source in tangents.parts:
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
