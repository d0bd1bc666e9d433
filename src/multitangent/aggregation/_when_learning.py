"""One aggregator where the source learns, and the guesses as they are elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from multitangent.aggregation._aggregator import Aggregator, Measured
from multitangent.aggregation._sum_of_guesses import SumOfGuesses


@dataclass(frozen=True)
class WhenLearning(Aggregator):
    """Another aggregator in the steps in which the source learns, `SumOfGuesses` in the others.

    Steps that learn push tangents anyway, so their directional derivatives cost nothing more. It
    goes with a source that learns in some steps only, such as `Every`: early in training all steps
    learn, and what is measured makes up for what poor guesses miss. The other steps push nothing,
    and `diagnostics` then has no numbers. All guesses of a site add up there, so each should be as
    long as the gradient. If any part of the source learns in every step, all steps measure.

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
