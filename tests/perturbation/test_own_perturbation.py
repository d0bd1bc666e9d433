"""A perturbation that a user writes, with public names alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models_for_tests import gradients, relative_error
from multitangent import ForwardGradient, Normal, SimulatedGradient, Weights
from multitangent.objective import Evaluation

LOSS = nn.CrossEntropyLoss()


class Biases:
    """Perturbs the biases of a model."""

    def bind(self, objective):
        return BoundBiases(objective)


class BoundBiases:
    def __init__(self, objective):
        self.objective = objective
        named = objective.model.named_parameters()
        self.biases = {name: p for name, p in named if name.endswith("bias")}

    def parameters_by_site(self):
        return {name: [p] for name, p in self.biases.items()}

    def __call__(self, batch, stream, tangents):
        return BiasRun(self, batch, stream, tangents)


class BiasRun:
    per_sample = False

    def __init__(self, bound, batch, stream, tangents):
        self.bound, self.batch, self.stream = bound, batch, stream
        self.scale = bound.objective.scale(batch)
        for name, bias in bound.biases.items():
            tangents.add(name, bias.detach())

    def prepare(self, *, certainly=False):
        return None

    def record(self, inject):
        return self.evaluate(self.batch, inject)

    def evaluate(self, part, inject, statistics="frozen", *, reuse=False):
        objective, biases = self.bound.objective, self.bound.biases
        replaced = {n: inject(b.detach(), n, slice(None)) for n, b in biases.items()}
        with objective.mode(part, self.stream, "update"):
            output = objective.output(part, replaced)
            return Evaluation(objective.losses(output, part), output)

    def pullback(self, gradients):
        return {bias: gradients[name] for name, bias in self.bound.biases.items()}


@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
@pytest.mark.parametrize("micro_batch", ["auto", 2])
def test_it_is_accepted_and_gives_what_ours_gives(kind, micro_batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    x, y = torch.randn(8, 5).double(), torch.randint(3, (8,))
    estimates = []
    for perturb in (Biases(), Weights()):
        gradient = kind(model, LOSS, Normal(4), perturb=perturb, micro_batch=micro_batch)
        gradient(x, y)
        estimates.append(gradients(model))
    assert relative_error(*estimates) <= 1e-12
    assert ForwardGradient(model, LOSS, Normal(20), perturb=Biases()).assess(x, y).cosine > 0.999


def test_what_cannot_be_bound_is_refused():
    with pytest.raises(ValueError, match="a perturbation such as Activations"):
        ForwardGradient(nn.Linear(2, 2), LOSS, perturb=object())
