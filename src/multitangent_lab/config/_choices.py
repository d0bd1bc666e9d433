"""Do the model and the data that a configuration names fit each other, and what do they imply?"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import TypeVar

from multitangent_lab._errors import ConfigError
from multitangent_lab._factories import source_hash
from multitangent_lab._hashes import digest
from multitangent_lab._texts import text_hash
from multitangent_lab.config._settings import Settings

_Settings = TypeVar("_Settings", bound=Settings)

PAPER = ("fc", "resnet18", "vit")
MODELS = (*PAPER, "gpt")
_OF_FC = {"width": "embedding", "hidden_layers": "blocks"}  # and what it is for gpt
_OF_GPT = ("embedding", "blocks", "heads")
_OF_TEXT = ("data_file", "level", "context", "credit")
_DEFAULTS = Settings()
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def with_implied(config: _Settings) -> _Settings:
    """Returns `config` with optimizer and checksums of text and code filled in.

    Raises:
        ConfigError: The model and the data do not fit each other, or there is no such module.
        DataError: The text can not be read.
    """
    _check(config)
    optimizer = "SGD" if config.model in PAPER else "AdamW"
    text = config.text_hash
    if text is None and config.dataset == "text":
        text = text_hash(config.data_file)
    return replace(
        config,
        optimizer=config.optimizer or optimizer,
        text_hash=text,
        code_hash=config.code_hash or _code_hash(config),
    )


def check_sources(config: Settings) -> None:
    """Raises unless text and code are those whose checksums `config` holds.

    Raises:
        ConfigError: They are not.
        DataError: The text can not be read.
    """
    found = {"code_hash": _code_hash(config)}
    if config.dataset == "text":
        found["text_hash"] = text_hash(config.data_file)
    what = {
        "code_hash": "your own model and data should be in the same files as when this",
        "text_hash": "`data_file` should hold the same text as when this",
    }
    for name, value in found.items():
        if value != getattr(config, name):
            raise ConfigError(
                f"{what[name]} configuration was written down, with {name} = "
                f"{getattr(config, name)!r}. Found {value!r}. Try what it was then, or a "
                f"configuration without `{name}` and another --run-dir."
            )


def _check(config: Settings) -> None:
    """Raises unless the settings of `config` concern the model and the data that it names."""
    if config.model not in MODELS and not _FACTORY.fullmatch(config.model):
        close = get_close_matches(config.model.lower(), MODELS, n=1)
        raise ConfigError(
            f"`model` should be one of {', '.join(MODELS)}, or package.module:factory for a model "
            f"of your own. Found {config.model!r}. Try {(close or MODELS)[0]!r}."
        )
    if config.data is not None:
        _check_own_data(config)
    elif config.dataset == "text" and config.model in PAPER:
        raise ConfigError(
            f"`model` should be one for tokens with a text. Found {config.model!r}. Try --model "
            "gpt, or package.module:factory."
        )
    elif config.dataset != "text" and config.model == "gpt":
        raise ConfigError(
            f"`dataset` should be text for gpt. Found {config.dataset!r}. Try --dataset text, with "
            "--data-file or without."
        )
    _check_settings(config)


def _check_settings(config: Settings) -> None:
    """Raises where a setting is not at its default that concerns another model or other data."""
    changed = {
        field.name: getattr(config, field.name)
        for field in fields(_DEFAULTS)
        if getattr(config, field.name) != getattr(_DEFAULTS, field.name)
    }
    for name, instead in _OF_FC.items():
        if name in changed and config.model not in PAPER:
            hint = f"Try `{instead}`." if config.model == "gpt" else "Try without."
            raise _not_for(name, "the model fc", changed[name], hint)
    for name in _OF_GPT:
        if name in changed and config.model != "gpt":
            raise _not_for(name, "the model gpt", changed[name])
    for name in _OF_TEXT:
        if name in changed and config.dataset != "text":
            raise _not_for(name, "--dataset text", changed[name])
    _check_credit(config)
    if config.embedding % config.heads:
        raise ConfigError(
            "`heads` should divide `embedding`, which they share. Found "
            f"{config.heads} and {config.embedding}. Try heads=4."
        )


def _check_credit(config: Settings) -> None:
    if config.credit == "sample" and config.discount != _DEFAULTS.discount:
        raise _not_for("discount", "--credit token", config.discount)
    if config.credit == "token" and config.perturb == "weights":
        raise ConfigError(
            "`credit` should be sample for weights: a weight acts at all positions, so every "
            "token's loss depends on it. Found token. Try --perturb activations."
        )
    if config.discount > 1:
        raise ConfigError(
            f"`discount` should be at most 1. Found {config.discount}. Try the default, 1.0."
        )


def _not_for(name: str, what: str, found: object, hint: str = "Try without.") -> ConfigError:
    return ConfigError(f"`{name}` should be set for {what} only. Found {found!s}. {hint}")


def _check_own_data(config: Settings) -> None:
    if not _FACTORY.fullmatch(config.data or ""):
        raise ConfigError(
            f"`data` should be package.module:factory. Found {config.data!r}. Try --dataset for "
            "the data sets that come with the laboratory."
        )
    if config.dataset != _DEFAULTS.dataset:
        raise ConfigError(
            f"`dataset` should be left out with --data. Found both, {config.dataset} and "
            f"{config.data}. Try one of them."
        )
    if ":" not in config.model:
        raise ConfigError(
            f"`model` should be one of your own with data of your own. Found {config.model!r}. Try "
            "--model package.module:factory; the factory may call multitangent_lab.models."
        )


def _code_hash(config: Settings) -> str | None:
    """Twelve digits that stand for the files of the user's own factories, if there are any."""
    references = {"model": config.model, "data": config.data}
    sources = {
        option: source_hash(option, reference)
        for option, reference in references.items()
        if reference is not None and ":" in reference
    }
    return digest(sources) if sources else None
