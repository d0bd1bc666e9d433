"""The folder of a run: is it new, begun, finished, or another run's?"""

import json
import platform
import tomllib
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import tomli_w

from multitangent_lab._errors import ConfigError
from multitangent_lab._files import write_text
from multitangent_lab.config import TrainConfig, as_json


def is_finished(config: TrainConfig, folder: Path) -> bool:
    """Returns whether `folder` holds the result of the run `config`, resolved.

    Raises:
        ConfigError: The folder holds another run, or this one, begun, and `resume` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`run_dir` should be a folder. Found the file '{folder}'. Try another.")
    if not (folder / "config.toml").exists():
        return False
    values = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    stored = TrainConfig(**values).resolved()  # defaults that do not matter to it may have changed
    if stored.identity == config.identity and (folder / "result.json").exists():
        return True
    _check_same_run(config, stored, folder)
    return False


def begin(config: TrainConfig, folder: Path) -> None:
    """Writes down what is run, and with what."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # of fewer epochs
    write_text(folder / "config.toml", to_toml(config))
    write_text(folder / "versions.json", json.dumps(_versions(), indent=2) + "\n")


def checkpoint(folder: Path, name: str) -> Path:
    """Returns the file of a checkpoint, `best` or `last`, which need not be there.

    Raises:
        ConfigError: It is there, and not whole.
    """
    path = folder / "checkpoints" / f"{name}.ckpt"
    if path.exists() and not zipfile.is_zipfile(path):
        raise ConfigError(
            f"`run_dir` should hold whole checkpoints. Found '{path}', which is cut off or "
            f"damaged. Try to delete the folder '{path.parent}' to begin anew, or another "
            "--run-dir."
        )
    return path


def _check_same_run(config: TrainConfig, stored: TrainConfig, folder: Path) -> None:
    """Raises unless `config` continues `stored`, for as many epochs or more."""
    other = {
        name: value
        for name, value in config.identity.items()
        if value != stored.identity[name]
        and not (name == "epochs" and config.epochs > stored.epochs)
    }
    if other:
        was = ", ".join(
            f"{name} = {stored.identity[name]!r} (now {other[name]!r})" for name in other
        )
        raise ConfigError(
            f"`run_dir` should hold this run or nothing. Found a run in '{folder}' with {was}. "
            "Try another --run-dir."
        )
    if not config.resume:
        raise ConfigError(
            f"`run_dir` should be new. Found this run, begun before, in '{folder}'. "
            "Try --resume to continue it, or another --run-dir."
        )


def to_toml(config: TrainConfig, without: Sequence[str] = ()) -> str:
    """Returns `config` as a TOML file; `resume` concerns one call only and is left out.

    Examples:
        >>> print(to_toml(TrainConfig(width=64).resolved()).splitlines()[2])
        width = 64
    """
    values = {
        name: value for name, value in as_json(config).items() if name not in ("resume", *without)
    }
    return tomli_w.dumps({name: value for name, value in values.items() if value is not None})


def _versions() -> dict[str, str]:
    packages = ("multitangent", "torch", "lightning")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
