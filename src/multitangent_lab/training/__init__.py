"""Training runs: the gradients by name, the loop, comparisons."""

from multitangent_lab._errors import ConfigError, NonFiniteLoss
from multitangent_lab.config import CompareConfig, TrainConfig
from multitangent_lab.training._compare import Comparison, compare
from multitangent_lab.training._data import DatasetModule
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
    "TrainConfig",
    "TrainResult",
    "build_gradient",
    "compare",
    "evaluate_best",
    "own_model",
    "to_toml",
    "train",
]
