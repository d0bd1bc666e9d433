"""The options of a command: defaults < preset < file < flags."""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from tyro.conf import arg

from multitangent_lab.config import ConfigError

Config = TypeVar("Config")


@dataclass(frozen=True)
class Options(Generic[Config]):
    """A command's configuration, and what all commands have in common."""

    settings: Annotated[Config, arg(name="")]
    json: bool = False
    """Print one JSON object on standard output, and nothing else."""
    config: Path | None = None
    """TOML file with any of these settings; for train and compare also patience, share, output,
    gain, images, recalibrate, hidden_layers, simulated, differences, sites, discount, learn_every,
    tensorboard, until_loss and evaluate_every, for compare estimates, and context, embedding,
    blocks and heads of gpt."""
    preset: str | None = None
    """Named settings to start from: demo or paper, where the command has them, or a TOML file, such
    as the preset.toml of a search."""


def starting_point(
    defaults: Config, presets: Mapping[str, Config], arguments: Sequence[str]
) -> Config:
    """Returns the configuration that the flags among `arguments` are to change.

    Args:
        defaults: The configuration without preset and file.
        presets: Configurations by name.
        arguments: What follows the command's name.

    Raises:
        ConfigError: The preset is unknown, or the file is not one or has unknown settings.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--preset", nargs="?")
    scan.add_argument("--config", nargs="?", type=Path)
    flags, _ = scan.parse_known_args(arguments)
    if flags.preset is not None:
        if flags.preset.endswith(".toml"):
            defaults = replace(defaults, **_read(Path(flags.preset), defaults))  # type: ignore[type-var]
        elif flags.preset not in presets:
            raise _unknown("preset", flags.preset, presets)
        else:
            defaults = presets[flags.preset]
    return replace(defaults, **_read(flags.config, defaults)) if flags.config else defaults  # type: ignore[type-var]


def _read(path: Path, config: Any) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"`--config` should be a TOML file. Found '{path}': {error}.") from error
    names = [field.name for field in fields(config)]
    for name in values:
        if name not in names:
            raise _unknown(f"each setting in '{path}'", name, names)
    return values


def _unknown(what: str, value: str, choices: Mapping[str, Any] | Sequence[str]) -> ConfigError:
    names = sorted(choices)
    close = get_close_matches(value, names, n=1) or names
    hint = f"Try {close[0]!r}." if close else "Try without."
    known_names = ", ".join(names) or "none, as there are none"
    return ConfigError(f"`{what}` should be one of {known_names}. Found {value!r}. {hint}")
