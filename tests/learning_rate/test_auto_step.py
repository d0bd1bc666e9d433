"""Slope and curvature along a direction, and the rate that follows from them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from multitangent import (
    AutoStep,
    ForwardGradient,
    Mean,
    Normal,
    Projection,
    SimulatedGradient,
)
from multitangent.learning_rate import StepRule, suggest

LOSS = nn.CrossEntropyLoss()


class Everything(nn.Module):
    """Convolution, batch and layer normalisation, attention, dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.batch_norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(dropout)
        self.attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.layer_norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.dropout(torch.tanh(self.batch_norm(self.convolution(x))))
        x = self.attention(x.flatten(2).mT)
        return self.head(self.layer_norm(x).mean(1))


def example(dropout=0.0, size=6):
    torch.manual_seed(0)
    model = Everything(dropout).double()
    return model, torch.randn(size, 1, 6, 6).double(), torch.randint(3, (size,))


def directions(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss", [LOSS, nn.CrossEntropyLoss(reduction="sum")], ids=["mean", "sum"])
def test_slope_and_curvature_of_everything(loss):
    model, x, y = example()
    gradient = ForwardGradient(model, loss, Normal(2))
    gradient(x, y)
    u = directions(model)
    before = copy.deepcopy(model.state_dict())
    found = gradient.along(u)
    for name, value in model.state_dict().items():  # batch statistics too
        assert torch.equal(value, before[name])

    def value(t):
        moved = {name: p.detach() + t * u[name] for name, p in model.named_parameters()}
        return loss(functional_call(model, moved, (x,)), y)

    h = 1e-4
    ahead, here, behind = value(h), value(0), value(-h)
    torch.testing.assert_close(found.loss, here)
    torch.testing.assert_close(found.slope, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found.curvature, (ahead - 2 * here + behind) / h**2, rtol=1e-4, atol=1e-4
    )
    assert found.slopes.shape == found.curvatures.shape == (6,)
    alone = gradient.along(u, curvature=False)
    torch.testing.assert_close(alone.slope, found.slope)
    assert alone.curvatures.isnan().all()


@pytest.mark.parametrize("micro_batch", [1, 2, 6])
def test_dropout_and_micro_batches(micro_batch):
    model, x, y = example(dropout=0.5)
    model.batch_norm.eval()
    gradient = ForwardGradient(model, LOSS, Normal(2), micro_batch=micro_batch)
    other = ForwardGradient(model, LOSS, Normal(2))
    gradient(x, y)
    other(x, y)
    u = directions(model)
    found, expected = gradient.along(u), other.along(u)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.slopes, expected.slopes)
    torch.testing.assert_close(found.curvatures, expected.curvatures)


def test_slopes_along_a_gradient_are_its_squared_length():
    model, x, y = example()
    true = SimulatedGradient(model, LOSS, Normal(2), statistics="coupled")
    true(x, y)
    model.zero_grad()
    LOSS(model(x), y).backward()
    u = {name: p.grad.clone() for name, p in model.named_parameters()}
    length = sum(value.square().sum() for value in u.values())
    found = true.along(u)
    torch.testing.assert_close(found.slope, length)
    variance = found.slopes.var() / 6
    torch.testing.assert_close(found.slope_variance, variance)


def test_one_sample_has_no_noise():
    model, x, y = example()
    model.eval()
    # PyTorch's backward of batch normalisation is wrong for one image whose gradient lies in
    # memory with the channels last, so that there is nothing to compare with.
    gradient = ForwardGradient(model, LOSS, Normal(2), verify=False)
    gradient(x[:1], y[:1])
    assert gradient.along(directions(model)).slope_variance == 0


def test_directions_for_some_parameters():
    model, x, y = example()
    gradient = ForwardGradient(model, LOSS, Normal(2))
    with pytest.raises(RuntimeError, match="`along` should be called after a step"):
        gradient.along({})
    gradient(x, y)
    u = directions(model)
    zeros = {name: torch.zeros_like(value) for name, value in u.items()}
    some = {"head.weight": u["head.weight"]}
    torch.testing.assert_close(gradient.along(some).slope, gradient.along(zeros | some).slope)
    with pytest.raises(ValueError, match=r"Found \[1\] for 'head.bias', which is \[3\]"):
        gradient.along({"head.bias": torch.ones(1)})
    with pytest.raises(ValueError, match="for 'nowhere', which is no parameter of that name"):
        gradient.along({"nowhere": torch.ones(1)})


def quadratic(curvatures):
    """A model whose loss is ``sum_i h_i (w_i - b_i)^2 / 2``, with b random for every sample."""
    h = torch.tensor(curvatures).double()

    def loss(output, target):
        return (0.5 * h * (output - target) ** 2).sum(1)

    class Identity(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(len(curvatures)).double())

        def forward(self, x):
            return self.weight + torch.zeros(len(x), 1).double()

    return Identity(), loss


def descend(model, loss, optimizer, gradient, steps, noise=0.0):
    generator = torch.Generator().manual_seed(1)
    width = len(model.weight)
    for _ in range(steps):
        target = noise * torch.randn(8, width, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        gradient(torch.zeros(8, 1).double(), target)
        optimizer.step()
    return float(loss(model.weight.detach()[None], torch.zeros(1, width)).mean())


def auto_step(model, loss, inner=None, **options):
    gradient = ForwardGradient(model, loss, Normal(2), Projection(), perturb="weights")
    inner = inner or torch.optim.SGD(model.parameters(), lr=1.0)
    return AutoStep(inner, gradient, **options), gradient


def test_rate_of_a_quadratic():
    model, loss = quadratic([4.0, 4.0, 4.0])
    optimizer, gradient = auto_step(model, loss, every=1)
    assert optimizer.learning_rate is None
    assert descend(model, loss, optimizer, gradient, 200) < 1e-12
    assert optimizer.learning_rate == pytest.approx(0.25)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.5),
        lambda parameters: torch.optim.Adam(parameters, lr=10.0),
    ],
)
def test_any_optimizer_any_scale(make, scale):
    model, loss = quadratic([scale, 3 * scale, 9 * scale])
    optimizer, gradient = auto_step(model, loss, make(model.parameters()), every=1)
    first = float(loss(model.weight.detach()[None], torch.zeros(1, 3)).mean())
    assert descend(model, loss, optimizer, gradient, 400) < 1e-3 * first


def test_noise_makes_the_rate_smaller():
    rates = []
    for noise in (0.0, 3.0):
        model, loss = quadratic([1.0] * 4)
        optimizer, gradient = auto_step(model, loss, every=1)
        descend(model, loss, optimizer, gradient, 600, noise)
        rates.append(optimizer.learning_rate)
    assert rates[0] == pytest.approx(1.0)
    assert 0 < rates[1] < 0.7


def test_negative_curvature_lets_the_rate_grow_and_positive_stops_it():
    rule = StepRule()
    one, none = torch.tensor(1.0), torch.tensor(0.0)
    first = rule.begin(-one, -one)
    assert first == pytest.approx(0.1)
    grown = rule.update(-2 * one, -one, one, none, -one)
    assert grown == pytest.approx(0.1 * 1.02)
    for _ in range(100):
        grown = rule.update(-2 * one, -one, one, none, -one)
    assert grown == pytest.approx(0.1 * 1.02**101, rel=1e-4)
    steep = 1e6 * one
    stopped = rule.update(steep * grown - 2, steep, one, none, -one)  # where slope -2 has led
    assert stopped < 1e-3 * grown


def test_values_that_are_not_finite_change_nothing():
    rule = StepRule()
    one, none = torch.tensor(1.0), torch.tensor(0.0)
    rule.begin(-one, one)
    before = rule.update(-0.9 * one, one, one, none, -one).clone()
    for slope, length in (
        (torch.tensor(torch.nan), one),
        (-one, none),
        (torch.tensor(torch.inf), one),
    ):
        assert rule.update(slope, one, length, none, -one) == before
    with pytest.raises(RuntimeError, match="`update` should follow `begin`"):
        StepRule().update(-one, one, one, none, -one)


def test_a_rate_of_many_trajectories_is_that_of_each():
    generator = torch.Generator().manual_seed(0)
    slopes, curvatures = torch.randn(2, 30, 5, generator=generator).double()
    together = StepRule()
    together.begin(-slopes[0].abs(), curvatures[0])
    alone = [StepRule() for _ in range(5)]
    for i, rule in enumerate(alone):
        rule.begin(-slopes[0, i].abs(), curvatures[0, i])
    for slope, curvature in zip(slopes[1:], curvatures[1:], strict=True):
        args = slope, curvature, torch.ones(5), 0.1 * slope.abs(), -slope.abs()
        together.update(*args)
        for i, rule in enumerate(alone):
            rule.update(*[a[i] for a in args])
    assert together.learning_rate is not None
    torch.testing.assert_close(
        together.learning_rate, torch.stack([rule.learning_rate for rule in alone])
    )


def test_resumes():
    def begin():
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        gradient = ForwardGradient(model, LOSS, Normal(2))
        inner = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        return model, gradient, AutoStep(inner, gradient, every=2)

    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(12)]

    def go(model, gradient, optimizer, some):
        for x, y in some:
            optimizer.zero_grad()
            gradient(x, y)
            optimizer.step()

    whole = begin()
    go(*whole, batches)
    first = begin()
    go(*first, batches[:5])
    states = [copy.deepcopy(part.state_dict()) for part in first]
    second = begin()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    go(*second, batches[5:])
    assert torch.equal(second[0].weight, whole[0].weight)
    assert second[2].learning_rate == whole[2].learning_rate


def test_schedulers_closures_frozen_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    gradient = ForwardGradient(model, LOSS, Normal(2))
    optimizer = AutoStep(torch.optim.SGD(model.parameters(), lr=1.0), gradient)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    frozen = model[0].weight.clone()

    def closure():
        optimizer.zero_grad()
        return gradient(x, y)

    before = model[2].weight.clone()
    assert optimizer.step(closure).isfinite()
    assert not torch.equal(model[2].weight, before)
    assert torch.equal(model[0].weight, frozen)
    scheduler.step()
    before = model[2].weight.clone()
    optimizer.step(closure)  # the scheduler has made the inner rate 0
    assert torch.equal(model[2].weight, before)
    assert repr(optimizer).startswith("AutoStep(SGD")


def test_bad_input():
    model, loss = quadratic([1.0])
    with pytest.raises(ValueError, match=r"`every` should be at least 1\. Found 0"):
        auto_step(model, loss, every=0)
    other = torch.optim.SGD([*model.parameters(), torch.ones(2, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match=r"Found others, of shapes \[\[2\]\]"):
        auto_step(model, loss, other)
    gradient = auto_step(model, loss)[1]
    gradient(torch.zeros(8, 1).double(), torch.zeros(8, 1).double())
    with pytest.raises(ValueError, match="`direction` should hold a tensor at least"):
        gradient.along({})


def test_the_rate_of_the_mean_in_few_dimensions():
    """Its steps are of very different length: E|u|^2 weighs, not the mean of ratios."""
    model, loss = quadratic([2.0] * 4)
    gradient = ForwardGradient(model, loss, Normal(1), Mean(), perturb="weights")
    rule = StepRule(shortest=1000.0)  # an average, with nothing forgotten
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = AutoStep(inner, gradient, rule, every=1)
    for _ in range(1000):
        with torch.no_grad():
            model.weight.fill_(1.0)  # the same problem again and again
        optimizer.zero_grad()
        gradient(torch.zeros(2, 1).double(), torch.zeros(2, 4).double())
        optimizer.step()
    expected = suggest(0.5, num_tangents=1, dimension=4, aggregator=Mean())
    _, promised, curved, *_ = rule.state_dict()["means"]
    assert float(promised / curved) == pytest.approx(expected, rel=0.2)
