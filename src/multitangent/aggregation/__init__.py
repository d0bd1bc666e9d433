"""Aggregators: from Gram matrix and directional derivatives to coefficients."""

from multitangent.aggregation._aggregator import Aggregator, Measured
from multitangent.aggregation._broadcast import rows_times
from multitangent.aggregation._control_variate import ControlVariate
from multitangent.aggregation._mean import Mean
from multitangent.aggregation._projection import Projection
from multitangent.aggregation._rescaled import Rescaled
from multitangent.aggregation._sum import Sum
from multitangent.aggregation._sum_of_guesses import SumOfGuesses
from multitangent.aggregation._top_k import TopK
from multitangent.aggregation._when_learning import WhenLearning

__all__ = [
    "Aggregator",
    "ControlVariate",
    "Mean",
    "Measured",
    "Projection",
    "Rescaled",
    "Sum",
    "SumOfGuesses",
    "TopK",
    "WhenLearning",
    "rows_times",
]
