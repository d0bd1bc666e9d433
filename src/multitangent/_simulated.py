"""The same gradient from backpropagation: the oracle."""

from __future__ import annotations

from torch import Tensor

from multitangent._estimator import GradientEstimator
from multitangent.perturbation import Sweep


class SimulatedGradient(GradientEstimator):
    """Computes what `ForwardGradient` computes, from the true gradient.

    Backpropagation gives the gradient of the perturbed values, whose products with the same
    tangents are the directional derivatives. This is how the paper's network results were obtained.
    It serves as the oracle of the tests and to study many tangents cheaply. Arguments and returns
    are those of `ForwardGradient`.

    Examples:
        >>> import torch
        >>> from multitangent import SimulatedGradient, StandardBasis
        >>> model = torch.nn.Linear(2, 1)
        >>> gradient = SimulatedGradient(model, torch.nn.MSELoss(), StandardBasis(1))
        >>> value = gradient(torch.ones(3, 2), torch.zeros(3, 1))
        >>> model.bias.grad.shape
        torch.Size([1])
    """

    def _differentiate(self, sweep: Sweep) -> tuple[Tensor, Tensor]:
        return sweep.backpropagate()
