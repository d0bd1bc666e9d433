"""What to run, as plain values: importing this loads neither torch nor lightning.

Fields marked `Suppress` are no options of the command line, for the sake of a short `--help`;
they are set in Python or in a `--config` file.
"""

from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Suppress

from multitangent_lab._errors import ConfigError
from multitangent_lab._hashes import digest, without_defaults
from multitangent_lab.config._choices import PAPER, with_implied
from multitangent_lab.config._gradient_names import WITH_GUESSES, ChosenName
from multitangent_lab.config._learning_rates import default_learning_rate
from multitangent_lab.config._settings import RunSettings, Settings

_NUM_TANGENTS, _NUM_TANGENTS_WITH_GUESSES, _NUM_TANGENTS_OF_DIRECT = 16, 8, 5
_GPT_RATE = 0.0015  # of AdamW
# The gradients nearest to backpropagation, see docs/guesses.md; other models have informed.
_RECIPES: dict[str, dict[str, Any]] = {
    "fc": {"gradient": "direct"},
    "resnet18": {"gradient": "feedback", "num_tangents": 3, "sites": ("stage2", "head")},
    "vit": {"gradient": "residual"},
    "gpt": {"gradient": "residual"},
}
_PERIOD_OF_FC = 32  # nearly as accurate as learning in every step, see docs/guesses.md


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunSettings):
    """Train one model with one gradient.

    Examples:
        >>> TrainConfig(dataset="mnist", gradient="projection").resolved().learning_rate
        0.04232
        >>> TrainConfig(epochs=0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        multitangent_lab._errors.ConfigError: `epochs` should be at least 1. Found 0. ...
    """

    gradient: ChosenName = "auto"
    """The gradient; single: the forward gradient of one tangent; informed, feedback, local,
    previous: some of the K tangents are guesses, and one is the value itself; direct: one of the K
    tangents is a guess, used as it is in the steps that do not learn; residual: the error at the
    last site is the guess for all of its shape, as it is; mezo: finite differences along one
    tangent of the weights; auto: direct for fc, residual for vit and gpt, feedback of two sites for
    resnet18, informed for other models."""
    learning_rate: float | Literal["auto"] | None = None
    """By default one that is known to suit, and for optimizers other than SGD that of torch; auto:
    set by the curvature along the steps."""
    resume: bool = False
    """Continue a run that was interrupted, or one that is to have more epochs."""
    tensorboard: Suppress[bool] = False
    """Write TensorBoard's event files too."""

    def resolved(self) -> "TrainConfig":
        """Returns an equal configuration in which what is implied is filled in.

        That is the optimizer, the learning rate for SGD and for gpt, the folder, the checksums of
        text and code, and the values that do not matter to `gradient`, so that equal runs have
        equal configurations.

        Raises:
            ConfigError: The settings do not fit each other.
            DataError: The text can not be read.
        """
        config = with_implied(self)._suited
        informed = config.gradient in WITH_GUESSES
        if config.gradient in ("single", "mezo", "residual"):
            config = replace(config, num_tangents=1)
        elif config.num_tangents is None or config.gradient == "backpropagation":
            config = replace(config, num_tangents=config._usual_num_tangents)
        if config.gradient == "backpropagation":
            if config.learning_rate == "auto":
                raise ConfigError(
                    "`learning_rate` should be a number for backpropagation: 'auto' asks for a "
                    "forward gradient. Found 'auto'. Try another --gradient."
                )
            names = ("tangents", "perturb", "sites", "share", "output", "gain")
            config = replace(config, **{name: getattr(_DEFAULTS, name) for name in names})
        if config.gradient in ("backpropagation", "mezo"):
            config = replace(config, simulated=False)
        if config.gradient in ("backpropagation", "mezo", "residual"):
            config = replace(config, differences=False)
        if config.gradient in ("backpropagation", "mezo", "residual"):  # no activations measured
            config = replace(config, credit=_DEFAULTS.credit, discount=_DEFAULTS.discount)
        if config.gradient == "mezo":
            config = replace(
                config,
                perturb="weights",
                tangents="normal",
                sites=None,
                share=None,
                output=None,
            )
        if config.gradient == "residual":
            config._check_residual()
            config = replace(config, tangents="normal", share=None, output="exact")
        if config.tangents == "low-rank" and config.perturb != "weights":
            raise ConfigError(
                "`tangents` should be of full rank for activations, which are no matrices. Found "
                "low-rank. Try --perturb weights, or normal."
            )
        if config.simulated and config.differences:
            raise ConfigError(
                "`differences` should be left out where derivatives are simulated. Found both. Try "
                "one of them."
            )
        if config.sites is not None and config.perturb == "weights":
            raise ConfigError(
                "`sites` should be left out where weights are perturbed: sites belong to "
                f"activations. Found {list(config.sites)}. Try --perturb activations."
            )
        if informed:
            config._check_guesses()
        config = replace(
            config,
            share=config.share or ("sample" if informed else "batch"),
            output=config.output or ("exact" if informed else "perturbed"),
            gain=config.gain if informed else _DEFAULTS.gain,
            learn_every=config._period if informed else 1,
            recalibrate=config.recalibrate or informed,
        )
        assert config.num_tangents is not None
        if config.learning_rate is None:
            config = replace(config, learning_rate=config._known_rate())
        if config.run_dir is None:
            same = replace(config, epochs=_DEFAULTS.epochs)  # continued, a run has more of them
            name = f"{config.data_name}-{config.label}-{same.hash}"
            config = replace(config, run_dir=Path("runs", name))
        return config

    @property
    def _suited(self) -> "TrainConfig":
        """The same with the gradient that suits the model and the settings, if none is named."""
        if self.gradient != "auto":
            return self
        chosen = self.num_tangents, self.sites, self.output
        is_plain = (self.perturb, self.credit) == ("activations", "sample")
        is_open = is_plain and chosen == (None, None, None)
        recipe = _RECIPES.get(self.model) if is_open else None
        return replace(self, **(recipe or {"gradient": "informed"}))

    @property
    def _usual_num_tangents(self) -> int:
        if self.gradient == "direct":
            return _NUM_TANGENTS_OF_DIRECT
        return _NUM_TANGENTS_WITH_GUESSES if self.gradient in WITH_GUESSES else _NUM_TANGENTS

    @property
    def _period(self) -> int:
        """The number of steps from one in which guesses learn to the next, in the end."""
        return self.learn_every or (_PERIOD_OF_FC if self.model == "fc" else 1)

    def _known_rate(self) -> float | None:
        """A learning rate that is known to suit, or none for torch's own."""
        if self.model == "gpt" and self.optimizer == "AdamW":
            return _GPT_RATE
        if self.optimizer != "SGD":
            return None
        if self.model not in PAPER:
            raise ConfigError(
                f"`learning_rate` should be given for SGD and the model {self.model}: none is "
                "known. Found none. Try --learning-rate 0.1, or the default optimizer, AdamW."
            )
        assert self.num_tangents is not None
        assert self.gradient != "auto"
        return default_learning_rate(
            self.dataset, self.gradient, self.num_tangents, self.model, self.width
        )

    def _check_guesses(self) -> None:
        needed = WITH_GUESSES[self.gradient]
        if self.num_tangents is not None and self.num_tangents < needed:
            raise ConfigError(
                f"`num_tangents` should be at least {needed} for the gradient {self.gradient}: "
                f"guesses and others at random. Found {self.num_tangents}. Try "
                f"--num-tangents {self._usual_num_tangents}, or projection in its place."
            )
        if self.gradient in ("feedback", "direct") and self.dataset == "text":
            raise ConfigError(
                f"`gradient` should not be {self.gradient} for a text: it would learn a matrix "
                f"from every output of every token to every activation. Found {self.gradient}. Try "
                "residual, informed or projection in its place."
            )
        if self.gain != "auto" and self.gain > 1:
            raise ConfigError(
                f"`gain` should be 'auto' or at most 1. Found {self.gain}. Try the default, 'auto'."
            )
        if self.perturb == "weights" and self.gradient != "previous":
            raise ConfigError(
                f"`perturb` should be activations for the gradient {self.gradient}, whose guesses "
                "are of activations. Found weights. Try previous or projection in its place."
            )

    def _check_residual(self) -> None:
        if self.perturb == "weights" or self.output == "perturbed":
            found = "weights" if self.perturb == "weights" else "a perturbed output"
            raise ConfigError(
                "`perturb` should be activations for the gradient residual, and the output exact: "
                f"its guess is the gradient at the last site. Found {found}. Try previous in its "
                "place, or leave both out."
            )

    @property
    def label(self) -> str:
        """The gradient's name, and the number of tangents if that is for the user to choose."""
        alone = self.gradient in ("backpropagation", "single", "residual", "mezo")
        return self.gradient if alone else f"{self.gradient}-{self.num_tangents}"

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the numbers that come out, as JSON values."""
        return {name: value for name, value in as_json(self).items() if name not in _PLACES}

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits, the same for the same `identity` on every machine."""
        return config_hash(self.identity)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(RunSettings):
    """Train the same model with several gradients and draw them together.

    Examples:
        >>> [run.label for run in CompareConfig(width=64).runs()]
        ['backpropagation', 'single', 'mean-16', 'projection-16', 'direct-5']
    """

    gradients: tuple[ChosenName, ...] = (
        "backpropagation",
        "single",
        "mean",
        "projection",
        "auto",
    )
    """The gradients to compare."""
    credit: Suppress[Literal["sample", "token"]] = "sample"
    """As for a run; only in a `--config` file here, to keep `--help` short."""
    until_loss: float | None = None
    """Train every gradient until its validation loss is at most this, at most for --epochs."""
    evaluate_every: int | None = None
    """Steps between two validations, in addition to one at the end of every epoch. The time of
    training does not include validations."""
    estimates: Suppress[int] = 8
    """The number of estimates of one batch to average once an epoch, to tell a bias from noise;
    with 1 there is no mean."""
    until_backpropagation: bool = False
    """Train backpropagation first, and every other gradient until its validation loss is at most
    the lowest that backpropagation reached."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.until_backpropagation and self.until_loss is not None:
            raise ConfigError(
                "`until_backpropagation` should be left out with until_loss, which is another loss "
                f"to reach. Found both, and {self.until_loss}. Try one of them."
            )
        if self.until_backpropagation and "backpropagation" not in self.gradients:
            raise ConfigError(
                "`gradients` should have backpropagation among them for until_backpropagation. "
                f"Found {', '.join(self.gradients)}. Try --until-loss, or add it."
            )

    def resolved(self) -> "CompareConfig":
        """Returns an equal configuration in which the folder is filled in."""
        if self.run_dir is not None:
            return self
        hashes = [run.hash for run in self.runs()]
        if self.until_backpropagation:
            hashes.append("until-backpropagation")
        digits = sha256("".join(hashes).encode()).hexdigest()[:12]
        return replace(self, run_dir=Path("runs", f"compare-{self.data_name}-{digits}"))

    def runs(self) -> tuple[TrainConfig, ...]:
        """Returns the runs, each to be continued if it was begun before.

        With `until_backpropagation` the loss to reach is a setting of the other runs. It is known
        once backpropagation has run.
        """
        shared = {field.name: getattr(self, field.name) for field in fields(RunSettings)}
        runs = (TrainConfig(**shared, gradient=name, resume=True) for name in self.gradients)
        return tuple(
            replace(run, run_dir=self.run_dir and self.run_dir / run.resolved().label).resolved()
            for run in runs
        )


def config_hash(values: dict[str, Any]) -> str:
    """Returns twelve hexadecimal digits that stand for settings by name.

    Those of the first version count always, later ones where they are not at their default.
    """
    if values.get("learn_every") == 1:  # as for all runs before this setting existed
        values = values | {"learn_every": None}
    return digest(without_defaults(values, {name: getattr(_DEFAULTS, name) for name in _LATER}))


def as_json(config: Settings) -> dict[str, Any]:
    """Returns the fields of `config` as values that JSON and TOML have, except for None."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {n: str(value) if isinstance(value, Path) else value for n, value in values.items()}


_DEFAULTS = RunSettings()
_LATER = (
    "gain", "hidden_layers", "images", "recalibrate", "data", "level", "context", "embedding",
    "blocks", "heads", "text_hash", "code_hash", "until_loss", "evaluate_every", "credit",
    "discount", "sites", "learn_every", "differences",
)  # fmt: skip
_PLACES = ("data_dir", "data_file", "device", "run_dir", "resume", "tensorboard")
