"""What to search or to suggest, as plain values: importing this loads no torch.

Fields marked `Suppress` are no options of the command line, for the sake of a short `--help`; they
are set in Python or in a `--config` file.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Suppress

from multitangent_lab._errors import ConfigError
from multitangent_lab.config._checks import check_fields
from multitangent_lab.config._choices import with_implied
from multitangent_lab.config._gradient_names import WITH_GUESSES, GradientName
from multitangent_lab.config._settings import AT_LEAST, Settings
from multitangent_lab.config._train import TrainConfig, as_json, config_hash


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Settings):
    """Search the learning rate of a training run, or of descent on a closed-form function.

    Any number of workers share a search: start the same command again, on other machines with
    the same `--storage`. A search that was interrupted goes on.

    Examples:
        >>> SearchConfig(function="sphere", low=1.0, high=0.1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        multitangent_lab._errors.ConfigError: `low` should be below `high`. Found 1.0 ...
    """

    gradient: GradientName = "projection"
    """The gradient; single: the forward gradient of one tangent."""
    num_tangents: int = 16
    """K, the number of tangents per step."""
    function: Literal["sphere", "rosenbrock", "styblinski-tang"] | None = None
    """Descend a closed-form function in place of training."""
    dimension: int = 64
    """Number of variables of the function."""
    low: float = 1e-6
    """The lowest learning rate."""
    high: float = 1.0
    """The highest learning rate."""
    trials: int = 40
    """Trials in all, those of other workers and of earlier calls included."""
    sampler: Literal["tpe", "gp", "random", "grid"] = "tpe"
    """How rates are chosen: tree-structured Parzen estimators, Gaussian processes, at random, or a
    logarithmic grid (for functions one vectorised run)."""
    storage: str | None = None
    """URL of Optuna's storage; by default an SQLite file in the run's folder."""
    seeds: Suppress[int] = 5
    """Seeds over which a function's value is averaged."""
    steps: Suppress[int | None] = None
    """Steps of descent on a function at most; by default the paper's."""
    tangents: Suppress[Literal["normal", "rademacher", "sphere", "orthogonal"]] = "normal"
    """How tangents are drawn."""
    perturb: Suppress[Literal["activations", "weights"]] = "activations"
    """What tangents are directions of."""
    optimizer: Suppress[str | None] = None
    """Any optimizer of torch.optim, by name; by default SGD for the paper's networks, else
    AdamW."""
    seed: Suppress[int] = 0
    """Seed of the initial weights, the order of the data, the tangents and the rates tried."""
    device: Suppress[Literal["auto", "cpu", "cuda"]] = "auto"
    """Where to compute; auto: on the GPU if there is one."""

    def __post_init__(self) -> None:
        own = ("dimension", "trials", "seeds", "steps")
        check_fields(self, AT_LEAST | dict.fromkeys(own, 1))
        if self.low >= self.high:
            raise ConfigError(
                f"`low` should be below `high`. Found {self.low} and {self.high}. Try --low 1e-6 "
                "--high 1."
            )
        if (
            self.function is not None
            and (self.gradient in WITH_GUESSES or self.gradient == "residual")
            and self.gradient != "previous"
        ):
            raise ConfigError(
                "`gradient` should be one without guesses for functions, or previous. Found "
                f"{self.gradient}. Try --gradient projection."
            )
        if self.function is not None and self.gradient == "mezo":
            raise ConfigError(
                "`gradient` should be one of derivatives for functions. Found mezo. Try --gradient "
                "single."
            )
        if self.function is not None and self.gradient == "previous" and self.num_tangents < 2:
            raise ConfigError(
                "`num_tangents` should be at least 2 for previous: the last gradient and others at "
                f"random. Found {self.num_tangents}. Try --num-tangents 4."
            )

    def resolved(self) -> SearchConfig:
        """Returns an equal configuration in which what is implied is filled in.

        Raises:
            ConfigError: The settings do not fit each other.
            DataError: The text can not be read.
        """
        folder = self.run_dir or Path("runs", f"search-{self.label}-{self.hash}")
        return replace(with_implied(self), run_dir=folder)

    @property
    def label(self) -> str:
        """What is searched, in short."""
        where = f"{self.function}-{self.dimension}" if self.function else self.data_name
        alone = self.gradient in ("backpropagation", "single", "mezo")
        tangents = "" if alone else f"-{self.num_tangents}"
        return f"{where}-{self.gradient}{tangents}"

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits, the same for the same search on every machine."""
        names = ["storage", "data_dir", "data_file", "device", "run_dir"]
        if self.sampler != "grid":  # other samplers go on where one has stopped
            names += ["trials", "sampler"]
        values = as_json(with_implied(self))
        return config_hash({name: v for name, v in values.items() if name not in names})

    def train_config(self, learning_rate: float, run_dir: Path | None) -> TrainConfig:
        """Returns the training run with a learning rate."""
        shared = {field.name: getattr(self, field.name) for field in fields(Settings)}
        own: dict[str, Any] = {"gradient": self.gradient, "learning_rate": learning_rate}
        return TrainConfig(**shared | own | {"run_dir": run_dir}).resolved()


@dataclass(frozen=True, kw_only=True)
class SuggestConfig:
    """Suggest the learning rate of a forward gradient from one that suits the true gradient.

    Examples:
        >>> SuggestConfig().aggregator
        'projection'
    """

    reference_rate: float = 0.1
    """A learning rate that suits the true gradient."""
    num_tangents: int = 16
    """K, the number of tangents per step."""
    dimension: int = 522
    """n, the number of perturbed values: of one sample's activations, or of all weights."""
    aggregator: Literal["sum", "mean", "projection"] = "projection"
    """How directional derivatives are combined."""
    headroom: float = 1.0
    """How many times the reference the true gradient's rate could be; inf: noise limits it."""

    def __post_init__(self) -> None:
        for name, value in (("num_tangents", self.num_tangents), ("dimension", self.dimension)):
            if value < 1:
                raise ConfigError(f"`{name}` should be at least 1. Found {value}. Try 16.")
        if not 0 < self.reference_rate < inf:
            raise ConfigError(
                "`reference_rate` should be positive and finite. Found "
                f"{self.reference_rate}. Try 0.1."
            )
        if not self.headroom >= 1:
            raise ConfigError(f"`headroom` should be at least 1. Found {self.headroom}. Try 1.")
