"""One aggregator where the source learns, and the guesses as they are elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from multitangent.aggregation._aggregator import Aggregator, Measured
from multitangent.aggregation._sum_of_guesses import SumOfGuesses


@dataclass(frozen=True)
class WhenLearning(Aggregator):
    """Another aggregator in the steps in which the source learns, `SumOfGuesses` in the others.

    Steps that learn push tangents anyway, so their directional derivatives cost nothing more. Early
    in training, when guesses are poor, all steps learn, and what is measured makes up for what
    guesses miss. The other steps push nothing. It goes with a source that learns in some steps
    only, such as `Every`.

    Args:
        inner: The aggregator of the steps that learn.

    Examples:
        >>> from multitangent import ControlVariate
        >>> aggregator = WhenLearning(ControlVariate())
        >>> aggregator.of_step(learns=True), aggregator.of_step(learns=False)
        (ControlVariate(gain='auto'), SumOfGuesses())
    """

    inner: Aggregator

    def of_step(self, learns: bool) -> Aggregator:
        return self.inner if learns else SumOfGuesses()

    def coefficients(self, measured: Measured) -> Tensor:
        return self.inner.coefficients(measured)
