"""How good an estimate is, beside the true gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from multitangent._batch import Part, call_model
from multitangent._coefficients import mixture
from multitangent.aggregation import Projection
from multitangent.perturbation import Setting, Sweep

if TYPE_CHECKING:
    from multitangent._estimator import GradientEstimator


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
            Shares of sources that overlap do not add up. Where tangents see the statistics of a
            batch held constant, so does the gradient here.
    """

    cosine: float
    cosines: Mapping[str, float]
    captured: Mapping[str, float]


def assess(estimator: GradientEstimator, setting: Setting, batch: Part) -> Assessment:
    """Take the estimator's next gradient, and the true one; leave everything as it was."""
    model = setting.model
    sites = estimator._sweep.parameters_by_site()
    with _unchanged(model):
        true = _backpropagated(setting, batch)
        sweep, _, jvps = estimator._differentiated(setting, batch)
        measured = {place: _captured(estimator, sweep, jvps, k) for place, k in _places(estimator)}
        estimator._combined(sweep, jvps)
        found = {id(p): p.grad for p in model.parameters() if p.grad is not None}
    pairs = {
        site: [(found[id(p)], true[id(p)]) for p in parameters if id(p) in found and id(p) in true]
        for site, parameters in sites.items()
    }
    length = _squared_length(estimator, setting, batch)
    return Assessment(
        cosine=_cosine([(found[key], true[key]) for key in found if key in true]),
        cosines={site: _cosine(of_site) for site, of_site in pairs.items()},
        captured={place: value / length if length else 0.0 for place, value in measured.items()},
    )


def _places(estimator: GradientEstimator) -> Iterator[tuple[str, list[int]]]:
    """The sources that add up to the estimator's, each with the places of its tangents."""
    first = 0
    texts: list[str] = []
    for source in estimator.tangents.summands:
        texts.append(repr(source))
        count = texts.count(texts[-1])
        place = texts[-1] if count == 1 else f"{texts[-1]} #{count}"
        yield place, list(range(first, first + source.num_tangents))
        first += source.num_tangents
    yield "all", list(range(first))


def _captured(estimator: GradientEstimator, sweep: Sweep, jvps: Tensor, k: Sequence[int]) -> float:
    """The squared length of the projection of all samples' gradients onto some tangents."""
    gram, along, _ = mixture(
        estimator._source, sweep.tangents.gram(), jvps, sweep.tangents.dimension
    )
    own = gram[..., list(k), :][..., list(k)], along[list(k)]
    return float((along[list(k)] * Projection()(*own)).sum())


def _squared_length(estimator: GradientEstimator, setting: Setting, batch: Part) -> float:
    with _unchanged(setting.model):
        gradients = estimator._sweep(setting, batch).true_gradients(estimator._statistics)
    return sum(float(gradient.double().square().sum()) for gradient in gradients.values())


def _backpropagated(setting: Setting, batch: Part) -> dict[int, Tensor]:
    """The true gradients of all trainable parameters, by the parameters' identity."""
    parameters = [p for p in setting.model.parameters() if p.requires_grad]
    with torch.enable_grad(), setting.part_of_batch(batch, "couple"):
        losses = setting.losses(call_model(setting.model, batch.inputs), batch)
        total = losses.sum() * setting.scale(batch)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    return {id(p): g.detach() for p, g in pairs if g is not None}


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Gradients, taken away meanwhile, and buffers are afterwards as they were."""
    kept = [(p, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
        for module, name, buffer, value in buffers:
            buffer.copy_(value)
            module._buffers[name] = buffer  # a module may put another in its place


def _cosine(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Of two gradients, given in pairs of parts; 0 where one of them is zero."""
    along = sum(float((a.double() * b.double()).sum()) for a, b in pairs)
    squares = [sum(float(pair[i].double().square().sum()) for pair in pairs) for i in (0, 1)]
    length = (squares[0] * squares[1]) ** 0.5
    return along / length if length > 0 else 0.0
