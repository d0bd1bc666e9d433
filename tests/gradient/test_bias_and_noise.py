"""What the mean of several estimates says of bias and noise."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import astuple, replace

import pytest
import torch
from torch import nn

from models_for_tests import build
from multitangent import (
    Activations,
    ControlVariate,
    Feedback,
    ForwardGradient,
    LocalLoss,
    Mean,
    Normal,
    Projection,
    SimulatedGradient,
)
from multitangent.aggregation import SumOfGuesses
from multitangent.engine import SplitError
from multitangent.gradient import _estimator, step
from multitangent.gradient._bias import Products, Sums
from multitangent.gradient._redrawn_source import RedrawnSource
from multitangent.tangents import Orthogonal, RunningMean, StandardBasis, Stream, TangentSource

LOSS = nn.CrossEntropyLoss()


class Fixed(TangentSource):
    """A guess that is the same in every step: ones."""

    num_tangents = 1
    guesses = (True,)

    def draw(self, request):
        return torch.ones(1, 1, *request.shape, dtype=request.dtype)


class Unseeded(TangentSource):
    num_tangents = 2

    def draw(self, request):
        return torch.randn(2, 1, *request.shape, dtype=request.dtype)


def linear():
    """A model with n = 20 weights, for which the loss's gradient is `GRADIENT`."""
    torch.manual_seed(1)
    model = nn.Linear(20, 1, bias=False).double()
    x, y = torch.randn(1, 20).double() + 1, torch.zeros(1, 1).double()
    return model, x, y


def squared_cosine_of_ones() -> float:
    _, x, _ = linear()  # the gradient is a multiple of x
    return float(x.sum() ** 2 / x.square().sum() / 20)


def assessed(source, aggregator, repeats):
    model, x, y = linear()
    gradient = ForwardGradient(model, nn.MSELoss(), source, aggregator, perturb="weights", seed=5)
    return gradient.assess(x, y, repeats=repeats)


@pytest.mark.parametrize("repeats", [40, 400])
def test_a_mean_of_random_tangents_has_noise_and_no_bias(repeats):
    found = assessed(Normal(4), Mean(), repeats)
    noise = (20 + 1) / (4 * repeats)  # E|m|^2 = (1 + (n + 1)/(K N)) |g|^2
    assert found.cosine_of_mean == pytest.approx((1 + noise) ** -0.5, abs=0.03)
    assert found.limit == pytest.approx(1, abs=0.03)
    assert found.estimates == repeats
    assert found.limit > found.cosine_of_mean


def test_a_projection_of_few_tangents_has_no_bias_of_the_direction():
    found = assessed(Normal(4), Projection(), 200)
    assert found.cosine == pytest.approx((4 / 20) ** 0.5, abs=0.2)
    noise = (20 / 4 - 1) / 200  # E|m|^2 = (K/n)^2 (1 + (n/K - 1)/N) |g|^2
    assert found.cosine_of_mean == pytest.approx((1 + noise) ** -0.5, abs=0.01)
    assert found.limit == pytest.approx(1, abs=0.01)


def test_a_fixed_guess_has_a_bias_and_no_noise():
    found = assessed(Fixed(), SumOfGuesses(), 50)
    expected = squared_cosine_of_ones() ** 0.5
    assert abs(found.cosine) == pytest.approx(expected)
    assert found.cosine == found.cosine_of_mean == found.limit
    assert found.estimates == 1


@pytest.mark.parametrize("gain", [0.2, 0.6, 1.0])
def test_a_control_variate_lies_in_between(gain):
    found = assessed(Normal(4) + Fixed(), ControlVariate(gain), 300)
    held = squared_cosine_of_ones()  # the mean is p + gain m, of which |p|^2 is that share
    missed = 1 - held
    expected = (held + gain * missed) / (held + gain**2 * missed) ** 0.5
    assert found.limit == pytest.approx(expected, abs=0.01)
    assert (found.limit > 0.99) == (gain == 1)


@pytest.mark.parametrize("perturb", ["weights", "activations", Activations(share="sample")])
def test_all_is_as_if_every_estimate_were_kept(perturb):
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(3), Projection(), perturb, seed=2)
    found = gradient.assess(x, y, repeats=6)
    problem, batch, stream = gradient.prepare(x, y)
    seeds = [stream.seed] + [stream.fold_in("estimate", i) for i in range(1, 6)]
    estimates = [
        step(
            replace(problem, source=RedrawnSource(problem.source, Stream(s, 0))), batch, stream
        ).gradients
        for s in seeds
    ]
    LOSS(model(x), y).backward()
    for site, cosine in (("all", found.cosine_of_mean), *found.cosines_of_mean.items()):
        inside = "" if site == "all" else site
        parameters = [p for name, p in model.named_parameters() if name.startswith(inside)]
        true = torch.cat([p.grad.flatten() for p in parameters])
        rows = torch.stack([torch.cat([e[p].flatten() for p in parameters]) for e in estimates])
        mean = rows.mean(0)
        assert cosine == pytest.approx(float(torch.cosine_similarity(mean, true, dim=0)))
        pairs = rows @ rows.T
        signal = float(pairs.sum() - pairs.trace()) / 30  # of <g_i, g_j>, i != j
        limit = found.limit if site == "all" else found.limits[site]
        if signal <= 0:
            assert limit is None
        else:
            expected = float(mean @ true) / (signal * float(true @ true)) ** 0.5
            assert limit == pytest.approx(max(-1, min(1, expected)))


def test_one_estimate_says_nothing_of_the_limit():
    found = assessed(Normal(4), Mean(), 1)
    assert (found.estimates, found.limit, found.limits) == (1, None, {"weight": None})
    assert found.cosine_of_mean == found.cosine
    assert found.cosines_of_mean == found.cosines


def test_the_first_estimate_is_the_next_steps():
    one, several = (assessed(Normal(4), Mean(), repeats) for repeats in (1, 3))
    assert (one.cosine, one.cosines, one.captured) == (
        several.cosine,
        several.cosines,
        several.captured,
    )


def test_a_source_without_random_numbers_is_asked_once():
    found = assessed(StandardBasis(7), Projection(), 100)
    assert found.estimates == 1
    assert found.limit == found.cosine < 0.99


@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
@pytest.mark.parametrize("name", ["dropout", "cnn"])
def test_estimates_have_the_masks_of_the_next_step(kind, name):
    """Each is exact: if the masks of dropout differed, their mean would not be."""
    model, x, y, dimension = build(name)
    found = kind(model, LOSS, Orthogonal(dimension)).assess(x, y, repeats=4)
    assert found.estimates == 4
    assert found.cosine_of_mean == pytest.approx(1, abs=1e-6)
    assert found.limit == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["mlp", "attention", "shared", "dropout"])
def test_the_simulation_finds_the_same(name):
    model, x, y, _ = build(name)
    found = [
        kind(model, LOSS, Normal(3), Mean(), seed=3).assess(x, y, repeats=5)
        for kind in (ForwardGradient, SimulatedGradient)
    ]
    one, other = found
    assert one.cosine_of_mean == pytest.approx(other.cosine_of_mean, abs=1e-8)
    for site, cosine in one.cosines_of_mean.items():
        assert cosine == pytest.approx(other.cosines_of_mean[site], abs=1e-8)
        if one.limits[site] is not None and "key" not in site:  # whose bias has no gradient
            assert one.limits[site] == pytest.approx(other.limits[site], abs=1e-6)


def test_nothing_changes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3)
    ).double()
    x, y = torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    source = Normal(2) + Feedback() + LocalLoss() + RunningMean()
    one, other = (
        ForwardGradient(copy.deepcopy(model), LOSS, source, ControlVariate()) for _ in range(2)
    )
    for _ in range(3):
        for gradient in (one, other):
            gradient(x, y)
        before = torch.get_rng_state()
        one.assess(x, y, repeats=3)
        assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(one.model.buffers(), other.model.buffers(), strict=True):
        assert torch.equal(a, b)
    assert one.step == other.step


def test_random_numbers_from_elsewhere_are_refused():
    """Every estimate would be the same, and all of its error look like a bias."""
    with pytest.raises(ValueError, match=r"request\.random.*Found that .*Unseeded.*Try"):
        assessed(Unseeded(), Mean(), 2)
    assert assessed(Unseeded(), Mean(), 1).estimates == 1


@pytest.mark.parametrize("repeats", [0, 2.0, True])
def test_a_number_of_estimates_is_checked(repeats):
    with pytest.raises(ValueError, match=r"`repeats` should be .* Found .* Try"):
        assessed(Normal(4), Mean(), repeats)


def test_a_batch_that_can_not_be_split_keeps_its_source(monkeypatch):
    model, x, y, _ = build("mlp")
    sources = []

    def once(problem, batch, stream):
        sources.append(problem.source)
        if len(sources) == 1:
            raise SplitError("samples that meet")
        return step(problem, batch, stream)

    gradient = ForwardGradient(model, LOSS, Normal(3), micro_batch=2)
    gradient(x, y)
    monkeypatch.setattr(_estimator, "step", once)
    with pytest.warns(UserWarning, match="splits what belongs together"):
        gradient.assess(x, y, repeats=2)
    assert sources[1] is sources[0]
    assert sources[2] is not sources[1]


def test_products_of_nothing_and_of_noise():
    zero = Products(count=3, along=0.0, mean=0.0, true=1.0, estimates=0.0)
    assert (zero.cosine, zero.limit) == (0, 0)
    noise = Products(count=4, along=0.1, mean=1.0, true=1.0, estimates=16.0)
    assert (noise.variance, noise.limit) == (4.0, None)
    near = Products(count=2, along=1.0, mean=1.0, true=1.0, estimates=2.5)
    assert near.limit == 1  # at most


def test_gradients_are_not_kept():
    model = nn.Linear(3, 2)
    sums = Sums({p: torch.ones_like(p) for p in model.parameters()})
    values = [{p: torch.randn_like(p).double() for p in model.parameters()} for _ in range(3)]
    references = [weakref.ref(value) for found in values for value in found.values()]
    for found in values:
        sums.add(found)
    del values, found
    gc.collect()
    assert all(reference() is None for reference in references)
    assert sums.products(model.parameters()).count == sums.count == 3
    first, second = (astuple(sums.products([p])) for p in model.parameters())
    both = astuple(sums.products(model.parameters()))
    assert both[1:] == pytest.approx([a + b for a, b in zip(first, second, strict=True)][1:])
