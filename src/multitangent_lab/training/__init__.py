"""Training runs: the gradients by name, the loop, comparisons."""

from multitangent_lab._errors import ConfigError, NonFiniteLoss
from multitangent_lab.config import CompareConfig, TrainConfig
from multitangent_lab.training._clock import ABOVE, Reached, reached, seconds_per_step
from multitangent_lab.training._compare import Comparison, compare
from multitangent_lab.training._data import DatasetModule
from multitangent_lab.training._draw_clock import draw_clock
from multitangent_lab.training._model import own_model
from multitangent_lab.training._module import GradientModule
from multitangent_lab.training._named_gradients import (
    AGGREGATORS,
    SOURCES,
    Backpropagation,
    Gradient,
    build_gradient,
)
from multitangent_lab.training._result import TrainResult
from multitangent_lab.training._run_folder import to_toml
from multitangent_lab.training._train import evaluate_best, train

__all__ = [
    "ABOVE",
    "AGGREGATORS",
    "SOURCES",
    "Backpropagation",
    "CompareConfig",
    "Comparison",
    "ConfigError",
    "DatasetModule",
    "Gradient",
    "GradientModule",
    "NonFiniteLoss",
    "Reached",
    "TrainConfig",
    "TrainResult",
    "build_gradient",
    "compare",
    "draw_clock",
    "evaluate_best",
    "own_model",
    "reached",
    "seconds_per_step",
    "to_toml",
    "train",
]
