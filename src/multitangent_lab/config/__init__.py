"""What to run, as plain values: importing this loads neither torch nor lightning."""

from multitangent_lab._errors import ConfigError
from multitangent_lab.config._bench import BenchConfig
from multitangent_lab.config._choices import check_sources
from multitangent_lab.config._doctor import DOCTOR_PRESETS, DoctorConfig
from multitangent_lab.config._fuzz import FuzzConfig
from multitangent_lab.config._gradient_names import WITH_GUESSES, ChosenName, GradientName
from multitangent_lab.config._learning_rates import default_learning_rate
from multitangent_lab.config._presets import COMPARE_PRESETS, TRAIN_PRESETS
from multitangent_lab.config._reproduce import FIGURES, NETWORKS, STUDIES, ReproduceConfig
from multitangent_lab.config._search import SearchConfig, SuggestConfig
from multitangent_lab.config._train import CompareConfig, TrainConfig, as_json

__all__ = [
    "COMPARE_PRESETS",
    "DOCTOR_PRESETS",
    "FIGURES",
    "NETWORKS",
    "STUDIES",
    "TRAIN_PRESETS",
    "WITH_GUESSES",
    "BenchConfig",
    "ChosenName",
    "CompareConfig",
    "ConfigError",
    "DoctorConfig",
    "FuzzConfig",
    "GradientName",
    "ReproduceConfig",
    "SearchConfig",
    "SuggestConfig",
    "TrainConfig",
    "as_json",
    "check_sources",
    "default_learning_rate",
]
