"""The same gradient from backpropagation: the oracle."""

from __future__ import annotations

from typing import Any, Literal

from multitangent.engine import Backpropagation, Engine, Trial
from multitangent.gradient._estimator import GradientEstimator

_STATISTICS = ("frozen", "coupled")


class SimulatedGradient(GradientEstimator):
    """Computes what `ForwardGradient` computes, from the true gradient.

    Backpropagation gives the gradient of the perturbed values, whose products with the same
    tangents are the directional derivatives. This is how the paper's network results were obtained.
    It serves as the oracle of the tests and to study many tangents cheaply. Arguments and returns
    are those of `ForwardGradient`, and one more.

    Args:
        statistics: Batch normalisation in training mode ties the samples together.
            ``"frozen"`` holds its mean and variance constant, as a forward sweep has to;
            ``"coupled"`` differentiates through them, as backpropagation and the paper do.

    Examples:
        >>> import torch
        >>> from multitangent import SimulatedGradient
        >>> from multitangent.tangents import StandardBasis
        >>> model = torch.nn.Linear(2, 1)
        >>> gradient = SimulatedGradient(model, torch.nn.MSELoss(), StandardBasis(1))
        >>> value = gradient(torch.ones(3, 2), torch.zeros(3, 1))
        >>> model.bias.grad.shape
        torch.Size([1])
    """

    def __init__(
        self,
        *args: Any,
        statistics: Literal["frozen", "coupled"] = "frozen",
        **kwargs: Any,
    ) -> None:
        if statistics not in _STATISTICS:
            raise ValueError(
                f"`statistics` should be one of {list(_STATISTICS)}. Found {statistics!r}."
            )
        self.statistics = statistics
        super().__init__(*args, **kwargs)

    def _engine(self, trial: Trial) -> Engine:
        return Backpropagation(self.statistics)

    def _options(self) -> str:
        rest = super()._options()
        return rest if self.statistics == "frozen" else f"{rest}, statistics={self.statistics!r}"
