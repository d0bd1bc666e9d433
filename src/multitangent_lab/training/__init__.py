"""Training runs: configurations, the loop, comparisons.

Names are handed on when they are first used, so that `multitangent_lab.training.config` can be
imported without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multitangent_lab._errors import ConfigError, NonFiniteLoss
    from multitangent_lab.training._compare import Comparison, compare
    from multitangent_lab.training._data import DatasetModule
    from multitangent_lab.training._module import GradientModule
    from multitangent_lab.training._result import TrainResult
    from multitangent_lab.training._train import train
    from multitangent_lab.training.config import CompareConfig, TrainConfig

_HOMES = {
    "CompareConfig": "config",
    "Comparison": "_compare",
    "ConfigError": "_errors",
    "DatasetModule": "_data",
    "GradientModule": "_module",
    "NonFiniteLoss": "_errors",
    "TrainConfig": "config",
    "TrainResult": "_result",
    "compare": "_compare",
    "train": "_train",
}

__all__ = [
    "CompareConfig",
    "Comparison",
    "ConfigError",
    "DatasetModule",
    "GradientModule",
    "NonFiniteLoss",
    "TrainConfig",
    "TrainResult",
    "compare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
