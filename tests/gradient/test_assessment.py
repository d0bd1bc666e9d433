"""An estimate beside the true gradient."""

from __future__ import annotations

import copy

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
    Normal,
    OwnValue,
    Projection,
    SimulatedGradient,
)
from multitangent.engine import Backpropagation
from multitangent.tangents import Orthogonal, RunningMean, Tangents

LOSS = nn.CrossEntropyLoss()
KINDS = [ForwardGradient, SimulatedGradient]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "attention", "shared", "dropout"])
@pytest.mark.parametrize("perturb", ["activations", "weights", Activations(output="exact")])
def test_an_exact_estimate_has_the_true_gradients_direction(kind, name, perturb):
    model, x, y, dimension = build(name)
    count = sum(p.numel() for p in model.parameters()) if perturb == "weights" else dimension
    found = kind(model, LOSS, Orthogonal(count), perturb=perturb).assess(x, y)
    assert found.cosine == pytest.approx(1, abs=1e-6)
    # That of a key's bias in attention is zero: it has no direction.
    assert all(cosine == pytest.approx(1, abs=1e-3) or abs(cosine) < 1e-3 or "key" in site
               for site, cosine in found.cosines.items())  # fmt: skip
    assert found.captured["all"] == pytest.approx(1, abs=1e-6)


def test_cosines_and_shares_are_those_of_the_gradients():
    """Two sites, each with a known gradient; shares from a projection written out."""
    model, x, y, _ = build("mlp")
    source = Normal(2) + OwnValue()
    gradient = ForwardGradient(model, LOSS, source, perturb=Activations(share="sample"), seed=3)
    found = gradient.assess(x, y)
    gradient(x, y)  # the same step
    estimated = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    LOSS(model(x), y).backward()
    true = {n: p.grad for n, p in model.named_parameters()}
    for site in ("1", "3", "5"):
        one, other = (
            torch.cat([g[f"{site}.{n}"].flatten() for n in ("weight", "bias")])
            for g in (estimated, true)
        )
        expected = float(torch.cosine_similarity(one, other, dim=0))
        assert found.cosines[site] == pytest.approx(expected)
    gradient.step -= 1
    problem, batch, stream = gradient.prepare(x, y)
    drawn = Tangents(source, stream)
    run = problem.perturbation(batch, stream, drawn)
    _, perturbed = Backpropagation().gradients(run, drawn)
    values = torch.cat([g.flatten(1) for g in perturbed.values()], 1)  # [B, n]
    rows = [b.rows().expand(-1, 6, *b.request.shape) for b in drawn.blocks.values()]
    tangents = torch.cat([r.flatten(2) for r in rows], 2).transpose(0, 1)  # [B, K, n]
    for place, own in ((repr(Normal(2)), [0, 1]), (repr(OwnValue()), [2]), ("all", [0, 1, 2])):
        inside = torch.linalg.pinv(tangents[:, own]) @ tangents[:, own] @ values.unsqueeze(2)
        share = inside.square().sum() / values.square().sum()
        assert found.captured[place] == pytest.approx(float(share))


def test_sources_of_one_text_are_told_apart():
    model, x, y, _ = build("mlp")
    found = ForwardGradient(model, LOSS, Normal(2) + Normal(2)).assess(x, y)
    names = ["Normal(num_tangents=2)", "Normal(num_tangents=2) #2", "all"]
    assert sorted(found.captured) == names
    assert found.captured[names[0]] != found.captured[names[1]]


def test_parameters_of_two_sites_count_once():
    lower, upper = nn.Linear(5, 5).double(), nn.Linear(5, 3).double()

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = lower, nn.Linear(5, 5).double(), upper
            self.second.weight = lower.weight

        def forward(self, x):
            return self.head(self.second(self.first(x).tanh()).tanh())

    model, x, y = Tied(), torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    gradient = ForwardGradient(model, LOSS, Normal(3))
    found = gradient.assess(x, y).cosine
    gradient(x, y)
    estimated = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    LOSS(model(x), y).backward()
    true = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert found == pytest.approx(float(torch.cosine_similarity(estimated, true, dim=0)))


def test_what_is_trainable_may_change():
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(3))
    model[1].requires_grad_(False)
    assert sorted(gradient.assess(x, y).cosines) == ["3", "5"]


@pytest.mark.parametrize("statistics", ["frozen", "coupled"])
def test_shares_are_of_what_the_simulation_differentiates(statistics):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    gradient = SimulatedGradient(model, LOSS, Orthogonal(15), statistics=statistics)
    assert gradient.assess(x, y).captured["all"] == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes(kind):
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    source = Normal(2) + Feedback() + LocalLoss() + RunningMean()
    one, other = (
        kind(copy.deepcopy(model), LOSS, source, ControlVariate(), perturb=Activations())
        for _ in range(2)
    )
    for _ in range(3):
        for gradient in (one, other):
            gradient(x, y)
        before = torch.get_rng_state()
        one.assess(x, y)
        assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(one.model.buffers(), other.model.buffers(), strict=True):
        assert torch.equal(a, b)
    assert one.step == other.step


def test_batch_statistics_count_as_backpropagation_counts_them():
    """With infinitely many tangents frozen statistics still miss a part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(16, 5).double(), torch.randint(0, 3, (16,))
    perturb = Activations(sites=["0", "1", "3"])
    found = ForwardGradient(model, LOSS, Orthogonal(15), Projection(), perturb).assess(x, y)
    assert found.captured["all"] == pytest.approx(1)
    assert found.cosines["1"] == pytest.approx(1)  # behind it there is no normalisation
    assert found.cosines["0"] < 0.999
