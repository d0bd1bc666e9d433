"""Closed-form functions, and descent on them as one batch."""

from __future__ import annotations

import pytest
import torch

from multitangent import (
    ControlVariate,
    Feedback,
    Mean,
    Normal,
    Projection,
    Rademacher,
    forward_gradient,
)
from multitangent.aggregation import TopK
from multitangent.learning_rate import StepRule
from multitangent.tangents import Orthogonal, RunningMean, StandardBasis, Stream
from multitangent_lab.functions import FUNCTIONS, Estimate, Function, TrueGradient, descend

F64 = torch.float64


@pytest.mark.parametrize(
    ("name", "start", "minimum"),
    [
        ("sphere", 8.0, torch.zeros(8)),
        ("rosenbrock", 104.0 + 6, torch.ones(8)),
        ("styblinski-tang", 0.0, torch.full((8,), -2.903534027771177, dtype=F64)),
    ],
)
def test_functions_start_and_end_where_the_paper_says(name, start, minimum):
    function = FUNCTIONS[name]
    assert function(function.start_point(8)) == start
    least = function(minimum.to(F64))
    assert float(least) == pytest.approx(8 * function.minimum, abs=1e-10)
    x = minimum.to(F64).requires_grad_()
    (slope,) = torch.autograd.grad(function(x), x)
    assert slope.abs().max() < 1e-12
    around = minimum + 0.1 * torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    assert (function(around.to(F64)) > least).all()
    assert function.steps == (25_000 if name == "rosenbrock" else 1000)


def test_styblinski_tang_at_its_minimum():
    assert FUNCTIONS["styblinski-tang"].minimum == pytest.approx(-39.16616570377142, abs=1e-12)


ESTIMATES = {
    "projection": Estimate(Normal(3), Projection()),
    "mean": Estimate(Rademacher(2), Mean()),
    "best": Estimate(Orthogonal(3), TopK(1)),
    "together": Estimate(Normal(2) + StandardBasis(2), Projection()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("estimate", ESTIMATES.values(), ids=ESTIMATES)
@pytest.mark.parametrize("rates", [1, 4])
def test_an_estimate_is_made_of_the_functions_directional_derivatives(name, estimate, rates):
    function, n = FUNCTIONS[name], 6
    points = torch.randn(rates, 2, n, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = estimate(function, points, step=5)
    gradient = TrueGradient()(function, points, 5)
    x = points[0, 0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(x), x)
    torch.testing.assert_close(gradient[0, 0], expected)
    for seed in range(2):
        one = Estimate(_Fixed(estimate.tangents, seed), estimate.aggregator)
        for rate in range(rates):
            alone = forward_gradient(function, points[rate, seed], one.tangents, one.aggregator)[1]
            torch.testing.assert_close(found[rate, seed], alone, rtol=1e-9, atol=1e-9)


class _Fixed(Normal):
    """The tangents that a seed has in step 5 of a descent."""

    def __new__(cls, *_):
        return object.__new__(cls)

    def __init__(self, source, seed):
        object.__setattr__(self, "num_tangents", source.num_tangents)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "seed", seed)

    def draw(self, request):
        from dataclasses import replace

        own = replace(request, stream=Stream(0, 5), samples=range(2))
        return (
            self.source.draw(own)[:, [self.seed % 2]]
            if _own(self.source, own)
            else (self.source.draw(own))
        )

    def mixing(self, gram, dimension):
        return self.source.mixing(gram, dimension)


def _own(source, request):
    return source.draw(request).shape[1] > 1


def test_trajectories_do_not_depend_on_their_company():
    function, estimate = FUNCTIONS["styblinski-tang"], ESTIMATES["projection"]
    rates = torch.tensor([1e-3, 0.03, 10.0, 0.01])
    together = descend(function, 5, estimate, rates, seeds=4, steps=150, dtype=F64)
    for i, rate in enumerate(rates):
        alone = descend(function, 5, estimate, rate[None], seeds=2, steps=150, dtype=F64)
        torch.testing.assert_close(alone.best[0], together.best[i, :2])
        assert torch.equal(alone.best_step[0], together.best_step[i, :2])
        assert torch.equal(alone.steps[0], together.steps[i, :2])


def test_guesses_are_learned_by_every_trajectory_for_itself():
    """However many run beside it, and whether or not others have been stopped."""
    function = FUNCTIONS["styblinski-tang"]
    estimate = Estimate(Normal(2) + RunningMean(decay=0.5), Projection())
    rates = torch.tensor([10.0, 1e-3, 0.03, 0.01])  # the first diverges at once
    together = descend(function, 5, estimate, rates, seeds=4, steps=150, dtype=F64)
    for i, rate in enumerate(rates):
        alone = descend(function, 5, estimate, rate[None], seeds=2, steps=150, dtype=F64)
        torch.testing.assert_close(alone.best[0], together.best[i, :2])
        assert torch.equal(alone.steps[0], together.steps[i, :2])


def test_the_previous_gradient_of_a_function_is_a_tangent():
    """On the sphere one rate keeps the true gradient's direction, of which more is found."""
    function, estimate = (
        FUNCTIONS["sphere"],
        Estimate(Normal(1) + RunningMean(decay=0.0), Projection()),
    )
    estimate = estimate.init()
    points = torch.ones(1, 1, 40, dtype=F64)
    lengths = [float(estimate(function, points, step).norm()) for step in range(30)]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 0.5 * 2 * 40**0.5 > 4 * lengths[0]


def test_functions_have_no_output_to_learn_from():
    estimate = Estimate(Normal(2) + Feedback(), Projection())
    with pytest.raises(ValueError, match="should not depend on a model's output"):
        descend(FUNCTIONS["sphere"], 4, estimate, torch.tensor([0.1]))


def test_gains_that_count_trajectories_are_refused():
    estimate = Estimate(Normal(2) + RunningMean(), ControlVariate())
    with pytest.raises(ValueError, match=r"how many trajectories .* Try ControlVariate\(0.1\)"):
        descend(FUNCTIONS["sphere"], 4, estimate, torch.tensor([0.1]))


@pytest.mark.parametrize("gradient", [Estimate(Normal(2), Projection()), TrueGradient()])
def test_rosenbrock_of_one_variable_is_zero(gradient):
    found = descend(FUNCTIONS["rosenbrock"], 1, gradient, torch.tensor([0.1, 1.0]), seeds=2)
    assert (found.best == 0).all() and (found.steps == 50).all()


def test_stops_without_improvement():
    # At rate 1 the true gradient of the sphere leads to the mirror image and back.
    found = descend(FUNCTIONS["sphere"], 3, TrueGradient(), torch.tensor([1.0, 0.5]), seeds=1)
    assert found.best.tolist() == [[3.0], [0.0]]
    assert found.best_step.tolist() == [[0], [1]]
    assert found.steps.tolist() == [[50], [51]]
    fewer = descend(
        FUNCTIONS["sphere"], 3, TrueGradient(), torch.tensor([1.0]), seeds=1, patience=7
    )
    assert fewer.steps.tolist() == [[7]]


def test_divergence_is_the_end_of_one_trajectory_only():
    rates = torch.tensor([1e3, 0.5])
    for function in FUNCTIONS.values():
        found = descend(function, 4, ESTIMATES["projection"], rates, seeds=2, steps=60)
        assert found.best.isfinite().all()
        assert found.steps[0].max() < 60


def test_the_step_at_which_a_target_is_reached():
    found = descend(
        FUNCTIONS["sphere"], 1, TrueGradient(), torch.tensor([0.25, 1e-6]), seeds=1, steps=9,
        target=0.07,
    )  # fmt: skip
    assert found.reached.tolist() == [[2], [-1]]  # x halves: 1, 1/4, 1/16


def test_one_more_function_is_one_entry():
    absolute = Function("absolute", lambda x: x.abs().sum(-1), (1.0, 2.0), steps=40)
    found = descend(absolute, 2, TrueGradient(), torch.tensor([0.25]), seeds=1)
    assert found.best.tolist() == [[0.0]]


def test_self_set_rates_are_the_inverse_curvature_of_a_quadratic():
    rule = StepRule()
    found = descend(FUNCTIONS["sphere"], 64, Estimate(Normal(4), Projection()), rule, seeds=3)
    assert found.best.max() < 1e-10
    assert found.learning_rates.shape == (1,)
    assert float(found.learning_rates) == pytest.approx(0.5, rel=1e-3)
    assert rule.learning_rate is None  # the caller's own is left alone


@pytest.mark.parametrize("name", ["sphere", "styblinski-tang"])
def test_self_set_rates_reach_what_a_search_reaches(name):
    function, estimate = FUNCTIONS[name], Estimate(Normal(16), Projection())
    searched = descend(function, 64, estimate, torch.logspace(-3, 0, 10), seeds=5)
    least = searched.best.mean(1).min()
    own = descend(function, 64, estimate, StepRule(), seeds=5).best.mean()
    start = float(function(function.start_point(64)))
    assert own <= least + 0.05 * (start - 64 * function.minimum)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"learning_rates": torch.tensor([0.1, -1.0])},
            "`learning_rates` should be a vector of positive.*-1",
        ),
        ({"learning_rates": torch.tensor(0.1)}, "`learning_rates` should be a vector"),
        (
            {"learning_rates": torch.tensor([float("nan")])},
            "`learning_rates` should be a vector of positive",
        ),
        ({"dimension": 0}, "`dimension` should be at least 1. Found 0"),
        ({"seeds": 0}, "`seeds` should be at least 1. Found 0"),
        ({"patience": 0}, "`patience` should be at least 1. Found 0"),
        ({"steps": 0}, "`steps` should be at least 1. Found 0"),
        (
            {"learning_rates": 0.1},
            "`learning_rates` should be a tensor or a StepRule. Found float. Try torch",
        ),
        ({"function": torch.sum}, "`function` should be a Function. Found builtin"),
    ],
)
def test_errors(arguments, message):
    usual = {"function": FUNCTIONS["sphere"], "dimension": 2, "learning_rates": torch.tensor([0.1])}
    with pytest.raises((TypeError, ValueError), match=message):
        descend(gradient=TrueGradient(), **usual | arguments)
