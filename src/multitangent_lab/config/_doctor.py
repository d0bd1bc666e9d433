"""Which model the doctor looks at, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from multitangent_lab._errors import ConfigError
from multitangent_lab.config._checks import check_fields


@dataclass(frozen=True)
class DoctorConfig:
    """Check if a model fits, where it does not, and what a step costs; exit code 1 if it fails.

    Examples:
        >>> DoctorConfig("resnet18").perturb
        'activations'
    """

    model: Positional[str] = "fc"
    """fc, resnet18, vit or gpt, on random data. Or package.module:factory, whose function returns a
    model, a batch of inputs and target, and a loss. Or a folder with a checkpoint of transformers,
    where config.json is enough."""
    data: str | None = None
    """package.module:factory of a data set, as for train. The function of the model then returns
    only the model."""
    perturb: Literal["activations", "weights"] = "activations"
    """What is perturbed."""
    num_tangents: int = 16
    """Tangents per step, K."""
    batch_size: int = 4
    """Samples in each run."""
    width: int = 256
    """Width of the hidden layers of fc."""
    context: int = 16
    """Tokens per sample, for models that take tokens."""
    fix: bool = False
    """Whether to first apply the safe remedies to the model in memory, and say which."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: on the GPU if there is one."""
    seed: int = 0
    """Seed of weights and random data."""

    def __post_init__(self) -> None:
        sizes = ("num_tangents", "batch_size", "width", "context")
        check_fields(self, dict.fromkeys(sizes, 1))
        if self.data is not None and ":" not in self.model:
            raise ConfigError(
                "`data` should go with a model of your own, package.module:factory. Found the "
                f"model {self.model!r}. Try it without --data."
            )


# The networks of the presets of train.
DOCTOR_PRESETS = {"paper": DoctorConfig(width=4096), "demo": DoctorConfig(width=64)}
